package spawnerhook

import (
	"context"
	"sync"
	"time"
)

// How long to wait before connecting to Docker again. A connection that stood
// longer than the longest pause starts over with the first.
const (
	firstPause = 100 * time.Millisecond
	lastPause  = 5 * time.Second
)

// Watch implements broker.Attestor. Events are read into a queue without ever
// waiting for changed: an engine drops events, without a word, for those who read
// slowly.
func (d *Docker) Watch(ctx context.Context, changed func(container string)) error {
	q, around := newHints(), newHints()
	var readers sync.WaitGroup
	readers.Go(func() {
		d.follow(ctx, func(name string) {
			q.add(name)
			around.add(name)
		})
	})
	readers.Go(func() {
		_ = around.each(ctx, func(name string) {
			err := d.lookAroundFor(ctx, name)
			if err != nil && pause(ctx, lastPause) == nil {
				d.log.Warn("can't look at the containers on this host; trying again", "err", err)
				around.add(name)
			}
		})
	})
	defer readers.Wait()
	return q.each(ctx, changed)
}

// follow reads events, connection after connection.
func (d *Docker) follow(ctx context.Context, hint func(name string)) {
	wait := firstPause
	for {
		began := time.Now()
		err := d.engine.events(ctx, func() { hint("") }, hint)
		if ctx.Err() != nil {
			return
		}
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

// hints is a queue of container names. A name that waits already is not queued
// again, so it never grows beyond the number of containers.
type hints struct {
	more chan struct{} // holds one token if there is something to take

	mu      sync.Mutex // guards the two below
	names   []string
	waiting map[string]bool
}

func newHints() *hints { return &hints{waiting: map[string]bool{}, more: make(chan struct{}, 1)} }

// each calls f with what is added, until ctx is done.
func (h *hints) each(ctx context.Context, f func(name string)) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-h.more:
			for _, name := range h.take() {
				f(name)
			}
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
	select {
	case h.more <- struct{}{}:
	default:
	}
}

func (h *hints) take() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	names := h.names
	h.names = nil
	clear(h.waiting)
	return names
}
