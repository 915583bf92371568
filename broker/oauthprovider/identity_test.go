package oauthprovider_test

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/google/go-cmp/cmp"

	"tokenbroker/broker"
	"tokenbroker/broker/oauthprovider"
)

// A claimset is what a token says.
type claimset = map[string]any

// A stranger is a provider that says whatever a test wants.
type stranger struct {
	t      *testing.T
	issuer string
	key    *rsa.PrivateKey

	document   claimset // replaces fields of the discovery document; nil values remove them
	keysStatus int      // of the key set; 0: 200
	id         string   // id_token; empty: none
	access     string
	userinfo   string // body; empty: 404
	asked      map[string]int
}

// theKey is made once: making it is slow.
var theKey = sync.OnceValues(func() (*rsa.PrivateKey, error) { return rsa.GenerateKey(rand.Reader, 2048) })

func newStranger(t *testing.T) *stranger {
	t.Helper()
	key, err := theKey()
	if err != nil {
		t.Fatal(err)
	}
	s := &stranger{t: t, key: key, access: "opaque", asked: map[string]int{}}
	s.issuer = serve(t, s.ServeHTTP)
	return s
}

func (s *stranger) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.asked[r.URL.Path]++
	answer := func(v any) { json.NewEncoder(w).Encode(v) }
	w.Header().Set("Content-Type", "application/json")
	switch r.URL.Path {
	case "/.well-known/openid-configuration":
		d := claimset{
			"issuer": s.issuer, "token_endpoint": s.issuer + "/token", "jwks_uri": s.issuer + "/keys", "userinfo_endpoint": s.issuer + "/userinfo",
			"authorization_endpoint": s.issuer + "/auth", "id_token_signing_alg_values_supported": []string{"RS256", "HS256", "none"},
		}
		for k, v := range s.document {
			if d[k] = v; v == nil {
				delete(d, k)
			}
		}
		answer(d)
	case "/keys":
		if s.keysStatus != 0 {
			w.WriteHeader(s.keysStatus)
		}
		answer(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: &s.key.PublicKey, KeyID: "k1", Algorithm: "RS256", Use: "sig"}}})
	case "/token":
		a := claimset{"access_token": s.access, "refresh_token": "rt-2", "token_type": "Bearer", "expires_in": 60}
		if s.id != "" {
			a["id_token"] = s.id
		}
		answer(a)
	case "/userinfo":
		if s.userinfo == "" {
			w.WriteHeader(http.StatusNotFound)
		}
		io.WriteString(w, s.userinfo)
	default:
		w.WriteHeader(http.StatusNotFound)
	}
}

// sign makes a JWT of the usual claims changed by change.
func (s *stranger) sign(alg jose.SignatureAlgorithm, key any, change claimset) string {
	s.t.Helper()
	now := time.Now()
	c := claimset{"iss": s.issuer, "aud": "hub", "sub": "u1", "iat": now.Unix(), "exp": now.Add(time.Minute).Unix()}
	for k, v := range change {
		if c[k] = v; v == nil {
			delete(c, k)
		}
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: jose.JSONWebKey{Key: key, KeyID: "k1"}}, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	token, err := jwt.Signed(signer).Claims(c).Serialize()
	if err != nil {
		s.t.Fatal(err)
	}
	return token
}

func (s *stranger) token(change claimset) string { return s.sign(jose.RS256, s.key, change) }

// client is ours, with roles from the usual claims.
func (s *stranger) client(change func(*oauthprovider.Config)) *oauthprovider.Provider {
	s.t.Helper()
	cfg := oauthprovider.Config{
		Name: "lab", Issuer: s.issuer, ClientID: "hub", ClientSecret: broker.NewSecret("s"),
		Roles: []string{"roles", "groups", "realm_access.roles"},
	}
	if change != nil {
		change(&cfg)
	}
	p, err := oauthprovider.New(cfg)
	if err != nil {
		s.t.Fatal(err)
	}
	return p
}

func (s *stranger) login(p *oauthprovider.Provider) (broker.Identity, broker.Issued, error) {
	return p.Login(s.t.Context(), broker.CodeGrant{Code: broker.NewSecret("c"), Verifier: broker.NewSecret("v"), RedirectURI: callback})
}

const callback = "http://127.0.0.1:8000/hub/oauth_callback"

// hashOf is the at_hash of an access token under RS256.
func hashOf(access string) string {
	sum := sha256.Sum256([]byte(access))
	return base64.RawURLEncoding.EncodeToString(sum[:16])
}

// unsigned is a JWT with alg none.
func unsigned(c claimset) string {
	body, _ := json.Marshal(c)
	return base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none"}`)) + "." + base64.RawURLEncoding.EncodeToString(body) + "."
}

func TestALoginBelievesOnlyAnIDTokenThatHolds(t *testing.T) {
	other, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	s := newStranger(t)
	public := s.key.Public().(*rsa.PublicKey).N.Bytes()
	for _, tt := range []struct {
		why, id string
		reason  string // empty: it holds
	}{
		{"as it should be", s.token(nil), ""},
		{"one of several audiences", s.token(claimset{"aud": []string{"hub", "api"}, "azp": "hub"}), ""},
		{"with the hash of its access token", s.token(claimset{"at_hash": hashOf("opaque")}), ""},
		{"ended a moment ago by our clock", s.token(claimset{"exp": time.Now().Add(-time.Minute).Unix()}), ""},
		{"ended an hour ago", s.token(claimset{"exp": time.Now().Add(-time.Hour).Unix()}), "it has expired"},
		{"without an end", s.token(claimset{"exp": nil}), "it has expired"},
		{"for another client", s.token(claimset{"aud": "other"}), "not for the configured client"},
		{"issued to another client", s.token(claimset{"aud": []string{"hub", "other"}, "azp": "other"}), "to another client"},
		{"of another issuer", s.token(claimset{"iss": "https://evil.example"}), "not of the configured issuer"},
		{"of the issuer with a slash", s.token(claimset{"iss": s.issuer + "/"}), "not of the configured issuer"},
		{"with the hash of another access token", s.token(claimset{"at_hash": hashOf("other")}), "another access token"},
		{"signed by another key", s.sign(jose.RS256, other, nil), "signature does not hold"},
		{"signed with the public key as a shared secret", s.sign(jose.HS256, public, nil), "signature does not hold"},
		{"signed with the client secret", s.sign(jose.HS256, bytes.Repeat([]byte("s"), 32), nil), "signature does not hold"},
		{"unsigned", unsigned(claimset{"iss": s.issuer, "aud": "hub", "sub": "u1", "exp": time.Now().Add(time.Minute).Unix()}), "signature does not hold"},
		{"garbage", "eyJ.eyJ.x", "not of the configured issuer"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			s.t, s.id = t, tt.id
			who, got, err := s.login(s.client(nil))
			if tt.reason == "" {
				if err != nil || who.Sub != "u1" {
					t.Errorf("got %q, %v", who.Sub, err)
				}
				return
			}
			var e *broker.Error
			if !errors.As(err, &e) || e.Sentence != "the identity that lab sent could not be verified" || !strings.Contains(err.Error(), tt.reason) {
				t.Errorf("got %v, want a sentence for the user and %q for the operator", err, tt.reason)
			}
			if who.Sub != "" || got.RefreshToken.Reveal() != "rt-2" {
				t.Errorf("got subject %q, refresh token to revoke: %t", who.Sub, !got.RefreshToken.IsZero())
			}
		})
	}
}

func TestWithoutKeysALoginFailsButARefreshIsKept(t *testing.T) {
	s := newStranger(t)
	s.keysStatus = http.StatusBadGateway
	s.id = s.token(claimset{"roles": []string{"x"}})
	_, _, err := s.login(s.client(nil))
	wantClass(t, err, broker.TryLater, "keys_unavailable")
	_, _, err = s.client(nil).Refresh(t.Context(), broker.NewSecret("rt-1"), "", nil)
	wantClass(t, err, broker.Lost, "keys_unavailable") // whose it is could not be told, but it is spent
	who, got, err := s.client(nil).Refresh(t.Context(), broker.NewSecret("rt-1"), "u1", nil)
	if err != nil || got.RefreshToken.Reveal() != "rt-2" || who.Known {
		t.Errorf("got new refresh token %t, roles known %t, error %v", !got.RefreshToken.IsZero(), who.Known, err)
	}
}

func TestWithoutAnIDTokenUserinfoSaysWho(t *testing.T) {
	s := newStranger(t)
	s.userinfo = `{"sub":"u7","preferred_username":"ann","roles":["x"]}`
	who, _, err := s.login(s.client(nil))
	if diff := cmp.Diff(broker.Identity{Sub: "u7", Username: "ann", Roles: []string{"roles/x"}, Known: true}, who); diff != "" || err != nil {
		t.Errorf("error %v (-want +got):\n%s", err, diff)
	}
	for _, body := range []string{`{"name":"ann"}`, `{"sub":""}`} {
		s.userinfo = body
		_, _, err = s.login(s.client(nil))
		if !errors.Is(err, broker.ErrDenied) || !strings.Contains(err.Error(), "did not say who logged in") {
			t.Errorf("userinfo %s: got %v", body, err)
		}
	}
	for _, body := range []string{``, `<html>`, `[]`, `{"sub":7}`} {
		s.userinfo = body
		_, _, err = s.login(s.client(nil))
		wantClass(t, err, broker.TryLater, "userinfo_unavailable")
	}
	s.document = claimset{"userinfo_endpoint": nil}
	_, _, err = s.login(s.client(nil))
	if !errors.Is(err, broker.ErrDenied) {
		t.Errorf("neither ID token nor userinfo: got %v", err)
	}
	// An access token speaks to services, and may name them another subject.
	s.access = s.token(nil)
	if _, _, err = s.login(s.client(nil)); !errors.Is(err, broker.ErrDenied) {
		t.Errorf("nothing but an access token: got %v", err)
	}
}

func TestARefreshComparesTheSubject(t *testing.T) {
	s := newStranger(t)
	other := claimset{"sub": "u2"}
	for _, tt := range []struct {
		why, id, access string
		changed         bool
	}{
		{"the ID token names the same", s.token(nil), "opaque", false},
		{"the ID token names the same, the access token another (pairwise)", s.token(nil), s.token(other), false},
		{"the ID token names another", s.token(other), "opaque", true},
		{"an ID token that doesn't hold names another", s.token(claimset{"sub": "u2", "aud": "x"}), "opaque", true},
		{"only the access token names another", "", s.token(other), true},
		{"an access token of another issuer names another", "", s.token(claimset{"sub": "u2", "iss": "https://x.example"}), false},
		{"an access token of another client names another", "", s.token(claimset{"sub": "u2", "azp": "x"}), false},
		{"nothing names anybody", "", "opaque", false},
	} {
		t.Run(tt.why, func(t *testing.T) {
			s.t, s.id, s.access = t, tt.id, tt.access
			who, got, err := s.client(nil).Refresh(t.Context(), broker.NewSecret("rt-1"), "u1", nil)
			if got.RefreshToken.Reveal() != "rt-2" {
				t.Error("the answer is lost")
			}
			if tt.changed {
				wantClass(t, err, broker.Dead, "subject_changed")
				return
			}
			if err != nil || who.Sub != "u1" {
				t.Errorf("got %q, %v", who.Sub, err)
			}
		})
	}
}

func TestRolesComeFromTheFirstTokenThatHasThem(t *testing.T) {
	s := newStranger(t)
	realm := claimset{"roles": []any{"b", "a", 7, nil, "a"}}
	for _, tt := range []struct {
		why, profile     string
		id, access       claimset // nil: no such token, or an opaque one
		userinfo         string
		roles            []string
		known, askedUser bool
	}{
		{"ID token", "keycloak", claimset{"roles": []string{"x"}}, nil, "", []string{"roles/x"}, true, false},
		{"a claim that is one string", "keycloak", claimset{"roles": "x y"}, nil, "", []string{"roles/x y"}, true, false},
		{"a claim inside another", "keycloak", claimset{"realm_access": realm}, nil, "", []string{"realm_access.roles/a", "realm_access.roles/b"}, true, false},
		{"a name with a dot", "keycloak", claimset{"realm_access.roles": []string{"x"}}, nil, "", []string{"realm_access.roles/x"}, true, false},
		{"access token for what the ID token lacks", "keycloak", claimset{"groups": []string{"/g"}}, claimset{"realm_access": realm, "groups": []string{"/h"}}, "",
			[]string{"groups//g", "realm_access.roles/a", "realm_access.roles/b"}, true, false},
		{"an access token of another issuer tells nothing", "keycloak", claimset{}, claimset{"iss": "https://x.example", "roles": []string{"x"}}, "", nil, true, false},
		{"only an access token", "keycloak", nil, claimset{"roles": []string{"x"}}, "", []string{"roles/x"}, true, false},
		{"absent means none", "keycloak", claimset{}, nil, "", nil, true, false},
		{"no claims at all", "keycloak", nil, nil, "", nil, false, true},
		{"no tokens to read, but userinfo", "keycloak", nil, nil, `{"sub":"u1","roles":["x"]}`, []string{"roles/x"}, true, true},
		{"generic: userinfo for what the tokens lack", "generic", claimset{"roles": []string{"x"}}, nil, `{"sub":"u1","groups":["g"],"roles":["y"]}`, []string{"groups/g", "roles/x"}, true, true},
		{"generic: userinfo doesn't answer", "generic", claimset{"roles": []string{"x"}}, nil, ``, nil, false, true},
		{"generic: userinfo of somebody else", "generic", claimset{"roles": []string{"x"}}, nil, `{"sub":"u2","groups":["g"]}`, nil, false, true},
		{"generic: the tokens have all", "generic", claimset{"roles": []string{"x"}, "groups": []string{}, "realm_access": realm}, nil, "",
			[]string{"realm_access.roles/a", "realm_access.roles/b", "roles/x"}, true, false},
	} {
		t.Run(tt.why, func(t *testing.T) {
			s.t, s.id, s.access, s.userinfo, s.asked = t, "", "opaque", tt.userinfo, map[string]int{}
			if tt.id != nil {
				s.id = s.token(tt.id)
			}
			if tt.access != nil {
				s.access = s.token(tt.access)
			}
			who, _, err := s.client(func(c *oauthprovider.Config) { c.Profile = tt.profile }).Refresh(t.Context(), broker.NewSecret("rt-1"), "u1", nil)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.roles, who.Roles); diff != "" || who.Known != tt.known {
				t.Errorf("known %t, want %t; roles (-want +got):\n%s", who.Known, tt.known, diff)
			}
			if asked := s.asked["/userinfo"] > 0; asked != tt.askedUser {
				t.Errorf("userinfo was asked: %t", asked)
			}
		})
	}
}

func TestAnAccessTokenSpeaksForItself(t *testing.T) {
	s := newStranger(t)
	now := time.Now().Unix()
	for _, tt := range []struct {
		why    string
		claims claimset
		want   broker.Issued
	}{
		{"scope, several audiences, shorter than the answer says", claimset{"scope": "read write", "aud": []string{"b", "a"}, "iat": now, "exp": now + 30},
			broker.Issued{ExpiresIn: 30 * time.Second, Scopes: []string{"read", "write"}, ScopesKnown: true, Audience: []string{"a", "b"}, AudienceKnown: true}},
		{"longer than the answer says", claimset{"aud": "a", "exp": now + 3600},
			broker.Issued{ExpiresIn: time.Minute, Audience: []string{"a"}, AudienceKnown: true}},
		{"the answer has cut the second that has begun", claimset{"aud": "a", "iat": now, "exp": now + 61},
			broker.Issued{ExpiresIn: 61 * time.Second, Audience: []string{"a"}, AudienceKnown: true}},
		{"a clock an hour ahead", claimset{"aud": "a", "iat": now + 3600, "exp": now + 3630},
			broker.Issued{ExpiresIn: 30 * time.Second, Audience: []string{"a"}, AudienceKnown: true}},
		{"scp as a list, no audience", claimset{"scp": []string{"write", "read"}, "aud": nil, "exp": nil},
			broker.Issued{ExpiresIn: time.Minute, Scopes: []string{"read", "write"}, ScopesKnown: true, AudienceKnown: true}},
		{"already over", claimset{"aud": "a", "iat": now, "exp": now - 30},
			broker.Issued{ExpiresIn: 1, Audience: []string{"a"}, AudienceKnown: true}},
	} {
		s.access = s.token(tt.claims)
		_, got, err := s.client(nil).Refresh(t.Context(), broker.NewSecret("rt-1"), "u1", nil)
		if err != nil {
			t.Errorf("%s: %v", tt.why, err)
		}
		got.AccessToken, got.RefreshToken, got.IDToken, got.TokenType = broker.Secret{}, broker.Secret{}, broker.Secret{}, ""
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.why, diff)
		}
	}
}

func TestTheDiscoveryDocumentMustNameTheIssuer(t *testing.T) {
	s := newStranger(t)
	s.id = s.token(nil)
	elsewhere := func(c *oauthprovider.Config) { c.DiscoveryURL = s.issuer + "/.well-known/openid-configuration" }
	if _, _, err := s.login(s.client(elsewhere)); err != nil {
		t.Errorf("found elsewhere, with the right issuer: %v", err)
	}
	base := func(c *oauthprovider.Config) { c.DiscoveryURL = s.issuer + "/" }
	if _, _, err := s.login(s.client(base)); err != nil {
		t.Errorf("found under a base URL: %v", err)
	}

	s.document = claimset{"issuer": "https://evil.example"}
	for _, change := range []func(*oauthprovider.Config){nil, elsewhere} {
		p := s.client(change)
		_, _, err := s.login(p)
		wantClass(t, err, broker.Misconfigured, "issuer_mismatch")
		wantClass(t, p.Check(t.Context()), broker.Misconfigured, "issuer_mismatch")
	}
	s.document = claimset{"issuer": s.issuer + "/"}
	_, _, err := s.login(s.client(nil))
	wantClass(t, err, broker.Misconfigured, "issuer_mismatch")
	s.document = claimset{"token_endpoint": nil}
	_, _, err = s.login(s.client(nil))
	wantClass(t, err, broker.TryLater, "discovery_unreadable")
	wantClass(t, s.client(func(c *oauthprovider.Config) { c.DiscoveryURL = s.issuer + "/nowhere/.well-known/x" }).Check(t.Context()), broker.Misconfigured, "discovery_not_found")
	s.document = claimset{"token_endpoint": "file:///etc/passwd"}
	_, _, err = s.login(s.client(nil))
	wantClass(t, err, broker.Misconfigured, "endpoint_unsafe")
	if s.asked["/token"] != 2 {
		t.Errorf("the code was sent %d times, want 2: to those that named the issuer", s.asked["/token"])
	}
}

func TestAnHTTPSDocumentCannotSendUsToHTTP(t *testing.T) {
	s := newStranger(t)
	ts := httptest.NewTLSServer(http.HandlerFunc(s.ServeHTTP))
	defer ts.Close()
	ts.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	plain := s.issuer
	s.issuer = ts.URL
	s.document = claimset{"token_endpoint": plain + "/token"}
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ts.Certificate().Raw}), 0o644); err != nil {
		t.Fatal(err)
	}
	trust := func(c *oauthprovider.Config) { c.CAFile = file }
	_, _, err := s.login(s.client(trust))
	wantClass(t, err, broker.Misconfigured, "endpoint_unsafe")
	s.document, s.id = nil, s.token(nil)
	if who, _, err := s.login(s.client(trust)); err != nil || who.Sub != "u1" {
		t.Errorf("all by https: got %q, %v", who.Sub, err)
	}
}

func TestDiscoveryOffersAndWeChoose(t *testing.T) {
	s := newStranger(t)
	s.document = claimset{"token_endpoint_auth_methods_supported": []string{"client_secret_post", "private_key_jwt"}}
	var basic bool
	s.issuer = serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/token" {
			_, _, basic = r.BasicAuth()
		}
		s.ServeHTTP(w, r)
	})
	s.id = s.token(nil)
	if _, _, err := s.login(s.client(nil)); err != nil || basic {
		t.Errorf("only client_secret_post is offered: Basic was used: %t, error %v", basic, err)
	}
}
