package oauthprovider_test

import (
	"encoding/base64"
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"tokenbroker/broker"
	"tokenbroker/broker/oauthprovider"
)

// jwtOf wraps claims into the shape of a signed JWT.
func jwtOf(claims string) string {
	e := base64.RawURLEncoding.EncodeToString
	return e([]byte(`{"alg":"RS256"}`)) + "." + e([]byte(claims)) + ".c2ln"
}

func FuzzTokenAnswer(f *testing.F) {
	for _, vectors := range [][]vector{keycloakVectors, genericVectors} {
		for _, v := range vectors {
			f.Add([]byte(v.body))
		}
	}
	f.Add([]byte(`{"access_token":"` + jwtOf(`{"scope":"a b","aud":["x"],"iat":1,"exp":2}`) + `","expires_in":"3e2"}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		got, ok := oauthprovider.ReadAnswer(body)
		code, _, _ := oauthprovider.ReadError(body)
		if !ok {
			return
		}
		token := got.AccessToken.Reveal()
		switch {
		case token == "" || strings.ContainsFunc(token+got.TokenType, func(r rune) bool { return r < ' ' || r > '~' }):
			t.Errorf("token %q of type %q can't stand in a header", token, got.TokenType)
		case got.ExpiresIn < 0 || got.ExpiresIn > oauthprovider.MaxLife || got.RefreshExpiresIn < 0 || got.RefreshExpiresIn > oauthprovider.MaxLife:
			t.Errorf("lives %v and %v", got.ExpiresIn, got.RefreshExpiresIn)
		case !isSet(got.Scopes) || !isSet(got.Audience):
			t.Errorf("scopes %q or audience %q are no sorted sets", got.Scopes, got.Audience)
		case code != "":
			t.Errorf("a refusal was taken for an answer: %s", body)
		}
	})
}

func FuzzClaims(f *testing.F) {
	for _, c := range []string{
		`{"realm_access":{"roles":["a","b"]},"scope":"x y","aud":"z","exp":1e3}`, `{"a.b":{"c":["d"]},"scp":["x"]}`, `{"a":{"b":1}}`, `[]`, `{}`, `null`, `{} {}`,
	} {
		f.Add(jwtOf(c), "realm_access.roles")
	}
	f.Add("eyJ.eyJ.x.y.z", "a.b.c")
	f.Add("..", ".")
	f.Fuzz(func(t *testing.T, token, path string) {
		list, scopes, ok := oauthprovider.ReadClaims(token, path)
		if !ok && (list != nil || scopes != nil) {
			t.Errorf("something was found in what is no JWT: %q, %q", list, scopes)
		}
		if !isSet(scopes) {
			t.Errorf("scopes %q are no sorted set", scopes)
		}
	})
}

// FuzzLogoutToken sends what anybody may send: any text, and any head and claims
// that the provider signs. What holds must be what a logout token must be.
func FuzzLogoutToken(f *testing.F) {
	key, err := theKey()
	if err != nil {
		f.Fatal(err)
	}
	s := &stranger{issuer: issuer, key: key, asked: map[string]int{}}
	p, err := oauthprovider.New(oauthprovider.Config{Name: "lab", Profile: "keycloak", Issuer: issuer, ClientID: "hub", AuthStyle: "none"})
	if err != nil {
		f.Fatal(err)
	}
	p.Via(handed{http.HandlerFunc(s.ServeHTTP)})
	now := time.Unix(1_000_000_000, 0)
	const good = `{"iss":"` + issuer + `","aud":"hub","iat":1000000000,"exp":1000000120,"jti":"1","sub":"u1","events":{"` + logoutEvent + `":{}}}`
	f.Add(`{"alg":"RS256","typ":"logout+jwt","kid":"k1"}`, good, "eyJ.eyJ.x")
	f.Add(`{"alg":"none","typ":"JWT"}`, strings.Replace(good, `"sub"`, `"nonce":null,"sid"`, 1), jwtOf(good))
	f.Add(`{"alg":"RS256","kid":7,"crit":["exp"]}`, strings.Replace(good, `1000000120`, `1e400`, 1), "..")
	f.Add(`{"alg":"RS256"}`, strings.Replace(good, `"hub"`, `["x",["hub"],"hub"]`, 1), "a.b.c.d.e")
	f.Add(`null`, `[]`, "")
	f.Fuzz(func(t *testing.T, head, claims, token string) {
		if l, err := p.LogoutToken(t.Context(), broker.NewSecret(token), now); err == nil {
			t.Errorf("what nobody has signed holds: %+v", l)
		}
		l, err := p.LogoutToken(t.Context(), broker.NewSecret(signed(t, key, head, claims)), now)
		if err != nil {
			return
		}
		var c map[string]any
		if err := json.Unmarshal([]byte(claims), &c); err != nil {
			t.Fatalf("what is no JSON holds: %v", err)
		}
		_, nonce := c["nonce"]
		if nonce || c["iss"] != issuer || l.ID == "" || c["jti"] != l.ID || l.Sub == "" && l.Session == "" ||
			!l.Until.After(now) || l.Until.After(now.Add(10*time.Minute)) {
			t.Errorf("%s holds as %+v", claims, l)
		}
	})
}

func isSet(list []string) bool {
	return slices.IsSorted(list) && len(slices.Compact(slices.Clone(list))) == len(list)
}
