package oauthprovider

import (
	"cmp"
	"context"
	"net/http"
	"net/url"
	"slices"

	"tokenbroker/broker"
)

// Look asks the RolesAPI, or else introspects the refresh token (RFC 7662), where
// the profile says what comes of that. No token_type_hint is sent: it may only make the search shorter, and
// servers differ in which they know.
func (p *Provider) Look(ctx context.Context, refresh broker.Secret, sub string) (broker.Identity, error) {
	ctx, cancel := context.WithTimeout(ctx, p.timeout)
	defer cancel()
	if p.api != nil {
		return p.api.look(ctx, sub)
	}
	unsupported := &broker.ProviderError{Class: broker.Misconfigured, Reason: "unsupported"}
	if len(p.profile.introspects) == 0 {
		return broker.Identity{}, unsupported
	}
	m, err := p.metadata(ctx, opIntrospect)
	if err != nil {
		return broker.Identity{}, err
	}
	if m.Introspection == "" {
		return broker.Identity{}, unsupported
	}
	var c claims
	err = p.post(ctx, m, opIntrospect, m.Introspection, sub, url.Values{"token": {refresh.Reveal()}}, func(r *reply) bool {
		c = decodeJSON(r.body)
		return r.status == http.StatusOK
	})
	if err != nil {
		return broker.Identity{}, err
	}
	return p.introspected(c, sub)
}

// introspected reads an introspection answer. What is not plainly about our
// refresh token of sub says nothing about sub.
func (p *Provider) introspected(c claims, sub string) (broker.Identity, error) {
	unknown := func(reason string) (broker.Identity, error) {
		return broker.Identity{}, &broker.ProviderError{Class: broker.TryLater, Reason: reason, Status: http.StatusOK}
	}
	active, ok := c["active"].(bool)
	if !ok {
		return unknown("unreadable_answer")
	}
	if !active {
		return broker.Identity{}, &broker.ProviderError{Class: broker.Dead, Reason: "session_ended", Status: http.StatusOK}
	}
	if !slices.Contains(p.profile.introspects, cmp.Or(c.text("typ"), c.text("token_type"))) {
		return unknown("wrong_token_type")
	}
	if cmp.Or(c.text("client_id"), c.text("azp"), p.cfg.ClientID) != p.cfg.ClientID {
		return unknown("wrong_client")
	}
	if c.text("sub") != sub {
		return unknown("wrong_subject")
	}
	return broker.Identity{Sub: sub, Username: c.text("preferred_username"), Roles: p.roles(c), Known: true}, nil
}
