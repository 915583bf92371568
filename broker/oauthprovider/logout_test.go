package oauthprovider_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/go-cmp/cmp"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
	"tokenbroker/broker/oauthprovider"
	"tokenbroker/broker/seal"
)

const (
	issuer      = "https://idp.example"
	logoutEvent = "http://schemas.openid.net/event/backchannel-logout"
)

// A handed request goes to a handler without a network, so that it works in a
// synctest bubble.
type handed struct{ to http.Handler }

func (h handed) RoundTrip(r *http.Request) (*http.Response, error) {
	w := httptest.NewRecorder()
	h.to.ServeHTTP(w, r)
	return w.Result(), nil
}

// A logoutRig is a broker whose provider is a stranger, in a bubble. Alice has
// logged in there.
type logoutRig struct {
	*stranger
	*broker.Broker
	provider *oauthprovider.Provider
	store    *brokertest.MemStore
	audit    brokertest.Buffer // brokers also write to it by themselves
	log      bytes.Buffer
}

func inLogoutRig(t *testing.T, profile string, f func(t *testing.T, r *logoutRig)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		key, err := theKey()
		if err != nil {
			t.Fatal(err)
		}
		r := &logoutRig{stranger: &stranger{t: t, key: key, access: "opaque", asked: map[string]int{}, issuer: issuer}, store: brokertest.NewMemStore()}
		r.document = claimset{"introspection_endpoint": r.issuer + "/introspect"}
		r.provider = r.client(func(c *oauthprovider.Config) { c.Profile = profile })
		r.provider.Via(handed{r.stranger})
		r.id = r.token(claimset{"sid": "session-1"})
		r.start(t)
		defer r.Close()
		login, err := r.Login(t.Context(), "main", "lab", broker.CodeGrant{Code: broker.NewSecret("c"), Verifier: broker.NewSecret("v"), RedirectURI: callback})
		if err == nil {
			_, err = r.Claim(t.Context(), "main", "lab", login.Handle, "alice")
		}
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute) // the keys may be asked for again
		f(t, r)
	})
}

func (r *logoutRig) start(t *testing.T) {
	t.Helper()
	keys, err := seal.New()
	if err != nil {
		t.Fatal(err)
	}
	r.Broker, err = broker.New(broker.Config{
		Deployment: "lab", Host: "host1", Contact: "it@lab.example",
		Hubs:      map[broker.HubID]broker.Hub{"main": {Login: "lab"}},
		Providers: []broker.Provider{r.provider},
		Store:     r.store, Keys: keys, Attestor: brokertest.NewAttestor(), Sockets: brokertest.NewSockets(),
		Audit: &r.audit, Log: slog.New(slog.NewTextHandler(&r.log, nil)), Journal: filepath.Join(t.TempDir(), "journal"),
	})
	if err == nil {
		err = r.Start(context.Background())
	}
	if err != nil {
		t.Fatal(err)
	}
	synctest.Wait()
}

// grant is alice's.
func (r *logoutRig) grant() broker.Grant {
	r.t.Helper()
	all, err := r.Grants(context.Background(), "main", "alice")
	if err != nil || len(all) != 1 {
		r.t.Fatalf("the grants are %v, %v", all, err)
	}
	return all[0]
}

// claims are a logout token's as Keycloak sends them, changed by change; nil
// values remove one.
func (r *logoutRig) claims(change claimset) claimset {
	c := changed(claimset{
		"iss": issuer, "aud": "hub", "sub": "u1", "sid": "session-1", "jti": "1", "typ": "Logout",
		"iat": in(0), "exp": in(120), "events": claimset{logoutEvent: claimset{}},
	}, change)
	for name, v := range c {
		if t, ok := v.(in); ok {
			c[name] = time.Now().Unix() + int64(t)
		}
	}
	return c
}

func changed(c, change claimset) claimset {
	maps.Copy(c, change)
	maps.DeleteFunc(c, func(_ string, v any) bool { return v == nil })
	return c
}

// said is a logout token, its head and claims changed, signed by the provider.
func (r *logoutRig) said(head, change claimset) string {
	return r.saidBy(r.key, head, r.claims(change))
}

func (r *logoutRig) saidBy(key *rsa.PrivateKey, head claimset, payload any) string {
	return signed(r.t, key, mustJSON(r.t, headOf(head)), mustJSON(r.t, payload))
}

// signed is a JWS by RS256, whatever its head says.
func signed(t *testing.T, key *rsa.PrivateKey, head, payload string) string {
	t.Helper()
	text := dotted(head, payload)
	sum := sha256.Sum256([]byte(text))
	mark, err := rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	return text + "." + base64.RawURLEncoding.EncodeToString(mark)
}

func headOf(change claimset) claimset {
	return changed(claimset{"alg": "RS256", "typ": "logout+jwt", "kid": "k1"}, change)
}

func dotted(head, payload string) string {
	e := base64.RawURLEncoding.EncodeToString
	return e([]byte(head)) + "." + e([]byte(payload))
}

// unsigned is a token up to its signature.
func (r *logoutRig) unsigned(head claimset, payload any) string {
	r.t.Helper()
	return dotted(mustJSON(r.t, headOf(head)), mustJSON(r.t, payload))
}

// withSecret signs with a shared secret.
func (r *logoutRig) withSecret(secret []byte) string {
	text := r.unsigned(claimset{"alg": "HS256"}, r.claims(nil))
	mac := hmac.New(sha256.New, secret)
	mac.Write([]byte(text))
	return text + "." + base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
}

// hear gives a logout token to the broker, and returns what the audit says of it.
func (r *logoutRig) hear(token string) (broker.Entry, error) {
	r.t.Helper()
	ref, err := r.ProviderLogout(context.Background(), "lab", broker.NewSecret(token))
	var told *broker.Error
	if errors.As(err, &told) {
		ref = told.Ref
	}
	for line := range strings.Lines(r.audit.String()) {
		var e broker.Entry
		if json.Unmarshal([]byte(line), &e) == nil && e.Ref == ref && e.Action == "provider_logout" {
			return e, err
		}
	}
	r.t.Fatalf("the audit has no line %s", ref)
	return broker.Entry{}, err
}

// in is a time in a claim: so many seconds from now.
type in int64

// A badLogout is a token that must not be followed, and the reason to be logged.
type badLogout struct {
	why          string
	head, claims claimset
	made         func(r *logoutRig) string // in another way
	reason       string
}

var badLogouts = []badLogout{
	{why: "nothing", made: text("x"), reason: "not a signed JWT"},
	{why: "two dots", made: text(".."), reason: "not a signed JWT"},
	{why: "no JSON", made: text("eyJ.eyJ.x"), reason: "not a signed JWT"},
	{why: "four parts", made: parts("%s.%s.%s.x"), reason: "not a signed JWT"},
	{why: "five parts, as if encrypted", made: parts("%s.%s.%s.x.y"), reason: "not a signed JWT"},
	{why: "JSON serialization", made: parts(`{"protected":%q,"payload":%q,"signature":%q}`), reason: "not a signed JWT"},
	{why: "claims that are a list", made: func(r *logoutRig) string { return r.saidBy(r.key, nil, []string{"x"}) }, reason: "not a signed JWT"},
	{why: "claims that are null", made: func(r *logoutRig) string { return r.saidBy(r.key, nil, nil) }, reason: "not a signed JWT"},

	{why: "no signature", made: func(r *logoutRig) string { return r.unsigned(claimset{"alg": "none"}, r.claims(nil)) + "." }, reason: "(alg)"},
	{why: "alg none in other letters", made: func(r *logoutRig) string { return r.unsigned(claimset{"alg": "nOnE"}, r.claims(nil)) + "." }, reason: "(alg)"},
	{why: "alg none with a signature", head: claimset{"alg": "none"}, reason: "(alg)"},
	{why: "no alg", head: claimset{"alg": nil}, reason: "(alg)"},
	{why: "the client's secret as key", made: func(r *logoutRig) string { return r.withSecret([]byte("s")) }, reason: "(alg)"},
	{why: "the public key as secret", made: func(r *logoutRig) string { return r.withSecret(r.key.N.Bytes()) }, reason: "(alg)"},
	{why: "an algorithm that the provider does not offer", head: claimset{"alg": "PS256"}, reason: "signature does not hold"},
	{why: "the algorithm's other hash", head: claimset{"alg": "RS512"}, reason: "signature does not hold"},
	{why: "a signature that is cut off", made: parts("%s.%s.%.0s"), reason: "signature does not hold"},
	{why: "another token's signature", made: func(r *logoutRig) string {
		return r.unsigned(nil, r.claims(claimset{"sub": "u2"})) + r.said(nil, nil)[strings.LastIndex(r.said(nil, nil), "."):]
	}, reason: "signature does not hold"},
	{why: "a critical extension that nobody knows", head: claimset{"crit": []string{"x"}, "x": 1}, reason: "signature does not hold"},
	{why: "another's key under the provider's kid", made: byAnother(nil), reason: "signature does not hold"},
	{why: "another's key that it brings along", made: byAnother(func(key jose.JSONWebKey) claimset { return claimset{"jwk": key, "kid": nil} }), reason: "signature does not hold"},
	{why: "another's key that it says where to find", made: byAnother(func(jose.JSONWebKey) claimset { return claimset{"jku": "https://evil.example/keys", "kid": nil} }), reason: "signature does not hold"},
	{why: "an unknown kid", head: claimset{"kid": "k9"}, reason: "signature does not hold"},

	{why: "typ of an access token", head: claimset{"typ": "at+jwt"}, reason: "(typ)"},
	{why: "typ of a security event", head: claimset{"typ": "secevent+jwt"}, reason: "(typ)"},
	{why: "typ of any JWT", head: claimset{"typ": "JWT"}, reason: "(typ)"},
	{why: "no typ", head: claimset{"typ": nil}, reason: "(typ)"},
	{why: "an empty typ", head: claimset{"typ": ""}, reason: "(typ)"},
	{why: "typ that is no text", head: claimset{"typ": []string{"logout+jwt"}}, reason: "(typ)"},
	{why: "an ID token of the same key", made: func(r *logoutRig) string { return r.token(claimset{"sid": "session-1"}) }, reason: "(typ)"},

	{why: "another issuer", claims: claimset{"iss": "https://evil.example"}, reason: "(iss)"},
	{why: "the issuer with a slash", claims: claimset{"iss": issuer + "/"}, reason: "(iss)"},
	{why: "the issuer in other letters", claims: claimset{"iss": strings.ToUpper(issuer)}, reason: "(iss)"},
	{why: "the claim in other letters", claims: claimset{"iss": nil, "ISS": issuer}, reason: "(iss)"},
	{why: "a list of issuers", claims: claimset{"iss": []string{issuer}}, reason: "(iss)"},
	{why: "no issuer", claims: claimset{"iss": nil}, reason: "(iss)"},
	{why: "another client", claims: claimset{"aud": "other"}, reason: "(aud)"},
	{why: "other clients", claims: claimset{"aud": []string{"other", "hub2"}}, reason: "(aud)"},
	{why: "no client", claims: claimset{"aud": nil}, reason: "(aud)"},
	{why: "the client as azp only", claims: claimset{"aud": "other", "azp": "hub"}, reason: "(aud)"},

	{why: "no time", claims: claimset{"iat": nil}, reason: "(iat)"},
	{why: "a time in words", claims: claimset{"iat": "now"}, reason: "(iat)"},
	{why: "made in an hour", claims: claimset{"iat": in(3600), "exp": in(3720)}, reason: "in the future"},
	{why: "made in three minutes", claims: claimset{"iat": in(180)}, reason: "in the future"},
	{why: "made at the end of time", claims: claimset{"iat": json.Number("1e300")}, reason: "in the future"},
	{why: "made before time", claims: claimset{"iat": json.Number("-1e300")}, reason: "too old"},
	{why: "a year old", claims: claimset{"iat": in(-365 * 86400)}, reason: "too old"},
	{why: "five minutes old, and says it may be", claims: claimset{"iat": in(-300), "exp": in(3600)}, reason: "too old"},
	{why: "five minutes old, without an end", claims: claimset{"iat": in(-300), "exp": nil}, reason: "too old"},
	{why: "ended two minutes ago", claims: claimset{"iat": in(-200), "exp": in(-121)}, reason: "too old"},
	{why: "an end that is no time", claims: claimset{"exp": "soon"}, reason: "(exp)"},
	{why: "an end that is null", claims: claimset{"exp": json.RawMessage("null")}, reason: "(exp)"},

	{why: "no jti", claims: claimset{"jti": nil}, reason: "(jti)"},
	{why: "an empty jti", claims: claimset{"jti": ""}, reason: "(jti)"},
	{why: "jti that is a number", claims: claimset{"jti": 7}, reason: "(jti)"},

	{why: "no events", claims: claimset{"events": nil}, reason: "(events)"},
	{why: "no event in them", claims: claimset{"events": claimset{}}, reason: "(events)"},
	{why: "another event", claims: claimset{"events": claimset{"https://schemas.openid.net/secevent/caep/event-type/session-revoked": claimset{}}}, reason: "(events)"},
	{why: "events as a list", claims: claimset{"events": []string{logoutEvent}}, reason: "(events)"},
	{why: "an event that is true", claims: claimset{"events": claimset{logoutEvent: true}}, reason: "(events)"},
	{why: "an event that is a text", claims: claimset{"events": claimset{logoutEvent: "{}"}}, reason: "(events)"},
	{why: "an event that is null", claims: claimset{"events": claimset{logoutEvent: nil}}, reason: "(events)"},
	{why: "an ID token that calls itself a logout token", claims: claimset{"events": nil, "nonce": "n"}, reason: "(events)"},
	{why: "a nonce", claims: claimset{"nonce": "n"}, reason: "(nonce)"},
	{why: "an empty nonce", claims: claimset{"nonce": ""}, reason: "(nonce)"},
	{why: "a nonce that is null", claims: claimset{"nonce": json.RawMessage("null")}, reason: "(nonce)"},

	{why: "nobody", claims: claimset{"sub": nil, "sid": nil}, reason: "neither a user nor a session"},
	{why: "an empty user", claims: claimset{"sub": ""}, reason: "not a text"},
	{why: "a user who is a number", claims: claimset{"sub": 7}, reason: "not a text"},
	{why: "several users", claims: claimset{"sub": []string{"u1", "u2"}}, reason: "not a text"},
	{why: "a session that is null", claims: claimset{"sid": json.RawMessage("null")}, reason: "not a text"},
}

func text(token string) func(*logoutRig) string { return func(*logoutRig) string { return token } }

// parts makes something else of the three parts of a good token.
func parts(format string) func(*logoutRig) string {
	return func(r *logoutRig) string {
		p := strings.Split(r.said(nil, nil), ".")
		return fmt.Sprintf(format, p[0], p[1], p[2])
	}
}

// byAnother signs a good token by a key of somebody's; head changes its head.
func byAnother(head func(jose.JSONWebKey) claimset) func(*logoutRig) string {
	return func(r *logoutRig) string {
		key, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			r.t.Fatal(err)
		}
		var change claimset
		if head != nil {
			change = head(jose.JSONWebKey{Key: &key.PublicKey})
		}
		return r.saidBy(key, change, r.claims(nil))
	}
}

func (bad *badLogout) token(r *logoutRig) string {
	if bad.made != nil {
		return bad.made(r)
	}
	return r.said(bad.head, bad.claims)
}

// Of each kind of bad token the reason is logged, nothing of the token is, and
// nothing else happens.
func TestALogoutTokenThatDoesNotHoldIsRefusedWithItsReason(t *testing.T) {
	inLogoutRig(t, "generic", func(t *testing.T, r *logoutRig) {
		logged := map[string]bool{} // an equal one is only counted
		for _, bad := range badLogouts {
			token, before := bad.token(r), r.grant()
			r.log.Reset()
			keys := r.asked["/keys"]
			e, err := r.hear(token)
			if !errors.Is(err, broker.ErrInvalid) || e.Outcome != "refused" || !strings.Contains(e.Reason, bad.reason) || !logged[e.Reason] && !strings.Contains(r.log.String(), bad.reason) {
				t.Fatalf("%s: %v; the audit says %q, want %q", bad.why, err, e.Reason, bad.reason)
			}
			logged[e.Reason] = true
			if asked := r.asked["/keys"] > keys; asked && bad.reason != "signature does not hold" {
				t.Errorf("%s: the keys were asked for", bad.why)
			}
			for _, word := range []string{"eyJ", "evil", "u1", "u2", "session-1", "k9", "at+jwt"} {
				if strings.Contains(r.log.String()+e.Reason+e.Sub+err.Error(), word) {
					t.Errorf("%s: %q is repeated: %s", bad.why, word, r.log.String())
				}
			}
			time.Sleep(6 * time.Second) // looks would have come
			if diff := cmp.Diff(before, r.grant(), cmp.AllowUnexported(broker.Secret{})); diff != "" {
				t.Errorf("%s: the grant changed:\n%s", bad.why, diff)
			}
			time.Sleep(time.Minute) // the keys may be asked for again
		}
		if r.asked["/token"] != 1 || r.asked["/introspect"] != 0 { // the login
			t.Errorf("the provider was asked: %v", r.asked)
		}
		r.store.Each(func(k broker.Key, _ broker.Record) {
			if k.Kind == "logout" {
				t.Errorf("%s was remembered", k)
			}
		})
	})
}

func TestLogoutTokensOfSeveralProvidersHold(t *testing.T) {
	for _, tt := range []struct {
		why, profile string
		head, claims claimset
		session      string // of alice's login that it does not end, if any
	}{
		{why: "Keycloak 26.5.5", profile: "keycloak"},
		{why: "Keycloak 26.5.5, with offline tokens to be revoked", profile: "keycloak", claims: claimset{"events": claimset{logoutEvent: claimset{}, "revoke_offline_access": true}}},
		{why: "an older Keycloak", profile: "keycloak", head: claimset{"typ": "JWT"}, claims: claimset{"exp": nil}},
		{why: "an older Keycloak, without a typ", profile: "keycloak", head: claimset{"typ": nil}, claims: claimset{"exp": nil, "typ": "Logout"}},
		{why: "npm oidc-provider", profile: "generic", claims: claimset{"typ": nil}},
		{why: "the specification's example", profile: "generic", claims: claimset{"typ": nil, "sid": nil}},
		{why: "a media type", profile: "generic", head: claimset{"typ": "application/Logout+JWT"}},
		{why: "several clients", profile: "generic", claims: claimset{"aud": []string{"other", "hub"}}},
		{why: "a session without a user", profile: "generic", claims: claimset{"sub": nil}},
		{why: "no end", profile: "generic", claims: claimset{"exp": nil}},
		{why: "an end in an hour", profile: "generic", claims: claimset{"exp": in(3600)}},
		{why: "a clock 100 s behind", profile: "generic", claims: claimset{"iat": in(-100), "exp": in(-40)}},
		{why: "a clock 100 s ahead", profile: "generic", claims: claimset{"iat": in(100), "exp": in(220)}},
		{why: "parts of a second", profile: "generic", claims: claimset{"iat": json.Number("946684860.25"), "exp": nil}},
		{why: "no kid", profile: "generic", head: claimset{"kid": nil}},
		{why: "another session", profile: "generic", claims: claimset{"sid": "session-2"}, session: "session-1"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			inLogoutRig(t, tt.profile, func(t *testing.T, r *logoutRig) {
				e, err := r.hear(r.said(tt.head, tt.claims))
				if err != nil || e.Outcome != "done" || e.User != "alice" || e.Sub != "u1" {
					t.Fatalf("%v: the audit says %+v", err, e)
				}
				if g := r.grant(); (g.State == broker.Live) != (tt.session != "") || g.Session != "session-1" {
					t.Errorf("the grant is %s, of session %q", g.State, g.Session)
				}
			})
		})
	}
}

// Who can send tokens can't have the provider asked for its keys by them.
func TestAFloodOfUnknownKeysAsksForTheKeysTwiceAMinuteAtMost(t *testing.T) {
	inLogoutRig(t, "keycloak", func(t *testing.T, r *logoutRig) {
		began, before := time.Now(), r.asked["/keys"]
		for i := range 1000 {
			token := r.said(claimset{"kid": fmt.Sprint("k-", i)}, claimset{"jti": fmt.Sprint(i)})
			if _, err := r.hear(token); !errors.Is(err, broker.ErrInvalid) {
				t.Fatal(err)
			}
			time.Sleep(100 * time.Millisecond)
		}
		most := 1 + int(time.Since(began)/(30*time.Second))
		if n := r.asked["/keys"] - before; n != most {
			t.Errorf("the keys were asked for %d times in %s, want %d", n, time.Since(began), most)
		}
		// Those that hold are followed meanwhile, and logins are not held up.
		if e, err := r.hear(r.said(nil, nil)); err != nil {
			t.Errorf("a good token in the flood: %+v, %v", e, err)
		}
		if _, _, err := r.login(r.client(func(c *oauthprovider.Config) {})); err == nil {
			t.Error("this client has no way to the provider")
		}
		r.id = r.token(nil)
		if _, _, err := r.login(r.provider); err != nil {
			t.Errorf("a login in the flood: %v", err)
		}
	})
}

// A provider that changes its keys is believed with the new ones.
func TestALogoutTokenBringsNewKeys(t *testing.T) {
	inLogoutRig(t, "keycloak", func(t *testing.T, r *logoutRig) {
		if _, err := r.hear(r.said(nil, claimset{"sid": "session-2"})); err != nil {
			t.Fatal(err)
		}
		key, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		synctest.Wait() // for the looks
		r.key = key
		if e, err := r.hear(r.said(nil, claimset{"jti": "2"})); err != nil {
			t.Errorf("%+v, %v", e, err)
		}
	})
}

// What can't be asked at the moment is no reason to call a token bad.
func TestWithoutKeysALogoutTokenIsRefusedForTheMoment(t *testing.T) {
	inLogoutRig(t, "keycloak", func(t *testing.T, r *logoutRig) {
		r.keysStatus = http.StatusBadGateway
		e, err := r.hear(r.said(nil, nil))
		if !errors.Is(err, broker.ErrProviderDown) || !strings.Contains(e.Reason, "keys_unavailable") {
			t.Errorf("%+v, %v", e, err)
		}
		r.keysStatus = 0
		time.Sleep(time.Minute)
		if _, err := r.hear(r.said(nil, nil)); err != nil {
			t.Error(err)
		}
	})
}

// Before anybody has logged in the metadata is not known either.
func TestAFloodOfLogoutTokensAsksForTheMetadataTwiceAMinuteAtMost(t *testing.T) {
	inLogoutRig(t, "keycloak", func(t *testing.T, r *logoutRig) {
		r.document = claimset{"token_endpoint": nil} // it can't be read
		p := r.client(nil)
		p.Via(handed{r.stranger})
		before := r.asked["/.well-known/openid-configuration"]
		for range 100 {
			_, err := p.LogoutToken(t.Context(), broker.NewSecret(r.said(nil, nil)), time.Now())
			wantProviderError(t, err)
			time.Sleep(100 * time.Millisecond)
		}
		if n := r.asked["/.well-known/openid-configuration"] - before; n != 1 {
			t.Errorf("the metadata was asked for %d times in 10 s", n)
		}
		r.document = nil
		time.Sleep(30 * time.Second)
		if l, err := p.LogoutToken(t.Context(), broker.NewSecret(r.said(nil, nil)), time.Now()); err != nil || l.Sub != "u1" {
			t.Errorf("%+v, %v", l, err)
		}
	})
}

func wantProviderError(t *testing.T, err error) {
	t.Helper()
	var pe *broker.ProviderError
	if !errors.As(err, &pe) || pe.Class != broker.TryLater {
		t.Fatalf("got %v, want a ProviderError", err)
	}
}

// A logout token is held against the time that the broker goes by.
func TestALogoutTokenHoldsUntilItIsOver(t *testing.T) {
	inLogoutRig(t, "generic", func(t *testing.T, r *logoutRig) {
		for _, tt := range []struct {
			claims claimset
			until  time.Duration // from when it was made, with the difference that clocks may have
		}{
			{claimset{}, 4 * time.Minute}, {claimset{"exp": in(30)}, 150 * time.Second}, {claimset{"exp": nil}, 4 * time.Minute}, {claimset{"exp": in(3600)}, 4 * time.Minute},
		} {
			made := time.Now()
			token := broker.NewSecret(r.said(nil, tt.claims))
			l, err := r.provider.LogoutToken(t.Context(), token, made)
			if want := (broker.Logout{ID: "1", Sub: "u1", Session: "session-1", Until: made.Add(tt.until)}); err != nil || l != want {
				t.Errorf("%v: got %+v, %v, want %+v", tt.claims, l, err, want)
			}
			for _, off := range []time.Duration{time.Hour, -time.Hour, tt.until + time.Second, -3 * time.Minute} {
				if _, err := r.provider.LogoutToken(t.Context(), token, made.Add(off)); !errors.Is(err, broker.ErrInvalid) {
					t.Errorf("%v, at %s from when it was made: %v", tt.claims, off, err)
				}
			}
		}
	})
}
