package broker

import (
	"context"
	"time"
)

// HubToken is what a hub gets in the place of a provider's token response.
type HubToken struct {
	Access    Secret
	Type      string
	ExpiresIn time.Duration
	Scopes    []string
	IDToken   Secret // may be empty
	Handle    Secret // in the place of the refresh token
	Ref       string
}

// Session is what CheckSession says; see hub.proto.
type Session struct {
	Active bool
	Stale  bool
	Token  *HubToken // nil: the hub has the current one
	Reason string
	Ref    string
}

// Login trades an authorization code at the provider for a pending grant.
func (b *Broker) Login(ctx context.Context, hub HubID, provider ProviderID, c CodeGrant) (HubToken, error) {
	panic("wip")
}

// RefreshHub answers a hub's refresh_token request.
func (b *Broker) RefreshHub(ctx context.Context, hub HubID, provider ProviderID, handle Secret) (HubToken, error) {
	panic("wip")
}

// Claim links the grant behind handle to user; see hub.proto.
func (b *Broker) Claim(ctx context.Context, hub HubID, provider ProviderID, handle Secret, user UserID) (ref string, err error) {
	panic("wip")
}

// CheckSession says whether a session lives; have is the fingerprint of the hub's access token.
func (b *Broker) CheckSession(ctx context.Context, hub HubID, provider ProviderID, handle Secret, user UserID, have string) (Session, error) {
	panic("wip")
}
