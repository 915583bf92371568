package broker

import (
	"context"
	"hash/fnv"
	"time"
)

// A provider ends a session that nobody uses (Keycloak: after 30 minutes), and a
// computation that runs for hours asks for no token. So a grant whose user has a
// running server here is refreshed before its refresh token would end. What can't
// be moved by that is the session's maximum; see Ending.
const (
	keepAliveEvery = time.Minute
	// keepAliveSoonest is the least life of a refresh token that is kept alive:
	// below it the refreshes would be more than the session is worth.
	keepAliveSoonest = 2 * keepAliveEvery
	// keepAliveAtOnce bounds what one broker sends a provider for this.
	keepAliveAtOnce = 4
)

// keepAll refreshes what is due, a few at a time. What has begun is finished.
func (b *Broker) keepAll(ctx context.Context) {
	ctx = context.WithoutCancel(ctx)
	grants, err := b.grantsHere(ctx)
	if err != nil {
		b.cfg.Log.Warn("sessions can't be kept alive at the moment", "err", err)
	}
	few := newCrowd(keepAliveAtOnce)
	for _, g := range grants {
		if due := g.keepAt(); !due.IsZero() && !due.After(b.pulse.now()) {
			few.Go(func() { b.keepOne(ctx, g, due) })
		}
	}
	few.Wait()
}

// grantsHere are the live grants of users whose servers run on this host.
func (b *Broker) grantsHere(ctx context.Context) ([]Grant, error) {
	return b.grantsOf(ctx, func(s *server) bool { return s.State == Bound })
}

// grantsOf are the live grants of users who have such a server on this host. With
// an error it returns those that could be read before.
func (b *Broker) grantsOf(ctx context.Context, such func(*server) bool) (grants []Grant, err error) {
	users := make(map[userKey]bool)
	for _, s := range b.servers.list() {
		if such(s) {
			users[userKey{s.Key.Hub, s.Key.User}] = true
		}
	}
	for k := range users {
		v, err := b.match(ctx, k.hub, k.user)
		if err != nil {
			return grants, err
		}
		for _, g := range v.grants {
			if g.State == Live {
				grants = append(grants, g)
			}
		}
	}
	return grants, nil
}

// keepOne refreshes g unless somebody has done so since it became due. What
// comes of it is in the grant; the log has what went wrong.
func (b *Broker) keepOne(ctx context.Context, g Grant, due time.Time) {
	_, err := b.whole(ctx, g.Key, func(t *cachedToken) bool { return t.Epoch == g.Epoch && !t.IssuedAt.Before(due) })
	if err != nil {
		b.cfg.Log.Warn("a session could not be kept alive", "grant", g.Key, "until", g.Expires, "err", err)
	}
}

// keepAt is when g should be refreshed although nobody asks; zero: never. It
// lies between a half and three quarters of the refresh token's life, for each
// grant at another point, so that grants that were made at once do not come due
// at once.
func (g *Grant) keepAt() time.Time {
	life := g.Expires.Sub(g.RefreshedAt)
	if g.Expires.IsZero() || life < keepAliveSoonest {
		return time.Time{}
	}
	return g.RefreshedAt.Add(life/2 + g.Key.spread(life/4))
}

// spread is k's own point in a time over which many grants have their turns.
func (k GrantKey) spread(over time.Duration) time.Duration {
	h := fnv.New32a()
	h.Write([]byte(k.String()))
	return time.Duration(h.Sum32()%1000) * over / 1000
}
