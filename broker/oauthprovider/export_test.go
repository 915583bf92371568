package oauthprovider

import (
	"context"
	"net"
	"net/http"
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

// Dial has p make its connections by dial.
func (p *Provider) Dial(dial func(ctx context.Context, network, addr string) (net.Conn, error)) {
	p.once.Transport.(fresh).DialContext = dial
	p.look.Transport.(bounded).next.(*http.Transport).DialContext = dial
}

// Rests is for how long p leaves the provider alone when it is in trouble.
func (p *Provider) Rests() time.Duration { return p.gate.rest }

// Via has p send its requests by t.
func (p *Provider) Via(t http.RoundTripper) {
	p.once.Transport, p.look.Transport, p.oidc.Transport = t, t, counted{p.gate, t}
}
