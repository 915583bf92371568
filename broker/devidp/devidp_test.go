//go:build !release

package devidp_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"tokenbroker/broker/devidp"
)

const home = "http://127.0.0.1:8000/hub/oauth_callback"

// start serves a provider and returns it with its issuer.
func start(t *testing.T, cfg devidp.Config) (*devidp.Server, string) {
	t.Helper()
	s, err := devidp.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ts := httptest.NewServer(s)
	t.Cleanup(ts.Close)
	return s, ts.URL
}

// post sends a form as the client and returns status and answer.
func post(t *testing.T, s *devidp.Server, endpoint string, form url.Values) (int, map[string]any) {
	t.Helper()
	req, err := http.NewRequest(http.MethodPost, endpoint, strings.NewReader(form.Encode()))
	if err != nil {
		t.Fatal(err)
	}
	id, secret := s.Client()
	req.SetBasicAuth(id, secret.Reveal())
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	var a map[string]any
	if len(body) > 0 && json.Unmarshal(body, &a) != nil {
		t.Fatalf("%s answered %q", endpoint, body)
	}
	return resp.StatusCode, a
}

// login returns a token answer for user.
func login(t *testing.T, s *devidp.Server, issuer, user string, scopes ...string) map[string]any {
	t.Helper()
	id, _ := s.Client()
	code, verifier, err := devidp.CodeFor(context.Background(), issuer, id, home, user, append(scopes, "openid")...)
	if err != nil {
		t.Fatal(err)
	}
	status, a := post(t, s, issuer+"/oauth/token", url.Values{
		"grant_type": {"authorization_code"}, "code": {code}, "code_verifier": {verifier}, "redirect_uri": {home},
	})
	if status != http.StatusOK {
		t.Fatalf("the code was answered with %d %v", status, a)
	}
	return a
}

func refresh(t *testing.T, s *devidp.Server, issuer string, token any) (int, map[string]any) {
	t.Helper()
	return post(t, s, issuer+"/oauth/token", url.Values{"grant_type": {"refresh_token"}, "refresh_token": {token.(string)}})
}

func active(t *testing.T, s *devidp.Server, issuer string, token any) map[string]any {
	t.Helper()
	_, a := post(t, s, issuer+"/oauth/introspect", url.Values{"token": {token.(string)}})
	return a
}

func TestARefreshTokenWorksOnceAndItsReuseEndsTheFamily(t *testing.T) {
	s, issuer := start(t, devidp.Config{})
	first := login(t, s, issuer, "alice")
	status, second := refresh(t, s, issuer, first["refresh_token"])
	if status != http.StatusOK || second["refresh_token"] == first["refresh_token"] {
		t.Fatalf("refresh: got %d and the same refresh token: %t", status, second["refresh_token"] == first["refresh_token"])
	}
	if status, a := refresh(t, s, issuer, first["refresh_token"]); status != http.StatusBadRequest || a["error"] != "invalid_grant" {
		t.Errorf("reuse: got %d %v, want 400 invalid_grant", status, a)
	}
	if status, _ := refresh(t, s, issuer, second["refresh_token"]); status != http.StatusBadRequest {
		t.Errorf("the newest refresh token after a reuse: got %d, want 400", status)
	}
	if a := active(t, s, issuer, second["access_token"]); a["active"] != false {
		t.Errorf("the newest access token after a reuse: got %v, want inactive", a)
	}
}

func TestALenientProviderForgivesReuse(t *testing.T) {
	for _, tt := range []struct {
		name    string
		cfg     devidp.Config
		rotates bool
	}{
		{"it keeps the refresh token", devidp.Config{KeepRefresh: true}, false},
		{"a grace", devidp.Config{Grace: time.Hour}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, issuer := start(t, tt.cfg)
			first := login(t, s, issuer, "alice")["refresh_token"]
			_, a := refresh(t, s, issuer, first)
			if rotated := a["refresh_token"] != first; rotated != tt.rotates {
				t.Errorf("another refresh token: %v, want %v", rotated, tt.rotates)
			}
			status, again := refresh(t, s, issuer, first)
			if status != http.StatusOK {
				t.Fatalf("the first one again: got %d %v", status, again)
			}
			for _, token := range []any{a["refresh_token"], again["refresh_token"]} {
				if status, got := refresh(t, s, issuer, token); status != http.StatusOK {
					t.Errorf("one that it brought: got %d %v", status, got)
				}
			}
		})
	}
	t.Run("a grace that is over", func(t *testing.T) {
		s, issuer := start(t, devidp.Config{Grace: time.Nanosecond})
		first := login(t, s, issuer, "alice")["refresh_token"]
		refresh(t, s, issuer, first)
		if status, got := refresh(t, s, issuer, first); status != http.StatusBadRequest {
			t.Errorf("got %d %v", status, got)
		}
	})
}

func TestIntrospectionShowsTheRolesOfNow(t *testing.T) {
	s, issuer := start(t, devidp.Config{})
	a := login(t, s, issuer, "alice")
	if err := s.SetRoles("alice"); err != nil {
		t.Fatal(err)
	}
	got := active(t, s, issuer, a["access_token"])
	if _, ok := got["roles"]; got["active"] != true || ok {
		t.Errorf("after all roles are gone: got %v, want active and no roles", got)
	}
	if err := s.SetRoles("nobody"); err == nil {
		t.Error("SetRoles of somebody unknown: got no error")
	}
}

func TestAnEndedSessionIsOver(t *testing.T) {
	for _, tt := range []struct {
		why string
		end func(t *testing.T, s *devidp.Server, issuer string, a map[string]any)
	}{
		{"by an administrator", func(t *testing.T, s *devidp.Server, _ string, _ map[string]any) {
			if err := s.EndSession("alice"); err != nil {
				t.Fatal(err)
			}
		}},
		{"by revocation", func(t *testing.T, s *devidp.Server, issuer string, a map[string]any) {
			if status, _ := post(t, s, issuer+"/revoke", url.Values{"token": {a["refresh_token"].(string)}}); status != http.StatusOK {
				t.Fatalf("revoke: got %d", status)
			}
		}},
		{"by logout", func(t *testing.T, _ *devidp.Server, issuer string, a map[string]any) {
			resp, err := http.Get(issuer + "/end_session?id_token_hint=" + a["id_token"].(string))
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			if resp.StatusCode != http.StatusOK {
				t.Fatalf("end session: got %d", resp.StatusCode)
			}
		}},
	} {
		t.Run(tt.why, func(t *testing.T) {
			s, issuer := start(t, devidp.Config{})
			a := login(t, s, issuer, "alice")
			tt.end(t, s, issuer, a)
			if status, got := refresh(t, s, issuer, a["refresh_token"]); status != http.StatusBadRequest || got["error_description"] != "Session not active" {
				t.Errorf("refresh afterwards: got %d %v", status, got)
			}
			if got := active(t, s, issuer, a["access_token"]); got["active"] != false {
				t.Errorf("access token afterwards: got %v, want inactive", got)
			}
		})
	}
}

func TestACodeWorksOnceAndOnlyWithItsVerifier(t *testing.T) {
	s, issuer := start(t, devidp.Config{})
	id, _ := s.Client()
	code, verifier, err := devidp.CodeFor(context.Background(), issuer, id, home, "bob", "openid")
	if err != nil {
		t.Fatal(err)
	}
	form := url.Values{"grant_type": {"authorization_code"}, "code": {code}, "redirect_uri": {home}}
	for _, tt := range []struct {
		why, verifier string
		want          int
	}{
		{"without a verifier", "", http.StatusBadRequest},
		{"with another verifier", strings.Repeat("x", 43), http.StatusBadRequest},
		{"as it should be", verifier, http.StatusOK},
		{"a second time", verifier, http.StatusBadRequest},
	} {
		form.Set("code_verifier", tt.verifier)
		if got, a := post(t, s, issuer+"/oauth/token", form); got != tt.want {
			t.Errorf("%s: got %d %v, want %d", tt.why, got, a["error"], tt.want)
		}
	}
}

func TestItAnswersOnLoopbackOnly(t *testing.T) {
	s, err := devidp.New(devidp.Config{})
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		why, remote, host string
		want              int
	}{
		{"from here to here", "127.0.0.1:4711", "localhost:8085", http.StatusOK},
		{"by IPv6", "[::1]:4711", "[::1]:8085", http.StatusOK},
		{"from elsewhere", "192.0.2.1:4711", "127.0.0.1:8085", http.StatusForbidden},
		{"by a name that resolves to here", "127.0.0.1:4711", "evil.example:8085", http.StatusForbidden},
		{"from nowhere", "", "127.0.0.1:8085", http.StatusForbidden},
	} {
		r := httptest.NewRequest(http.MethodGet, "/.well-known/openid-configuration", nil)
		r.RemoteAddr, r.Host = tt.remote, tt.host
		w := httptest.NewRecorder()
		s.ServeHTTP(w, r)
		if w.Code != tt.want {
			t.Errorf("%s: got %d, want %d", tt.why, w.Code, tt.want)
		}
	}
	if _, err := devidp.New(devidp.Config{Issuer: "http://idp.example"}); err == nil {
		t.Error("an issuer that is not on loopback was accepted")
	}
}

func TestTheLoginPageNamesTheUsersAndWhatTheyMay(t *testing.T) {
	s, issuer := start(t, devidp.Config{})
	if err := s.Disable("carol"); err != nil {
		t.Fatal(err)
	}
	resp, err := http.Get(issuer + "/login?id=x%22%3E%3Cscript%3E")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"Development only", "alice", "researcher", "/course-1"} {
		if !strings.Contains(string(body), want) {
			t.Errorf("the page lacks %q:\n%s", want, body)
		}
	}
	for _, bad := range []string{"carol", "<script>"} {
		if strings.Contains(string(body), bad) {
			t.Errorf("the page holds %q:\n%s", bad, body)
		}
	}
	if _, _, err := devidp.CodeFor(context.Background(), issuer, "jupyterhub", home, "carol", "openid"); err == nil {
		t.Error("a disabled user has logged in")
	}
	if _, _, err := devidp.CodeFor(context.Background(), issuer, "jupyterhub", "http://evil.example/", "alice", "openid"); err == nil {
		t.Error("a redirect to elsewhere was accepted")
	}
}

func TestADelayedRequestHasNotHappened(t *testing.T) {
	s, issuer := start(t, devidp.Config{})
	a := login(t, s, issuer, "alice")
	s.Delay(time.Hour)
	arrived, release := s.Hold()
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-arrived
		release() // into the delay
		cancel()
	}()
	form := url.Values{"grant_type": {"refresh_token"}, "refresh_token": {a["refresh_token"].(string)}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, issuer+"/oauth/token", strings.NewReader(form.Encode()))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	if _, err := http.DefaultClient.Do(req); err == nil {
		t.Fatal("an answer came at once")
	}
	s.Delay(0)
	if status, got := refresh(t, s, issuer, a["refresh_token"]); status != http.StatusOK {
		t.Errorf("afterwards: got %d %v", status, got)
	}
}

func TestACallbackBeforeTheClickIsRefused(t *testing.T) {
	_, issuer := start(t, devidp.Config{})
	c := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	resp, err := c.Get(issuer + "/authorize?response_type=code&client_id=jupyterhub&scope=openid&code_challenge=" + strings.Repeat("x", 43) +
		"&code_challenge_method=S256&redirect_uri=" + url.QueryEscape(home))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	page, err := resp.Location()
	if err != nil || page.Path != "/login" {
		t.Fatalf("got %v, %v, want the login page", page, err)
	}
	resp, err = c.Get(issuer + "/authorize/callback?" + page.RawQuery)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if back, err := resp.Location(); err != nil || back.Query().Get("error") != "interaction_required" || back.Query().Has("code") {
		t.Errorf("got %v, %v, want interaction_required", back, err)
	}
}

func TestIntrospectionOfARefreshTokenShowsTheRolesOfNowAndSpendsNothing(t *testing.T) {
	s, issuer := start(t, devidp.Config{})
	a := login(t, s, issuer, "alice")
	check(t, s.SetRoles("alice", "student"))
	got := active(t, s, issuer, a["refresh_token"])
	if roles := fmt.Sprint(got["roles"]); got["active"] != true || got["typ"] != "Refresh" || got["sub"] != s.Sub("alice") || roles != "[student]" {
		t.Errorf("got %v", got)
	}
	status, next := refresh(t, s, issuer, a["refresh_token"])
	if status != http.StatusOK {
		t.Fatalf("a refresh afterwards: got %d %v", status, next)
	}
	if got := active(t, s, issuer, a["refresh_token"]); got["active"] != true {
		t.Errorf("spent: got %v, want active as at Keycloak", got)
	}
	check(t, s.Disable("alice"))
	if got := active(t, s, issuer, next["refresh_token"]); got["active"] != false || len(got) != 1 {
		t.Errorf("disabled: got %v, want only inactive", got)
	}
	check(t, s.Enable("alice"))
	check(t, s.EndSession("alice"))
	if got := active(t, s, issuer, next["refresh_token"]); got["active"] != false {
		t.Errorf("ended: got %v", got)
	}
	resp, err := http.PostForm(issuer+"/oauth/introspect", url.Values{"token": {next["refresh_token"].(string)}, "client_id": {"jupyterhub"}, "client_secret": {"wrong"}})
	check(t, err)
	resp.Body.Close()
	if resp.StatusCode/100 == 2 {
		t.Errorf("without credentials: got %d", resp.StatusCode)
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
