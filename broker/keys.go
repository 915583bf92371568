package broker

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"tokenbroker/broker/seal"
)

// Keys are rotated without a pause while several brokers run, each of which reads
// its keyset anew by itself. What one has sealed the others must be able to open,
// so each step waits until all of them have taken the one before; see seal.Add.
// That they have, they say themselves, in records that KeyKeeper reads.
const (
	// attendEvery is how often a broker says which keys it has, unless they change.
	attendEvery = 15 * time.Second
	// writesTake is more than a write that was sealed before a change of keys can
	// be under way.
	writesTake = 10 * time.Second
	// attendFor is for how long that holds.
	attendFor = time.Minute
)

// attendance is what a broker says of itself.
type attendance struct {
	At   time.Time
	Keys []seal.Key
	// Sealing are the keys that it has sealed under since it said so last: what
	// it seals under now, and before it read its keyset anew what is not written
	// yet may be sealed under another.
	Sealing []seal.KeyID
	// Journal are the keys that boxes in its journal are sealed under.
	Journal []seal.KeyID
}

// brokersKey is the set of all hosts that ever had a broker of the deployment.
var brokersKey = Key{Kind: setBrokers}

func attendanceKey(h HostID) Key { return Key{Kind: kindBroker, Parts: []string{string(h)}} }

// attend says until the broker closes which keys it has, and at once when they
// are others than keys, which were said already.
func (b *Broker) attend(keys []seal.Key) {
	before := primaries(keys)
	changed := func() bool { return !slices.Equal(keys, b.cfg.Keys.Keys()) }
	wait, enough := attendEvery, changed
	for b.patient(wait, enough) {
		keys = b.cfg.Keys.Keys()
		now := primaries(keys)
		b.say(context.Background(), keys, union(before, now))
		wait, enough = attendEvery, changed
		if !slices.Equal(before, now) {
			wait, enough = writesTake, func() bool { return false }
		}
		before = now
	}
}

// say is attendOnce, whose failure is no more than a line in the log.
func (b *Broker) say(ctx context.Context, keys []seal.Key, sealing []seal.KeyID) {
	ctx, cancel := context.WithTimeout(ctx, attendEvery)
	defer cancel()
	if err := b.attendOnce(ctx, keys, sealing); err != nil {
		b.cfg.Log.Warn("the other brokers can't be told which keys this one has", "err", err)
	}
}

// patient waits, at most until enough, and reports whether the broker is open.
func (b *Broker) patient(d time.Duration, enough func() bool) bool {
	for began := time.Now(); time.Since(began) < d && !enough(); {
		select {
		case <-b.closing:
			return false
		case <-time.After(time.Second):
		}
	}
	return true
}

func (b *Broker) attendOnce(ctx context.Context, keys []seal.Key, sealing []seal.KeyID) error {
	if err := b.pulse.sync(ctx); err != nil {
		return err
	}
	// First, so that nobody takes it for absent who can't find what it says.
	if err := b.cfg.Store.Add(ctx, brokersKey, string(b.cfg.Host)); err != nil {
		return storeError(err, brokersKey)
	}
	now := attendance{At: b.pulse.now(), Keys: keys, Sealing: sealing}
	for _, e := range b.journal.entries() {
		if id, ok := seal.KeyOf(e.Box); ok && !slices.Contains(now.Journal, id) {
			now.Journal = append(now.Journal, id)
		}
	}
	_, err := update(ctx, &b.vault, attendanceKey(b.cfg.Host), forever, func(a *attendance, _ bool) error {
		*a = now
		return nil
	})
	return err
}

// primaries are the keys of a keyset that seal: one, or none in an empty one.
func primaries(keys []seal.Key) (ids []seal.KeyID) {
	for _, k := range keys {
		if k.State == seal.Primary {
			ids = append(ids, k.ID)
		}
	}
	return ids
}

func union(a, b []seal.KeyID) []seal.KeyID {
	all := slices.Concat(a, b)
	slices.Sort(all)
	return slices.Compact(all)
}

// A KeyKeeper does the work of a rotation that concerns a whole deployment. It
// needs no running broker.
type KeyKeeper struct {
	Deployment string
	Store      Store
	Keys       *seal.Keyset
}

// BrokerKeys is what one broker has said of its keys.
type BrokerKeys struct {
	Host    HostID
	SeenAt  time.Time  // zero: never
	Present bool       // it was seen within the last minute
	Keys    []seal.Key // from the oldest to the newest
	// Sealing are the keys that its writes under way may be sealed under.
	Sealing []seal.KeyID
	// Journal are the keys that its journal needs: what it holds there is on its
	// way into the store.
	Journal []seal.KeyID
}

// Has says whether the broker can open what id seals.
func (b BrokerKeys) Has(id seal.KeyID) bool {
	return slices.ContainsFunc(b.Keys, func(k seal.Key) bool {
		return k.ID == id && k.State != seal.Disabled && k.State != seal.Gone
	})
}

// SealsUnder says whether id is all that the broker seals under.
func (b BrokerKeys) SealsUnder(id seal.KeyID) bool {
	return len(b.Sealing) > 0 && !slices.ContainsFunc(b.Sealing, func(s seal.KeyID) bool { return s != id })
}

// Needs says whether the broker's journal, or a write of it, is under id.
func (b BrokerKeys) Needs(id seal.KeyID) bool {
	return slices.Contains(b.Sealing, id) || slices.Contains(b.Journal, id)
}

func (k KeyKeeper) vault() *vault {
	return &vault{store: k.Store, keys: k.Keys, deployment: k.Deployment}
}

// Brokers lists what the deployment's brokers have said, by host.
func (k KeyKeeper) Brokers(ctx context.Context) ([]BrokerKeys, error) {
	pulse, err := k.Store.Pulse(ctx)
	if err != nil {
		return nil, fmt.Errorf("ask the store for the time: %w", err)
	}
	hosts, err := k.Store.Members(ctx, brokersKey)
	if err != nil {
		return nil, fmt.Errorf("list the brokers: %w", err)
	}
	slices.Sort(hosts)
	var all []BrokerKeys
	for _, h := range hosts {
		var a attendance
		_, err := k.vault().load(ctx, attendanceKey(HostID(h)), &a)
		if err != nil && !errors.Is(err, ErrAbsent) {
			return nil, fmt.Errorf("ask for the broker on %s: %w", h, err)
		}
		all = append(all, BrokerKeys{
			Host: HostID(h), SeenAt: a.At, Present: pulse.Now.Sub(a.At) < attendFor, Keys: a.Keys, Sealing: a.Sealing, Journal: a.Journal,
		})
	}
	return all, nil
}

// Forget is for the broker of a host that is gone for good, with its journal.
func (k KeyKeeper) Forget(ctx context.Context, h HostID) error {
	if err := k.Store.Remove(ctx, brokersKey, string(h)); err != nil {
		return fmt.Errorf("forget the broker on %s: %w", h, err)
	}
	return nil
}

// A Census says what lies in the store.
type Census struct {
	Records map[seal.KeyID]int // how many open, by the key they are under
	Others  map[seal.KeyID]int // how many don't, by the key that they name
	// Strange are records that don't open, with the reason, sorted: of an older
	// backup, under a lost key, or damaged.
	Strange []string
}

// Count opens every record.
func (k KeyKeeper) Count(ctx context.Context) (Census, error) {
	c := Census{Records: make(map[seal.KeyID]int), Others: make(map[seal.KeyID]int)}
	err := k.each(ctx, func(key Key, r Record) error {
		id, sealed := seal.KeyOf(r.Box)
		_, err := k.Keys.Open(r.Box, k.vault().place(key, r.Revision))
		switch {
		case err == nil:
			c.Records[id]++
			return nil
		case sealed:
			c.Others[id]++
		}
		c.Strange = append(c.Strange, strange(key, err))
		return nil
	})
	slices.Sort(c.Strange)
	return c, err
}

// strange says which record does not open, and why, without the names of the parts
// that seal.Place repeats.
func strange(k Key, err error) string {
	_, why, _ := strings.Cut(err.Error(), seal.ErrUnsealable.Error()+": ")
	return fmt.Sprintf("%s: %s", k, why)
}

// each calls f once with every record. A record is counted once, even if the
// store lists it twice.
func (k KeyKeeper) each(ctx context.Context, f func(Key, Record) error) error {
	seen := make(map[string]bool)
	return k.Store.Records(ctx, func(key Key) error {
		name := key.String()
		if seen[name] {
			return nil
		}
		seen[name] = true
		r, err := k.Store.Get(ctx, key)
		if errors.Is(err, ErrAbsent) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read record %s: %w", key, err)
		}
		return f(key, r)
	})
}

// Reseal seals all records anew that are not under the key that seals now, and
// returns those that it could not open. progress is told how many of how many
// are done.
func (k KeyKeeper) Reseal(ctx context.Context, progress func(done, all int)) (strangers []string, err error) {
	var old []Key
	err = k.each(ctx, func(key Key, r Record) error {
		if !k.current(r) {
			old = append(old, key)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for i, key := range old {
		err := k.reseal(ctx, key)
		switch {
		case errors.Is(err, seal.ErrUnsealable):
			strangers = append(strangers, strange(key, err))
		case err != nil:
			return strangers, err
		}
		progress(i+1, len(old))
	}
	slices.Sort(strangers)
	return strangers, nil
}

// reseal writes a record as it is, under the key that seals now. To a broker that
// is about to change the record this is a change like any other: its write is
// refused, and it does its change again on what it finds, which is the same
// grant at the same version with the same lease. A broker that was faster has
// sealed the record anew itself.
func (k KeyKeeper) reseal(ctx context.Context, key Key) error {
	for {
		r, err := k.Store.Get(ctx, key)
		if errors.Is(err, ErrAbsent) || err == nil && k.current(r) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read record %s: %w", key, err)
		}
		plain, err := k.Keys.Open(r.Box, k.vault().place(key, r.Revision))
		if err != nil {
			return err
		}
		box, err := k.Keys.Seal(plain, k.vault().place(key, r.Revision+1))
		if err != nil {
			return err
		}
		err = k.Store.Put(ctx, key, r.Revision, box, KeepLife)
		if !errors.Is(err, ErrStale) {
			return err
		}
	}
}

// current says whether a record is under the key that seals now.
func (k KeyKeeper) current(r Record) bool {
	id, ok := seal.KeyOf(r.Box)
	return ok && slices.Contains(primaries(k.Keys.Keys()), id)
}
