package oauthprovider_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"tokenbroker/broker"
	"tokenbroker/broker/oauthprovider"
)

// A world is a provider and our client of it in a synctest bubble: connections
// are pipes, and time passes only while all wait.
type world struct {
	*oauthprovider.Provider
	t     *testing.T
	conns chan net.Conn
	ended chan struct{}

	mu    sync.Mutex // guards what follows
	down  bool       // connections are refused
	spoil func(sent, http.ResponseWriter, *http.Request) bool
	sent  []sent
	users map[string]string // refresh and access tokens → whose
	n     int
}

// A sent is a request that the provider got.
type sent struct {
	at   time.Time
	kind string // refresh_token, authorization_code, token-exchange, revoke, introspect, userinfo or GET
	who  string
}

// inWorld runs f in a bubble.
func inWorld(t *testing.T, f func(t *testing.T, w *world), change ...func(*oauthprovider.Config)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t, conns: make(chan net.Conn), ended: make(chan struct{}), users: make(map[string]string)}
		cfg := oauthprovider.Config{
			Name: "lab", Profile: "keycloak", Issuer: "http://127.0.0.1:1", ClientID: "hub", ClientSecret: broker.NewSecret("s"), Roles: []string{"roles"},
			Endpoints: oauthprovider.Endpoints{
				Token: "http://127.0.0.1:1/token", Revocation: "http://127.0.0.1:1/revoke",
				Introspection: "http://127.0.0.1:1/introspect", Userinfo: "http://127.0.0.1:1/userinfo",
			},
		}
		for _, c := range change {
			c(&cfg)
		}
		var err error
		if w.Provider, err = oauthprovider.New(cfg); err != nil {
			t.Fatal(err)
		}
		w.Dial(w.dial)
		server := http.Server{Handler: w}
		served := make(chan error, 1)
		go func() { served <- server.Serve(w) }()
		defer func() {
			server.Close()
			<-served
			synctest.Wait()
		}()
		f(t, w)
	})
}

func (w *world) dial(ctx context.Context, network, _ string) (net.Conn, error) {
	w.mu.Lock()
	down := w.down
	w.mu.Unlock()
	refused := &net.OpError{Op: "dial", Net: network, Err: syscall.ECONNREFUSED}
	if down {
		return nil, refused
	}
	ours, theirs := net.Pipe()
	select {
	case w.conns <- theirs:
		return ours, nil
	case <-w.ended:
		return nil, refused
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Accept, Close and Addr make w a net.Listener.
func (w *world) Accept() (net.Conn, error) {
	select {
	case c := <-w.conns:
		return c, nil
	case <-w.ended:
		return nil, net.ErrClosed
	}
}

func (w *world) Close() error {
	select {
	case <-w.ended:
	default:
		close(w.ended)
	}
	return nil
}

func (w *world) Addr() net.Addr { return &net.UnixAddr{Name: "pipes"} }

// ServeHTTP is a provider that gives a new refresh token each time and forgives
// the use of an old one. A login's code is the user's name.
func (w *world) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	s := sent{at: time.Now(), kind: r.Method}
	if r.Method == http.MethodPost {
		r.ParseForm()
		s.kind = r.Form.Get("grant_type")
		s.kind = s.kind[strings.LastIndex(s.kind, ":")+1:]
	}
	if r.URL.Path != "/token" {
		s.kind = r.URL.Path[1:]
	}
	carried := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
	if r.Method == http.MethodPost {
		carried = r.Form.Get("refresh_token") + r.Form.Get("subject_token") + r.Form.Get("token")
	}
	w.mu.Lock()
	s.who = w.users[carried]
	if s.kind == "authorization_code" {
		s.who = r.Form.Get("code")
	}
	w.sent = append(w.sent, s)
	spoil := w.spoil
	w.mu.Unlock()
	if spoil == nil || !spoil(s, rw, r) {
		w.answer(s, rw, r)
	}
}

func (w *world) answer(s sent, rw http.ResponseWriter, r *http.Request) {
	switch {
	case r.Method == http.MethodGet && s.kind != "userinfo":
		rw.WriteHeader(http.StatusMethodNotAllowed)
	case s.kind == "userinfo":
		fmt.Fprintf(rw, `{"sub":%q,"preferred_username":%q}`, s.who, s.who)
	case s.kind == "introspect":
		fmt.Fprintf(rw, `{"active":true,"typ":"Refresh","sub":%q,"roles":["researcher"]}`, s.who)
	case s.kind == "revoke":
	case s.who == "":
		rw.WriteHeader(http.StatusBadRequest)
		io.WriteString(rw, grant("Invalid refresh token"))
	default:
		a := map[string]any{"access_token": w.token(s.who, r.Form.Get("audience"), r.Form.Get("scope")), "token_type": "Bearer", "expires_in": 300}
		if s.kind != "token-exchange" {
			a["refresh_token"] = w.issue(s.who)
		}
		json.NewEncoder(rw).Encode(a)
	}
}

// issue makes a refresh token.
func (w *world) issue(who string) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.n++
	token := fmt.Sprintf("rt-%d.", w.n)
	w.users[token] = who
	return token
}

// token makes an access token. Nobody checks its signature.
func (w *world) token(who, audience, scope string) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.n++
	c, _ := json.Marshal(map[string]any{
		"iss": "http://127.0.0.1:1", "azp": "hub", "sub": who, "aud": audience, "scope": scope, "roles": []string{"researcher"}, "jti": w.n,
		"iat": time.Now().Unix(), "exp": time.Now().Add(5 * time.Minute).Unix(),
	})
	token := "e30." + base64.RawURLEncoding.EncodeToString(c) + ".c2ln"
	w.users[token] = who
	return token
}

// trouble changes how the provider answers: f reports whether it has answered.
// nil: as it should.
func (w *world) trouble(f func(s sent, rw http.ResponseWriter, r *http.Request) bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.spoil = f
}

// status makes the provider answer all token requests with a page of HTML.
func (w *world) status(status int, header ...string) {
	w.trouble(func(s sent, rw http.ResponseWriter, _ *http.Request) bool {
		for i := 0; i < len(header); i += 2 {
			rw.Header().Set(header[i], header[i+1])
		}
		rw.WriteHeader(status)
		io.WriteString(rw, "<html>")
		return true
	})
}

// refuse has the provider's machine refuse connections.
func (w *world) refuse(down bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.down = down
}

// requests are those that the provider got, of some kinds or of all.
func (w *world) requests(kinds ...string) (all []sent) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, s := range w.sent {
		if len(kinds) == 0 || slices.Contains(kinds, s.kind) {
			all = append(all, s)
		}
	}
	return all
}

// refresh refreshes who's session.
func (w *world) refresh(who string) error {
	_, _, err := w.Refresh(context.Background(), broker.NewSecret(w.issue(who)), who, nil)
	return err
}

// login logs who in.
func (w *world) login(who string) error {
	_, _, err := w.Login(context.Background(), broker.CodeGrant{Code: broker.NewSecret(who), Verifier: broker.NewSecret("v")})
	return err
}

// mostInASecond is how many requests came within any second, give or take what a
// limiter loses that counts in floating point.
func mostInASecond(all []sent) (most int) {
	for i := range all {
		n := 0
		for _, s := range all[i:] {
			if s.at.Sub(all[i].at) < time.Second-time.Millisecond {
				n++
			}
		}
		most = max(most, n)
	}
	return most
}
