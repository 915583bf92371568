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
	// fellBack is called before a pulse is believed of another server, or with a
	// lower revision than high: the store may have forgotten something. Once for
	// all reads that see it, by server.
	fellBack func(ctx context.Context, high int64, got Pulse) error
	falls    flights[string, struct{}]

	mu     sync.Mutex // guards all below
	last   Pulse
	at     time.Time // when the read of last began, by our monotonic clock
	high   int64     // the highest revision that was read or made here
	server string    // that answered
	doubts int64     // how often it turned out that what was read may be over
	seen   int64     // the doubts when the read of last began
	hinted int64     // the highest revision that others spoke of since follow looked
	begun  int64     // how many reads have begun
	done   int64     // the last of them that brought something
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

// anew reads once more. What was read from the store before the call is of the
// store that the pulse then is of, if the revision is the same: one that restarts
// within the lease may have come back older.
func (p *pulse) anew(ctx context.Context) error {
	begun, _ := p.progress()
	for {
		if err := p.readAnew(ctx); err != nil {
			return err
		}
		if _, done := p.progress(); done > begun {
			return nil
		}
	}
}

// progress is how many reads have begun, and the last one that brought something.
func (p *pulse) progress() (begun, done int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.begun, p.done
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
	high, doubts := p.before()
	n, began, got, err := p.ask(ctx)
	if err == nil && p.fell(high, got) {
		if err := p.catch(ctx, high, got); err != nil {
			return none, err
		}
		_, doubts = p.before()
		n, began, got, err = p.ask(ctx)
	}
	if err != nil {
		return none, storeError(err, Key{Kind: "revision"})
	}
	p.take(n, got, began, doubts)
	return none, nil
}

// ask asks the store; n is which read it is, and began when it was.
func (p *pulse) ask(ctx context.Context) (n int64, began time.Time, got Pulse, err error) {
	p.mu.Lock()
	p.begun++
	n = p.begun
	p.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	began = time.Now()
	got, err = p.store.Pulse(ctx)
	return n, began, got, err
}

// fell says whether got is of a store that may have forgotten something since its
// revision was high.
func (p *pulse) fell(high int64, got Pulse) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.fellBack != nil && (got.Revision < high || got.Server != p.server)
}

// catch has fellBack called, and believes got then.
func (p *pulse) catch(ctx context.Context, high int64, got Pulse) error {
	_, err := p.falls.do(ctx, got.Server, func(ctx context.Context) (none struct{}, err error) {
		if err := p.fellBack(ctx, high, got); err != nil {
			return none, err
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		p.high, p.server = got.Revision, got.Server
		return none, nil
	})
	return err
}

// take believes what a read brought, unless one that began later was faster.
func (p *pulse) take(n int64, got Pulse, began time.Time, doubts int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.high, p.done = max(p.high, got.Revision), max(p.done, n)
	if began.Before(p.at) {
		return
	}
	p.server = got.Server
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
