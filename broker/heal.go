package broker

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strconv"
	"time"

	"tokenbroker/broker/seal"
)

// A store may fall back to an older copy of itself: a replica that lagged is
// promoted, a backup is restored, a machine dies before its disk was written. It
// then holds refresh tokens that are spent, and forgets disconnects. What this
// broker wrote itself it still knows from its journal, and puts it right:
//
//	a lower epoch       is raised: what was decided under it stays void
//	a lost disconnect   is made again, unless a login came after it
//	a lower version     gets the newer refresh token, never over a tombstone;
//	                    without one the grant is quarantined as store_lost
//	an absent grant     is restored, never after a disconnect

// settleEvery is how often the journal looks which of its boxes the store has
// for sure.
const settleEvery = 5 * time.Second

// boxAlarm is how many boxes may wait for a store that does not settle before
// the log says so.
const boxAlarm = 1000

// healed returns g as it must be after what this broker has written of it.
func (b *Broker) healed(k GrantKey, g Grant, exists bool) (_ Grant, there, changed bool) {
	e, ok := b.journal.get(k)
	switch {
	case !ok, b.committing.has(k): // the journal is ahead, and its answer on the way
		return g, exists, false
	case exists && g.Version >= e.Version && g.Epoch >= e.Epoch && !e.EndedAt.After(g.EndedAt):
		return g, true, false
	}
	own, has := b.boxed(e)
	if !exists {
		if !has || e.EndedAt.After(own.LoginAt) {
			return g, false, false
		}
		b.cfg.Log.Error("the store has lost a grant; it is restored from the journal", "grant", k, "version", own.Version)
		return own, true, true
	}
	b.cfg.Log.Error("the store fell back to an older grant", "grant", k,
		"version", g.Version, "known_version", e.Version, "epoch", g.Epoch, "known_epoch", e.Epoch)
	return b.heal(g, e, own, has), true, true
}

// heal is healed for a grant that is there but older.
func (b *Broker) heal(g Grant, e journalEntry, own Grant, has bool) Grant {
	epoch, ended := max(g.Epoch, e.Epoch), latest(g.EndedAt, e.EndedAt)
	switch {
	case g.Version >= e.Version:
	case has && !g.Tombstone.After(own.LoginAt):
		g = own
	case g.Tombstone.IsZero():
		g.end(NeedsLogin, "store_lost", b.pulse.now())
		g.Spending = Spending{}
		g.Version = e.Version
	}
	g.Epoch, g.EndedAt = max(g.Epoch, epoch), ended
	if ended.After(g.LoginAt) && g.Tombstone.IsZero() {
		g.Tombstone = ended
		g.State, g.Reason, g.Since = byAdministrator.state, byAdministrator.reason, ended
	}
	return g
}

func (b *Broker) boxPlace(k GrantKey, version int64) seal.Place {
	return seal.Place{b.cfg.Deployment, "journal", string(k.Hub), string(k.Provider), k.Sub, strconv.FormatInt(version, 10)}
}

// boxed opens the grant in e, if it has one.
func (b *Broker) boxed(e journalEntry) (Grant, bool) {
	if e.Box == nil {
		return Grant{}, false
	}
	plain, err := b.cfg.Keys.Open(e.Box, b.boxPlace(e.Key, e.Version))
	var r grantRecord
	if err == nil {
		err = json.Unmarshal(plain, &r)
	}
	if err != nil {
		b.cfg.Log.Error("a grant in the journal can't be opened", "grant", e.Key, "err", err)
		return Grant{}, false
	}
	return r.open(), true
}

// note writes g down unless the journal knows all of it. The store has g, or is
// about to be asked to take it; trouble with the disk is logged and no more.
func (b *Broker) note(g Grant) {
	old, known := b.journal.get(g.Key)
	if known && old.Version >= g.Version && old.Epoch >= g.Epoch && !g.EndedAt.After(old.EndedAt) {
		return
	}
	e := journalEntry{
		Key: g.Key, Version: max(g.Version, old.Version), Epoch: max(g.Epoch, old.Epoch),
		EndedAt: latest(g.EndedAt, old.EndedAt), Box: old.Box,
	}
	if g.Version > old.Version {
		e.Box = b.box(g)
	}
	if !g.Tombstone.IsZero() {
		e.Box = nil // a disconnected grant is never restored
	}
	if err := b.journal.write(e); err != nil {
		b.cfg.Log.Error("the journal can't be written", "grant", g.Key, "err", err)
	}
}

// box seals g for the journal; nil, which is logged, if it can't.
func (b *Broker) box(g Grant) []byte {
	plain, err := json.Marshal(g.record())
	var box []byte
	if err == nil {
		box, err = b.cfg.Keys.Seal(plain, b.boxPlace(g.Key, g.Version))
	}
	if err != nil {
		b.cfg.Log.Error("a grant can't be sealed for the journal", "grant", g.Key, "err", err)
		return nil
	}
	return box
}

// dismiss takes a provider's answer, which the store has refused, out of the
// journal again.
func (b *Broker) dismiss(k GrantKey, version int64) {
	if err := b.journal.forget(k, version); err != nil {
		b.cfg.Log.Error("the journal can't be written", "grant", k, "err", err)
	}
}

// reconcile puts the store right in all that this broker has written. It runs
// whenever the store's revision has fallen, and at the start: then it also gives
// back the leases that a crash has left, which other brokers wait for, and
// returns the grants whose refresh the crash broke off.
func (b *Broker) reconcile(ctx context.Context, atStart bool) (brokenOff []GrantKey, err error) {
	moved := false
	for _, e := range b.journal.entries() {
		wrote := false
		_, err := b.changeGrant(ctx, e.Key, func(g *Grant, exists bool) error {
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
			if _, err := b.whole(ctx, k, func(t *cachedToken) bool { return !t.IssuedAt.Before(started) }); err != nil {
				b.cfg.Log.Warn("a refresh that a crash broke off could not be finished", "grant", k, "err", err)
			}
		})
	}
	few.Wait()
}

// mend puts the store right in e's grant, which it has fallen back in.
func (b *Broker) mend(ctx context.Context, e journalEntry) {
	healed := false
	_, err := b.changeStored(ctx, e.Key, func(g *Grant, exists bool) error {
		if *g, _, healed = b.healed(e.Key, *g, exists); !healed {
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
	ctx, cancel := context.WithTimeout(ctx, 2*settleEvery)
	defer cancel()
	if err := b.cfg.Store.Settle(ctx); err != nil {
		if len(boxes) >= boxAlarm {
			b.cfg.Log.Error("the store does not keep what it is given; the journal grows", "grants", len(boxes), "err", err)
		}
		return
	}
	for _, e := range boxes {
		b.dismiss(e.Key, e.Version)
	}
}

// stored says whether the store has e's grant, or a newer one.
func (b *Broker) stored(ctx context.Context, e journalEntry) bool {
	var r grantRecord
	_, err := b.vault.load(ctx, e.Key.record(), &r)
	return err == nil && r.Version >= e.Version
}
