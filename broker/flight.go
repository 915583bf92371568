package broker

import (
	"context"
	"fmt"
	"runtime/debug"
	"sync"
	"time"
)

// flights runs at most one call per key at a time; whoever asks meanwhile waits
// for that call's result. The call is detached from its callers: they may hang
// up, what it began is finished. The zero value is ready.
type flights[K comparable, V any] struct {
	mu   sync.Mutex // guards the map
	all  map[K]*flight[V]
	crew crew
}

type flight[V any] struct {
	done chan struct{} // closed once the two below are set
	v    V
	err  error
}

// do returns call's result, or ctx's error if that ends first.
func (f *flights[K, V]) do(ctx context.Context, k K, call func(context.Context) (V, error)) (V, error) {
	f.mu.Lock()
	c, ok := f.all[k]
	if !ok {
		c = &flight[V]{done: make(chan struct{})}
		if f.all == nil {
			f.all = make(map[K]*flight[V])
		}
		f.all[k] = c
		detached := context.WithoutCancel(ctx)
		f.crew.Go(func() { f.fly(detached, k, c, call) })
	}
	f.mu.Unlock()

	select {
	case <-c.done:
		return c.v, c.err
	case <-ctx.Done():
		var zero V
		return zero, ctx.Err()
	}
}

func (f *flights[K, V]) fly(ctx context.Context, k K, c *flight[V], call func(context.Context) (V, error)) {
	defer func() {
		if r := recover(); r != nil {
			// Where, not what: the value may hold what was being worked on.
			c.err = fmt.Errorf("a %T panicked at %s", r, debug.Stack())
		}
		f.mu.Lock()
		if f.all[k] == c {
			delete(f.all, k)
		}
		f.mu.Unlock()
		close(c.done)
	}()
	c.v, c.err = call(ctx)
}

// shut lets nobody else wait for k's call: who asks from now on gets another.
func (f *flights[K, V]) shut(k K) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.all, k)
}

// wait returns when no call is under way.
func (f *flights[K, V]) wait() { f.crew.wait() }

// A crew is a sync.WaitGroup whose calls may also begin while somebody waits and
// none is left, as requests do that come in while a broker closes. The zero value
// is ready.
type crew struct {
	mu   sync.Mutex // guards all below
	n    int
	idle chan struct{} // closed once n is 0; nil: nobody waits for that
}

// Go runs f in a goroutine of its own.
func (c *crew) Go(f func()) {
	c.mu.Lock()
	c.n++
	c.mu.Unlock()
	go func() {
		defer c.leave()
		f()
	}()
}

func (c *crew) leave() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n--; c.n == 0 && c.idle != nil {
		close(c.idle)
		c.idle = nil
	}
}

// wait returns when no call is under way.
func (c *crew) wait() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.n > 0 {
		if c.idle == nil {
			c.idle = make(chan struct{})
		}
		idle := c.idle
		c.mu.Unlock()
		<-idle
		c.mu.Lock()
	}
}

// sequels runs calls of one key one after the other, one for all who asked before
// it began: whoever asks while a call is under way waits for the next one, which
// sees what he has seen. The calls are detached from their callers. The zero
// value is ready.
type sequels[K comparable] struct {
	flights flights[K, struct{}]
	turns   turns[K]
}

// do returns call's error, or ctx's if that ends first.
func (s *sequels[K]) do(ctx context.Context, k K, call func(context.Context) error) error {
	_, err := s.flights.do(ctx, k, func(ctx context.Context) (none struct{}, err error) {
		leave, err := s.turns.take(ctx, k)
		if err != nil {
			return none, err
		}
		defer leave()
		s.flights.shut(k)
		return none, call(ctx)
	})
	return err
}

// wait returns when no call is under way.
func (s *sequels[K]) wait() { s.flights.wait() }

// turns lets callers of one key in one at a time. The zero value is ready.
type turns[K comparable] struct {
	mu  sync.Mutex // guards the map
	all map[K]*turn
}

type turn struct {
	free chan struct{} // holds one item while nobody has the turn
	want int           // who has it or waits for it
}

// take waits for k's turn; leave gives it on.
func (t *turns[K]) take(ctx context.Context, k K) (leave func(), err error) {
	t.mu.Lock()
	if t.all == nil {
		t.all = make(map[K]*turn)
	}
	x, ok := t.all[k]
	if !ok {
		x = &turn{free: make(chan struct{}, 1)}
		x.free <- struct{}{}
		t.all[k] = x
	}
	x.want++
	t.mu.Unlock()

	drop := func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if x.want--; x.want == 0 {
			delete(t.all, k)
		}
	}
	select {
	case <-x.free:
		return func() { x.free <- struct{}{}; drop() }, nil
	case <-ctx.Done():
		drop()
		return nil, ctx.Err()
	}
}

// marked is a set of keys that something is being done to. The zero value is
// ready.
type marked[K comparable] struct {
	mu  sync.Mutex // guards the map
	all map[K]bool
}

// add marks k until the function it returns is called. Nobody marks it twice.
func (m *marked[K]) add(k K) (remove func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.all == nil {
		m.all = make(map[K]bool)
	}
	m.all[k] = true
	return func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.all, k)
	}
}

func (m *marked[K]) has(k K) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.all[k]
}

// A crowd runs calls, a bounded number at a time.
type crowd struct {
	slots chan struct{}
	wg    sync.WaitGroup
}

func newCrowd(atOnce int) *crowd { return &crowd{slots: make(chan struct{}, atOnce)} }

// Go waits for a place and runs f.
func (c *crowd) Go(f func()) {
	c.slots <- struct{}{}
	c.wg.Go(func() {
		defer func() { <-c.slots }()
		f()
	})
}

// Wait returns when all calls have.
func (c *crowd) Wait() { c.wg.Wait() }

// every calls f each d until ctx ends.
func every(ctx context.Context, d time.Duration, f func(context.Context)) {
	tick := time.NewTicker(d)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			f(ctx)
		}
	}
}
