// Package httpserver offers the broker as JSON over HTTP/1.1, to containers
// and hubs, and is the hub's OAuth 2.0 token endpoint. It decides nothing: it
// turns requests into the domain's words and back, and errors into statuses.
//
//	a server's socket   GET  /v1/token, /v1/token/{provider}, /v1/providers
//	                    GET  /v1/watch, /v1/watch/{provider}: server-sent events
//	a hub's socket      POST /v1/claim, /v1/check-session, /v1/register, /v1/unregister,
//	                    /v1/set-groups, /v1/set-shared, /v1/logout
//	                    POST /oauth2/token/{provider}
//	a TCP listener      POST /oauth2/token/{provider}, for a hub without our Python half
//	another one         POST /backchannel-logout/{provider}, for the providers
//
// Package grpcserver offers the same over gRPC; the fields are named and
// described in proto/tokenbroker/v1.
package httpserver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"tokenbroker/broker"
)

// NewWorkload serves containers, on the servers' sockets.
func NewWorkload(b *broker.Broker, log *slog.Logger) *http.Server {
	e := edge{b: b, log: log, serves: func(p *broker.Peer) bool { return p.Server != broker.ServerKey{} }}
	mux := e.mux([]route{
		{"/v1/token", http.MethodGet, "token", e.token},
		{"/v1/token/{provider}", http.MethodGet, "token", e.token},
		{"/v1/providers", http.MethodGet, "providers", e.providers},
	})
	mux.HandleFunc("/v1/watch", e.watch)
	mux.HandleFunc("/v1/watch/{provider}", e.watch)
	return e.server(mux)
}

// NewHub serves a hub, on its socket.
func NewHub(b *broker.Broker, log *slog.Logger) *http.Server {
	e := edge{b: b, log: log, serves: func(p *broker.Peer) bool { return p.Hub != "" }}
	mux := e.mux([]route{
		{"/v1/claim", http.MethodPost, "claim", e.claim},
		{"/v1/check-session", http.MethodPost, "session", e.checkSession},
		{"/v1/register", http.MethodPost, "register", e.register},
		{"/v1/unregister", http.MethodPost, "unregister", e.unregister},
		{"/v1/set-groups", http.MethodPost, "groups", e.setGroups},
		{"/v1/set-shared", http.MethodPost, "shared", e.setShared},
		{"/v1/logout", http.MethodPost, "logout", e.logout},
	})
	mux.Handle(tokenPath, tokenEndpoint{e, hubOfSocket})
	return e.server(mux)
}

// An edge answers the requests of one audience.
type edge struct {
	b      *broker.Broker
	log    *slog.Logger
	serves func(*broker.Peer) bool // keeps a service off another one's sockets; nil: not on a socket
	hosts  Hosts                   // without a socket
}

// A route is one thing that can be asked for. action is its name in the audit,
// the same as over gRPC. What is posted is JSON.
type route struct {
	path, method, action string
	call                 func(r *http.Request, p *broker.Peer, body []byte) (answer any, err error)
}

func (e edge) server(h http.Handler) *http.Server {
	return &http.Server{
		Handler: h,
		// No ReadTimeout: it would end requests that wait for a provider. Bodies
		// have a deadline of their own.
		ReadHeaderTimeout:            5 * time.Second,
		WriteTimeout:                 2 * time.Minute,
		IdleTimeout:                  5 * time.Minute,
		MaxHeaderBytes:               12 << 10, // net/http adds 4 KiB
		DisableGeneralOptionsHandler: true,
		ConnContext:                  withConnection(maxAge),
		ErrorLog:                     slog.NewLogLogger(e.log.Handler(), slog.LevelDebug),
	}
}

func (e edge) mux(routes []route) *http.ServeMux {
	mux := http.NewServeMux()
	for _, r := range routes {
		mux.Handle(r.path, e.answer(r))
	}
	mux.Handle("/", e.answer(route{action: "request", call: func(*http.Request, *broker.Peer, []byte) (any, error) {
		return nil, refusal(http.StatusNotFound, "there is nothing at this path")
	}}))
	return mux
}

// answer serves a route and turns whatever goes wrong into an answer that may
// be told.
func (e edge) answer(rt route) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		p := peerOf(r.Context())
		defer e.survive(w, r, p, rt.action)
		body, end, err := e.receive(w, r, rt.method, "application/json")
		if err != nil {
			e.fail(w, r, p, rt.action, err)
			return
		}
		defer end()
		answer, err := rt.call(r, p, body)
		if err != nil {
			e.fail(w, r, p, rt.action, err)
			return
		}
		writeJSON(w, http.StatusOK, "application/json", answer)
	}
}

// survive answers a call that panicked. It is deferred.
func (e edge) survive(w http.ResponseWriter, r *http.Request, p *broker.Peer, action string) {
	if v := recover(); v != nil {
		e.fail(w, r, p, action, e.crashed(action, v))
	}
}

// receive counts a request in, refuses those that are not for us before anything
// of them is used, and reads the body of the others. An empty method allows all.
// end counts the request out; with an error there is nothing to end.
func (e edge) receive(w http.ResponseWriter, r *http.Request, method, contentType string) (body []byte, end func(), err error) {
	if r.ContentLength != 0 { // whoever announces a body must send it
		http.NewResponseController(w).SetReadDeadline(time.Now().Add(bodyTimeout))
	}
	if end, err = e.begin(w, r); err != nil {
		return nil, nil, err
	}
	err = e.mayAsk(w, r, method)
	if err == nil && method == http.MethodPost {
		body, err = readBody(w, r, contentType)
	}
	if err != nil {
		end()
	}
	return body, end, err
}

// begin counts a request in and sees to it that no connection is for ever: a
// caller's credentials are those of its connect.
func (e edge) begin(w http.ResponseWriter, r *http.Request) (end func(), err error) {
	if e.serves == nil {
		return func() {}, nil
	}
	c := connectionOf(r.Context())
	if c == nil || !e.serves(c.Peer()) {
		return nil, broker.Errorf(broker.UnknownPeer, "this socket serves others")
	}
	if time.Now().After(c.until) {
		w.Header().Set("Connection", "close")
	}
	return c.Begin()
}

// mayAsk says why a request is not for us.
func (e edge) mayAsk(w http.ResponseWriter, r *http.Request, method string) error {
	// Nobody but a browser sends an Origin, and a page must not reach us through
	// a proxy that somebody put before the socket.
	if r.Header.Get("Origin") != "" {
		return refusal(http.StatusBadRequest, "requests of browsers (header Origin) are not served")
	}
	switch host := hostname(r.Host); {
	case e.serves != nil && host != "" && host != "localhost":
		return refusal(http.StatusBadRequest, "the header Host must be localhost")
	case e.serves == nil && !e.hosts.has(host):
		return refusal(http.StatusBadRequest, "this listener has another name than the header Host says; if it is one of the token broker's, "+
			"add it to the listener's hosts in the broker's configuration")
	}
	if method != "" && r.Method != method {
		w.Header().Set("Allow", method)
		return refusal(http.StatusMethodNotAllowed, "this path serves %s only", method)
	}
	return nil
}

// hostname is the name in a header Host: without the port, in lower case.
func hostname(host string) string {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]") // of an IPv6 address
	return strings.ToLower(strings.TrimSuffix(host, "."))
}

// crashed logs a panic. Only what the runtime says is put into words: another
// value could hold anything.
func (e edge) crashed(action string, v any) error {
	err := fmt.Errorf("panic with a %T", v)
	if r, ok := v.(runtime.Error); ok {
		err = fmt.Errorf("panic: %w", r)
	}
	e.log.Error("a call crashed", "action", action, "err", err, "stack", string(debug.Stack()))
	return err
}

// told returns what may be told of err. What the domain answered is recorded
// already; what it never saw is recorded here.
func (e edge) told(r *http.Request, p *broker.Peer, action string, err error) *broker.Error {
	var told *broker.Error
	switch {
	case errors.As(err, &told) && told.Ref != "":
		return told
	case told == nil && r.Context().Err() != nil: // nobody listens any more
		return broker.Errorf(broker.Unavailable, "the caller left")
	}
	if e.serves == nil { // there is no peer to name
		err = fmt.Errorf("%w (from %s)", err, r.RemoteAddr)
	}
	return e.b.Refuse(p, action, err)
}

// maxAge is how long a connection is used for new requests, the same as over gRPC.
// Tests shorten it for the servers they make.
var maxAge = 10 * time.Minute

// A caller is a connection that knows its Peer and counts the requests that come
// in over it.
type caller interface {
	Peer() *broker.Peer
	Begin() (end func(), err error)
}

// A connection is what its requests need to know of it.
type connection struct {
	caller
	until time.Time // the last request may come in over it
}

type connectionKey struct{}

// withConnection puts a connection into the context of its requests.
func withConnection(age time.Duration) func(context.Context, net.Conn) context.Context {
	return func(ctx context.Context, c net.Conn) context.Context {
		known, ok := c.(caller)
		if !ok {
			return ctx
		}
		return context.WithValue(ctx, connectionKey{}, &connection{known, time.Now().Add(age)})
	}
}

// connectionOf returns what a request came in over, or nil if that is not known.
func connectionOf(ctx context.Context) *connection {
	c, _ := ctx.Value(connectionKey{}).(*connection)
	return c
}

// peerOf returns who makes a request, or nil if that is not known.
func peerOf(ctx context.Context) *broker.Peer {
	if c := connectionOf(ctx); c != nil {
		return c.Peer()
	}
	return nil
}
