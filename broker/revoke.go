package broker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"
)

// Disconnection is what has ended with a disconnect and what has not.
type Disconnection struct {
	Provider         ProviderID
	Sub              string
	IssuingStoppedAt time.Time
	OutstandingUntil time.Time
	// Revocation says whether the provider has been told of it. Services that
	// check tokens by themselves accept them until OutstandingUntil all the same.
	Revocation Revocation
	// NotKept is empty once the store has the disconnect for sure. Else it says
	// why a store that loses its memory may forget it, and what to do.
	NotKept string
}

// keptWithin bounds how long a disconnect waits for the store to have it for sure.
const keptWithin = 15 * time.Second

// Disconnect ends a user's grants on every broker of the deployment: none
// issues a token for them after IssuingStoppedAt. It returns once the store will
// not forget that, or says that it may. by says who asked, for the audit. An empty
// provider means all, an empty hub the only one. What has begun is finished,
// whether the caller waits or not.
func (b *Broker) Disconnect(ctx context.Context, by string, hub HubID, user UserID, provider ProviderID) (gone []Disconnection, ref string, err error) {
	e := b.entry("disconnect", nil)
	e.By, e.Hub, e.User, e.Provider = by, hub, user, provider
	gone, err = b.disconnect(ctx, hub, user, provider, byAdministrator, e)
	if err := b.record(ctx, e, err); err != nil {
		return nil, "", err
	}
	return gone, e.Ref, nil
}

// OnLogout is what a logout, at the hub or at the provider, does to the user's
// grants.
type OnLogout string

const (
	Keep        OnLogout = "keep"         // at the hub: nothing, a computation may go on
	OnlyLook    OnLogout = "ignore"       // at the provider: nothing but what a look at it shows
	StopIssuing OnLogout = "stop_issuing" // no token until the next login
	RevokeAll   OnLogout = "revoke"       // the same, and the provider ends what was issued
)

// ending is how a logout ends a grant; false: not at all.
func (o OnLogout) ending() (ending, bool) {
	how := byLogout
	how.revoke = o == RevokeAll
	return how, o == StopIssuing || o == RevokeAll
}

// HubLogout says that user has logged out of the hub. What that does the hub's
// OnLogout says. If it is the hub that doesn't allow him any more, he gets no token
// before a login that it allows, whatever OnLogout says. It may be said again.
func (b *Broker) HubLogout(ctx context.Context, hub HubID, user UserID, notAllowed bool) (ref string, err error) {
	e := b.entry("logout", nil)
	e.Hub, e.User = hub, user
	how, ends := b.cfg.Hubs[hub].OnLogout.ending()
	if notAllowed {
		e.Reason = "the hub does not allow the user any more"
		how.reason, ends = "not_allowed", true
	}
	err = checkUser(user)
	if ends && err == nil {
		_, err = b.disconnect(ctx, hub, user, "", how, e)
	}
	if errors.Is(err, errNoGrant) {
		err = nil
	}
	if err := b.record(ctx, e, err); err != nil {
		return "", err
	}
	return e.Ref, nil
}

// Why nothing is ended.
var (
	errNoGrant      = errors.New("the user has no grant there")
	errOtherSession = errors.New("the grant rests on another session")
)

func (b *Broker) disconnect(ctx context.Context, hub HubID, user UserID, provider ProviderID, how ending, e *Entry) ([]Disconnection, error) {
	ctx = context.WithoutCancel(ctx) // what is ended is also told
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
	end := func(ctx context.Context) ([]Disconnection, error) {
		return b.endAt(ctx, userKey{hub, user}, provider, l, how)
	}
	if how != byAdministrator {
		gone, err := end(ctx) // a browser waits
		return gone, cmp.Or(err, b.replicated(ctx))
	}
	gone, notKept, err := b.forSure(ctx, end)
	if err != nil {
		return gone, err
	}
	if notKept != nil {
		e.Reason = "the store may forget it: " + notKept.Error()
		b.cfg.Log.Error("the store may forget a disconnect", "hub", hub, "user", user, "err", notKept)
	}
	for i := range gone {
		gone[i].NotKept = unsure(notKept)
	}
	return gone, nil
}

// unsure is what an administrator is told of a disconnect that is not kept for
// sure.
func unsure(err error) string {
	if err == nil {
		return ""
	}
	return fmt.Sprintf("the store has not confirmed that it keeps this (%s); if it loses its memory now, only the brokers that know of it "+
		"put it right: see to the store, then run the command again", err)
}

// forSure calls end until the store has for sure what it wrote. If the store can't
// say so end is called again, as soon as the store is there: another server may have
// taken its place meanwhile, and need not have it.
func (b *Broker) forSure(ctx context.Context, end func(context.Context) ([]Disconnection, error)) (gone []Disconnection, notKept, err error) {
	ctx, cancel := context.WithTimeout(ctx, keptWithin)
	defer cancel()
	for tries := 0; tries < 3; {
		since := b.settler.failures()
		again, err := end(ctx)
		switch {
		case err != nil && tries == 0:
			return again, nil, err
		case err != nil && (!errors.Is(err, ErrUnavailable) || pause(ctx, 200*time.Millisecond) != nil):
			return gone, notKept, nil // it was done once
		case err != nil:
			continue
		}
		gone, notKept = again, b.settler.settled(ctx, since)
		if notKept == nil {
			break
		}
		tries++
	}
	return gone, notKept, nil
}

// endAt ends k's grants at provider, or all.
func (b *Broker) endAt(ctx context.Context, k userKey, provider ProviderID, l linkRecord, how ending) (gone []Disconnection, err error) {
	var errs []error // one grant that can't be ended does not save the others
	for _, id := range slices.Sorted(maps.Keys(l.Subs)) {
		if provider != "" && provider != id {
			continue
		}
		g, err := b.tombstone(ctx, GrantKey{k.hub, id, l.Subs[id]}, k.user, how)
		switch {
		case errors.Is(err, ErrAbsent):
		case err != nil:
			errs = append(errs, err)
		default:
			gone = append(gone, Disconnection{Provider: id, Sub: l.Subs[id], OutstandingUntil: g.OutstandingUntil, Revocation: g.Revocation})
		}
	}
	if len(gone)+len(errs) == 0 {
		return nil, Errorf(Invalid, "user: %q has no grant to end at %s", k.user, orAll(provider)).Hint("tokenbroker sessions list shows who has").Because(errNoGrant)
	}
	if err := b.stopIssuing(ctx, k.hub, k.user, gone); err != nil {
		return gone, errors.Join(append(errs, err)...)
	}
	b.revokeGone(ctx, k.hub, gone)
	return gone, errors.Join(errs...)
}

// revokeGone tells the providers, all at once, and waits for them for a moment.
func (b *Broker) revokeGone(ctx context.Context, hub HubID, gone []Disconnection) {
	ctx, cancel := context.WithTimeout(ctx, revokePatience)
	defer cancel()
	var asked sync.WaitGroup
	for i := range gone {
		d := &gone[i]
		k := GrantKey{hub, d.Provider, d.Sub}
		asked.Go(func() {
			b.revokeOne(ctx, k)
			if g, err := b.loadGrant(context.WithoutCancel(ctx), k); err == nil {
				d.Revocation = g.Revocation
			}
		})
	}
	asked.Wait()
}

// An ending is how a grant is ended from our side.
type ending struct {
	state  GrantState
	reason string
	revoke bool // also at the provider
	unlink bool // it is nobody's then, and its subject may log in under another name
	// session, if not empty, spares a grant that rests on another one.
	session string
}

var (
	byAdministrator = ending{state: Disconnected, reason: "disconnected by an administrator", revoke: true}
	byLogout        = ending{state: NeedsLogin, reason: "logged_out"}
)

// tombstone ends one grant. Whatever is under way finds the mark: a refresh
// before it stores, a request before it answers.
func (b *Broker) tombstone(ctx context.Context, k GrantKey, user UserID, how ending) (g Grant, err error) {
	mark := func() error {
		g, err = b.changeGrant(ctx, k, func(g *Grant, exists bool) error {
			switch {
			case !exists || g.User != user:
				return ErrAbsent
			case how.session != "" && g.Session != "" && g.Session != how.session:
				return errOtherSession
			case !how.unlink && !g.Tombstone.IsZero() && (g.State == how.state || g.State == Disconnected):
				return errKeep
			case how.unlink:
				g.User = ""
			}
			now := b.pulse.now()
			g.Tombstone, g.EndedAt = now, now
			g.end(how.state, how.reason, now)
			if how.revoke {
				g.Revocation = RevocationPending
			}
			return nil
		})
		return err
	}
	if !how.revoke {
		err = mark()
		return g, err
	}
	err = b.revokeSoon(ctx, k, mark)
	return g, err
}

// revokeLate has a refresh token revoked that came for a grant after its
// tombstone. It is kept for that alone; what was kept before is spent.
func (b *Broker) revokeLate(ctx context.Context, k GrantKey, refresh Secret) {
	if refresh.IsZero() {
		return
	}
	if err := b.keepToRevoke(ctx, k, refresh); err != nil {
		b.revokeAtProvider(ctx, k.Provider, refresh)
		return
	}
	b.revokeOne(ctx, k)
}

func (b *Broker) keepToRevoke(ctx context.Context, k GrantKey, refresh Secret) error {
	return b.revokeSoon(ctx, k, func() error {
		_, err := b.changeGrant(ctx, k, func(g *Grant, exists bool) error {
			if !exists || g.Tombstone.IsZero() {
				return errKeep // a login came, whose session the token may share
			}
			g.Refresh, g.Revocation = refresh, RevocationPending
			return nil
		})
		return err
	})
}

// rightsMoved tells every broker that a grant's rights changed, and what went
// with them the audit and the provider.
func (b *Broker) rightsMoved(ctx context.Context, was, is Grant, cause string) error {
	if err := b.move(ctx, is.Key); err != nil {
		return err
	}
	b.recordRoles(ctx, was, is, cause)
	b.afterChange(ctx, userKey{is.Key.Hub, is.User}, rights{roles: was.Roles})
	return nil
}

// stopIssuing moves the revision and fills in since when no broker answers. That a
// fail-over does not take it back the caller sees to.
func (b *Broker) stopIssuing(ctx context.Context, hub HubID, user UserID, gone []Disconnection) error {
	for _, d := range gone {
		if err := b.announce(ctx, GrantKey{hub, d.Provider, d.Sub}); err != nil {
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
