package oauthprovider_test

import (
	"encoding/base64"
	"slices"
	"strings"
	"testing"

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

func isSet(list []string) bool {
	return slices.IsSorted(list) && len(slices.Compact(slices.Clone(list))) == len(list)
}
