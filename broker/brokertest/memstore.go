package brokertest

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"tokenbroker/broker"
)

var _ broker.Store = (*MemStore)(nil)

// A MemStore is a broker.Store in memory. It passes TestStore, and can be made
// to fail, to wait, and to live at another time.
//
// It starts no goroutine and reads the time from time.Now, so it works inside
// a synctest bubble.
type MemStore struct {
	mu       sync.Mutex // guards all below
	records  map[string]memRecord
	sets     map[string]map[string]bool
	revision int64
	server   int           // moves with each Fallback
	ahead    time.Duration // of the store's clock before time.Now
	before   Hook
	after    Hook
	failure  error
	calls    map[string]int
	ears     map[chan string]bool // of those who listen
	deaf     bool
}

// manyNotes is how many notes wait for one who listens; more are lost.
const manyNotes = 64

type memRecord struct {
	broker.Record
	key broker.Key
	end time.Time // zero: none
}

// A Hook is called with the name of a method ("Get", "Put", "Delete", "Add",
// "Remove", "Members", "Records", "Move", "Pulse", "Tell", "Replicated", "Settle",
// "Check") and its key, if it has one. It may wait, and may call the store. If it
// returns an error, so does the method.
type Hook func(method string, k broker.Key) error

// NewMemStore returns an empty store.
func NewMemStore() *MemStore {
	return &MemStore{
		records: make(map[string]memRecord),
		sets:    make(map[string]map[string]bool),
		calls:   make(map[string]int),
		ears:    make(map[chan string]bool),
	}
}

// Fail makes every method return err, and change nothing, until Fail(nil).
func (s *MemStore) Fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failure = err
}

// Before has h called before each method does its work; nil ends that. If h
// returns an error, nothing is changed.
func (s *MemStore) Before(h Hook) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.before = h
}

// After has h called after each method that succeeded; nil ends that. If h
// returns an error, the change has happened but its answer is lost.
func (s *MemStore) After(h Hook) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.after = h
}

// Calls returns how often a method was called.
func (s *MemStore) Calls(method string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls[method]
}

// Advance moves the store's clock, forward or back, against time.Now.
func (s *MemStore) Advance(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ahead += d
}

// DropNotes loses all notes, without an error, until DropNotes(false); whoever
// listens then begins anew, as after a lost connection.
func (s *MemStore) DropNotes(drop bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.deaf && !drop {
		s.pass("")
	}
	s.deaf = drop
}

// Tamper puts box where a record lies without moving its revision, as somebody
// who can write to the store might. It reports whether there was a record.
func (s *MemStore) Tamper(k broker.Key, box []byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.records[encode(k)]
	if ok {
		r.Box = bytes.Clone(box)
		s.records[encode(k)] = r
	}
	return ok
}

// PutBack puts a record as it once was in the place of the one that is there, as
// somebody who can write to the store might.
func (s *MemStore) PutBack(k broker.Key, old broker.Record) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.records[encode(k)]
	r.Record, r.key = broker.Record{Revision: old.Revision, Box: bytes.Clone(old.Box)}, k
	s.records[encode(k)] = r
}

// Copy returns what a backup or a replica would hold now, for Fallback.
func (s *MemStore) Copy() *MemCopy {
	s.mu.Lock()
	defer s.mu.Unlock()
	return &MemCopy{maps.Clone(s.records), cloneSets(s.sets), s.revision}
}

// Fallback puts the store back to what it was when c was made; a nil c empties it.
func (s *MemStore) Fallback(c *MemCopy) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c == nil {
		c = &MemCopy{records: make(map[string]memRecord)}
	}
	s.server++
	s.records, s.sets, s.revision = maps.Clone(c.records), cloneSets(c.sets), c.revision
}

// A MemCopy is a MemStore's contents at one moment.
type MemCopy struct {
	records  map[string]memRecord
	sets     map[string]map[string]bool
	revision int64
}

func cloneSets(sets map[string]map[string]bool) map[string]map[string]bool {
	c := make(map[string]map[string]bool)
	for k, s := range sets {
		c[k] = maps.Clone(s)
	}
	return c
}

// Each calls f with every record, in the order of their keys.
func (s *MemStore) Each(f func(k broker.Key, r broker.Record)) {
	s.mu.Lock()
	now := s.now()
	var all []memRecord
	for _, name := range slices.Sorted(maps.Keys(s.records)) {
		if r := s.records[name]; !r.ended(now) {
			r.Box = bytes.Clone(r.Box)
			all = append(all, r)
		}
	}
	s.mu.Unlock()
	for _, r := range all {
		f(r.key, r.Record)
	}
}

// Get implements broker.Store.
func (s *MemStore) Get(ctx context.Context, k broker.Key) (broker.Record, error) {
	var r broker.Record
	err := s.do(ctx, "Get", k, func() error {
		found, ok := s.live(k)
		if !ok {
			return broker.ErrAbsent
		}
		r = broker.Record{Revision: found.Revision, Box: bytes.Clone(found.Box)}
		return nil
	})
	if err != nil {
		return broker.Record{}, err
	}
	return r, nil
}

// Put implements broker.Store.
func (s *MemStore) Put(ctx context.Context, k broker.Key, was int64, box []byte, life time.Duration) error {
	return s.do(ctx, "Put", k, func() error {
		found, _ := s.live(k) // revision 0 if absent
		if found.Revision != was {
			return broker.ErrStale
		}
		r := memRecord{
			Record: broker.Record{Revision: was + 1, Box: bytes.Clone(box)},
			key:    broker.Key{Kind: k.Kind, Parts: slices.Clone(k.Parts)},
		}
		switch {
		case life > 0:
			r.end = s.now().Add(life)
		case life == broker.KeepLife:
			r.end = found.end
		}
		s.records[encode(k)] = r
		return nil
	})
}

// Delete implements broker.Store.
func (s *MemStore) Delete(ctx context.Context, k broker.Key, was int64) error {
	return s.do(ctx, "Delete", k, func() error {
		found, ok := s.live(k)
		if ok && found.Revision != was {
			return broker.ErrStale
		}
		delete(s.records, encode(k))
		return nil
	})
}

// Add implements broker.Store.
func (s *MemStore) Add(ctx context.Context, k broker.Key, member string) error {
	return s.do(ctx, "Add", k, func() error {
		set := s.sets[encode(k)]
		if set == nil {
			set = make(map[string]bool)
			s.sets[encode(k)] = set
		}
		set[member] = true
		return nil
	})
}

// Remove implements broker.Store.
func (s *MemStore) Remove(ctx context.Context, k broker.Key, member string) error {
	return s.do(ctx, "Remove", k, func() error {
		delete(s.sets[encode(k)], member)
		return nil
	})
}

// Members implements broker.Store.
func (s *MemStore) Members(ctx context.Context, k broker.Key) ([]string, error) {
	var members []string
	err := s.do(ctx, "Members", k, func() error {
		members = slices.Collect(maps.Keys(s.sets[encode(k)]))
		return nil
	})
	if err != nil {
		return nil, err
	}
	return members, nil
}

// Records implements broker.Store.
func (s *MemStore) Records(ctx context.Context, f func(broker.Key) error) error {
	var all []broker.Key
	err := s.do(ctx, "Records", broker.Key{}, func() error {
		now := s.now()
		for _, r := range s.records {
			if !r.ended(now) {
				all = append(all, r.key)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, k := range all {
		if err := f(k); err != nil {
			return err
		}
	}
	return nil
}

// Move implements broker.Store.
func (s *MemStore) Move(ctx context.Context) (int64, error) {
	var revision int64
	err := s.do(ctx, "Move", broker.Key{}, func() error {
		s.revision = max(s.revision+1, s.now().UnixMicro())
		revision = s.revision
		return nil
	})
	if err != nil {
		return 0, err
	}
	return revision, nil
}

// Pulse implements broker.Store.
func (s *MemStore) Pulse(ctx context.Context) (broker.Pulse, error) {
	var p broker.Pulse
	err := s.do(ctx, "Pulse", broker.Key{}, func() error {
		p = broker.Pulse{Revision: s.revision, Now: s.now(), Server: strconv.Itoa(s.server)}
		return nil
	})
	if err != nil {
		return broker.Pulse{}, err
	}
	return p, nil
}

// Tell implements broker.Store.
func (s *MemStore) Tell(ctx context.Context, note string) error {
	return s.do(ctx, "Tell", broker.Key{}, func() error {
		if !s.deaf && note != "" {
			s.pass(note)
		}
		return nil
	})
}

// pass has note heard by those who listen. The caller holds the lock.
func (s *MemStore) pass(note string) {
	for ear := range s.ears {
		select {
		case ear <- note:
		default:
		}
	}
}

// Listen implements broker.Store. It hears nothing while the store fails,
// because nobody can tell anything then.
func (s *MemStore) Listen(ctx context.Context, heard func(note string)) error {
	ear := make(chan string, manyNotes)
	s.locked(func() error { s.ears[ear] = true; return nil })
	defer s.locked(func() error { delete(s.ears, ear); return nil })
	if ctx.Err() == nil {
		heard("")
	}
	for ctx.Err() == nil {
		select {
		case note := <-ear:
			heard(note)
		case <-ctx.Done():
		}
	}
	return ctx.Err()
}

// Replicated implements broker.Store: there are no replicas.
func (s *MemStore) Replicated(ctx context.Context) error {
	return s.do(ctx, "Replicated", broker.Key{}, func() error { return nil })
}

// Settle implements broker.Store: memory is as durable as it gets.
func (s *MemStore) Settle(ctx context.Context) error {
	return s.do(ctx, "Settle", broker.Key{}, func() error { return nil })
}

// Check implements broker.Store. A store in memory can be trusted with tests.
func (s *MemStore) Check(ctx context.Context) error {
	return s.do(ctx, "Check", broker.Key{}, func() error { return nil })
}

// do counts a call, asks the hooks, and runs f under the lock.
func (s *MemStore) do(ctx context.Context, method string, k broker.Key, f func() error) error {
	s.mu.Lock()
	s.calls[method]++
	before, after, failure := s.before, s.after, s.failure
	s.mu.Unlock()

	if failure != nil {
		return failure
	}
	if before != nil { // not under the lock: it may call the store
		if err := before(method, k); err != nil {
			return err
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := s.locked(f); err != nil {
		return err
	}
	if after != nil {
		return after(method, k)
	}
	return nil
}

func (s *MemStore) locked(f func() error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return f()
}

// now is the store's time, to the microsecond, as Redis tells it. The caller
// holds the lock.
func (s *MemStore) now() time.Time {
	return time.UnixMicro(time.Now().Add(s.ahead).UnixMicro())
}

// live returns the record at k unless its life has ended. The caller holds the
// lock.
func (s *MemStore) live(k broker.Key) (memRecord, bool) {
	r, ok := s.records[encode(k)]
	if !ok || r.ended(s.now()) {
		return memRecord{}, false
	}
	return r, true
}

func (r memRecord) ended(now time.Time) bool {
	return !r.end.IsZero() && !now.Before(r.end)
}

// encode puts each part behind its length, so that no two keys meet.
func encode(k broker.Key) string {
	var b strings.Builder
	for _, part := range append([]string{k.Kind}, k.Parts...) {
		fmt.Fprintf(&b, "%d:%s", len(part), part)
	}
	return b.String()
}
