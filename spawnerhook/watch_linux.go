package spawnerhook

import (
	"context"
	"sync"
	"time"

	"tokenbroker/broker"
)

// How long to wait before connecting to Docker again. A connection that stood
// longer than the longest pause starts over with the first.
const (
	firstPause = 100 * time.Millisecond
	lastPause  = 5 * time.Second
)

// maxExecs bounds the commands that wait to be told of.
const maxExecs = 10000

// Watch implements broker.Attestor. Events are read into a queue without ever
// waiting for changed or ran: an engine drops events, without a word, for those
// who read slowly. There is one Watch at a time.
func (d *Docker) Watch(ctx context.Context, since time.Time, changed func(container string), ran func(broker.Exec)) error {
	q, around := newHints(), newHints()
	d.execs.watch(q.ran)
	var readers sync.WaitGroup
	readers.Go(func() {
		hint := func(name string) {
			q.add(name)
			around.add(name)
		}
		d.follow(ctx, since, listener{subscribed: func() { hint("") }, changed: hint, ran: d.execs.event, ended: d.execs.ended})
	})
	readers.Go(func() { _ = around.each(ctx, func() { d.lookAroundForAll(ctx, around) }) })
	tell := func(names []string, execs []broker.Exec, lost int) {
		for _, name := range names {
			changed(name)
		}
		for _, x := range execs {
			ran(x)
		}
		if lost > 0 {
			d.log.Error("more commands are run in containers than can be recorded", "not_recorded", lost)
		}
	}
	err := q.each(ctx, func() { tell(q.take()) })
	readers.Wait()
	d.execs.watch(nil)
	_, execs, lost := q.take() // nobody else will be told of these
	tell(nil, execs, lost)
	return err
}

// lookAroundForAll follows the hints that wait. What can't be followed waits again.
func (d *Docker) lookAroundForAll(ctx context.Context, around *hints) {
	names, _, _ := around.take()
	for _, name := range names {
		err := d.lookAroundFor(ctx, name)
		if err != nil && pause(ctx, lastPause) == nil {
			d.log.Warn("can't look at the containers on this host; trying again", "err", err)
			around.add(name)
		}
	}
}

// follow reads events, connection after connection.
func (d *Docker) follow(ctx context.Context, since time.Time, l listener) {
	wait := firstPause
	// The engine answers a moment before it subscribes. What happens in between it
	// replays, if asked from a moment before; after a break, from where it broke.
	if now := time.Now(); since.IsZero() || since.After(now) {
		since = now.Add(-time.Second)
	}
	for {
		began := time.Now()
		last, err := d.engine.events(ctx, since, l)
		if ctx.Err() != nil {
			return
		}
		since = last
		if time.Since(began) > lastPause {
			wait = firstPause
		}
		d.log.Warn("docker's events ended; connecting again", "err", err, "in", wait)
		if pause(ctx, wait) != nil {
			return
		}
		wait = min(2*wait, lastPause)
	}
}

// hints is a queue of container names and of commands that were run. A name that
// waits already is not queued again, so there are never more than containers.
type hints struct {
	more chan struct{} // holds one token if there is something to take

	mu      sync.Mutex // guards what follows
	names   []string
	waiting map[string]bool
	execs   []broker.Exec
	lost    int // execs beyond maxExecs
}

func newHints() *hints { return &hints{waiting: map[string]bool{}, more: make(chan struct{}, 1)} }

// each calls take each time that there is something to take, until ctx is done.
func (h *hints) each(ctx context.Context, take func()) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-h.more:
			take()
		}
	}
}

func (h *hints) add(name string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.waiting[name] {
		return
	}
	h.waiting[name] = true
	h.names = append(h.names, name)
	h.wake()
}

func (h *hints) ran(x broker.Exec) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.execs) >= maxExecs {
		h.lost++
		return
	}
	h.execs = append(h.execs, x)
	h.wake()
}

func (h *hints) wake() {
	select {
	case h.more <- struct{}{}:
	default:
	}
}

func (h *hints) take() (names []string, execs []broker.Exec, lost int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	names, execs, lost = h.names, h.execs, h.lost
	h.names, h.execs, h.lost = nil, nil, 0
	clear(h.waiting)
	return names, execs, lost
}
