package oauthprovider

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"strings"
	"time"

	"golang.org/x/time/rate"

	"tokenbroker/broker"
)

// go-oidc's VerifyLogout takes any typ and any iat, and wants exp, which older
// versions of Keycloak leave out. So the claims are read here, and go-oidc checks
// the signature. That comes last: whoever can send a token must not have us ask
// the provider for its keys as often as he likes.
const (
	logoutEvent = "http://schemas.openid.net/event/backchannel-logout"
	// logoutType is the typ that keeps tokens of other kinds from being taken for
	// logout tokens.
	logoutType = "logout+jwt"
	// logoutLife is for how long after it was made a logout token holds, whatever
	// its own exp: it is followed at once or not at all.
	logoutLife = 2 * time.Minute
	// keysRest is how long after one the next request for the keys of logout
	// tokens comes at the soonest. Those of ID tokens are not touched by it.
	keysRest = 30 * time.Second
)

// LogoutToken reads a logout token and checks all of it.
func (p *Provider) LogoutToken(ctx context.Context, token broker.Secret, now time.Time) (broker.Logout, error) {
	l, wrong := p.readLogout(token.Reveal(), now)
	if wrong == "" {
		var err error
		if wrong, err = p.checkLogout(ctx, token.Reveal()); err != nil {
			return broker.Logout{}, err
		}
	}
	if wrong != "" {
		return broker.Logout{}, broker.Errorf(broker.Invalid, "this is no logout token of %s that holds", p.cfg.Name).
			Because(errors.New("logout token: " + wrong))
	}
	return l, nil
}

// readLogout reads what a logout token claims, and says what of it can't be.
func (p *Provider) readLogout(token string, now time.Time) (l broker.Logout, wrong string) {
	header, _, _ := strings.Cut(token, ".")
	c, h := parseJWT(token), decode(header)
	events, _ := c["events"].(map[string]any)
	_, event := events[logoutEvent].(map[string]any)
	_, nonce := c["nonce"]
	until, wrong := c.logoutUntil(now)
	l = broker.Logout{ID: c.text("jti"), Sub: c.text("sub"), Session: c.text("sid"), Until: until}
	for _, may := range []struct {
		be    bool
		wrong string
	}{
		{c != nil, "it is not a signed JWT"},
		{slices.Contains(algorithms, h.text("alg")), "its signature is not by a public key (alg)"},
		{p.isLogout(h), "it is a JWT of another kind (typ)"},
		{p.cfg.Issuer != "" && c.text("iss") == p.cfg.Issuer, "it is not of the configured issuer, to the letter (iss)"},
		{slices.Contains(c.list("aud"), p.cfg.ClientID), "it is not for the configured client (aud)"},
		{event, "it speaks of no logout (events)"},
		{!nonce, "it is an ID token (nonce)"},
		{l.ID != "", "it has no name to remember it by (jti)"},
		{c.textOrNone("sub") && c.textOrNone("sid"), "its user or session is not a text (sub, sid)"},
		{l.Sub != "" || l.Session != "", "it names neither a user nor a session (sub, sid)"},
		{wrong == "", wrong},
	} {
		if !may.be {
			return broker.Logout{}, may.wrong
		}
	}
	return l, ""
}

// isLogout reports whether the header h is of a logout token.
func (p *Provider) isLogout(h claims) bool {
	typ, given := h["typ"]
	if !given {
		return slices.Contains(p.profile.logoutTypes, "")
	}
	s, _ := typ.(string)
	s = strings.TrimPrefix(strings.ToLower(s), "application/")
	return s == logoutType || s != "" && slices.Contains(p.profile.logoutTypes, s)
}

// textOrNone reports whether a claim is a text, if it is there.
func (c claims) textOrNone(name string) bool {
	_, given := c[name]
	return !given || c.text(name) != ""
}

// logoutUntil is until when a logout token holds, or why it doesn't now. The two
// clocks may differ by clockSkew.
func (c claims) logoutUntil(now time.Time) (until time.Time, wrong string) {
	iat, ok := c.seconds("iat")
	if !ok {
		return until, "it does not say when it was made (iat)"
	}
	end := iat + logoutLife.Seconds()
	if _, given := c["exp"]; given {
		exp, ok := c.seconds("exp")
		if !ok {
			return until, "its end is not a time (exp)"
		}
		end = min(end, exp)
	}
	at, skew := float64(now.UnixMilli())/1000, clockSkew.Seconds()
	switch {
	case iat > at+skew:
		return until, "it was made in the future; compare the provider's clock with the store's (iat)"
	case end+skew <= at:
		return until, "it is too old; compare the provider's clock with the store's (iat, exp)"
	}
	return now.Add(time.Duration((end + skew - at) * float64(time.Second))), ""
}

// checkLogout checks the signature of a logout token and says what is wrong with
// it. An error says that this can't be done at the moment.
func (p *Provider) checkLogout(ctx context.Context, token string) (wrong string, err error) {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	m := p.lastKnown()
	if m == nil {
		if !p.logoutFinds.Allow() {
			return "", &broker.ProviderError{Class: broker.TryLater, Reason: "keys_unavailable", Err: errKeysRest}
		}
		if m, err = p.metadata(ctx, opLook); err != nil {
			return "", err
		}
	}
	if m.logouts == nil {
		return "", &broker.ProviderError{Class: broker.Misconfigured, Reason: "no_keys"}
	}
	var keys error
	_, err = m.logouts.Verify(context.WithValue(ctx, keyFault{}, &keys), token)
	switch {
	case errors.Is(keys, errKeysRest):
		return "its key is none of the provider's; they were read a moment ago (kid)", nil
	case keys != nil:
		return "", &broker.ProviderError{Class: broker.TryLater, Reason: "keys_unavailable", Err: plain(keys)}
	case err != nil:
		return "its signature does not hold", nil
	}
	return "", nil
}

var errKeysRest = errors.New("the keys were asked for a moment ago")

// sparing lets requests through as seldom as pace says.
type sparing struct {
	next http.RoundTripper
	pace *rate.Limiter
}

func (s sparing) RoundTrip(r *http.Request) (*http.Response, error) {
	if !s.pace.Allow() {
		return nil, errKeysRest
	}
	return s.next.RoundTrip(r)
}
