package httpserver_test

import (
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
	"tokenbroker/broker/httpserver"
)

const logoutPath = "/backchannel-logout/keycloak"

// logoutForm is a logout of alice's that holds.
func logoutForm(id string) url.Values {
	l := broker.Logout{ID: id, Sub: "alice", Session: "of another browser " + canary, Until: time.Now().Add(time.Minute)}
	return url.Values{"logout_token": {brokertest.LogoutTokenOf(l).Reveal()}}
}

// comes is the answer to somebody who comes to the listener for logout tokens.
func comes(h http.Handler, r *http.Request) reply {
	w := httptest.NewRecorder()
	r.Host = "broker.example:9445"
	h.ServeHTTP(w, r)
	return reply{status: w.Code, header: w.Header(), text: w.Body.String()}
}

func TestALogoutTokenIsAnsweredWithNothing(t *testing.T) {
	s := newStack(t, setup{})
	s.login()
	h := httpserver.NewLogout(s.b, named, slog.New(slog.NewTextHandler(s.log, nil))).Handler
	for range 2 { // it may come again
		got := comes(h, newRequest(t, "POST", logoutPath, form, with(logoutForm("1"), "state", "x").Encode()))
		if got.status != 200 || got.text != "" || got.header.Get("Cache-Control") != "no-store" {
			t.Errorf("answer: %d %v %s", got.status, got.header, got.text)
		}
		if e := s.audit.last(t); e.Action != "provider_logout" || e.Outcome != "done" || e.Sub != "alice" || e.Reason == "" {
			t.Errorf("the audit says %+v", e)
		}
	}
	if strings.Contains(s.log.String()+s.audit.String(), canary) {
		t.Error("something of the token was written down")
	}
}

func TestWhatIsNoLogoutTokenIsAnsweredWith400(t *testing.T) {
	s := newStack(t, setup{})
	s.login()
	h := httpserver.NewLogout(s.b, named, slog.New(slog.NewTextHandler(s.log, nil))).Handler
	post := func(path, body string) *http.Request { return newRequest(t, "POST", path, form, body) }
	browser := post(logoutPath, logoutForm("1").Encode())
	browser.Header.Set("Origin", "https://evil.example")
	for _, tt := range []struct {
		why    string
		req    *http.Request
		status int
		words  string
	}{
		{"a token that does not hold", post(logoutPath, "logout_token="+canary), 400, "no logout token that holds"},
		{"no token", post(logoutPath, "token="+canary), 400, "logout_token is missing"},
		{"an empty token", post(logoutPath, "logout_token="), 400, "logout_token is missing"},
		{"two tokens", post(logoutPath, logoutForm("1").Encode()+"&logout_token="+canary), 400, "more than once"},
		{"a token in the query", post(logoutPath+"?"+logoutForm("1").Encode(), ""), 400, "logout_token is missing"},
		{"no escape", post(logoutPath, "logout_token=%zz"+canary), 400, "malformed"},
		{"JSON", newRequest(t, "POST", logoutPath, "application/json", `{"logout_token":"`+canary+`"}`), 400, "Content-Type"},
		{"ten megabytes", post(logoutPath, "logout_token="+strings.Repeat(canary, 1<<20)), 400, "65536"},
		{"a browser", browser, 400, "browsers"},
		{"an unknown provider", post("/backchannel-logout/nowhere", logoutForm("1").Encode()), 400, "no provider"},
		{"a GET", newRequest(t, "GET", logoutPath+"?"+logoutForm("1").Encode(), "", ""), 405, "POST"},
		{"no provider", post("/backchannel-logout/", logoutForm("1").Encode()), 404, "nothing at this path"},
		{"the hub's token endpoint", post(endpoint, refreshForm(canary).Encode()), 404, "nothing at this path"},
	} {
		got := comes(h, tt.req)
		if got.status != tt.status || !strings.Contains(got.text, tt.words) || got.header.Get("Cache-Control") != "no-store" {
			t.Errorf("%s: %d %v %s, want %d with %q", tt.why, got.status, got.header, got.text, tt.status, tt.words)
		}
		if e := s.audit.last(t); e.Outcome != "refused" || tt.status != 404 && e.Action != "provider_logout" {
			t.Errorf("%s: the audit says %+v", tt.why, e)
		}
		if strings.Contains(got.text+s.log.String()+s.audit.String(), canary) {
			t.Fatalf("%s: something of the request is repeated: %s", tt.why, got.text)
		}
	}
}

func TestAFloodOfLogoutTokensIsTurnedAwayUnread(t *testing.T) {
	s := newStack(t, setup{})
	h := httpserver.NewLogout(s.b, named, slog.New(slog.NewTextHandler(s.log, nil))).Handler
	unread := 0
	for range 1500 {
		got := comes(h, newRequest(t, "POST", logoutPath, form, "logout_token="+canary))
		if got.status != 400 || got.header.Get("Cache-Control") != "no-store" {
			t.Fatalf("answer: %d %s", got.status, got.text)
		}
		if got.text == "" {
			unread++
		}
	}
	if lines := strings.Count(s.audit.String(), "\n"); unread == 0 || unread == 1500 || lines != 1 {
		t.Errorf("%d were turned away unread, and the audit has %d lines of the others, want the first", unread, lines)
	}
	if n := strings.Count(s.log.String(), "turned away unread"); n != 1 {
		t.Errorf("the log says so %d times", n)
	}
}

func TestACrashAtALogoutTokenTellsNothing(t *testing.T) {
	s := newStack(t, setup{})
	h := httpserver.NewLogout(s.b, named, slog.New(slog.NewTextHandler(s.log, nil))).Handler
	s.crash()
	got := comes(h, newRequest(t, "POST", logoutPath, form, logoutForm("1").Encode()))
	if got.status != 400 || !strings.Contains(got.text, `"server_error"`) || strings.Contains(got.text, crashSecret) {
		t.Errorf("answer: %d %s", got.status, got.text)
	}
}
