package broker

import (
	"context"
	"sync"
	"time"
)

// confirmLease is for how long a revision that was read counts as current:
// the longest that one broker may go on under rights another one has ended.
const confirmLease = 250 * time.Millisecond

// pulse reads the deployment's revision and time, once per lease for all
// requests of this broker.
type pulse struct {
	store Store
	reads flights[struct{}, struct{}]
	// fellBack is called before a revision is believed that is lower than one
	// that was read before: the store has forgotten something.
	fellBack func(context.Context) error

	mu   sync.Mutex // guards the three below
	last Pulse
	at   time.Time // when the read of last began, by our monotonic clock
	high int64     // the highest revision that was read or made here
}

// revision returns a revision that was current at most confirmLease ago. What
// took longer to arrive proves nothing and is read again.
func (p *pulse) revision(ctx context.Context) (int64, error) {
	for range 3 {
		if err := p.sync(ctx); err != nil {
			return 0, err
		}
		if rev, ok := p.confirmed(); ok {
			return rev, nil
		}
	}
	return 0, Errorf(Unavailable, "the token broker's store is too slow")
}

// sync sets the clock by the store, unless that was done within the lease. A
// flow that goes by the time and reads no revision begins with it: our monotonic
// clock stands still while the machine sleeps.
func (p *pulse) sync(ctx context.Context) error {
	if _, ok := p.confirmed(); ok {
		return nil
	}
	_, err := p.reads.do(ctx, struct{}{}, p.read)
	return err
}

func (p *pulse) highest() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.high
}

// confirmed returns the last revision if its lease still runs.
func (p *pulse) confirmed() (int64, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.last.Revision, !p.at.IsZero() && time.Since(p.at) <= confirmLease
}

func (p *pulse) read(ctx context.Context) (none struct{}, err error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	high := p.highest() // as of now: what we move meanwhile is no sign of a fall
	began := time.Now()
	got, err := p.store.Pulse(ctx)
	if err == nil && got.Revision < high && p.fellBack != nil {
		if err := p.fellBack(ctx); err != nil {
			return none, err
		}
		began = time.Now()
		got, err = p.store.Pulse(ctx)
	}
	if err != nil {
		return none, storeError(err, Key{Kind: "revision"})
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last, p.at, p.high = got, began, max(p.high, got.Revision)
	return none, nil
}

// now is the store's time, carried on by our monotonic clock. The host's own
// idea of the time of day plays no part; it may be an hour off.
func (p *pulse) now() time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.last.Now.Add(time.Since(p.at)).UTC()
}

// moved says that the revision is rev now, because we moved it. The next one is
// read anew: both fields go back by the same, so that now stays right.
func (p *pulse) moved(rev int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.high = max(p.high, rev)
	p.at = p.at.Add(-2 * confirmLease)
	p.last.Now = p.last.Now.Add(-2 * confirmLease)
}
