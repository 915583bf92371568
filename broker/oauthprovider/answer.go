package oauthprovider

import (
	"encoding/json"
	"math"
	"strconv"
	"strings"
	"time"

	"tokenbroker/broker"
)

const (
	typeAccess = "urn:ietf:params:oauth:token-type:access_token"
	typeJWT    = "urn:ietf:params:oauth:token-type:jwt"
)

// An answer is a favourable token answer. Only the access token is
// indispensable: a new refresh token must not be lost because some field
// beside it is odd.
type answer struct {
	access, refresh, idToken string
	tokenType, issuedType    string
	expiresIn, refreshIn     time.Duration
	scopes                   []string
	scopesKnown              bool

	claims claims // of the access token; nil if it can't be read
}

// parseAnswer returns nil if body is not a token answer.
func parseAnswer(body []byte) *answer {
	var f map[string]json.RawMessage
	if json.Unmarshal(body, &f) != nil {
		return nil
	}
	a := &answer{
		access:     text(f["access_token"]),
		refresh:    text(f["refresh_token"]),
		idToken:    text(f["id_token"]),
		tokenType:  text(f["token_type"]),
		issuedType: text(f["issued_token_type"]),
		expiresIn:  seconds(f["expires_in"]),
		refreshIn:  seconds(f["refresh_expires_in"]),
	}
	if a.refreshIn == 0 {
		a.refreshIn = seconds(f["refresh_token_expires_in"])
	}
	if !visible(a.access) || a.access == "" || text(f["error"]) != "" {
		return nil
	}
	if !visible(a.tokenType) || a.tokenType == "" {
		a.tokenType = "Bearer"
	}
	a.scopes, a.scopesKnown = words(f["scope"])
	a.claims = parseJWT(a.access)
	return a
}

// isAccessToken reports whether an exchange gave what it was asked for. Some
// servers call a JWT access token a JWT, some don't call it anything.
func (a *answer) isAccessToken() bool {
	switch a.issuedType {
	case "", typeAccess, typeJWT:
		return a.tokenType != "N_A"
	}
	return false
}

// issued is what the answer gave. The access token's own claims, where they can
// be read, stand before what the answer says beside it. Their signature is not
// checked: the token has this moment come from the provider's own token
// endpoint, and whoever could change it there could change all of the answer.
func (a *answer) issued() broker.Issued {
	i := broker.Issued{
		AccessToken:      broker.NewSecret(a.access),
		TokenType:        a.tokenType,
		RefreshToken:     broker.NewSecret(a.refresh),
		IDToken:          broker.NewSecret(a.idToken),
		ExpiresIn:        a.life(time.Now()),
		RefreshExpiresIn: a.refreshIn,
		Scopes:           a.scopes,
		ScopesKnown:      a.scopesKnown,
	}
	if a.claims == nil {
		return i
	}
	if s, ok := a.claims.scopes(); ok {
		i.Scopes, i.ScopesKnown = s, true
	}
	// A token that can be read and names no audience has none: that is known.
	i.Audience, i.AudienceKnown = set(a.claims.list("aud")), true
	return i
}

// life is how long the access token lives, the shortest of what is said: by
// the answer, and by the token's own claims, read as a span so that our clock
// doesn't matter. An answer may have cut the second that had begun when it was
// made; the token works in it all the same.
func (a *answer) life(now time.Time) time.Duration {
	exp, ok := a.claims.seconds("exp")
	if !ok {
		return a.expiresIn
	}
	from, ok := a.claims.seconds("iat")
	if !ok {
		from = float64(now.Unix())
	}
	own := span(exp - from)
	switch {
	case exp-from > maxLife.Seconds():
		return a.expiresIn
	case own == 0:
		own = 1 // it has ended; 0 would mean that nothing is known
	}
	if a.expiresIn == 0 || own == a.expiresIn+time.Second {
		return own
	}
	return min(own, a.expiresIn)
}

// text is a JSON string, or nothing.
func text(raw json.RawMessage) string {
	var s string
	if json.Unmarshal(raw, &s) != nil {
		return ""
	}
	return s
}

// seconds reads a number of seconds in any of the forms servers use: 300,
// 300.0, "300". What makes no sense counts as not said.
func seconds(raw json.RawMessage) time.Duration {
	s := strings.TrimSpace(string(raw))
	if t := text(raw); t != "" {
		s = strings.TrimSpace(t)
	}
	f, err := strconv.ParseFloat(s, 64)
	if err != nil {
		return 0
	}
	return span(f)
}

// maxLife is the longest life we believe. Beyond it somebody has counted in
// nanoseconds, or means for ever.
const maxLife = 10 * 366 * 24 * time.Hour

func span(seconds float64) time.Duration {
	if math.IsNaN(seconds) || seconds <= 0 || seconds > maxLife.Seconds() {
		return 0
	}
	return time.Duration(seconds * float64(time.Second))
}

// words reads a scope field: words in a string, or an array of strings.
func words(raw json.RawMessage) (list []string, ok bool) {
	if len(raw) == 0 {
		return nil, false
	}
	var v any
	if json.Unmarshal(raw, &v) != nil || v == nil {
		return nil, false
	}
	return split(v)
}

// split is the sorted words of a claim that is a string or an array of strings.
func split(v any) (list []string, ok bool) {
	switch v := v.(type) {
	case string:
		return set(strings.Fields(v)), true
	case []any:
		for _, e := range v {
			s, ok := e.(string)
			if !ok {
				return nil, false
			}
			list = append(list, strings.Fields(s)...)
		}
		return set(list), true
	}
	return nil, false
}

// visible reports whether s has only the characters RFC 6749 allows in a token
// (appendix A.12): it will stand in headers and lines of text.
func visible(s string) bool {
	for i := range len(s) {
		if s[i] < 0x20 || s[i] > 0x7e {
			return false
		}
	}
	return true
}
