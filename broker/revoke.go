package broker

import (
	"context"
	"errors"
	"maps"
	"slices"
	"time"
)

// Disconnection is what has ended with a disconnect and what has not.
type Disconnection struct {
	Provider         ProviderID
	Sub              string
	IssuingStoppedAt time.Time
	OutstandingUntil time.Time
}

// Disconnect ends a user's grants on every broker of the deployment: none
// issues a token for them after IssuingStoppedAt. by says who asked, for the
// audit. An empty provider means all, an empty hub the only one.
func (b *Broker) Disconnect(ctx context.Context, by string, hub HubID, user UserID, provider ProviderID) (gone []Disconnection, ref string, err error) {
	e := b.entry("disconnect", nil)
	e.By, e.Hub, e.User, e.Provider = by, hub, user, provider
	gone, err = b.disconnect(ctx, hub, user, provider, e)
	if err := b.record(ctx, e, err); err != nil {
		return nil, "", err
	}
	return gone, e.Ref, nil
}

func (b *Broker) disconnect(ctx context.Context, hub HubID, user UserID, provider ProviderID, e *Entry) ([]Disconnection, error) {
	hub, err := b.onlyHub(hub)
	if err == nil {
		err = b.pulse.sync(ctx)
	}
	if err != nil {
		return nil, err
	}
	e.Hub = hub
	l, err := b.loadLink(ctx, userKey{hub, user})
	if err != nil {
		return nil, err
	}
	var gone []Disconnection
	var errs []error // one grant that can't be ended does not save the others
	for _, id := range slices.Sorted(maps.Keys(l.Subs)) {
		if provider != "" && provider != id {
			continue
		}
		g, err := b.tombstone(ctx, GrantKey{hub, id, l.Subs[id]}, user)
		switch {
		case errors.Is(err, ErrAbsent):
		case err != nil:
			errs = append(errs, err)
		default:
			gone = append(gone, Disconnection{Provider: id, Sub: l.Subs[id], OutstandingUntil: g.OutstandingUntil})
		}
	}
	if len(gone)+len(errs) == 0 {
		return nil, Errorf(Invalid, "user: %q has no grant to end at %s", user, orAll(provider)).Hint("tokenbroker sessions list shows who has")
	}
	return gone, errors.Join(append(errs, b.stopIssuing(ctx, hub, user, gone))...)
}

// tombstone ends one grant. Whatever is under way finds the mark: a refresh
// before it stores, a request before it answers.
func (b *Broker) tombstone(ctx context.Context, k GrantKey, user UserID) (Grant, error) {
	return b.changeGrant(ctx, k, func(g *Grant, exists bool) error {
		switch {
		case !exists || g.User != user:
			return ErrAbsent
		case !g.Tombstone.IsZero():
			return errKeep
		}
		now := b.pulse.now()
		g.Tombstone, g.EndedAt = now, now
		g.end(Disconnected, "disconnected by an administrator", now)
		return nil
	})
}

// stopIssuing moves the revision and fills in since when no broker answers.
func (b *Broker) stopIssuing(ctx context.Context, hub HubID, user UserID, gone []Disconnection) error {
	for _, d := range gone {
		if err := b.move(ctx, GrantKey{hub, d.Provider, d.Sub}); err != nil {
			return err
		}
	}
	b.views.drop(userKey{hub, user})
	for i := range gone {
		// The other brokers confirm against the revision within one lease.
		gone[i].IssuingStoppedAt = b.pulse.now().Add(confirmLease)
	}
	return nil
}

func (b *Broker) onlyHub(hub HubID) (HubID, error) {
	if hub == "" && len(b.cfg.Hubs) == 1 {
		for only := range b.cfg.Hubs {
			return only, nil
		}
	}
	if _, ok := b.cfg.Hubs[hub]; !ok {
		return "", Errorf(Invalid, "hub: there is no hub %q; there are %s", hub, list(b.hubNames())).Hint("name one of them with --hub")
	}
	return hub, nil
}

func (b *Broker) hubNames() []string {
	var names []string
	for h := range b.cfg.Hubs {
		names = append(names, string(h))
	}
	slices.Sort(names)
	return names
}

func orAll(p ProviderID) ProviderID {
	if p == "" {
		return "any provider"
	}
	return p
}
