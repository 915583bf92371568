package httpserver_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"tokenbroker/broker"
	"tokenbroker/broker/httpserver"
)

// A reply is what came back.
type reply struct {
	status int
	header http.Header
	text   string
	body   map[string]any
}

func (r reply) str(name string) string { s, _ := r.body[name].(string); return s }

// do sends a request and reads the JSON that must come back.
func (s *stack) do(path string, r *http.Request) reply {
	s.t.Helper()
	resp, err := s.http(path).Do(r)
	check(s.t, err)
	return s.read(resp)
}

func (s *stack) read(resp *http.Response) reply {
	s.t.Helper()
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	check(s.t, err)
	got := reply{status: resp.StatusCode, header: resp.Header, text: string(text)}
	if err := json.Unmarshal(text, &got.body); err != nil {
		s.t.Fatalf("not JSON: %s %q", resp.Status, text)
	}
	return got
}

// say sends a request as it is written, and reads one answer.
func (s *stack) say(path, request string) reply {
	s.t.Helper()
	answer := s.raw(path, request)
	resp, err := http.ReadResponse(bufio.NewReader(strings.NewReader(answer)), nil)
	if err != nil {
		s.t.Fatalf("not HTTP: %q", answer)
	}
	return s.read(resp)
}

func TestRequestsThatAreNotForUsAreRefused(t *testing.T) {
	for _, tt := range []struct {
		why, request string
		status       int
		words        string
	}{
		{"as curl does", "GET /v1/providers HTTP/1.1\r\nHost: localhost\r\n", 200, ""},
		{"a port changes nothing", "GET /v1/providers HTTP/1.1\r\nHost: LocalHost:8080\r\n", 200, ""},
		{"HTTP/1.0 needs no Host", "GET /v1/providers HTTP/1.0\r\n", 200, ""},
		{"a page in a browser", "GET /v1/providers HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\n", 400, "Origin"},
		{"a name that was bound to us", "GET /v1/providers HTTP/1.1\r\nHost: evil.example\r\n", 400, "Host"},
		{"the same in the request line", "GET http://evil.example/v1/providers HTTP/1.1\r\nHost: localhost\r\n", 400, "Host"},
		{"an address", "GET /v1/providers HTTP/1.1\r\nHost: 127.0.0.1\r\n", 400, "Host"},
		{"another method", "POST /v1/token HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n", 405, "GET"},
		{"no method of ours", "HEAD /v1/providers HTTP/1.0\r\n", 405, "GET"},
		{"another path", "GET /v1/tokens HTTP/1.1\r\nHost: localhost\r\n", 404, "path"},
		{"a hub's path", "POST /v1/claim HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n", 404, "path"},
		{"the token endpoint", "POST /oauth2/token/keycloak HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n", 404, "path"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			s := newStack(t, setup{})
			s.ready()
			if strings.HasPrefix(tt.request, "HEAD") {
				if got := s.raw(s.sock(alice), tt.request+"\r\n"); !strings.HasPrefix(got, fmt.Sprintf("HTTP/1.0 %d ", tt.status)) {
					t.Errorf("answer: %q, want %d", got, tt.status)
				}
				return
			}
			got := s.say(s.sock(alice), tt.request+"Connection: close\r\n\r\n")
			if got.status != tt.status || !strings.Contains(got.str("detail"), tt.words) {
				t.Errorf("answer: %d %s, want %d with %q", got.status, got.text, tt.status, tt.words)
			}
			if got.status != 200 {
				wantProblem(t, s, got, broker.Invalid)
			}
		})
	}
}

// wantProblem compares a problem with the audit.
func wantProblem(t *testing.T, s *stack, got reply, code broker.Code) {
	t.Helper()
	if ct := got.header.Get("Content-Type"); ct != "application/problem+json" {
		t.Errorf("Content-Type: %s, want application/problem+json", ct)
	}
	if cc := got.header.Get("Cache-Control"); cc != "no-store" {
		t.Errorf("Cache-Control: %q, want no-store", cc)
	}
	if got.body["status"] != float64(got.status) || got.str("title") != http.StatusText(got.status) || got.str("next") == "" {
		t.Errorf("problem: %s", got.text)
	}
	if e := s.audit.last(t); got.str("code") != string(code) || e.Code != code || e.Ref != got.str("ref") {
		t.Errorf("problem: %s %s, and the audit has %s %s, want %s", got.str("code"), got.str("ref"), e.Code, e.Ref, code)
	}
}

func TestAQueryIsReadStrictly(t *testing.T) {
	for _, tt := range []struct {
		why, query string
		words      string
	}{
		{"a misspelt parameter", "audeince=storage", `"audeince"`},
		{"scopes by another name", "scopes=read", `"scopes"`},
		{"a token in the place of a name", strings.Repeat("x", 40) + "=1", "an unknown parameter"},
		{"two audiences", "audience=storage&audience=payroll", "audience"},
		{"no number", "min_ttl=soon", "min_ttl"},
		{"half a second", "min_ttl=0.5", "min_ttl"},
		{"no escape", "audience=%zz", "malformed"},
		{"semicolons", "audience=a;scope=b", "malformed"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			s := newStack(t, setup{})
			s.ready()
			got := s.do(s.sock(alice), newRequest(t, "GET", "/v1/token?"+tt.query, "", ""))
			if got.status != 400 || !strings.Contains(got.str("detail"), tt.words) {
				t.Errorf("answer: %d %s, want 400 with %q", got.status, got.text, tt.words)
			}
			wantProblem(t, s, got, broker.Invalid)
		})
	}
}

func TestScopesMayBeWrittenInAnyWay(t *testing.T) {
	s := newStack(t, setup{})
	s.ready()
	for _, q := range []string{"scope=read+write", "scope=write%20read", "scope=read&scope=write", "scope=read++write&scope=read"} {
		got := s.do(s.sock(alice), newRequest(t, "GET", "/v1/token/keycloak?"+q, "", ""))
		if scopes := fmt.Sprint(got.body["scopes"]); scopes != "[read write]" {
			t.Errorf("%s: scopes %s, want [read write]", q, scopes)
		}
	}
}

func TestABodyIsReadStrictly(t *testing.T) {
	long := strings.Repeat("x", 40)
	for _, tt := range []struct {
		why, contentType, body string
		status                 int
		words                  string
	}{
		{"a form", "application/x-www-form-urlencoded", "user=alice", 415, "application/json"},
		{"nothing said", "", `{}`, 415, "application/json"},
		{"with a charset", "application/json; charset=utf-8", `{}`, 400, "user"},
		{"an unknown field", "application/json", `{"usr":"alice"}`, 400, `"usr"`},
		{"a token in the place of a name", "application/json", `{"` + long + `":"alice"}`, 400, "an unknown field"},
		{"a number for a name", "application/json", `{"user":42}`, 400, "user must be a string"},
		{"a word for a number", "application/json", `{"uid":"me"}`, 400, "uid must be a whole number"},
		{"a uid below nothing", "application/json", `{"uid":-1}`, 400, "uid must be a whole number"},
		{"a word for a list", "application/json", `{"groups":"lab"}`, 400, "groups must be a list"},
		{"a number in a list", "application/json", `{"groups":[1]}`, 400, "groups must be a"},
		{"a word for a choice", "application/json", `{"require_grant":"yes"}`, 400, "require_grant must be true or false"},
		{"a list", "application/json", `[]`, 400, "object"},
		{"nothing", "application/json", ``, 400, "not valid JSON"},
		{"half an object", "application/json", `{"user":"al`, 400, "not valid JSON"},
		{"more than an object", "application/json", `{"user":"alice"}{}`, 400, "goes on"},
		{"more than an object, no JSON", "application/json", `{"user":"alice"}]`, 400, "goes on"},
		{"no text", "application/json", "{\"user\":\"\xff\"}", 400, "UTF-8"},
		{"null", "application/json", `null`, 400, "user"},
		{"one byte too many", "application/json", strings.Repeat(" ", 64<<10+1), 413, "65536"},
		{"ten megabytes", "application/json", strings.Repeat(" ", 10<<20), 413, "65536"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			s := newStack(t, setup{})
			got := s.do(s.hub, newRequest(t, "POST", "/v1/register", tt.contentType, tt.body))
			if got.status != tt.status || !strings.Contains(got.str("detail"), tt.words) {
				t.Errorf("answer: %d %s, want %d with %q", got.status, got.text, tt.status, tt.words)
			}
			wantProblem(t, s, got, broker.Invalid)
			if strings.Contains(got.text, long) {
				t.Errorf("the answer repeats what may be a token: %s", got.text)
			}
		})
	}
}

func TestAnAnswerHasItsLengthAndIsNeverChunked(t *testing.T) {
	s := newStack(t, setup{})
	s.ready()
	for _, version := range []string{"1.0", "1.1"} {
		got := s.raw(s.sock(alice), "GET /v1/token HTTP/"+version+"\r\nHost: localhost\r\nConnection: close\r\n\r\n")
		if !strings.Contains(got, "\r\nContent-Length: ") || strings.Contains(got, "Transfer-Encoding") {
			t.Errorf("HTTP/%s: %q", version, got)
		}
	}
}

func TestALargeHeaderIsRefused(t *testing.T) {
	s := newStack(t, setup{})
	got := s.raw(s.sock(alice), "GET /v1/token HTTP/1.1\r\nHost: localhost\r\nX: "+strings.Repeat("x", 17<<10)+"\r\n\r\n")
	if !strings.HasPrefix(got, "HTTP/1.1 431 ") {
		t.Errorf("17 KiB of header: %.60q, want 431", got)
	}
}

func TestAServiceKeepsOffOtherSockets(t *testing.T) {
	s := newStack(t, setup{})
	log := quietLog()
	for _, tt := range []struct {
		why string
		srv *http.Server
		req *http.Request
	}{
		{"Workload", httpserver.NewWorkload(s.b, log), newRequest(t, "GET", "/v1/token", "", "")},
		{"Hub", httpserver.NewHub(s.b, log), newRequest(t, "POST", "/v1/claim", "application/json", "{}")},
		{"the token endpoint", httpserver.NewHub(s.b, log), newRequest(t, "POST", "/oauth2/token/keycloak", form, "grant_type=refresh_token&refresh_token=x")},
	} {
		w := httptest.NewRecorder() // a connection without a Peer
		tt.srv.Handler.ServeHTTP(w, tt.req)
		if w.Code != http.StatusUnauthorized {
			t.Errorf("%s without a peer: %d %s, want 401", tt.why, w.Code, w.Body)
		}
	}
}

func TestACrashTellsNothing(t *testing.T) {
	s := newStack(t, setup{})
	s.ready()
	s.crash()
	got := s.do(s.hub, newRequest(t, "POST", "/v1/register", "application/json", `{"user":"alice","container_name":"c"}`))
	if got.status != 500 || got.str("code") != "internal" || got.str("ref") == "" {
		t.Errorf("answer: %d %s, want 500 internal with a ref", got.status, got.text)
	}
	for _, where := range []string{got.text, s.audit.String(), s.log.String()} {
		if strings.Contains(where, crashSecret) {
			t.Errorf("a crash told its value: %s", where)
		}
	}
	if !strings.Contains(s.log.String(), "stack") {
		t.Error("the log has no stack of the crash")
	}
}
