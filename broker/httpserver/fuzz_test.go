package httpserver_test

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"regexp"
	"strings"
	"testing"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
	"tokenbroker/broker/httpserver"
	"tokenbroker/broker/seal"
)

// newBroker is a broker without sockets, for what only reads requests.
func newBroker(t testing.TB) *broker.Broker {
	t.Helper()
	keys, err := seal.New()
	check(t, err)
	b, err := broker.New(broker.Config{
		Deployment: "test", Host: "here", Contact: "it-help@lab.example",
		Hubs:      map[broker.HubID]broker.Hub{"main": {Login: "keycloak"}},
		Providers: []broker.Provider{brokertest.NewProvider("keycloak")},
		Store:     brokertest.NewMemStore(), Keys: keys, Attestor: brokertest.NewAttestor(), Sockets: brokertest.NewSockets(),
		Audit: io.Discard, Log: quietLog(), Journal: t.TempDir() + "/journal",
	})
	check(t, err)
	check(t, b.Start(context.Background()))
	t.Cleanup(b.Close)
	return b
}

// A handed connection is what a socket would have accepted.
type handed struct {
	net.Conn
	peer *broker.Peer
}

func (h handed) Peer() *broker.Peer             { return h.peer }
func (h handed) Begin() (end func(), err error) { return func() {}, nil }

// answerTo lets a server answer a request of a peer, and looks at what must
// hold of every answer.
func answerTo(t *testing.T, srv *http.Server, p *broker.Peer, r *http.Request) *httptest.ResponseRecorder {
	t.Helper()
	w := httptest.NewRecorder()
	srv.Handler.ServeHTTP(w, r.WithContext(srv.ConnContext(context.Background(), handed{peer: p})))
	if w.Code == http.StatusInternalServerError {
		t.Errorf("answer: 500 %s", w.Body)
	}
	if w.Code < 300 || w.Code >= 400 { // net/http redirects to a clean path by itself
		if !json.Valid(w.Body.Bytes()) {
			t.Errorf("answer: %d %q, want JSON", w.Code, w.Body)
		}
		if w.Header().Get("Cache-Control") != "no-store" {
			t.Errorf("answer: %v, want no-store", w.Header())
		}
	}
	return w
}

// mayLetIn is what a loopback name looks like.
var mayLetIn = regexp.MustCompile(`(?i)^\[?(localhost|[0-9a-f.:]+)\]?\.?(:.*)?$`)

func FuzzTokenEndpoint(f *testing.F) {
	for _, seed := range []string{
		codeForm("alice").Encode(), refreshForm("tbh_x").Encode(), "", "grant_type", "grant_type=refresh_token&refresh_token=a&refresh_token=b",
		"%zz", "a;b", "grant_type=authorization_code&code=%00&code_verifier=%ff&redirect_uri=%0d%0a", "grant_type=refresh_token&refresh_token=" + strings.Repeat("x", 100),
	} {
		f.Add("keycloak", seed, "localhost")
	}
	for _, host := range []string{"", "evil.example", "[::1]:9444", "[", "]:", "localhost.:x", "127.0.0.1.", "::1%lo", "\x00"} {
		f.Add("nope", refreshForm("tbh_x").Encode(), host)
	}
	b := newBroker(f)
	onSocket := httpserver.NewHub(b, quietLog())
	onTCP := httpserver.NewTokenEndpoint(b, "main", broker.NewSecret(canary+"s"), httpserver.Hosts{}, quietLog())
	f.Fuzz(func(t *testing.T, provider, body, host string) {
		for _, srv := range []*http.Server{onSocket, onTCP} {
			r := newRequest(t, "POST", "/oauth2/token/"+url.PathEscape(provider), form, body)
			r.Host = host
			w := answerTo(t, srv, &broker.Peer{Hub: "main"}, r)
			if w.Code == 200 && !mayLetIn.MatchString(host) && (host != "" || srv == onTCP) {
				t.Errorf("Host %q was let in", host)
			}
			sent, _ := url.ParseQuery(body)
			for _, name := range []string{"code", "code_verifier", "refresh_token", "client_secret"} {
				secret := sent.Get(name)
				if len(secret) > 12 && w.Code != 200 && strings.Contains(w.Body.String(), secret) {
					t.Errorf("the answer repeats %s: %s", name, w.Body)
				}
			}
		}
	})
}

func FuzzHubJSON(f *testing.F) {
	paths := []string{"/v1/claim", "/v1/check-session", "/v1/register", "/v1/unregister", "/v1/set-groups", "/v1/set-shared", "/v1/logout"}
	for i, seed := range []string{
		`{"provider":"keycloak","handle":"tbh_x","user":"alice"}`, `{"user":"alice","have_sha256":"00"}`,
		`{"user":"alice","server":"","container_name":"c","groups":["a"],"require_grant":true,"uid":1000}`, `{"user":"alice","generation":1}`, `{"user":"alice","groups":["a"]}`, `{"user":"alice","server":"","shared":true}`,
		`{"user":"alice"}{}`, `[]`, `null`, `"`, "{\"user\":\"\xff\"}", `{"usr":1}`, `{"uid":-1}`, `{"generation":1e99}`, strings.Repeat(`[`, 20000),
	} {
		f.Add(byte(i), seed)
	}
	b := newBroker(f)
	srv := httpserver.NewHub(b, quietLog())
	f.Fuzz(func(t *testing.T, path byte, body string) {
		r := newRequest(t, "POST", paths[int(path)%len(paths)], "application/json", body)
		w := answerTo(t, srv, &broker.Peer{Hub: "main"}, r)
		if w.Code == 200 && !json.Valid([]byte(body)) {
			t.Errorf("%q was accepted: %s", body, w.Body)
		}
	})
}

func FuzzTokenQuery(f *testing.F) {
	for _, seed := range []string{"", "audience=storage&scope=a+b&min_ttl=60", "min_ttl=-9223372036854775809", "min_ttl=99999999999999999999", "%zz", "a;b", "scope=%00", "x=1", "=", "&&&"} {
		f.Add("keycloak", seed)
	}
	b := newBroker(f)
	srv := httpserver.NewWorkload(b, quietLog())
	f.Fuzz(func(t *testing.T, provider, query string) {
		r := newRequest(t, "GET", "/v1/token/"+url.PathEscape(provider), "", "")
		r.URL.RawQuery = query
		w := answerTo(t, srv, &broker.Peer{Server: alice, PID: int32(os.Getpid())}, r)
		if w.Code == 200 {
			t.Errorf("a server that nobody registered got an answer: %s", w.Body)
		}
	})
}
