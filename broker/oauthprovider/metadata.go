package oauthprovider

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/coreos/go-oidc/v3/oidc"

	"tokenbroker/broker"
)

// metadata is what we need of a discovery document, and what is made of it.
type metadata struct {
	Issuer        string   `json:"issuer"`
	Token         string   `json:"token_endpoint"`
	Userinfo      string   `json:"userinfo_endpoint"`
	JWKS          string   `json:"jwks_uri"`
	Revocation    string   `json:"revocation_endpoint"`
	Introspection string   `json:"introspection_endpoint"`
	AuthStyles    []string `json:"token_endpoint_auth_methods_supported"`
	IDTokenAlgs   []string `json:"id_token_signing_alg_values_supported"`
	Scopes        []string `json:"scopes_supported"`

	oidc     *oidc.Provider
	verifier *oidc.IDTokenVerifier // nil: there are no keys to verify with
	logouts  *oidc.IDTokenVerifier // of logout tokens, with keys of its own; nil: as verifier
}

const wellKnown = "/.well-known/openid-configuration"

// algorithms are those of public keys. A shared secret (HS256) or none proves
// nothing about who signed, whatever a discovery document says.
var algorithms = []string{
	oidc.RS256, oidc.RS384, oidc.RS512, oidc.PS256, oidc.PS384, oidc.PS512,
	oidc.ES256, oidc.ES384, oidc.ES512, oidc.EdDSA,
}

// metadata returns what discovery found, and asks if nothing is known yet, in
// the way of a request o. All who wait share one request, which no single caller
// can cancel; the next call after a failure asks again.
func (p *Provider) metadata(ctx context.Context, o op) (*metadata, error) {
	if m := p.lastKnown(); m != nil {
		return m, nil
	}
	found := p.discovering.DoChan("", func() (any, error) {
		if m := p.lastKnown(); m != nil {
			return m, nil
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), p.timeout)
		defer cancel()
		var m *metadata
		err := p.gate.pass(ctx, opLook|o&opCode, "", func() (err error) {
			m, err = p.discover(ctx)
			return err
		})
		if err != nil {
			return nil, err
		}
		p.learn(m)
		return m, nil
	})
	select {
	case <-ctx.Done():
		return nil, unreached(opLook, false, ctx.Err())
	case r := <-found:
		if r.Err != nil {
			return nil, r.Err
		}
		return r.Val.(*metadata), nil
	}
}

func (p *Provider) lastKnown() *metadata {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.known
}

// learn makes m what is known, unless nothing has changed: the keys that were
// fetched already stay with the old one.
func (p *Provider) learn(m *metadata) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.known == nil || !p.known.same(m) {
		p.known = m
	}
}

func (m *metadata) same(n *metadata) bool {
	return m.Token == n.Token && m.Userinfo == n.Userinfo && m.JWKS == n.JWKS && m.Revocation == n.Revocation &&
		m.Introspection == n.Introspection && slices.Equal(m.AuthStyles, n.AuthStyles) && slices.Equal(m.IDTokenAlgs, n.IDTokenAlgs)
}

// discover reads the discovery document. go-oidc's own reader would put the
// body into its errors, follow redirects, and drop the check of the issuer
// when the document lies elsewhere.
func (p *Provider) discover(ctx context.Context) (*metadata, error) {
	from := p.cfg.DiscoveryURL
	if from == "" {
		from = p.cfg.Issuer
	}
	if !strings.Contains(from, "/.well-known/") {
		from = strings.TrimSuffix(from, "/") + wellKnown
	}
	body, err := p.get(ctx, from)
	if err != nil {
		return nil, err
	}
	m := new(metadata)
	if json.Unmarshal(body, m) != nil || m.Token == "" && p.cfg.Endpoints.Token == "" {
		return nil, &broker.ProviderError{Class: broker.TryLater, Reason: "discovery_unreadable", Status: http.StatusOK}
	}
	if m.Issuer != p.cfg.Issuer {
		return nil, &broker.ProviderError{
			Class: broker.Misconfigured, Reason: "issuer_mismatch", Status: http.StatusOK,
			Err: fmt.Errorf("the discovery document is of issuer %.200q, configured is %q", m.Issuer, p.cfg.Issuer),
		}
	}
	return p.use(m, from)
}

// use completes m with the configured endpoints and makes the verifier. from is
// where m was read; a document that came by https can't send us to http.
func (p *Provider) use(m *metadata, from string) (*metadata, error) {
	e := p.cfg.Endpoints
	for _, u := range []string{m.Token, m.Userinfo, m.JWKS, m.Revocation, m.Introspection} {
		if u != "" && (!isURL(u) || strings.HasPrefix(from, "https:") && !strings.HasPrefix(u, "https:")) {
			return nil, &broker.ProviderError{
				Class: broker.Misconfigured, Reason: "endpoint_unsafe", Status: http.StatusOK,
				Err: errors.New("the discovery document names an endpoint that is not an https URL"),
			}
		}
	}
	m.Token = cmp.Or(e.Token, m.Token)
	m.Userinfo = cmp.Or(e.Userinfo, m.Userinfo)
	m.JWKS = cmp.Or(e.JWKS, m.JWKS)
	m.Revocation = cmp.Or(e.Revocation, m.Revocation)
	m.Introspection = cmp.Or(e.Introspection, m.Introspection)
	algs := slices.DeleteFunc(slices.Clone(m.IDTokenAlgs), func(a string) bool { return !slices.Contains(algorithms, a) })

	ctx := oidc.ClientContext(context.Background(), p.oidc)
	m.oidc = (&oidc.ProviderConfig{
		IssuerURL: m.Issuer, TokenURL: m.Token, UserInfoURL: m.Userinfo, JWKSURL: m.JWKS, Algorithms: algs,
	}).NewProvider(ctx)
	if m.Issuer != "" && m.JWKS != "" {
		keys := keySet{oidc.NewRemoteKeySet(ctx, m.JWKS)}
		m.verifier = oidc.NewVerifier(m.Issuer, keys, &oidc.Config{ClientID: p.cfg.ClientID, SupportedSigningAlgs: algs, Now: leeway})
		sparingly := *p.oidc
		sparingly.Transport = sparing{p.oidc.Transport, p.logoutKeys}
		keys = keySet{oidc.NewRemoteKeySet(oidc.ClientContext(ctx, &sparingly), m.JWKS)}
		m.logouts = oidc.NewVerifier(m.Issuer, keys, &oidc.Config{ClientID: p.cfg.ClientID, SupportedSigningAlgs: algs, SkipExpiryCheck: true})
	}
	return m, nil
}

// get reads a document.
func (p *Provider) get(ctx context.Context, from string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, from, nil)
	if err != nil {
		return nil, &broker.ProviderError{Class: broker.Misconfigured, Reason: "bad_url"}
	}
	r, err := p.fetch(req)
	if err != nil {
		return nil, err
	}
	if r.status != http.StatusOK {
		class, reason := byStatus(opLook, r.status, false)
		if r.status == http.StatusNotFound {
			class, reason = broker.Misconfigured, "not_found" // a realm or path that there is not
		}
		return nil, &broker.ProviderError{Class: class, Reason: "discovery_" + reason, Status: r.status, RetryAfter: retryAfter(r.header)}
	}
	return r.body, nil
}

// fetch sends a request that spends nothing and reads the answer. Of one that is
// not favourable the status will do.
func (p *Provider) fetch(req *http.Request) (*reply, error) {
	req.Header.Set("Accept", "application/json")
	resp, err := p.look.Do(req)
	if err != nil {
		return nil, unreached(opLook, false, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil && resp.StatusCode == http.StatusOK {
		return nil, unreached(opLook, true, err)
	}
	return &reply{resp.StatusCode, resp.Header, body}, nil
}

// knock asks a server without discovery whether it is there. Any answer but
// that of a broken gateway says so.
func (p *Provider) knock(ctx context.Context, endpoint string) error {
	u, err := url.Parse(endpoint)
	if err != nil {
		return &broker.ProviderError{Class: broker.Misconfigured, Reason: "bad_url"}
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return &broker.ProviderError{Class: broker.Misconfigured, Reason: "bad_url"}
	}
	resp, err := p.look.Do(req)
	if err != nil {
		return unreached(opLook, false, err)
	}
	resp.Body.Close()
	if resp.StatusCode >= 500 {
		return &broker.ProviderError{Class: broker.TryLater, Reason: "provider_error", Status: resp.StatusCode, RetryAfter: retryAfter(resp.Header)}
	}
	return nil
}
