// Package rolewatch holds the sources that tell a broker that somebody's rights
// may have changed. Each says "look at this subject now" and no more: what follows
// is what the provider says when the broker asks it (broker/recheck.go). So a
// source that is wrong costs a look, and one that is silent costs the time until
// the recheck.
//
//	source       from the change to the last token              needs
//	keycloak.go  events.every and a second, while it answers    a service account that may read events
package rolewatch

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"tokenbroker/broker"
)

// A Looker follows hints; the broker does. Both return when what they began is
// over or ctx ends. An error says that nothing is known and nothing has changed.
type Looker interface {
	LookNow(ctx context.Context, p broker.ProviderID, sub, cause string) error
	LookAtAll(ctx context.Context, p broker.ProviderID, cause string) error
}

// A hint says whom to look at, and why.
type hint struct {
	sub   string // empty: everybody
	cause string
}

const (
	// looksAtOnce bounds the hints that are followed at the same time. One that
	// takes long, because a refresh does, holds up none of the others.
	looksAtOnce = 8
	// hintsKept bounds those that wait. More are a hint about everybody.
	hintsKept = 1024
)

// A follower has hints followed, apart from the source, which goes on reading.
type follower struct {
	looker   Looker
	provider broker.ProviderID
	log      *slog.Logger
	subjects chan hint
	all      chan string // one cause: whoever waits is looked at once for all hints
}

func newFollower(l Looker, p broker.ProviderID, log *slog.Logger) *follower {
	return &follower{l, p, log, make(chan hint, hintsKept), make(chan string, 1)}
}

// take accepts a hint and never waits.
func (f *follower) take(h hint) {
	if h.sub != "" {
		select {
		case f.subjects <- h:
			return
		default:
			h.cause = "more hints than can be followed"
		}
	}
	select {
	case f.all <- h.cause:
	default:
	}
}

// run works until ctx ends.
func (f *follower) run(ctx context.Context) {
	var all sync.WaitGroup
	for range looksAtOnce {
		all.Go(func() { f.eachSubject(ctx) })
	}
	all.Go(func() { f.everybody(ctx) })
	all.Wait()
}

func (f *follower) eachSubject(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case h := <-f.subjects:
			if err := f.looker.LookNow(ctx, f.provider, h.sub, h.cause); err != nil && ctx.Err() == nil {
				f.log.Warn("a hint could not be followed; the recheck will see to it", "sub", h.sub, "cause", h.cause, "err", err)
			}
		}
	}
}

// everybody looks at all and then rests for as long as that took: somebody who
// edits roles for an hour must not have the provider asked about thousands of
// users all that time.
func (f *follower) everybody(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case cause := <-f.all:
			began := time.Now()
			if err := f.looker.LookAtAll(ctx, f.provider, cause); err != nil && ctx.Err() == nil {
				f.log.Warn("not everybody could be looked at; the recheck will see to it", "cause", cause, "err", err)
			}
			if pause(ctx, time.Since(began)) != nil {
				return
			}
		}
	}
}

// pause waits, or returns ctx's error if that ends first.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
