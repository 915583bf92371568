package oauthprovider

import (
	"time"

	"tokenbroker/broker"
)

// ReadAnswer is the parser of token answers; ok: it is one.
func ReadAnswer(body []byte) (issued broker.Issued, ok bool) {
	a := parseAnswer(body)
	if a == nil {
		return broker.Issued{}, false
	}
	return a.issued(), true
}

// ReadError is the parser of refusals.
var ReadError = parseError

// ReadClaims is the parser of JWTs, and what is looked for in them.
func ReadClaims(token, path string) (list, scopes []string, ok bool) {
	c := parseJWT(token)
	v, _ := c.find(path)
	scopes, _ = c.scopes()
	c.seconds(path)
	return values(v), scopes, c != nil
}

// MaxLife is the longest life that is believed.
const MaxLife time.Duration = maxLife
