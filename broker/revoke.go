package broker

import (
	"context"
	"time"
)

// Disconnection is what has ended with a disconnect and what has not.
type Disconnection struct {
	Provider         ProviderID
	Sub              string
	IssuingStoppedAt time.Time
	OutstandingUntil time.Time
}

// Disconnect ends a user's grants on every broker of the deployment.
// by says who asked, for the audit. An empty provider means all, an empty hub
// the only one.
func (b *Broker) Disconnect(ctx context.Context, by string, hub HubID, user UserID, provider ProviderID) (gone []Disconnection, ref string, err error) {
	panic("wip")
}
