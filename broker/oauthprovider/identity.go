package oauthprovider

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"golang.org/x/oauth2"

	"tokenbroker/broker"
)

// clockSkew is how long after its end an ID token is still believed. It has
// only just come from the provider; what differs is the clocks.
const clockSkew = 2 * time.Minute

func leeway() time.Time { return time.Now().Add(-clockSkew) }

// newcomer says whom an answer is about when nobody in particular is expected.
// Only a verified ID token or the userinfo endpoint can say it: an access
// token speaks to others, and may name them another subject.
func (p *Provider) newcomer(ctx context.Context, m *metadata, a *answer) (broker.Identity, error) {
	id, err := p.verify(ctx, m, a)
	if err != nil {
		return broker.Identity{}, err
	}
	user := claims(nil)
	if id == nil && m.Userinfo != "" {
		if user, err = p.userinfo(ctx, m, a); err != nil {
			return broker.Identity{}, err
		}
	}
	sub := id.text("sub")
	if id == nil {
		sub = user.text("sub")
	}
	if sub == "" {
		return broker.Identity{}, broker.Errorf(broker.Denied,
			"%s did not say who logged in: its answer has neither an ID token nor a userinfo subject", p.cfg.Name).
			Hint("ask {contact}: the hub must ask %s for the scope openid", p.cfg.Name)
	}
	return p.identity(ctx, m, a, sub, id, user), nil
}

// returning says whom an answer is about when sub is expected. The answer must
// be kept whatever it says, so only another subject is an error. An ID token
// that can't be verified is not used, but the subject it names still counts.
func (p *Provider) returning(ctx context.Context, m *metadata, a *answer, sub string) (broker.Identity, error) {
	id, err := p.verify(ctx, m, a)
	if err != nil {
		p.log.Warn("the ID token of a refresh is not used", "error", err)
	}
	named := id.text("sub")
	if id == nil {
		named = cmp.Or(parseJWT(a.idToken).text("sub"), p.accessClaims(a).text("sub"))
	}
	if named != "" && named != sub {
		return broker.Identity{Sub: named}, &broker.ProviderError{Class: broker.Dead, Reason: "subject_changed", Status: http.StatusOK}
	}
	return p.identity(ctx, m, a, sub, id, nil), nil
}

// identity collects the roles of sub. Each configured claim is taken from the
// first of ID token, access token and userinfo that has it. All are of this
// moment, and a claim that none of them has means no roles; but if one of them
// should have been asked and didn't answer, the roles are not known. A RolesAPI
// is asked in the place of all of them.
func (p *Provider) identity(ctx context.Context, m *metadata, a *answer, sub string, id, user claims) broker.Identity {
	access := p.accessClaims(a)
	session := id.text("sid")
	if p.api != nil {
		who := p.api.after(ctx, sub, cmp.Or(id.text("preferred_username"), access.text("preferred_username"), user.text("preferred_username")))
		who.Session = session
		return who
	}
	who := broker.Identity{Sub: sub, Session: session, Known: id != nil || access != nil || user != nil}
	if user == nil && m.Userinfo != "" && p.looksFurther(id, access) {
		var err error
		user, err = p.userinfo(ctx, m, a)
		if err == nil && user.text("sub") != sub {
			err = errors.New("it names another subject")
		}
		if err != nil {
			p.log.Warn("the userinfo endpoint told no roles", "error", err)
			return broker.Identity{Sub: sub, Session: who.Session, Username: cmp.Or(id.text("preferred_username"), access.text("preferred_username"))}
		}
		who.Known = true
	}
	who.Roles = p.roles(id, access, user)
	who.Username = cmp.Or(id.text("preferred_username"), access.text("preferred_username"), user.text("preferred_username"))
	return who
}

// roles takes each configured claim from the first of the sources that has it.
func (p *Provider) roles(sources ...claims) (roles []string) {
	for _, name := range p.cfg.Roles {
		for _, from := range sources {
			if v, ok := from.find(name); ok {
				for _, r := range values(v) {
					roles = append(roles, name+"/"+r)
				}
				break
			}
		}
	}
	return set(roles)
}

// looksFurther reports whether the userinfo endpoint may know more about roles
// than the tokens do.
func (p *Provider) looksFurther(id, access claims) bool {
	if id == nil && access == nil {
		return len(p.cfg.Roles) > 0
	}
	return p.profile.userinfoRoles && slices.ContainsFunc(p.cfg.Roles, func(name string) bool {
		_, inID := id.find(name)
		_, inAccess := access.find(name)
		return !inID && !inAccess
	})
}

// accessClaims are the access token's, if it is a JWT that the provider issued
// to us. Its signature is not checked; see issued.
func (p *Provider) accessClaims(a *answer) claims {
	if p.cfg.Issuer == "" || a.claims.text("iss") != p.cfg.Issuer {
		return nil
	}
	if to := cmp.Or(a.claims.text("azp"), a.claims.text("client_id")); to != "" && to != p.cfg.ClientID {
		return nil
	}
	return a.claims
}

// verify returns the claims of the ID token, nil if there is none.
func (p *Provider) verify(ctx context.Context, m *metadata, a *answer) (claims, error) {
	if a.idToken == "" || m.Issuer == "" {
		return nil, nil
	}
	if m.verifier == nil {
		return nil, &broker.ProviderError{Class: broker.Misconfigured, Reason: "no_keys", Status: http.StatusOK}
	}
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	var keys error
	tok, err := m.verifier.Verify(context.WithValue(ctx, keyFault{}, &keys), a.idToken)
	switch {
	case keys != nil:
		return nil, &broker.ProviderError{Class: broker.TryLater, Reason: "keys_unavailable", Err: plain(keys)}
	case err != nil:
		return nil, p.untrusted(a, err)
	case tok.AccessTokenHash != "" && tok.VerifyAccessToken(a.access) != nil:
		return nil, p.untrusted(a, errOtherAccess)
	}
	c := parseJWT(a.idToken)
	if azp := c.text("azp"); len(tok.Audience) > 1 && azp != "" && azp != p.cfg.ClientID {
		return nil, p.untrusted(a, errOtherClient)
	}
	return c, nil
}

// untrusted is the error of an ID token that doesn't hold. go-oidc's words may
// quote the token, so they stay here; what an operator can put right is found
// again from the token.
func (p *Provider) untrusted(a *answer, err error) error {
	c := parseJWT(a.idToken)
	why := "its signature does not hold"
	var expired *oidc.TokenExpiredError
	switch {
	case errors.As(err, &expired):
		why = "it has expired; compare this host's clock"
	case errors.Is(err, errOtherAccess), errors.Is(err, errOtherClient):
		why = err.Error()
	case c.text("iss") != p.cfg.Issuer:
		why = "it is not of the configured issuer, to the letter"
	case !slices.Contains(c.list("aud"), p.cfg.ClientID):
		why = "it is not for the configured client"
	}
	return broker.Errorf(broker.Denied, "the identity that %s sent could not be verified", p.cfg.Name).
		Because(errors.New("ID token: " + why))
}

var (
	errOtherAccess = errors.New("it belongs to another access token")
	errOtherClient = errors.New("it was issued to another client")
)

// keyFault is the context key under which a keySet leaves why it had no keys.
type keyFault struct{}

// A keySet is the provider's keys. go-oidc's verifier says only in words why a
// signature could not be checked; whether the keys could be had at all decides
// what we do, so it is kept here.
type keySet struct{ *oidc.RemoteKeySet }

func (k keySet) VerifySignature(ctx context.Context, jwt string) ([]byte, error) {
	payload, err := k.RemoteKeySet.VerifySignature(ctx, jwt)
	if err != nil && strings.HasPrefix(err.Error(), "fetching keys") {
		if fault, ok := ctx.Value(keyFault{}).(*error); ok {
			*fault = err
		}
	}
	return payload, err
}

// userinfo asks the userinfo endpoint with the new access token.
func (p *Provider) userinfo(ctx context.Context, m *metadata, a *answer) (claims, error) {
	ctx, cancel := context.WithTimeout(oidc.ClientContext(ctx, p.oidc), lookTimeout)
	defer cancel()
	info, err := m.oidc.UserInfo(ctx, oauth2.StaticTokenSource(&oauth2.Token{AccessToken: a.access}))
	if err != nil {
		return nil, &broker.ProviderError{Class: broker.TryLater, Reason: "userinfo_unavailable", Err: plain(err)}
	}
	var raw json.RawMessage
	if info.Claims(&raw) != nil {
		return nil, &broker.ProviderError{Class: broker.TryLater, Reason: "userinfo_unreadable"}
	}
	c := decodeJSON(raw)
	if c == nil {
		return nil, &broker.ProviderError{Class: broker.TryLater, Reason: "userinfo_unreadable"}
	}
	return c, nil
}
