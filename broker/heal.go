package broker

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"tokenbroker/broker/seal"
)

// A store may fall back to an older copy of itself: a replica that lagged is
// promoted, a backup is restored, a machine dies before its disk was written. It
// then holds refresh tokens that are spent, and forgets disconnects. What this
// broker wrote itself it still knows from its journal, and puts it right:
//
//	a lower epoch       is raised: what was decided under it stays void, and
//	                    the roles of the newer one hold
//	a lost disconnect   is made again, unless a login came after it
//	a lower version     gets the newer refresh token, never over a tombstone;
//	                    without one the grant is quarantined as store_lost
//	an absent grant     is restored, never after a disconnect

// settleEvery is how often the journal looks which of its boxes the store has
// for sure.
const settleEvery = 5 * time.Second

const (
	// beatEvery is how often a broker looks at the store when nobody asks for
	// anything, so that it soon sees that the store has forgotten something.
	beatEvery = time.Second
	// othersWithin is for how long a broker that has seen that answers nobody: the
	// others see it within a beat, and write again what they know.
	othersWithin = 3 * beatEvery
)

// boxAlarm is how many boxes may wait for a store that does not settle before
// the log says so.
const boxAlarm = 1000

// known is what the store must have of k at least. It is asked before the store is,
// which may learn more meanwhile; and an answer on its way there does not count.
func (b *Broker) known(k GrantKey) journalEntry {
	e, _ := b.journal.get(k)
	e.Key = k
	if b.committing.has(k) {
		return journalEntry{Key: k}
	}
	return e
}

// healed returns g, read from the store, as it must be after what was known before.
func (b *Broker) healed(e journalEntry, g Grant, exists bool) (_ Grant, there, changed bool) {
	if exists && g.Version >= e.Version && g.Epoch >= e.Epoch && !e.EndedAt.After(g.EndedAt) {
		return g, true, false
	}
	own, has := b.boxed(e)
	if !exists {
		if !has || e.EndedAt.After(own.LoginAt) {
			return g, false, false
		}
		b.cfg.Log.Error("the store has lost a grant; it is restored from the journal", "grant", e.Key, "version", own.Version)
		return own, true, true
	}
	b.cfg.Log.Error("the store fell back to an older grant", "grant", e.Key,
		"version", g.Version, "known_version", e.Version, "epoch", g.Epoch, "known_epoch", e.Epoch)
	return b.heal(g, e, own, has), true, true
}

// heal is healed for a grant that is there but older.
func (b *Broker) heal(g Grant, e journalEntry, own Grant, has bool) Grant {
	e.rights(&g)
	epoch, roles, ended := g.Epoch, g.Roles, latest(g.EndedAt, e.EndedAt)
	switch {
	case g.Version >= e.Version:
	case has && !g.Tombstone.After(own.LoginAt):
		g = own
	default:
		if g.Tombstone.IsZero() {
			g.end(NeedsLogin, "store_lost", b.pulse.now())
			g.Spending = Spending{}
		}
		g.Version = e.Version // and once it is written, the store has not fallen back
	}
	g.Epoch, g.Roles, g.EndedAt = max(g.Epoch, epoch), roles, ended
	if ended.After(g.LoginAt) && g.Tombstone.IsZero() {
		g.Tombstone, g.Since = ended, ended
		g.State, g.Reason, g.Revocation = e.End.State, e.End.Reason, e.End.Revocation
		if g.State == "" {
			g.State, g.Reason = NeedsLogin, "store_lost" // and with it a login
		}
	}
	return g
}

func (b *Broker) boxPlace(k GrantKey, version int64) seal.Place {
	return seal.Place{b.cfg.Deployment, "journal", string(k.Hub), string(k.Provider), k.Sub, strconv.FormatInt(version, 10)}
}

// boxed opens the grant in e, if it has one, with the rights that e knows of.
func (b *Broker) boxed(e journalEntry) (Grant, bool) {
	if e.Box == nil {
		return Grant{}, false
	}
	var r grantRecord
	err := openValue(b.cfg.Keys, e.Box, b.boxPlace(e.Key, e.Version), &r)
	if err != nil {
		b.cfg.Log.Error("a grant in the journal can't be opened", "grant", e.Key, "err", err)
		return Grant{}, false
	}
	g := r.open()
	e.rights(&g)
	return g, true
}

// rights gives g the roles that e knows of if they are newer.
func (e *journalEntry) rights(g *Grant) {
	if e.Epoch > g.Epoch {
		g.Epoch, g.Roles = e.Epoch, e.Roles
	}
}

// note writes g down unless the journal knows all of it. The store has g, or is
// about to be asked to take it; trouble with the disk is logged and no more.
func (b *Broker) note(g Grant) {
	err := b.journal.write(g.Key, func(e *journalEntry) bool {
		news := e.learn(g)
		if g.Version > e.Version {
			e.Version, e.Box, news = g.Version, b.box(g), true
		}
		if !g.Tombstone.IsZero() {
			e.Box = nil // a disconnected grant is never restored
		}
		return news
	})
	if err != nil {
		b.cfg.Log.Error("the journal can't be written", "grant", g.Key, "err", err)
	}
}

// witness notes rights and disconnects that others have written. It does not wait
// for the disk: the store has them, and this only helps if it forgets them.
func (b *Broker) witness(g Grant) {
	known, _ := b.journal.get(g.Key)
	if !known.learn(g) {
		return
	}
	err := b.journal.add(g.Key, func(e *journalEntry) bool {
		if !g.Tombstone.IsZero() {
			e.Box = nil
		}
		return e.learn(g)
	})
	if err != nil {
		b.cfg.Log.Error("the journal can't be written", "grant", g.Key, "err", err)
	}
}

// endedAs is how g ended; Revocation is what is still to be done about it, if its
// end should be forgotten: all of it, which may be done twice.
func (g *Grant) endedAs() (e endedAs) {
	if g.Tombstone.IsZero() {
		return e
	}
	e = endedAs{State: g.State, Reason: g.Reason}
	if g.Revocation != "" {
		e.Revocation = RevocationPending
	}
	return e
}

// learn takes over what g says of rights and disconnects, and reports whether it
// is news.
func (e *journalEntry) learn(g Grant) (news bool) {
	if g.Epoch > e.Epoch {
		e.Epoch, e.Roles, news = g.Epoch, g.Roles, true
	}
	if g.EndedAt.After(e.EndedAt) {
		e.EndedAt, e.End, news = g.EndedAt, g.endedAs(), true
	}
	return news
}

// box seals g for the journal; nil, which is logged, if it can't.
func (b *Broker) box(g Grant) []byte {
	box, err := sealValue(b.cfg.Keys, g.record(), b.boxPlace(g.Key, g.Version))
	if err != nil {
		b.cfg.Log.Error("a grant can't be sealed for the journal", "grant", g.Key, "err", err)
		return nil
	}
	return box
}

// dismiss takes a provider's answer that the store has refused out of the journal
// again, and that its version and its epoch were ever reached: else the store
// would seem to have fallen back.
func (b *Broker) dismiss(began, next Grant) {
	err := b.journal.write(next.Key, func(e *journalEntry) (ours bool) {
		if e.Version == next.Version {
			e.Version, e.Box, ours = began.Version, nil, true
		}
		if e.Epoch == next.Epoch && next.Epoch > began.Epoch {
			e.Epoch, e.Roles, ours = began.Epoch, began.Roles, true
		}
		return ours
	})
	if err != nil {
		b.cfg.Log.Error("the journal can't be written", "grant", next.Key, "err", err)
	}
}

// fellBack runs before anything is believed of a store that may have forgotten
// something: it has restarted, another server has its place, or its revision fell
// below high. A disconnect that it forgot may be known to another broker only.
func (b *Broker) fellBack(ctx context.Context, high int64, got Pulse) error {
	if got.Revision < high {
		b.cfg.Log.Error("the store has forgotten what was written last; what the brokers know of it is written again",
			"revision", got.Revision, "known_revision", high)
	} else {
		b.cfg.Log.Warn("the store has restarted, or another server has taken its place; what it has is compared with the journal")
	}
	if _, err := b.reconcile(ctx, false); err != nil {
		return err
	}
	hosts, err := b.cfg.Store.Members(ctx, brokersKey)
	if err != nil {
		return storeError(err, brokersKey)
	}
	if !slices.ContainsFunc(hosts, func(h string) bool { return h != string(b.cfg.Host) }) {
		return nil
	}
	return pause(ctx, othersWithin)
}

// reconcile puts the store right in all that this broker has written or seen. It
// runs whenever the store may have fallen back, and at the start: then it also
// gives back the leases that a crash has left, which other brokers wait for, and
// returns the grants whose refresh the crash broke off.
func (b *Broker) reconcile(ctx context.Context, atStart bool) (brokenOff []GrantKey, err error) {
	moved := false
	for _, e := range b.journal.entries() {
		wrote := false
		g, err := b.changeGrant(ctx, e.Key, func(g *Grant, exists bool) error {
			wrote = exists
			switch {
			case !exists:
				return errMoved // nothing to put right
			case atStart && g.Lease.Journal == b.journal.id:
				g.Lease = Lease{}
				if g.Mark.Attempt != "" {
					brokenOff = append(brokenOff, e.Key)
				}
				return nil
			}
			return errKeep
		})
		switch {
		case errors.Is(err, ErrUnavailable):
			return nil, err
		case err != nil && !errors.Is(err, errMoved):
			b.cfg.Log.Error("a grant can't be compared with the journal", "grant", e.Key, "err", err)
		case err == nil:
			b.stillToRevoke(ctx, e, g)
		}
		moved = moved || wrote
	}
	if !moved {
		return nil, nil
	}
	return brokenOff, b.moveRevision(ctx)
}

// finish retries the refreshes that a crash broke off. A provider may forgive a
// second use of a token only for 30 s, and until somebody asks for one that may
// be over.
func (b *Broker) finish(ctx context.Context, brokenOff []GrantKey) {
	started := b.pulse.now()
	few := newCrowd(keepAliveAtOnce)
	for _, k := range brokenOff {
		few.Go(func() {
			if err := b.finishOne(ctx, k, started); err != nil {
				b.cfg.Log.Warn("a refresh that a crash broke off could not be finished", "grant", k, "err", err)
			}
		})
	}
	few.Wait()
}

// finishOne tries a second time when the token has rested, as it does if the crash
// was in the retry.
func (b *Broker) finishOne(ctx context.Context, k GrantKey, started time.Time) error {
	for again := false; ; again = true {
		_, err := b.whole(ctx, k, func(t *cachedToken) bool { return !t.IssuedAt.Before(started) })
		var said *Error
		if again || !errors.As(err, &said) || said.RetryAfter == 0 || pause(ctx, said.RetryAfter) != nil {
			return err
		}
	}
}

// stillToRevoke puts into the queue a disconnect that the store forgot, and the
// refresh token in e if the disconnect came before the store had it: a commit that
// found the tombstone would have done so. The work on the queue is not begun: it
// asks for the revision, which waits for us.
func (b *Broker) stillToRevoke(ctx context.Context, e journalEntry, g Grant) {
	own, has := b.boxed(e)
	var err error
	switch {
	case g.Tombstone.IsZero():
	case has && !own.Refresh.IsZero() && !own.Refresh.Equal(g.Refresh):
		err = b.keepToRevoke(ctx, e.Key, own.Refresh)
	case g.Revocation == RevocationPending:
		err = b.revokeSoon(ctx, e.Key, func() error { return nil })
	}
	if err != nil {
		b.cfg.Log.Warn("the provider is not told of a disconnect", "grant", e.Key, "err", err)
	}
}

// mend puts the store right in e's grant, which it has fallen back in.
func (b *Broker) mend(ctx context.Context, e journalEntry) {
	healed := false
	known := b.known(e.Key)
	_, err := b.changeStored(ctx, e.Key, func(g *Grant, exists bool) error {
		if *g, _, healed = b.healed(known, *g, exists); !healed {
			return errKeep
		}
		return nil
	})
	switch {
	case errors.Is(err, ErrUnavailable):
		return // the store is away, and has lost nothing
	case err == nil && healed:
		err = b.moveRevision(ctx)
	}
	if err != nil {
		b.cfg.Log.Error("a grant that the store has lost can't be put right", "grant", e.Key, "err", err)
	}
}

// settle forgets what the store has for sure, and puts right what it has lost:
// other brokers leave such a grant to this one while its lease runs.
func (b *Broker) settle(ctx context.Context) {
	var boxes []journalEntry
	for _, e := range b.journal.entries() {
		if e.Box != nil {
			boxes = append(boxes, e)
		}
	}
	since := b.settler.failures()
	boxes = slices.DeleteFunc(boxes, func(e journalEntry) bool {
		there := b.stored(ctx, e)
		if !there {
			b.mend(ctx, e)
		}
		return !there
	})
	if len(boxes) == 0 {
		return
	}
	if err := b.settler.settled(ctx, since); err != nil {
		if len(boxes) >= boxAlarm {
			b.cfg.Log.Error("the store does not keep what it is given; the journal grows", "grants", len(boxes), "err", err)
		}
		return
	}
	for _, e := range boxes {
		if err := b.journal.forget(e.Key, e.Version); err != nil {
			b.cfg.Log.Error("the journal can't be written", "grant", e.Key, "err", err)
		}
	}
}

// A settler asks the store to settle, once for all who want to know.
type settler struct {
	store  Store
	calls  flights[struct{}, time.Time]
	failed atomic.Int64
}

// failures is to be read before what settled is asked about.
func (s *settler) failures() int64 { return s.failed.Load() }

// settled returns nil once the store has for sure what was written to it, or
// found there, since failures returned since. A store says only once that it is
// not the same any more, so a call that failed meanwhile counts, whoever made it.
func (s *settler) settled(ctx context.Context, since int64) error {
	asked := time.Now()
	for {
		began, err := s.calls.do(ctx, struct{}{}, s.ask)
		switch {
		case err != nil:
			return err
		case s.failures() != since:
			return errors.New("the store changed meanwhile")
		case !began.Before(asked):
			return nil
		}
	}
}

func (s *settler) ask(ctx context.Context) (began time.Time, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*settleEvery)
	defer cancel()
	began = time.Now()
	if err = s.store.Settle(ctx); err != nil {
		s.failed.Add(1)
	}
	return began, err
}

// stored says whether the store has e's grant, or a newer one.
func (b *Broker) stored(ctx context.Context, e journalEntry) bool {
	var r grantRecord
	_, err := b.vault.load(ctx, e.Key.record(), &r)
	return err == nil && r.Version >= e.Version
}
