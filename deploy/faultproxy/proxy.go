package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httputil"
	"net/url"
	"path"
	"strings"
	"sync"
	"time"
)

// A call is one request that a client made of the provider.
type call struct {
	// Kind is "token/" and the grant type at the token endpoint, elsewhere the
	// last part of the path: "userinfo", "introspect", "auth".
	Kind string `json:"kind"`
	// User is the preferred_username of the refresh token's owner; empty if the
	// call carries none, or one whose owner has not been seen.
	User string `json:"user,omitempty"`
	// Status is what the client was answered; 0: not yet, or nothing; clientGone.
	Status int `json:"status"`
}

// clientGone is the status of a call whose client left during a delay. The
// provider never heard of it.
const clientGone = 499

// A proxy forwards to one provider, counts, remembers and makes trouble.
type proxy struct {
	forward *httputil.ReverseProxy

	mu     sync.Mutex // guards the rest
	calls  []*call
	faults []*fault
	tokens map[string]string // refresh token → subject
	users  map[string]string // subject → preferred_username
}

func newProxy(to *url.URL) *proxy {
	p := &proxy{tokens: map[string]string{}, users: map[string]string{}}
	p.forward = &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(to)
			r.Out.Host = r.In.Host
			// An answer we can read: the transport unpacks what it asked for itself.
			r.Out.Header.Del("Accept-Encoding")
		},
		ModifyResponse: p.learn,
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) {
			w.WriteHeader(http.StatusBadGateway)
		},
	}
	return p
}

// ServeHTTP counts the call, then does what the first fault that matches it
// says, else what the provider says.
func (p *proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	form, err := peekForm(r)
	if err != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	c, f := p.enter(r, form)
	if f != nil && !f.wait(r.Context()) {
		p.leave(c, clientGone)
		panic(http.ErrAbortHandler)
	}
	answer := &statusWriter{ResponseWriter: w}
	switch {
	case f != nil && f.Drop:
		panic(http.ErrAbortHandler)
	case f != nil && f.Lose:
		p.forward.ServeHTTP(&discard{header: http.Header{}}, r.WithContext(context.WithoutCancel(r.Context())))
		panic(http.ErrAbortHandler)
	case f != nil && f.Status != 0:
		w.Header().Set("Content-Type", f.contentType())
		answer.WriteHeader(f.Status)
		io.WriteString(answer, strings.ReplaceAll(f.Body, "{refresh_token}", form.Get("refresh_token")))
	default:
		p.forward.ServeHTTP(answer, r)
	}
	p.leave(c, answer.status)
}

// enter notes that a call has come and picks the fault for it.
func (p *proxy) enter(r *http.Request, form url.Values) (*call, *fault) {
	c := &call{Kind: kind(r, form)}
	p.mu.Lock()
	defer p.mu.Unlock()
	if token := form.Get("refresh_token"); token != "" {
		p.tokens[token] = claims(token)["sub"]
	}
	for _, field := range []string{"refresh_token", "subject_token", "token"} {
		if c.User == "" {
			c.User = p.users[claims(form.Get(field))["sub"]]
		}
	}
	p.calls = append(p.calls, c)
	for _, f := range p.faults {
		if f.take(c) {
			return c, f
		}
	}
	return c, nil
}

func (p *proxy) leave(c *call, status int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	c.Status = status
}

// learn reads the refresh token and its owner from a token answer.
func (p *proxy) learn(r *http.Response) error {
	if path.Base(r.Request.URL.Path) != "token" || r.StatusCode != http.StatusOK {
		return nil
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return err
	}
	r.Body.Close()
	r.Body = io.NopCloser(bytes.NewReader(body))
	var answer struct {
		AccessToken  string `json:"access_token"`
		RefreshToken string `json:"refresh_token"`
	}
	if json.Unmarshal(body, &answer) != nil {
		return nil // not for us to judge
	}
	who := claims(answer.AccessToken)
	p.mu.Lock()
	defer p.mu.Unlock()
	if who["sub"] != "" && who["preferred_username"] != "" {
		p.users[who["sub"]] = who["preferred_username"]
	}
	if answer.RefreshToken != "" {
		p.tokens[answer.RefreshToken] = who["sub"]
	}
	return nil
}

// kind names a call for counting.
func kind(r *http.Request, form url.Values) string {
	last := path.Base(r.URL.Path)
	if last == "token" && r.Method == http.MethodPost {
		grant := form.Get("grant_type")
		return "token/" + grant[strings.LastIndexByte(grant, ':')+1:] // some are URNs
	}
	return last
}

// peekForm reads a form from the body and puts the body back.
func peekForm(r *http.Request) (url.Values, error) {
	if !strings.HasPrefix(r.Header.Get("Content-Type"), "application/x-www-form-urlencoded") {
		return nil, nil
	}
	body, err := io.ReadAll(http.MaxBytesReader(nil, r.Body, 1<<20))
	if err != nil {
		return nil, err
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	return url.ParseQuery(string(body))
}

// claims returns the text claims of a JWT, unverified; none for anything else.
func claims(token string) map[string]string {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return nil
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return nil
	}
	var all map[string]any
	if json.Unmarshal(payload, &all) != nil {
		return nil
	}
	text := map[string]string{}
	for name, value := range all {
		if s, ok := value.(string); ok {
			text[name] = s
		}
	}
	return text
}

// A fault is trouble for calls that match it.
type fault struct {
	Kind  string `json:"kind"`  // of calls; empty: any
	User  string `json:"user"`  // of calls; empty: any
	Times int    `json:"times"` // how often; 0: until it is cleared

	Delay  duration `json:"delay"`  // before anything else; ends early when the fault is cleared
	Status int      `json:"status"` // answered instead of asking the provider
	Body   string   `json:"body"`   // with Status; {refresh_token} in it stands for the request's
	Drop   bool     `json:"drop"`   // break the connection, provider not asked
	Lose   bool     `json:"lose"`   // ask the provider, then break the connection

	left    int
	cleared chan struct{}
}

// take says whether the fault is for c, and uses it up by one.
func (f *fault) take(c *call) bool {
	if f.Kind != "" && f.Kind != c.Kind || f.User != "" && f.User != c.User {
		return false
	}
	if f.Times == 0 {
		return true
	}
	f.left--
	return f.left >= 0
}

// wait waits for the fault's delay and reports whether the client is still there.
func (f *fault) wait(ctx context.Context) bool {
	if f.Delay == 0 {
		return true
	}
	after := time.NewTimer(time.Duration(f.Delay))
	defer after.Stop()
	select {
	case <-after.C:
		return true
	case <-f.cleared:
		return true
	case <-ctx.Done():
		return false
	}
}

func (f *fault) contentType() string {
	if strings.HasPrefix(f.Body, "{") {
		return "application/json"
	}
	return "text/html"
}

// A duration is written as Go writes it: "1.5s".
type duration time.Duration

func (d *duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	*d = duration(v)
	return err
}

// A statusWriter remembers the status it passes on.
type statusWriter struct {
	http.ResponseWriter
	status int
}

func (w *statusWriter) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

// Unwrap lets the reverse proxy flush.
func (w *statusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// discard takes an answer that nobody is to see.
type discard struct{ header http.Header }

func (d *discard) Header() http.Header         { return d.header }
func (d *discard) Write(b []byte) (int, error) { return len(b), nil }
func (d *discard) WriteHeader(int)             {}
