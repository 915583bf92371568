package broker

import (
	"context"
	"time"
)

// Want is what a container asks for; see GetTokenRequest in workload.proto.
type Want struct {
	Provider ProviderID
	Audience string
	Scopes   []string
	MinTTL   time.Duration
	Rejected string // fingerprint of a token that a service refused
}

// A Token is what a container gets.
type Token struct {
	Access    Secret
	Type      string
	Provider  ProviderID
	Audience  string
	Scopes    []string
	ExpiresAt time.Time     // by the store's clock
	ExpiresIn time.Duration // from the moment of the answer
	Ref       string
}

// ProviderStatus says what a request for a provider would meet.
type ProviderStatus struct {
	Name      ProviderID
	Login     bool
	State     GrantState
	Audiences []string
	Scopes    []string
}

// Token answers one request of a container.
func (b *Broker) Token(ctx context.Context, p *Peer, want Want) (Token, error) { panic("wip") }

// Providers lists what the container could ask for.
func (b *Broker) Providers(ctx context.Context, p *Peer) (list []ProviderStatus, ref string, err error) {
	panic("wip")
}
