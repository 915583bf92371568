package oauthprovider_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/google/go-cmp/cmp"

	"tokenbroker/broker"
	"tokenbroker/broker/oauthprovider"
)

// secretAnswer is what must never be seen in an error.
const secretAnswer = "rt-SECRET"

// serve starts a server and returns its URL.
func serve(t *testing.T, h http.HandlerFunc) string {
	t.Helper()
	ts := httptest.NewServer(h)
	t.Cleanup(ts.Close)
	return ts.URL
}

func TestARequestHoldsWhatItsKindNeedsAndNothingElse(t *testing.T) {
	var got url.Values
	u := serve(t, func(w http.ResponseWriter, r *http.Request) {
		r.ParseForm()
		got = r.PostForm
		got.Set("?path", r.URL.Path)
		id, secret, _ := r.BasicAuth()
		got.Set("?basic", id+" "+secret)
		io.WriteString(w, `{"access_token":"a"}`)
	})
	cfg := oauthprovider.Config{
		Name: "lab", ClientID: "hub:1", ClientSecret: broker.NewSecret("p%ss w:rd"),
		Endpoints: oauthprovider.Endpoints{Token: u + "/token", Revocation: u + "/revoke"},
		Audiences: map[string][]string{"storage": {"storage", "read"}},
	}
	p, err := oauthprovider.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Profile = "keycloak"
	keycloak, err := oauthprovider.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	const exchange = "?path=/token&grant_type=urn:ietf:params:oauth:grant-type:token-exchange&subject_token=a" +
		"&subject_token_type=urn:ietf:params:oauth:token-type:access_token&requested_token_type=urn:ietf:params:oauth:token-type:access_token"
	// Form-encoded before Basic: RFC 6749, section 2.3.1.
	const basic = "hub%3A1 p%25ss+w%3Ard"
	for _, tt := range []struct {
		why  string
		ask  func(context.Context)
		want string
	}{
		{"login", func(ctx context.Context) {
			p.Login(ctx, broker.CodeGrant{Code: broker.NewSecret("c"), Verifier: broker.NewSecret("v"), RedirectURI: "http://h/cb"})
		}, "?path=/token&grant_type=authorization_code&code=c&code_verifier=v&redirect_uri=http://h/cb"},
		{"refresh", func(ctx context.Context) { p.Refresh(ctx, broker.NewSecret("r"), "sub", nil) },
			"?path=/token&grant_type=refresh_token&refresh_token=r"},
		{"narrowed refresh", func(ctx context.Context) { p.Refresh(ctx, broker.NewSecret("r"), "sub", []string{"write", "read"}) },
			"?path=/token&grant_type=refresh_token&refresh_token=r&scope=read write"},
		{"exchange", func(ctx context.Context) {
			p.Exchange(ctx, broker.NewSecret("a"), broker.Target{Audience: "storage", Scopes: []string{"read"}})
		}, exchange + "&audience=storage&scope=read storage"},
		{"exchange of the whole", func(ctx context.Context) { p.Exchange(ctx, broker.NewSecret("a"), broker.Target{}) }, exchange},
		{"exchange at Keycloak, which must not lose openid", func(ctx context.Context) {
			keycloak.Exchange(ctx, broker.NewSecret("a"), broker.Target{Audience: "storage", Scopes: []string{"write"}})
		}, exchange + "&audience=storage&scope=openid read storage write"},
		{"revoke", func(ctx context.Context) { p.Revoke(ctx, broker.NewSecret("r"), broker.RefreshToken) },
			"?path=/revoke&token=r&token_type_hint=refresh_token"},
	} {
		want := url.Values{"?basic": {basic}}
		for _, pair := range strings.Split(tt.want, "&") {
			k, v, _ := strings.Cut(pair, "=")
			want.Set(k, v)
		}
		got = nil
		tt.ask(t.Context())
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.why, diff)
		}
	}
}

func TestOtherWaysToAuthenticate(t *testing.T) {
	var got url.Values
	var header string
	u := serve(t, func(w http.ResponseWriter, r *http.Request) {
		r.ParseForm()
		got, header = r.PostForm, r.Header.Get("Authorization")
		io.WriteString(w, `{"access_token":"a"}`)
	})
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	file := writeKey(t, key)
	ask := func(style, keyFile, secret string) {
		p, err := oauthprovider.New(oauthprovider.Config{
			Name: "lab", ClientID: "hub", ClientSecret: broker.NewSecret(secret), AuthStyle: style, PrivateKeyFile: keyFile,
			Endpoints: oauthprovider.Endpoints{Token: u + "/token"},
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := do(t, p, "refresh"); err != nil {
			t.Fatal(err)
		}
	}

	ask("client_secret_post", "", "s")
	if got.Get("client_id") != "hub" || got.Get("client_secret") != "s" || header != "" {
		t.Errorf("client_secret_post: got %v, Authorization %q", got, header)
	}
	ask("", "", "")
	if got.Get("client_id") != "hub" || got.Has("client_secret") || header != "" {
		t.Errorf("a public client: got %v, Authorization %q", got, header)
	}
	seen := map[string]bool{}
	for range 2 {
		ask("", file, "")
		if got.Get("client_assertion_type") != "urn:ietf:params:oauth:client-assertion-type:jwt-bearer" || header != "" {
			t.Fatalf("private_key_jwt: got %v, Authorization %q", got, header)
		}
		tok, err := jwt.ParseSigned(got.Get("client_assertion"), []jose.SignatureAlgorithm{jose.ES256})
		if err != nil {
			t.Fatal(err)
		}
		var c jwt.Claims
		if err := tok.Claims(&key.PublicKey, &c); err != nil {
			t.Fatal(err)
		}
		if err := c.Validate(jwt.Expected{Issuer: "hub", Subject: "hub", AnyAudience: jwt.Audience{u + "/token"}, Time: time.Now()}); err != nil {
			t.Errorf("the assertion: %v", err)
		}
		seen[c.ID] = true
	}
	if len(seen) != 2 {
		t.Error("two assertions have one jti; a provider would take the second for a replay")
	}
}

func writeKey(t *testing.T, key any) string {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "key.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o400); err != nil {
		t.Fatal(err)
	}
	return file
}

// TestARequestIsNeverRepeated lets the server end connections in all the ways
// that make net/http try again.
func TestARequestIsNeverRepeated(t *testing.T) {
	for _, tt := range []struct {
		why string
		end func(http.ResponseWriter, *http.Request)
	}{
		{"the connection is cut", func(w http.ResponseWriter, r *http.Request) { hijack(w).Close() }},
		{"the connection is reset", func(w http.ResponseWriter, r *http.Request) {
			c := hijack(w)
			c.(*net.TCPConn).SetLinger(0)
			c.Close()
		}},
		{"the connection ends within the header", func(w http.ResponseWriter, r *http.Request) {
			c := hijack(w)
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Le")
			c.Close()
		}},
		{"the connection ends within the body", func(w http.ResponseWriter, r *http.Request) {
			c := hijack(w)
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{\"access_token\":\""+secretAnswer)
			c.Close()
		}},
		{"the connection is reset within the body", func(w http.ResponseWriter, r *http.Request) {
			c := hijack(w)
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{\"access_token\":\""+secretAnswer)
			c.(*net.TCPConn).SetLinger(0)
			c.Close()
		}},
		{"what comes back is not HTTP", func(w http.ResponseWriter, r *http.Request) {
			c := hijack(w)
			io.WriteString(c, "{\"access_token\":\""+secretAnswer+"\"}\r\n\r\n")
			c.Close()
		}},
		{"the answer is 10 MB", func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, `{"access_token":"`+secretAnswer)
			io.WriteString(w, strings.Repeat("x", 10<<20))
			io.WriteString(w, `"}`)
		}},
		{"the header is 10 MB", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X-Long", strings.Repeat(secretAnswer, 1<<20))
			io.WriteString(w, `{}`)
		}},
	} {
		t.Run(tt.why, func(t *testing.T) {
			var requests atomic.Int32
			u := serve(t, func(w http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				requests.Add(1)
				tt.end(w, r)
			})
			err := do(t, plainProvider(t, "generic", u), "refresh")
			var e *broker.ProviderError
			if !errors.As(err, &e) || e.Class != broker.Lost {
				t.Errorf("got %v, want class lost", err)
			}
			if requests.Load() != 1 {
				t.Errorf("it was sent %d times", requests.Load())
			}
			if err != nil && strings.Contains(err.Error(), "SECRET") {
				t.Errorf("the error shows the answer: %v", err)
			}
		})
	}
}

// TestEveryPOSTHasItsOwnConnection: on a kept one nobody could tell whether the
// server had closed it before or after it read the token.
func TestEveryPOSTHasItsOwnConnection(t *testing.T) {
	from := map[string]bool{}
	u := serve(t, func(w http.ResponseWriter, r *http.Request) {
		from[r.RemoteAddr] = true
		io.WriteString(w, `{"access_token":"a"}`)
	})
	p := plainProvider(t, "generic", u)
	for range 3 {
		if err := do(t, p, "refresh"); err != nil {
			t.Fatal(err)
		}
	}
	if len(from) != 3 {
		t.Errorf("3 refreshes used %d connections", len(from))
	}
}

func hijack(w http.ResponseWriter) net.Conn {
	c, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		panic(err)
	}
	return c
}

func TestWhatWasNotReachedSpendsNothing(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	u := "http://" + l.Addr().String()
	l.Close()
	for _, what := range []string{"login", "refresh", "exchange", "revoke"} {
		wantClass(t, do(t, plainProvider(t, "generic", u), what), broker.TryLater, "unreachable")
	}
}

func TestARedirectIsNotFollowed(t *testing.T) {
	var elsewhere atomic.Int32
	other := serve(t, func(http.ResponseWriter, *http.Request) { elsewhere.Add(1) })
	for _, status := range []int{301, 302, 303, 307, 308} {
		u := serve(t, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, other+"/token", status) })
		wantClass(t, do(t, plainProvider(t, "generic", u), "refresh"), broker.Misconfigured, "redirect")
	}
	if elsewhere.Load() != 0 {
		t.Errorf("%d requests went elsewhere", elsewhere.Load())
	}
}

func TestLifetimesAreReadAsServersWriteThem(t *testing.T) {
	for _, tt := range []struct {
		answer        string
		life, refresh time.Duration
	}{
		{`"expires_in":300`, 5 * time.Minute, 0},
		{`"expires_in":"300"`, 5 * time.Minute, 0},
		{`"expires_in":300.0`, 5 * time.Minute, 0},
		{`"expires_in":3e2`, 5 * time.Minute, 0},
		{`"expires_in":0`, 0, 0},
		{`"expires_in":-5`, 0, 0},
		{`"expires_in":null`, 0, 0},
		{`"expires_in":"soon"`, 0, 0},
		{`"expires_in":{}`, 0, 0},
		{`"expires_in":300000000000`, 0, 0}, // nanoseconds: better unknown than for ever
		{`"expires_in":1e999`, 0, 0},
		{`"refresh_expires_in":0`, 0, 0},
		{`"refresh_expires_in":1800`, 0, 30 * time.Minute},
		{`"refresh_token_expires_in":"15897600"`, 0, 184 * 24 * time.Hour},
		{`"scope":7,"id_token":[],"token_type":{}`, 0, 0},
	} {
		u := serve(t, func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, `{"access_token":"a","refresh_token":"r",%s}`, tt.answer)
		})
		_, got, err := plainProvider(t, "generic", u).Refresh(t.Context(), broker.NewSecret("x"), "sub", nil)
		if err != nil {
			t.Errorf("%s: %v", tt.answer, err)
		}
		if got.ExpiresIn != tt.life || got.RefreshExpiresIn != tt.refresh || got.RefreshToken.Reveal() != "r" {
			t.Errorf("%s: got %v and %v, refresh token kept: %t", tt.answer, got.ExpiresIn, got.RefreshExpiresIn, !got.RefreshToken.IsZero())
		}
	}
}

func TestATokenThatCannotStandInALineIsNoAnswer(t *testing.T) {
	for _, token := range []string{`a\nb`, `a\u0000`, `a\u007f`, `\u00e4`} {
		u := serve(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, `{"access_token":"%s"}`, token) })
		wantClass(t, do(t, plainProvider(t, "generic", u), "refresh"), broker.Lost, "unreadable_answer")
	}
}

func TestTheSameRefreshTokenAgainIsNotANewOne(t *testing.T) {
	u := serve(t, func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, `{"access_token":"a","refresh_token":"r"}`)
	})
	p := plainProvider(t, "generic", u)
	for sent, isNew := range map[string]bool{"r": false, "q": true} {
		_, got, err := p.Refresh(t.Context(), broker.NewSecret(sent), "sub", nil)
		if err != nil || got.RefreshToken.IsZero() == isNew {
			t.Errorf("sent %q: a new refresh token: %t, error %v", sent, !got.RefreshToken.IsZero(), err)
		}
	}
}

func TestAnAdoptedTokenOfNobodyIsAnErrorThatKeepsTheAnswer(t *testing.T) {
	u := serve(t, func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, `{"access_token":"a","refresh_token":"r2"}`)
	})
	_, got, err := plainProvider(t, "generic", u).Refresh(t.Context(), broker.NewSecret("r"), "", nil)
	wantClass(t, err, broker.Dead, "no_subject")
	if got.RefreshToken.Reveal() != "r2" {
		t.Error("the answer is lost, nobody can revoke it")
	}
}

func TestALoginWithoutAVerifierIsNotSent(t *testing.T) {
	u := serve(t, func(http.ResponseWriter, *http.Request) { t.Error("it was sent") })
	_, _, err := plainProvider(t, "generic", u).Login(t.Context(), broker.CodeGrant{Code: broker.NewSecret("c")})
	if !errors.Is(err, broker.ErrInvalid) {
		t.Errorf("got %v", err)
	}
}

func TestCheckWithoutDiscoveryTakesAnyAnswer(t *testing.T) {
	status := http.StatusMethodNotAllowed
	u := serve(t, func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(status) })
	p := plainProvider(t, "generic", u)
	if err := p.Check(t.Context()); err != nil {
		t.Errorf("405 is an answer: %v", err)
	}
	status = http.StatusBadGateway
	wantClass(t, p.Check(t.Context()), broker.TryLater, "provider_error")
}

func TestInfoIsWhatWasConfiguredAndWhatTheProfileAdds(t *testing.T) {
	cfg := oauthprovider.Config{
		Name: "lab", Profile: "keycloak", Issuer: "https://sso.example.org/realms/lab", ClientID: "hub", RedirectURI: "https://hub.example.org/cb",
		Roles: []string{"roles"}, Audiences: map[string][]string{"storage": {"storage"}}, Adopt: true,
	}
	p, err := oauthprovider.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	want := broker.ProviderInfo{
		Name: "lab", Issuer: "https://sso.example.org/realms/lab", ClientID: "hub", Narrowing: broker.ByExchange,
		Audiences: map[string][]string{"storage": {"storage"}}, RoleClaims: []string{"roles"}, Adopt: true, RedirectURI: "https://hub.example.org/cb",
		ImpliedScopes: []string{"acr", "basic", "email", "offline_access", "openid", "profile", "roles", "web-origins"},
	}
	if diff := cmp.Diff(want, p.Info()); diff != "" {
		t.Errorf("Info (-want +got):\n%s", diff)
	}
	cfg.Narrowing = broker.Never
	p, err = oauthprovider.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	// A Keycloak that exchanges ends the session with any access token that is revoked.
	want.Narrowing, want.RevokesAccessAlone = broker.Never, true
	if diff := cmp.Diff(want, p.Info()); diff != "" {
		t.Errorf("Info with narrowing none (-want +got):\n%s", diff)
	}
}

func TestTheScopeFieldOfAnOpaqueToken(t *testing.T) {
	for _, tt := range []struct {
		answer string
		want   []string
		known  bool
	}{
		{`"scope":"write read  read"`, []string{"read", "write"}, true},
		{`"scope":["write","read"]`, []string{"read", "write"}, true},
		{`"scope":""`, nil, true},
		{`"scope":null`, nil, false},
		{`"scope":7`, nil, false},
		{`"x":1`, nil, false},
	} {
		u := serve(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, `{"access_token":"a",%s}`, tt.answer) })
		_, got, err := plainProvider(t, "generic", u).Refresh(t.Context(), broker.NewSecret("x"), "sub", nil)
		if err != nil || !cmp.Equal(got.Scopes, tt.want) || got.ScopesKnown != tt.known || got.AudienceKnown {
			t.Errorf("%s: got %q, known %t, audience known %t, error %v", tt.answer, got.Scopes, got.ScopesKnown, got.AudienceKnown, err)
		}
	}
}

func TestRetryAfterIsPassedOnWithinReason(t *testing.T) {
	for _, tt := range []struct {
		header   string
		from, to time.Duration
	}{
		{"7", 7 * time.Second, 7 * time.Second},
		{"999999999", time.Hour, time.Hour},
		{"-7", 0, 0},
		{"tomorrow", 0, 0},
		{time.Now().Add(10 * time.Minute).UTC().Format(http.TimeFormat), 9 * time.Minute, 10 * time.Minute},
		{"Thu, 01 Jan 1970 00:00:00 GMT", 0, 0},
	} {
		u := serve(t, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Retry-After", tt.header)
			w.WriteHeader(http.StatusTooManyRequests)
		})
		e := wantClass(t, do(t, plainProvider(t, "generic", u), "refresh"), broker.TryLater, "busy")
		if e.RetryAfter < tt.from || e.RetryAfter > tt.to {
			t.Errorf("%q: got %v", tt.header, e.RetryAfter)
		}
	}
}

// serveTLS returns a server that answers with a token, and its authority's file.
func serveTLS(t *testing.T) (ts *httptest.Server, file string) {
	t.Helper()
	ts = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, `{"access_token":"a"}`) }))
	t.Cleanup(ts.Close)
	ts.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	file = filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ts.Certificate().Raw}), 0o644); err != nil {
		t.Fatal(err)
	}
	return ts, file
}

func TestAPrivateAuthorityNeedsItsFile(t *testing.T) {
	ts, file := serveTLS(t)
	wantClass(t, do(t, plainProvider(t, "generic", ts.URL), "refresh"), broker.Misconfigured, "certificate_untrusted")
	p, err := oauthprovider.New(oauthprovider.Config{
		Name: "lab", ClientID: "hub", CAFile: file, Endpoints: oauthprovider.Endpoints{Token: ts.URL + "/token"},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := do(t, p, "refresh"); err != nil {
		t.Errorf("with the authority's file: %v", err)
	}
}

func TestAProxyIsUsedIfConfigured(t *testing.T) {
	ts, file := serveTLS(t)
	var through atomic.Int32
	proxy := serve(t, func(w http.ResponseWriter, r *http.Request) {
		through.Add(1)
		if r.Method != http.MethodConnect {
			io.WriteString(w, `{"access_token":"a"}`)
			return
		}
		to, err := net.Dial("tcp", ts.Listener.Addr().String())
		if err != nil {
			t.Error(err)
			return
		}
		w.WriteHeader(http.StatusOK)
		from, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		go func() { io.Copy(to, from); to.Close() }()
		io.Copy(from, to)
		from.Close()
	})
	for _, endpoint := range []string{"http://idp.invalid/token", "https://example.com/token"} { // which is in ts' certificate
		through.Store(0)
		p, err := oauthprovider.New(oauthprovider.Config{
			Name: "lab", ClientID: "hub", Proxy: proxy, CAFile: file, Endpoints: oauthprovider.Endpoints{Token: endpoint},
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := do(t, p, "refresh"); err != nil || through.Load() != 1 {
			t.Errorf("%s: %d requests through the proxy, error %v", endpoint, through.Load(), err)
		}
	}
}

func TestRevocationWithoutAnEndpointIsUnsupported(t *testing.T) {
	p, err := oauthprovider.New(oauthprovider.Config{Name: "lab", ClientID: "hub", Endpoints: oauthprovider.Endpoints{Token: "http://127.0.0.1:1/token"}})
	if err != nil {
		t.Fatal(err)
	}
	wantClass(t, do(t, p, "revoke"), broker.Misconfigured, "unsupported")
}

func TestEveryMistakeInTheConfigurationIsNamed(t *testing.T) {
	_, err := oauthprovider.New(oauthprovider.Config{
		Profile: "keyclock", DiscoveryURL: "sso.example.org", Narrowing: "sometimes", AuthStyle: "client_secret_basic",
		Endpoints: oauthprovider.Endpoints{Userinfo: "ftp://x/"},
	})
	if err == nil {
		t.Fatal("got no error")
	}
	for _, field := range []string{"name:", "profile:", "issuer:", "client_id:", "discovery_url:", "narrowing:", "endpoints.userinfo:", "client_secret_file:"} {
		if !strings.Contains(err.Error(), field) {
			t.Errorf("%s is not named in:\n%v", field, err)
		}
	}
	base := oauthprovider.Config{Name: "lab", ClientID: "hub", Issuer: "https://sso.example.org"}
	for _, change := range []func(*oauthprovider.Config){
		func(c *oauthprovider.Config) { c.CAFile = "/no/such/file" },
		func(c *oauthprovider.Config) { c.CAFile = os.DevNull },
		func(c *oauthprovider.Config) { c.PrivateKeyFile = os.DevNull },
		func(c *oauthprovider.Config) { c.Proxy = "::" },
		func(c *oauthprovider.Config) { c.AuthStyle = "private_key_jwt" },
		func(c *oauthprovider.Config) { c.AuthStyle = "handshake" },
		func(c *oauthprovider.Config) { c.Issuer = "https://user:password@sso.example.org" },
	} {
		cfg := base
		change(&cfg)
		if _, err := oauthprovider.New(cfg); err == nil || strings.Contains(err.Error(), "password@") {
			t.Errorf("got %v, want an error that says what is wrong", err)
		}
	}
	if _, err := oauthprovider.New(base); err != nil {
		t.Errorf("the configuration without mistakes: %v", err)
	}
}
