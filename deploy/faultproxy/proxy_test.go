package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// jwt returns what looks like a token of a user.
func jwt(user, mark string) string {
	payload := fmt.Sprintf(`{"sub":"id-of-%s","preferred_username":%q,"iat":1}`, user, user)
	return "e30." + base64.RawURLEncoding.EncodeToString([]byte(payload)) + "." + mark
}

// A provider answers a token request with tokens of its "user" field and
// everything else with its path.
type provider struct{ asked chan string }

func (p provider) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.asked <- r.URL.Path
	if !strings.HasSuffix(r.URL.Path, "/token") {
		io.WriteString(w, r.URL.Path)
		return
	}
	user := r.FormValue("user")
	json.NewEncoder(w).Encode(map[string]string{
		"access_token":  jwt(user, "access"),
		"refresh_token": jwt(user, "new"),
	})
}

type fixture struct {
	t     *testing.T
	front *httptest.Server
	back  *httptest.Server
	asked chan string
}

func start(t *testing.T) *fixture {
	t.Helper()
	f := &fixture{t: t, asked: make(chan string, 100)}
	up := httptest.NewServer(provider{f.asked})
	to, err := url.Parse(up.URL)
	if err != nil {
		t.Fatal(err)
	}
	p := newProxy(to)
	f.front, f.back = httptest.NewServer(p), httptest.NewServer(p.control())
	t.Cleanup(func() { f.clear(); f.front.Close(); f.back.Close(); up.Close() })
	return f
}

func (f *fixture) post(fields url.Values) (int, string, error) {
	r, err := http.PostForm(f.front.URL+"/realms/x/token", fields)
	if err != nil {
		return 0, "", err
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	return r.StatusCode, string(body), err
}

func (f *fixture) refresh(user string) (int, string, error) {
	return f.post(url.Values{"grant_type": {"refresh_token"}, "user": {user}, "refresh_token": {jwt(user, "old")}})
}

func (f *fixture) fault(body string) {
	f.t.Helper()
	r, err := http.Post(f.back.URL+"/faults", "application/json", strings.NewReader(body))
	if err != nil {
		f.t.Fatal(err)
	}
	r.Body.Close()
	if r.StatusCode != http.StatusNoContent {
		f.t.Fatalf("fault %s: got %s, want 204", body, r.Status)
	}
}

func (f *fixture) clear() {
	f.t.Helper()
	r, err := http.NewRequest(http.MethodDelete, f.back.URL+"/faults", nil)
	if err != nil {
		f.t.Fatal(err)
	}
	if _, err := http.DefaultClient.Do(r); err != nil {
		f.t.Error(err)
	}
}

func (f *fixture) get(path string, into any) {
	f.t.Helper()
	r, err := http.Get(f.back.URL + path)
	if err != nil {
		f.t.Fatal(err)
	}
	defer r.Body.Close()
	if err := json.NewDecoder(r.Body).Decode(into); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fixture) counts() map[string]int {
	f.t.Helper()
	var got struct{ Counts map[string]int }
	f.get("/calls", &got)
	return got.Counts
}

// until waits for what the proxy says of its calls.
func (f *fixture) until(condition func([]call) bool) {
	f.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		var got struct{ Calls []call }
		f.get("/calls", &got)
		if condition(got.Calls) {
			return
		}
		if time.Now().After(deadline) {
			f.t.Fatalf("calls: got %+v for ten seconds", got.Calls)
		}
	}
}

func TestCallsPassAndAreCountedByKind(t *testing.T) {
	f := start(t)
	if status, body, err := f.refresh("alice"); err != nil || status != 200 || !strings.Contains(body, jwt("alice", "new")) {
		t.Fatalf("refresh: got %d %s %v, want the provider's answer", status, body, err)
	}
	f.post(url.Values{"grant_type": {"urn:ietf:params:oauth:grant-type:token-exchange"}})
	if _, err := http.Get(f.front.URL + "/realms/x/userinfo"); err != nil {
		t.Fatal(err)
	}
	want := map[string]int{"token/refresh_token": 1, "token/token-exchange": 1, "userinfo": 1}
	if diff := cmp.Diff(want, f.counts()); diff != "" {
		t.Errorf("counts (-want +got):\n%s", diff)
	}
}

func TestRefreshTokensAreRememberedFromRequestsAndAnswers(t *testing.T) {
	f := start(t)
	f.post(url.Values{"grant_type": {"authorization_code"}, "user": {"alice"}})
	f.refresh("bob")
	var got map[string]string
	f.get("/refresh-tokens", &got)
	want := map[string]string{jwt("alice", "new"): "alice", jwt("bob", "old"): "bob", jwt("bob", "new"): "bob"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("tokens (-want +got):\n%s", diff)
	}
}

func TestAFaultDoesWhatItSays(t *testing.T) {
	for _, tt := range []struct {
		why, fault string
		status     int // 0: the connection breaks
		body       string
		asked      int // calls that reached the provider
	}{
		{"a status instead of an answer", `{"status":503,"body":"<html>"}`, 503, "<html>", 0},
		{"an answer that repeats the secret", `{"status":400,"body":"you sent {refresh_token}"}`, 400, "you sent " + jwt("alice", "old"), 0},
		{"a dropped request", `{"drop":true}`, 0, "", 0},
		{"a lost answer", `{"lose":true}`, 0, "", 1},
		{"another kind of call", `{"kind":"userinfo","drop":true}`, 200, "access_token", 1},
		{"a user we haven't seen yet", `{"user":"alice","drop":true}`, 200, "access_token", 1},
		{"a short delay", `{"delay":"1ms"}`, 200, "access_token", 1},
	} {
		t.Run(tt.why, func(t *testing.T) {
			f := start(t)
			f.fault(tt.fault)
			status, body, err := f.refresh("alice")
			if (err != nil) != (tt.status == 0) || status != tt.status || !strings.Contains(body, tt.body) {
				t.Errorf("got %d %q %v, want %d %q", status, body, err, tt.status, tt.body)
			}
			if len(f.asked) != tt.asked {
				t.Errorf("the provider was asked %d times, want %d", len(f.asked), tt.asked)
			}
		})
	}
}

func TestAFaultForOneUserLeavesOthersAlone(t *testing.T) {
	f := start(t)
	f.refresh("alice")
	f.refresh("bob")
	f.fault(`{"kind":"token/refresh_token","user":"alice","status":500}`)
	if status, _, err := f.refresh("bob"); err != nil || status != 200 {
		t.Errorf("bob: got %d %v, want 200", status, err)
	}
	if status, _, err := f.refresh("alice"); err != nil || status != 500 {
		t.Errorf("alice: got %d %v, want 500", status, err)
	}
}

func TestAFaultCanBeForAFewCalls(t *testing.T) {
	f := start(t)
	f.fault(`{"status":500,"times":2}`)
	var got []int
	for range 3 {
		status, _, _ := f.refresh("alice")
		got = append(got, status)
	}
	if diff := cmp.Diff([]int{500, 500, 200}, got); diff != "" {
		t.Errorf("statuses (-want +got):\n%s", diff)
	}
}

func TestClearingEndsADelay(t *testing.T) {
	f := start(t)
	f.fault(`{"delay":"1h"}`)
	done := make(chan int)
	go func() {
		status, _, _ := f.refresh("alice")
		done <- status
	}()
	f.until(func(calls []call) bool { return len(calls) == 1 })
	f.clear()
	if status := <-done; status != 200 {
		t.Errorf("after clearing: got %d, want 200", status)
	}
}

func TestAClientThatLeavesDuringADelayNeverReachesTheProvider(t *testing.T) {
	f := start(t)
	f.fault(`{"delay":"1h"}`)
	ctx, cancel := context.WithCancel(context.Background())
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, f.front.URL+"/token", strings.NewReader("grant_type=refresh_token"))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	done := make(chan error)
	go func() {
		_, err := http.DefaultClient.Do(r)
		done <- err
	}()
	f.until(func(calls []call) bool { return len(calls) == 1 })
	cancel()
	<-done
	f.until(func(calls []call) bool { return calls[0].Status == clientGone })
	f.clear()
	if len(f.asked) != 0 {
		t.Errorf("the provider was asked %d times, want 0", len(f.asked))
	}
}

func TestAMistypedFaultIsRefused(t *testing.T) {
	f := start(t)
	r, err := http.Post(f.back.URL+"/faults", "application/json", bytes.NewBufferString(`{"dely":"1s"}`))
	if err != nil {
		t.Fatal(err)
	}
	if r.StatusCode != http.StatusBadRequest {
		t.Errorf("got %s, want 400", r.Status)
	}
}

func TestTheControlSocketIsPrivate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.sock")
	l, err := listenPrivate(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		t.Errorf("mode: got %v, want nothing for group and others", info.Mode().Perm())
	}
}

func TestServeEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- serve(ctx, map[net.Listener]http.Handler{l: http.NotFoundHandler()}) }()
	cancel()
	if err := <-done; err != nil {
		t.Errorf("serve: got %v, want nil", err)
	}
}
