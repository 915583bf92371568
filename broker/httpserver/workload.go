package httpserver

import (
	"net/http"
	"strings"
	"time"

	"tokenbroker/broker"
)

type tokenResponse struct {
	AccessToken string            `json:"access_token"`
	TokenType   string            `json:"token_type"`
	ExpiresIn   int64             `json:"expires_in"`
	ExpiresAt   string            `json:"expires_at"`
	Provider    broker.ProviderID `json:"provider"`
	Audience    string            `json:"audience"`
	Scopes      []string          `json:"scopes"`
	Ref         string            `json:"ref"`
}

func (e edge) token(r *http.Request, p *broker.Peer, _ []byte) (any, error) {
	want, err := wantOf(r)
	if err != nil {
		return nil, err
	}
	t, err := e.b.Token(r.Context(), p, want)
	if err != nil {
		return nil, err
	}
	return tokenJSON(t), nil
}

func tokenJSON(t broker.Token) tokenResponse {
	return tokenResponse{
		AccessToken: t.Access.Reveal(),
		TokenType:   t.Type,
		ExpiresIn:   int64(t.ExpiresIn / time.Second),
		ExpiresAt:   timestamp(t.ExpiresAt),
		Provider:    t.Provider,
		Audience:    t.Audience,
		Scopes:      list(t.Scopes),
		Ref:         t.Ref,
	}
}

// wantOf reads what a container asks for. Scopes may be separated by spaces,
// given one by one, or both.
func wantOf(r *http.Request) (broker.Want, error) {
	q, err := query(r, "audience", "scope", "min_ttl", "rejected_sha256")
	if err != nil {
		return broker.Want{}, err
	}
	minTTL, err := seconds("min_ttl", q.Get("min_ttl"))
	if err != nil {
		return broker.Want{}, err
	}
	return broker.Want{
		Provider: broker.ProviderID(r.PathValue("provider")),
		Audience: q.Get("audience"),
		Scopes:   strings.Fields(strings.Join(q["scope"], " ")),
		MinTTL:   minTTL,
		Rejected: q.Get("rejected_sha256"),
	}, nil
}

type providersResponse struct {
	Providers []providerStatus `json:"providers"`
	Ref       string           `json:"ref"`
}

type providerStatus struct {
	Name      broker.ProviderID `json:"name"`
	Login     bool              `json:"login"`
	State     broker.GrantState `json:"state"`
	Audiences []string          `json:"audiences"`
	Scopes    []string          `json:"scopes"`
}

func (e edge) providers(r *http.Request, p *broker.Peer, _ []byte) (any, error) {
	if _, err := query(r); err != nil {
		return nil, err
	}
	all, ref, err := e.b.Providers(r.Context(), p)
	if err != nil {
		return nil, err
	}
	answer := providersResponse{Providers: []providerStatus{}, Ref: ref}
	for _, s := range all {
		answer.Providers = append(answer.Providers, providerStatus{s.Name, s.Login, s.State, list(s.Audiences), list(s.Scopes)})
	}
	return answer, nil
}
