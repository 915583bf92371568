package broker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	"tokenbroker/broker/seal"
)

// Kinds of records, and of the sets that say where records are.
const (
	kindGrant        = "grant"        // hub, provider, sub → Grant
	kindHandle       = "handle"       // hub, provider, fingerprint → handleRecord
	kindLink         = "link"         // hub, user → linkRecord
	kindRegistration = "registration" // hub, host, user, server → Registration
	kindToken        = "token"        // hub, provider, sub, audience, scopes → tokenRecord
	kindWhole        = "whole"        // hub, provider, sub → tokenRecord of the whole grant
	kindHub          = "hub"          // hub, provider, sub, scopes → tokenRecord of the hub's own
	kindIssued       = "issued"       // hub, provider, sub → issuedRecord
	kindBroker       = "broker"       // host → attendance
	kindLogout       = "logout"       // provider, logout token → logoutRecord

	setGrants        = "grants"        // all grants of the deployment
	setPending       = "pending"       // hub → fingerprints of pending handles
	setRegistrations = "registrations" // host → servers registered there
	setBrokers       = "brokers"       // all hosts of the deployment
	setRevocations   = "revocations"   // grants that something is to be revoked of
	setStops         = "stops"         // users of whose servers some are to be stopped
)

func (k GrantKey) record() Key {
	return Key{Kind: kindGrant, Parts: []string{string(k.Hub), string(k.Provider), k.Sub}}
}

// A vault is the Store with sealing: what goes in is a value, what lies in the
// store is sealed whole and bound to its place, which is the deployment, the
// key and the record's revision. A record that was changed, moved, or put back
// under a newer revision does not open.
type vault struct {
	store      Store
	keys       *seal.Keyset
	deployment string
}

// load reads the record at k into v and returns its revision. It returns
// ErrAbsent if there is none.
func (a *vault) load(ctx context.Context, k Key, v any) (revision int64, err error) {
	r, err := a.store.Get(ctx, k)
	if err != nil {
		return 0, storeError(err, k)
	}
	if err := a.open(k, r, v); err != nil {
		return 0, err
	}
	return r.Revision, nil
}

func (a *vault) open(k Key, r Record, v any) error {
	if err := openValue(a.keys, r.Box, a.place(k, r.Revision), v); err != nil {
		return fmt.Errorf("open record %s: %w", k, err)
	}
	return nil
}

// save writes v at k if the record there still has revision was.
func (a *vault) save(ctx context.Context, k Key, was int64, v any, life time.Duration) error {
	box, err := sealValue(a.keys, v, a.place(k, was+1))
	if err != nil {
		return fmt.Errorf("seal record %s: %w", k, err)
	}
	return storeError(a.store.Put(ctx, k, was, box, life), k)
}

// sealValue seals v, as JSON, for its place.
func sealValue(keys *seal.Keyset, v any, place seal.Place) (box []byte, err error) {
	Erasing(func() {
		var plain plaintext
		if err = json.NewEncoder(&plain).Encode(v); err == nil {
			box, err = keys.Seal(plain, place)
		}
	})
	return box, err
}

// plaintext takes what encoding/json has written out of its buffer, which goes back
// into a pool that [Erasing] does not reach. An Encoder doesn't read it again.
type plaintext []byte

func (p *plaintext) Write(b []byte) (int, error) {
	*p = append(*p, b...)
	clear(b)
	return len(b), nil
}

// openValue opens into v what sealValue sealed for a place.
func openValue(keys *seal.Keyset, box []byte, place seal.Place, v any) (err error) {
	Erasing(func() {
		var plain []byte
		if plain, err = keys.Open(box, place); err == nil {
			err = json.Unmarshal(plain, v)
		}
	})
	return err
}

// unlessAbsent is err, or nil if there only is no record.
func unlessAbsent(err error) error {
	if errors.Is(err, ErrAbsent) {
		return nil
	}
	return err
}

// errKeep is what a change returns to leave the record as it is.
var errKeep = errors.New("leave the record as it is")

// update reads the record at k, lets change alter it, and writes it back; if
// somebody else was faster it starts over with what they wrote. An absent
// record is a zero T with exists false. The T that was written, or left, is
// returned; after an error of change's own it is what was read.
//
// life is asked of the changed value, so that a record's end can follow what it
// holds.
func update[T any](ctx context.Context, a *vault, k Key, life func(*T) time.Duration, change func(v *T, exists bool) error) (T, error) {
	for {
		var v T
		was, err := a.load(ctx, k, &v)
		if err != nil && !errors.Is(err, ErrAbsent) {
			return v, err
		}
		if err := change(&v, err == nil); err != nil {
			if errors.Is(err, errKeep) {
				return v, nil
			}
			return v, err
		}
		err = a.save(ctx, k, was, &v, life(&v))
		if !errors.Is(err, ErrStale) {
			return v, err
		}
	}
}

// forever is the life of a record that the store must not drop.
func forever[T any](*T) time.Duration { return 0 }

func (a *vault) place(k Key, revision int64) seal.Place {
	p := seal.Place{a.deployment, k.Kind}
	p = append(p, k.Parts...)
	return append(p, strconv.FormatInt(revision, 10))
}

// String names a record in errors for operators.
func (k Key) String() string { return fmt.Sprintf("%s%q", k.Kind, k.Parts) }

// storeError passes the store's two answers on and makes an Unavailable of
// anything else, which is trouble.
func storeError(err error, k Key) error {
	if err == nil || errors.Is(err, ErrAbsent) || errors.Is(err, ErrStale) {
		return err
	}
	return Errorf(Unavailable, "the token broker can't reach its store").Because(fmt.Errorf("%s: %w", k, err))
}

// later is the next value of a counter that must never come back: one more,
// and never below the store's time, so that a fail-over to an older copy of the
// store does not hand out a used value.
func later(old int64, now time.Time) int64 {
	return max(old+1, now.UnixMicro())
}
