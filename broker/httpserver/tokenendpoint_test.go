package httpserver_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
	"tokenbroker/broker/httpserver"
)

const (
	form     = "application/x-www-form-urlencoded"
	endpoint = "/oauth2/token/keycloak"
	// canary is in every request that must not be repeated.
	canary = "canary-7f3a"
)

func codeForm(code string) url.Values {
	return url.Values{
		"grant_type": {"authorization_code"}, "code": {code}, "code_verifier": {canary + "v"}, "redirect_uri": {"https://hub/cb"},
		"client_id": {"jupyterhub"}, "client_secret": {canary + "s"}, "data": {"None"},
	}
}

func refreshForm(token string) url.Values {
	return url.Values{"grant_type": {"refresh_token"}, "refresh_token": {token}, "client_secret": {canary + "s"}, "data": {"None"}}
}

func with(f url.Values, name string, values ...string) url.Values {
	f[name] = values
	return f
}

func (s *stack) post(path string, f url.Values) reply {
	s.t.Helper()
	return s.do(s.hub, newRequest(s.t, "POST", path, form, f.Encode()))
}

func TestAHubLogsInAndRefreshes(t *testing.T) {
	s := newStack(t, setup{})
	s.provider.SetRoles("alice", "researcher")
	got := s.post(endpoint, codeForm("alice"))
	if got.status != 200 || got.str("access_token") == "" || got.str("token_type") != "Bearer" || got.body["expires_in"].(float64) < 290 ||
		got.str("scope") != "all openid" || got.str("id_token") == "" || !strings.HasPrefix(got.str("refresh_token"), "tbh_") {
		t.Fatalf("login: %d %s", got.status, got.text)
	}
	if got.header.Get("Cache-Control") != "no-store" || got.header.Get("Content-Type") != "application/json" {
		t.Errorf("login: header %v", got.header)
	}
	if strings.Contains(got.text, s.provider.RefreshToken("alice")) {
		t.Error("the hub got the refresh token")
	}
	handle := got.str("refresh_token")
	_, err := s.b.Claim(context.Background(), "main", "keycloak", broker.NewSecret(handle), "alice")
	check(t, err)

	s.expire()
	again := s.post(endpoint, refreshForm(handle))
	if again.status != 200 || again.str("access_token") == "" || again.str("access_token") == got.str("access_token") || again.str("refresh_token") != handle {
		t.Errorf("refresh: %d %s, want another token and the same handle", again.status, again.text)
	}
}

func TestWhatAClientProvesOnTheHubsSocketIsNotLookedAt(t *testing.T) {
	s := newStack(t, setup{})
	r := newRequest(t, "POST", endpoint, form, codeForm("alice").Encode())
	r.SetBasicAuth("jupyterhub", "anything")
	if got := s.do(s.hub, r); got.status != 200 || got.str("access_token") == "" {
		t.Errorf("login with other credentials: %d %s", got.status, got.text)
	}
}

func TestHTTP10ClientsGetAWholeAnswer(t *testing.T) {
	s := newStack(t, setup{})
	body := codeForm("alice").Encode()
	got := s.say(s.hub, fmt.Sprintf("POST %s HTTP/1.0\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s", endpoint, form, len(body), body))
	if got.status != 200 || got.str("access_token") == "" || got.header.Get("Content-Length") != fmt.Sprint(len(got.text)) {
		t.Errorf("login: %d %v %s", got.status, got.header, got.text)
	}
}

// A failingLogin is a provider that doesn't take a code.
type failingLogin struct {
	*brokertest.Provider
	err error
}

func (p failingLogin) Login(context.Context, broker.CodeGrant) (broker.Identity, broker.Issued, error) {
	return broker.Identity{}, broker.Issued{}, p.err
}

func loginFails(class broker.ProviderClass) setup {
	return setup{provider: func(p *brokertest.Provider) broker.Provider {
		return failingLogin{p, &broker.ProviderError{Class: class, Reason: "expired"}}
	}}
}

// TestALoginsErrorIsASentence: OAuthenticator shows a user error_description of
// a 200, and "500 : Internal Server Error" for anything else.
func TestALoginsErrorIsASentence(t *testing.T) {
	for _, tt := range []struct {
		why    string
		set    setup
		path   string
		form   url.Values
		want   string
		words  string
		spends bool
	}{
		{"no code", setup{}, endpoint, codeForm(""), "invalid_request", "code", false},
		{"no verifier", setup{}, endpoint, with(codeForm(canary), "code_verifier"), "invalid_request", "PKCE", false},
		{"an empty verifier", setup{}, endpoint, with(codeForm(canary), "code_verifier", ""), "invalid_request", "enable_pkce", false},
		{"no redirect_uri", setup{}, endpoint, with(codeForm(canary), "redirect_uri"), "invalid_request", "redirect_uri", false},
		{"an unknown provider", setup{}, "/oauth2/token/nope", codeForm(canary), "invalid_request", `"nope"`, false},
		{"a code that is too old", loginFails(broker.Dead), endpoint, codeForm(canary), "invalid_grant", "keycloak", true},
		{"a provider that is down", loginFails(broker.TryLater), endpoint, codeForm(canary), "temporarily_unavailable", "keycloak", true},
		{"an answer that got lost", loginFails(broker.Lost), endpoint, codeForm(canary), "temporarily_unavailable", "keycloak", true},
	} {
		t.Run(tt.why, func(t *testing.T) {
			s := newStack(t, tt.set)
			got := s.post(tt.path, tt.form)
			if got.status != 200 || got.str("error") != tt.want || !strings.Contains(got.str("error_description"), tt.words) {
				t.Errorf("answer: %d %s, want 200 %s with %q", got.status, got.text, tt.want, tt.words)
			}
			if !tt.spends && s.provider.Calls("login") != 0 {
				t.Error("the code was exchanged")
			}
			wantOAuthError(t, s, got, "login")
		})
	}
}

// wantOAuthError compares an error with the audit, and looks for what must not
// be in either.
func wantOAuthError(t *testing.T, s *stack, got reply, action string) {
	t.Helper()
	if got.header.Get("Cache-Control") != "no-store" || got.header.Get("Content-Type") != "application/json" {
		t.Errorf("header: %v", got.header)
	}
	e := s.audit.last(t)
	if e.Ref != got.str("ref") || e.Ref == "" || e.Action != action || !strings.Contains(got.str("error_description"), e.Ref) {
		t.Errorf("answer: %s, and the audit has %s %s, want %s", got.text, e.Action, e.Ref, action)
	}
	for _, where := range []string{got.text, fmt.Sprint(got.header), s.audit.String(), s.log.String()} {
		if strings.Contains(where, canary) {
			t.Errorf("something of the request is repeated: %s", where)
		}
	}
}

// TestARefreshsErrorEndsASessionOnlyIfItHasEnded: invalid_grant logs the user
// out of the hub.
func TestARefreshsErrorEndsASessionOnlyIfItHasEnded(t *testing.T) {
	fails := func(class broker.ProviderClass) func(*stack, string) {
		return func(s *stack, _ string) {
			s.expire()
			s.provider.Next(brokertest.Answer{Err: &broker.ProviderError{Class: class}})
		}
	}
	for _, tt := range []struct {
		why     string
		prepare func(s *stack, handle string)
		form    func(handle string) url.Values
		status  int
		want    string
	}{
		{"a handle nobody has", nil, func(string) url.Values { return refreshForm("tbh_" + canary) }, 400, "invalid_grant"},
		{"a refresh token from before, not adopted", nil, func(string) url.Values { return refreshForm(canary) }, 400, "invalid_grant"},
		{"the session has ended", func(s *stack, _ string) { s.expire(); s.provider.EndSession("alice") }, refreshForm, 400, "invalid_grant"},
		{"an administrator cut her off", func(s *stack, _ string) { s.disconnect() }, refreshForm, 400, "invalid_grant"},
		{"the provider is down", fails(broker.TryLater), refreshForm, 503, "temporarily_unavailable"},
		{"our own credentials are wrong", fails(broker.Misconfigured), refreshForm, 503, "temporarily_unavailable"},
		{"the store is down", func(s *stack, _ string) { s.store.Fail(errors.New("refused")) }, refreshForm, 503, "temporarily_unavailable"},
		{"no handle", nil, func(string) url.Values { return refreshForm("") }, 400, "invalid_request"},
		{"two handles", nil, func(h string) url.Values { return with(refreshForm(h), "refresh_token", h, canary) }, 400, "invalid_request"},
		{"no grant type", nil, func(h string) url.Values { return with(refreshForm(h), "grant_type") }, 400, "invalid_request"},
		{"a password", nil, func(h string) url.Values { return with(refreshForm(h), "grant_type", "password") }, 400, "unsupported_grant_type"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			s := newStack(t, setup{})
			handle := s.login().Reveal()
			if tt.prepare != nil {
				tt.prepare(s, handle)
			}
			got := s.post(endpoint, tt.form(handle))
			if got.status != tt.status || got.str("error") != tt.want {
				t.Errorf("answer: %d %s, want %d %s", got.status, got.text, tt.status, tt.want)
			}
			if (got.header.Get("Retry-After") != "") != (tt.status == 503) {
				t.Errorf("Retry-After: %q with %d", got.header.Get("Retry-After"), got.status)
			}
			action := "refresh"
			if f := tt.form(handle); len(f["refresh_token"]) == 2 || f.Get("grant_type") != "refresh_token" {
				action = "grant"
			}
			wantOAuthError(t, s, got, action)
			if strings.Contains(got.text, handle) {
				t.Errorf("the answer repeats the handle: %s", got.text)
			}
		})
	}
}

func TestTheTokenEndpointReadsFormsOnly(t *testing.T) {
	for _, tt := range []struct {
		why    string
		req    *http.Request
		status int
		words  string
	}{
		{"JSON", newRequest(t, "POST", endpoint, "application/json", `{"grant_type":"refresh_token","refresh_token":"`+canary+`"}`), 415, "Content-Type"},
		{"a GET", newRequest(t, "GET", endpoint+"?grant_type=refresh_token&refresh_token="+canary, "", ""), 405, "POST"},
		{"a query", newRequest(t, "POST", endpoint+"?grant_type=refresh_token&refresh_token="+canary, form, ""), 400, "grant_type is missing"},
		{"no escape", newRequest(t, "POST", endpoint, form, "grant_type=refresh_token&refresh_token="+canary+"%zz"), 400, "malformed"},
		{"ten megabytes", newRequest(t, "POST", endpoint, form, "grant_type=refresh_token&refresh_token="+strings.Repeat(canary, 1<<20)), 413, "65536"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			s := newStack(t, setup{})
			got := s.do(s.hub, tt.req)
			if got.status != tt.status || got.str("error") != "invalid_request" || !strings.Contains(got.str("error_description"), tt.words) {
				t.Errorf("answer: %d %s, want %d invalid_request with %q", got.status, got.text, tt.status, tt.words)
			}
			wantOAuthError(t, s, got, "grant")
		})
	}
}

func TestATokenEndpointWithoutASocketWantsTheSecret(t *testing.T) {
	const secret = "s3cret/with+signs="
	s := newStack(t, setup{})
	handle := s.login().Reveal()
	open := httpserver.NewTokenEndpoint(s.b, "main", broker.NewSecret(secret), named, quietLog()).Handler
	unset := httpserver.NewTokenEndpoint(s.b, "main", broker.Secret{}, named, quietLog()).Handler
	basic := func(password string) *http.Request {
		r := newRequest(t, "POST", endpoint, form, with(refreshForm(handle), "client_secret").Encode())
		r.SetBasicAuth("jupyterhub", password)
		return r
	}
	body := func(password string) *http.Request {
		return newRequest(t, "POST", endpoint, form, with(refreshForm(handle), "client_secret", password).Encode())
	}
	for _, tt := range []struct {
		why    string
		h      http.Handler
		r      *http.Request
		status int
	}{
		{"in the form", open, body(secret), 200},
		{"by Basic, escaped as RFC 6749 wants it", open, basic(url.QueryEscape(secret)), 200},
		{"by Basic, as it is", open, basic(secret), 200},
		{"another one", open, body(canary), 401},
		{"another one by Basic", open, basic(canary), 401},
		{"none", open, body(""), 401},
		{"none is not the one that was never set", unset, body(""), 401},
	} {
		t.Run(tt.why, func(t *testing.T) {
			w := httptest.NewRecorder()
			tt.r.Host = "broker.example:9444"
			tt.h.ServeHTTP(w, tt.r)
			got := s.read(w.Result())
			if got.status != tt.status {
				t.Fatalf("answer: %d %s, want %d", got.status, got.text, tt.status)
			}
			if got.status == 200 {
				return
			}
			if got.str("error") != "invalid_client" || got.header.Get("WWW-Authenticate") == "" {
				t.Errorf("answer: %s with %v, want invalid_client", got.text, got.header)
			}
			wantOAuthError(t, s, got, "grant")
		})
	}
}

func TestABrowserNeverReachesTheTokenEndpoint(t *testing.T) {
	s := newStack(t, setup{})
	h := httpserver.NewTokenEndpoint(s.b, "main", broker.NewSecret("x"), named, quietLog()).Handler
	r := newRequest(t, "POST", endpoint, form, with(codeForm("alice"), "client_secret", "x").Encode())
	r.Host = "broker.example"
	r.Header.Set("Origin", "https://evil.example")
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	if w.Code != 400 || !strings.Contains(w.Body.String(), "Origin") || s.provider.Calls("login") != 0 {
		t.Errorf("a request with an Origin: %d %s", w.Code, w.Body)
	}
}

func TestACrashOfTheTokenEndpointTellsNothing(t *testing.T) {
	s := newStack(t, setup{})
	s.crash()
	got := s.post(endpoint, refreshForm("tbh_x"))
	if got.status != 500 || got.str("error") != "server_error" || strings.Contains(got.text, crashSecret) {
		t.Errorf("answer: %d %s, want 500 server_error", got.status, got.text)
	}
}
