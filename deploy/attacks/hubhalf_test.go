//go:build linux

package attacks_test

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"tokenbroker/broker/devidp"
)

// call says something on a hub's socket, as its hooks do.
func (w *world) call(t *testing.T, hub, path string, body any) answer {
	t.Helper()
	text, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	return w.post(t, hub, path, "application/json", string(text))
}

func (w *world) post(t *testing.T, hub, path, kind, body string) (a answer) {
	t.Helper()
	c := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", w.sockets+"/hubs/"+hub+"/hub.sock")
	}}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://localhost"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", kind)
	resp, err := (&http.Client{Transport: c}).Do(req)
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	a = answer{Status: resp.StatusCode, Body: string(text)}
	a.parse()
	return a
}

// trade asks a hub's token endpoint.
func (w *world) trade(t *testing.T, hub, provider string, form url.Values) answer {
	t.Helper()
	return w.post(t, hub, "/oauth2/token/"+provider, "application/x-www-form-urlencoded", form.Encode())
}

// codeOf is what a browser brings back from a login at a provider.
func (w *world) codeOf(t *testing.T, account string) url.Values {
	t.Helper()
	code, verifier, err := devidp.CodeFor(t.Context(), w.issuer, "jupyterhub", callback, account, everything...)
	if err != nil {
		t.Fatal(err)
	}
	return url.Values{"grant_type": {"authorization_code"}, "code": {code}, "code_verifier": {verifier}, "redirect_uri": {callback}}
}

// login logs an account in and returns the hub's handle.
func (w *world) login(t *testing.T, hub, provider, account string) (handle string) {
	t.Helper()
	a := w.trade(t, hub, provider, w.codeOf(t, account))
	if a.Status != http.StatusOK || a.said.RefreshToken == "" {
		t.Fatalf("login of %s: %+v", account, a)
	}
	return a.said.RefreshToken
}

// claim says that a login is a user's.
func (w *world) claim(t *testing.T, hub, provider, handle, user string) answer {
	t.Helper()
	return w.call(t, hub, "/v1/claim", map[string]any{"provider": provider, "handle": handle, "user": user})
}

// user logs somebody in who has the account of that name, and has him claimed.
func (w *world) user(t *testing.T, hub, user, account string) (handle string) {
	t.Helper()
	handle = w.login(t, hub, "idp", account)
	if a := w.claim(t, hub, "idp", handle, user); a.Status != http.StatusOK {
		t.Fatalf("claim for %s: %+v", user, a)
	}
	return handle
}

// A server is somebody's, as a hub says.
type server struct {
	w          *world
	hub, user  string
	account    string
	name       string // of its container
	dir        string
	generation int64
	id         string // of its container, full
	unread     bool   // its processes ask, and don't read or don't live to
}

// register is what the hub's hook says before a server starts.
func (w *world) register(t *testing.T, hub, user, account, container string) *server {
	t.Helper()
	s := &server{w: w, hub: hub, user: user, account: account, name: w.image + "-" + container}
	s.again(t)
	return s
}

func (s *server) again(t *testing.T) {
	t.Helper()
	a := s.w.call(t, s.hub, "/v1/register", map[string]any{"user": s.user, "container_name": s.name})
	if a.Status != http.StatusOK {
		t.Fatalf("register %s: %+v", s.user, a)
	}
	s.dir, s.generation = a.said.Directory, a.said.Generation
}

func (s *server) unregister(t *testing.T) {
	t.Helper()
	a := s.w.call(t, s.hub, "/v1/unregister", map[string]any{"user": s.user, "generation": s.generation})
	if a.Status != http.StatusOK {
		t.Fatalf("unregister %s: %+v", s.user, a)
	}
}

// mount is the option that the hub's hook adds.
func (s *server) mount() []string { return []string{"-v", s.dir + ":" + inside + ":ro"} }

// socket is where it is on this host.
func (s *server) socket() string { return s.dir + "/broker.sock" }

// starts runs the server's container.
func (s *server) starts(t *testing.T, options ...string) {
	t.Helper()
	s.id = s.w.run(t, s.name, append(s.mount(), options...)...)
	s.owns(s.id)
}

// owns says that a container is this server's.
func (s *server) owns(id string) {
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	s.w.owners[id] = s
}

// asks asks in the server's own container, until there is something to say.
func (s *server) asks(t *testing.T, more ...string) (a answer) {
	t.Helper()
	eventually(t, "an answer to "+s.user, func() bool {
		a = execIn(t, s.name, append([]string{"ask", socket}, more...)...)
		return a.said.Code != "pending"
	})
	s.got(a)
	return a
}

// got notes that a token came to whom it belongs.
func (s *server) got(a answer) {
	if a.said.AccessToken == "" {
		return
	}
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	s.w.given[a.said.Ref] = s
}

// up logs somebody in and starts a server that gets tokens.
func (w *world) up(t *testing.T, hub, user, account string, options ...string) *server {
	t.Helper()
	w.user(t, hub, user, account)
	s := w.register(t, hub, user, account, hub+"-"+user)
	s.starts(t, options...)
	s.served(t)
	return s
}

// served fails the test unless the server gets a token of its own user.
func (s *server) served(t *testing.T) answer {
	t.Helper()
	a := s.asks(t)
	s.isOwn(t, a)
	return a
}

// isOwn fails the test unless a is a token of the server's own user.
func (s *server) isOwn(t *testing.T, a answer) {
	t.Helper()
	if sub := subject(a.said.AccessToken); a.Status != http.StatusOK || sub != "sub-"+s.account {
		t.Fatalf("%s is not served: %d %s; the token's subject is %q", s.user, a.Status, a.Body, sub)
	}
}
