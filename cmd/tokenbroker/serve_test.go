//go:build !release

package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"tokenbroker/broker"
	"tokenbroker/broker/devidp"
)

// newTestWorld is the demo's world, with its configuration changed.
func newTestWorld(t *testing.T, change func(*Config)) *world {
	t.Helper()
	w := &world{stderr: io.Discard}
	var err error
	if w.dir, err = os.MkdirTemp("/tmp", "tb"); err != nil {
		t.Fatal(err)
	}
	w.onClose(func() error { return os.RemoveAll(w.dir) })
	t.Cleanup(func() {
		if err := w.close(); err != nil {
			t.Error(err)
		}
	})
	log := slog.New(slog.DiscardHandler)
	for _, start := range []func() error{
		func() error { return w.startIDP(t.Context(), log) },
		func() error { return w.startRedis(t.Context(), log) },
		func() error { return w.configure(t.Context(), log) },
		func() error { change(w.cfg); return w.startBroker(t.Context(), log) },
	} {
		if err := start(); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

func TestARefreshUnderWayWhenTheBrokerStopsIsAnsweredAndStored(t *testing.T) {
	w := newTestWorld(t, func(*Config) {})
	if _, err := w.hub.login(t.Context(), "alice"); err != nil {
		t.Fatal(err)
	}
	if err := w.hub.claim(t.Context(), "alice"); err != nil {
		t.Fatal(err)
	}
	w.redis.SetTime(time.Now().Add(time.Hour)) // the store's clock counts: all tokens have ended
	arrived, release := w.idp.Hold()
	answered := make(chan error, 1)
	go func() {
		var err error
		for err == nil && w.idp.Requests()[devidp.Refresh] == 0 { // until the broker has looked at the clock
			err = w.hub.refresh(t.Context())
		}
		answered <- err
	}()
	<-arrived
	before, _ := w.redis.records()
	w.stop()
	release()
	if err := <-answered; err != nil {
		t.Errorf("the hub's request: %v", err)
	}
	if err := <-w.ended; err != nil {
		t.Errorf("serve: %v", err)
	}
	w.ended <- nil // for close
	after, _ := w.redis.records()
	for key := range after {
		if kindOf(key) == "grant" && string(before[key]) == string(after[key]) {
			t.Errorf("%s was not stored", key)
		}
	}
}

const hubSecret = "0123456789abcdefghijklmnopqrstuvwxyz0123456"

func TestTheListenerWantsItsSecret(t *testing.T) {
	address := freeAddress(t)
	w := newTestWorld(t, func(c *Config) {
		secret := filepath.Join(filepath.Dir(c.Keys.KEKFile), "hub-secret")
		write(t, secret, hubSecret, 0o400)
		h := c.Hubs["main"]
		h.Listener = &ListenerConfig{ListenConfig{Address: address}, secret}
		c.Hubs["main"] = h
	})
	code, verifier, err := devidp.CodeFor(t.Context(), w.idp.issuer, "jupyterhub", hubCallback, "alice", "openid", "storage")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ secret, want string }{
		{"another's", "the hub's client secret is missing or not the one"},
		{hubSecret, `"refresh_token":"tbh_`},
	} {
		resp, err := http.PostForm("http://"+address+"/oauth2/token/devidp", url.Values{
			"grant_type": {"authorization_code"}, "code": {code}, "code_verifier": {verifier},
			"redirect_uri": {hubCallback}, "client_secret": {tt.secret},
		})
		if err != nil {
			t.Fatal(err)
		}
		text, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if !strings.Contains(string(text), tt.want) {
			t.Errorf("with secret %q: got %s, want %s", tt.secret, text, tt.want)
		}
	}
}

// With TLS the names are those of the certificate; without, a proxy's are configured.
func TestListenersAreAskedUnderTheirNames(t *testing.T) {
	secure, proxied := freeAddress(t), freeAddress(t)
	cert := filepath.Join(t.TempDir(), "cert")
	trusted := x509.NewCertPool()
	trusted.AddCert(certificate(t, cert, time.Now().Add(time.Hour), "broker.example"))
	newTestWorld(t, func(c *Config) {
		c.Metrics = &ListenConfig{Address: secure, TLSCertFile: cert + ".pem", TLSKeyFile: cert + "-key.pem"}
		c.Logout = &ListenConfig{Address: proxied, Hosts: []string{"hub.example.org"}}
	})
	tr := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", secure)
		},
		TLSClientConfig:   &tls.Config{RootCAs: trusted, ServerName: "broker.example"},
		ForceAttemptHTTP2: true,
	}
	defer tr.CloseIdleConnections()
	overTLS, plain := &http.Client{Transport: tr}, http.DefaultClient
	for _, tt := range []struct {
		client    *http.Client
		url, host string
		status    int
	}{
		{overTLS, "https://broker.example/metrics", "", 200},
		{overTLS, "https://broker.example/metrics", "localhost", 400},
		{plain, "http://" + proxied + "/", "hub.example.org", 404},
		{plain, "http://" + proxied + "/", "", 404},
		{plain, "http://" + proxied + "/", "evil.example", 400},
	} {
		r, err := http.NewRequest(http.MethodGet, tt.url, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Host = tt.host
		resp, err := tt.client.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		text, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != tt.status || resp.ProtoMajor != 1 || tt.status == 400 && !strings.Contains(string(text), "hosts") {
			t.Errorf("%s as %q: %s %d %s, want %d", tt.url, tt.host, resp.Proto, resp.StatusCode, text, tt.status)
		}
	}
}

func TestALogoutAtTheProviderEndsTheSession(t *testing.T) {
	address := freeAddress(t)
	w := newTestWorld(t, func(c *Config) { c.Logout = &ListenConfig{Address: address} })
	if _, err := w.hub.login(t.Context(), "alice"); err != nil {
		t.Fatal(err)
	}
	if err := w.hub.claim(t.Context(), "alice"); err != nil {
		t.Fatal(err)
	}
	token, err := w.idp.LogoutToken("alice")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		token  string
		status int
		active bool
	}{{token + "x", 400, true}, {token, 200, false}, {token, 200, false}} {
		resp, err := http.PostForm("http://"+address+"/backchannel-logout/devidp", url.Values{"logout_token": {tt.token}})
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		active, err := w.hub.checkSession(t.Context(), "alice")
		if resp.StatusCode != tt.status || resp.Header.Get("Cache-Control") != "no-store" || err != nil || active != tt.active {
			t.Errorf("answer %d %v; then the session is active: %t, %v", resp.StatusCode, resp.Header, active, err)
		}
	}
}

func TestMetricsAreServedWhereTheConfigurationSays(t *testing.T) {
	address := freeAddress(t)
	newTestWorld(t, func(c *Config) { c.Metrics = &ListenConfig{Address: address} })
	resp, err := http.Get("http://" + address + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil || !strings.Contains(string(text), `tokenbroker_attestation_level{level="uid"} 1`) {
		t.Errorf("%v: %s", err, text)
	}
}

// logrotate renames the file and sends SIGHUP; the chain goes on in the new one.
func TestTheAuditIsRotatedWhileTheBrokerServes(t *testing.T) {
	w := newTestWorld(t, func(*Config) {})
	file, heads := w.cfg.Audit.File, w.path("heads")
	says := func(code int, text string, args ...string) string {
		t.Helper()
		var out strings.Builder
		got := run(t.Context(), append([]string{"audit"}, append(args, "-c", w.configFile)...), &out, &out)
		if got != code || !strings.Contains(out.String(), text) {
			t.Errorf("%v: exit code %d, want %d, and %q in\n%s", args, got, code, text, out.String())
		}
		return out.String()
	}
	login := func() {
		t.Helper()
		if _, err := w.hub.login(t.Context(), "alice"); err != nil {
			t.Fatal(err)
		}
	}
	for _, old := range []string{file + ".2", file + ".1"} {
		login()
		write(t, heads, says(0, `"seq":`, "head"), 0o600)
		if err := os.Rename(file, old); err != nil {
			t.Fatal(err)
		}
		login() // still goes into the old one
		if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
			if info, err := os.Stat(file); err == nil && info.Mode().Perm() == 0o600 {
				break
			} else if time.Now().After(end) {
				t.Fatalf("the file was not opened anew: %v", err)
			}
		}
		login()
	}
	compress(t, file+".2")
	all := []string{file, file + ".1", file + ".2.gz"}
	verify := append([]string{"verify", "--head", heads}, all...)
	says(0, "in their places", verify...)
	says(0, `"wrong": []`, append(verify, "-o", "json")...)
	says(0, "note: without --head", append([]string{"verify"}, all...)...)
	says(4, "lines are missing, if not more: on", append([]string{"verify", "--head", heads}, all[2])...)
	says(1, "holds something else", append([]string{"verify", "--head", w.configFile}, all...)...)

	text, err := os.ReadFile(file + ".1")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.SplitAfter(string(text), "\n")
	write(t, file+".1", strings.Join(append(lines[:1:1], lines[2:]...), ""), 0o600)
	says(4, "WRONG: "+file+".1:2: before line ", verify...)
	// What stands in the journal of systemd between the lines of the log.
	var out strings.Builder
	c := newRoot()
	c.SetArgs([]string{"audit", "verify", "-", "-c", w.configFile})
	c.SetIn(strings.NewReader(`{"time":"now","level":"INFO","msg":"serving"}` + "\n" + lines[0]))
	c.SetOut(&out)
	if err := c.ExecuteContext(t.Context()); err != nil || !strings.Contains(out.String(), "1 line of host") {
		t.Errorf("from standard input: %v\n%s", err, out.String())
	}
	if err := os.Truncate(file, 0); err != nil {
		t.Fatal(err)
	}
	login()
	write(t, file, "", 0o600)
	says(0, `"seq":`, "head") // of a file that is empty the last line is kept beside it
	write(t, file, lines[0], 0o600)
	says(4, "has lost its last ", "head")
}

func compress(t *testing.T, file string) {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	z.Write(text)
	z.Close()
	write(t, file+".gz", out.String(), 0o600)
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func TestTheSearchFindsWhatItLooksFor(t *testing.T) {
	places := map[string][]byte{"a": []byte("nothing"), "b": []byte("xx refresh-1 xx")}
	if !leaks(places, "other", "refresh-1") || leaks(places, "refresh-2") {
		t.Error("leaks doesn't tell")
	}
}

func TestSystemdIsToldWhatItAskedFor(t *testing.T) {
	dir, err := os.MkdirTemp("/tmp", "tb")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	if err := notify("READY=1"); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 64)
	n, err := l.Read(got)
	if err != nil || string(got[:n]) != "READY=1" {
		t.Errorf("notify sent %q, %v", got[:n], err)
	}
	t.Setenv("NOTIFY_SOCKET", "")
	if err := notify("READY=1"); err != nil {
		t.Errorf("nobody asked: %v", err)
	}
}

func TestAHelperThatImagesCanNotRunIsFound(t *testing.T) {
	script := filepath.Join(t.TempDir(), "access-token")
	write(t, script, "#!/bin/sh\n", 0o755)
	got := checkHelper(t.Context(), &Config{Helper: script})
	if got[0].Result != "FAILS" || !strings.Contains(got[0].Detail, "is not a Linux program") {
		t.Errorf("a script: %+v", got)
	}
	write(t, script, "#!/bin/sh\n", 0o700)
	got = checkHelper(t.Context(), &Config{Helper: script})
	if got[0].Result != "FAILS" || !strings.Contains(got[0].Detail, "chmod 0755") {
		t.Errorf("a closed one: %+v", got)
	}
}

func TestDoctorSaysUnderWhichNamesTheListenersAreAsked(t *testing.T) {
	dir := t.TempDir()
	certificate(t, dir+"/new", time.Now().Add(time.Hour), "hub.example.org")
	certificate(t, dir+"/old", time.Date(2026, 1, 2, 0, 0, 0, 0, time.UTC), "hub.example.org")
	with := func(cert string) ListenConfig {
		return ListenConfig{Address: "0.0.0.0:9444", TLSCertFile: dir + cert + ".pem", TLSKeyFile: dir + cert + "-key.pem", Hosts: []string{"a"}}
	}
	old := with("/old")
	got := checkListeners(t.Context(), &Config{
		Hubs:    map[broker.HubID]HubConfig{"main": {Listener: &ListenerConfig{ListenConfig: with("/new")}}, "other": {}},
		Logout:  &old,
		Metrics: &ListenConfig{Address: "127.0.0.1:9464"},
	})
	want := []finding{
		{"hubs.main.listener", "ok", "0.0.0.0:9444 may be asked as hub.example.org, a"},
		{"logout", "FAILS", "the certificate in " + dir + "/old.pem ended on 2026-01-02"},
		{"metrics", "ok", "127.0.0.1:9464 may be asked as localhost, its addresses"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("checkListeners (-want +got):\n%s", diff)
	}
}

// The commands about users, on a broker whose users have logged in.
func TestTheAdministratorsCommandsOnALiveUser(t *testing.T) {
	w := newTestWorld(t, func(*Config) {})
	ctx := t.Context()
	login := func(account string) error {
		if _, err := w.hub.login(ctx, account); err != nil {
			return err
		}
		return w.hub.claim(ctx, "alice")
	}
	if err := login("alice"); err != nil {
		t.Fatal(err)
	}
	says := func(code int, text string, args ...string) {
		t.Helper()
		var out strings.Builder
		if got := run(ctx, append(args, "--socket", w.cfg.Admin.Socket), &out, &out); got != code || !regexp.MustCompile(text).MatchString(out.String()) {
			t.Errorf("%v: exit code %d, want %d, and %q in\n%s", args, got, code, text, out.String())
		}
	}
	says(0, `alice +devidp +live +- +on_request .*roles/researcher`, "sessions", "list")
	says(0, `grant +live: the user logged in on .*\nnext +refreshed when a token is asked for; the provider sets no end`, "sessions", "show", "alice")
	says(0, `devidp +sub-alice .*live`, "users", "show", "alice")
	says(0, `answer +yes\nrule +1  \{roles: \[researcher\], audiences: \[storage\], scopes: \[read\], provider: devidp, max_ttl: 10m0s\}\n`+
		`roles that it wants +researcher\nof these the user has +devidp:roles/researcher`, "explain", "--user", "alice")
	says(0, `answer +no \(denied\)\nthe user is told +.*needs one of the roles admin; you have .*\nrule +2 `, "explain", "--user", "alice", "--audience", "compute")

	if err := login("bob"); err == nil {
		t.Error("bob got alice's name")
	}
	says(0, `alice: was sub sub-alice, is now sub sub-bob\n(?s).*devidp +sub-alice`, "users", "rebind", "alice", "--provider", "devidp", "--sub", "sub-bob", "--yes")
	if err := login("alice"); err == nil {
		t.Error("alice got the name back")
	}
	if err := login("bob"); err != nil {
		t.Errorf("bob's login after: %v", err)
	}
	says(0, `account +devidp, sub sub-bob`, "sessions", "show", "alice")
	says(0, `- +devidp +revoked +the name alice was given to another account +login`, "sessions", "list")
}
