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
	reads flights[struct{}, Pulse]

	mu   sync.Mutex // guards the two below
	last Pulse
	at   time.Time // when the read of last began, by our monotonic clock
}

// revision returns a revision that was current at most confirmLease ago.
func (p *pulse) revision(ctx context.Context) (int64, error) {
	if rev, ok := p.confirmed(); ok {
		return rev, nil
	}
	got, err := p.reads.do(ctx, struct{}{}, p.read)
	if err != nil {
		return 0, err
	}
	return got.Revision, nil
}

// sync sets the clock by the store. A flow that goes by the time and reads no
// revision begins with it: our monotonic clock stands still while the machine
// sleeps.
func (p *pulse) sync(ctx context.Context) error {
	_, err := p.revision(ctx)
	return err
}

// confirmed returns the last revision if its lease still runs.
func (p *pulse) confirmed() (int64, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.last.Revision, !p.at.IsZero() && time.Since(p.at) <= confirmLease
}

func (p *pulse) read(ctx context.Context) (Pulse, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	began := time.Now()
	got, err := p.store.Pulse(ctx)
	if err != nil {
		return Pulse{}, storeError(err, Key{Kind: "revision"})
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last, p.at = got, began
	return got, nil
}

// now is the store's time, carried on by our monotonic clock. The host's own
// idea of the time of day plays no part; it may be an hour off.
func (p *pulse) now() time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.last.Now.Add(time.Since(p.at)).UTC()
}

// forget makes the next revision be read anew, for after we moved it. Both
// fields go back by the same, so that now stays right.
func (p *pulse) forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.at = p.at.Add(-2 * confirmLease)
	p.last.Now = p.last.Now.Add(-2 * confirmLease)
}
