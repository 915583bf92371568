package broker

import (
	"context"
	"sync"
	"time"
)

// confirmLease is for how long a revision that was read counts as current:
// the longest that one broker may go on under rights another one has ended.
const confirmLease = 250 * time.Millisecond

// hintRest is how long hints are not acted on after one was. Whoever can tell
// notes can have a broker read the revision that often, and no more.
const hintRest = 25 * time.Millisecond

// pulse reads the deployment's revision and time, once per lease for all
// requests of this broker, and again when another broker hints that the revision
// has moved.
type pulse struct {
	store Store
	reads flights[int64, struct{}] // by doubts: what began under fewer proves less
	hints chan struct{}            // holds one item until follow has seen to hinted
	// fellBack is called before a revision is believed that is lower than one
	// that was read before: the store has forgotten something.
	fellBack func(context.Context) error

	mu     sync.Mutex // guards all below
	last   Pulse
	at     time.Time // when the read of last began, by our monotonic clock
	high   int64     // the highest revision that was read or made here
	doubts int64     // how often it turned out that what was read may be over
	seen   int64     // the doubts when the read of last began
	hinted int64     // the highest revision that others spoke of since follow looked
	told   int64     // the last revision that was read or made here; see moves
	change chan struct{}
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
	return p.readAnew(ctx)
}

// readAnew reads, or joins a read that began after the last doubt.
func (p *pulse) readAnew(ctx context.Context) error {
	_, doubts := p.before()
	_, err := p.reads.do(ctx, doubts, p.read)
	return err
}

// before is what has to be known before a read: what we move meanwhile is no sign
// of a fall, and what is doubted meanwhile stays in doubt.
func (p *pulse) before() (high, doubts int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.high, p.doubts
}

// confirmed returns the last revision if its lease still runs and nothing has
// cast doubt on it.
func (p *pulse) confirmed() (int64, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.last.Revision, !p.at.IsZero() && p.seen == p.doubts && time.Since(p.at) <= confirmLease
}

func (p *pulse) read(ctx context.Context) (none struct{}, err error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	high, doubts := p.before()
	began := time.Now()
	got, err := p.store.Pulse(ctx)
	if err == nil && got.Revision < high && p.fellBack != nil {
		if err := p.fellBack(ctx); err != nil {
			return none, err
		}
		_, doubts = p.before()
		began = time.Now()
		got, err = p.store.Pulse(ctx)
	}
	if err != nil {
		return none, storeError(err, Key{Kind: "revision"})
	}
	p.take(got, began, doubts)
	return none, nil
}

// take believes what a read brought, unless one that began later was faster.
func (p *pulse) take(got Pulse, began time.Time, doubts int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.high = max(p.high, got.Revision)
	if began.Before(p.at) {
		return
	}
	p.last, p.at, p.seen = got, began, doubts
	if doubts == p.doubts {
		p.announce(got.Revision)
	}
}

// now is the store's time, carried on by our monotonic clock. The host's own
// idea of the time of day plays no part; it may be an hour off.
func (p *pulse) now() time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.last.Now.Add(time.Since(p.at)).UTC()
}

// moved says that the revision is rev now, because we moved it. The next request
// reads it anew.
func (p *pulse) moved(rev int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.high = max(p.high, rev)
	p.doubts++
	p.announce(rev)
}

// hint says that the revision may be rev by now. That is no fact, so follow reads
// it, unless we have read or made that one ourselves.
func (p *pulse) hint(rev int64) {
	p.mu.Lock()
	p.hinted = max(p.hinted, rev)
	p.mu.Unlock()
	select {
	case p.hints <- struct{}{}:
	default:
	}
}

// follow reads the revision when something hints that it has moved, until ctx
// ends: what others tell is known before the lease ends, and without a request
// to ask for it.
func (p *pulse) follow(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.hints:
		}
		if !p.doubt() {
			continue
		}
		_ = p.readAnew(ctx) // the next request asks again, and says what is wrong
		if pause(ctx, hintRest) != nil {
			return
		}
	}
}

// doubt takes the hints since it was called last, and ends the lease if they speak
// of a later revision than we know of. One that we made has ended it already.
func (p *pulse) doubt() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	rev := p.hinted
	p.hinted = 0
	if rev <= p.told {
		return false
	}
	p.doubts++
	return true
}

// moves returns a channel that is closed when the next move of the revision is
// seen: we made it, or a read found it. Whoever keeps something open asks for it
// before he looks at what may change, and looks again once it is closed. Because
// notes get lost, he also calls revision now and then, which reads.
func (p *pulse) moves() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.change == nil {
		p.change = make(chan struct{})
	}
	return p.change
}

// announce closes that channel, once for each revision. The caller holds the lock.
func (p *pulse) announce(rev int64) {
	if rev == p.told {
		return
	}
	p.told = rev
	if p.change != nil {
		close(p.change)
		p.change = nil
	}
}
