package broker

import (
	"context"
	"math"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Brokers tell each other what they would else find out by asking, see
// Store.Tell:
//
//	revision <number>   it has moved there: confirm against it now
//	grant <key>         its lease is free, or it is another grant: look again
//
// Nothing rests on them. Without notes the revision is confirmed once per
// confirmLease, and a grant that another broker refreshes is looked at each
// leasePollMost; forged ones cost a read each hintRest, and one look at a grant
// that is waited for each tenth of what its waiter would wait.

// tellWithin is how long a store may take over a note. It is all the same to
// whoever tells it whether that worked.
const tellWithin = time.Second

const (
	aboutRevision = "revision "
	aboutGrant    = "grant "
)

func revisionNote(rev int64) string { return aboutRevision + strconv.FormatInt(rev, 10) }
func grantNote(k GrantKey) string   { return aboutGrant + k.member() }

// inform tells the deployment's brokers.
func (b *Broker) inform(ctx context.Context, note string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), tellWithin)
	defer cancel()
	if err := b.cfg.Store.Tell(ctx, note); err != nil {
		b.cfg.Log.Debug("the other brokers could not be told; they find out by themselves", "note", note, "err", err)
	}
}

// heard acts on a note, which may be anybody's.
func (b *Broker) heard(note string) {
	if note == "" { // some may have been missed
		b.pulse.hint(math.MaxInt64)
		b.bells.ringAll()
		return
	}
	if k, ok := strings.CutPrefix(note, aboutGrant); ok {
		b.bells.ring(k)
		return
	}
	if n, ok := strings.CutPrefix(note, aboutRevision); ok {
		if rev, err := strconv.ParseInt(n, 10, 64); err == nil {
			b.pulse.hint(rev)
		}
	}
}

// await waits for a note at bell, as long as wait and somewhat more at the most,
// so that brokers that began together don't go on together. It waits for a
// tenth of that in any case: not each note is worth a look, and who closes may
// have something to finish here that takes more than one.
func (b *Broker) await(ctx context.Context, bell <-chan struct{}, wait time.Duration) error {
	least := wait / 10
	if err := pause(ctx, least); err != nil {
		return err
	}
	t := time.NewTimer(wait - least + rand.N(wait/4))
	defer t.Stop()
	select {
	case <-t.C:
	case <-bell:
	case <-b.closing:
	case <-ctx.Done():
	}
	return ctx.Err()
}

// bells ring where somebody waits. The zero value is ready.
type bells[K comparable] struct {
	mu  sync.Mutex // guards the map
	all map[K]chan struct{}
}

// hang hangs k's bell until takeDown is called. It holds one ring for who doesn't
// wait yet. Nobody hangs it twice.
func (b *bells[K]) hang(k K) (bell <-chan struct{}, takeDown func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.all == nil {
		b.all = make(map[K]chan struct{})
	}
	c := make(chan struct{}, 1)
	b.all[k] = c
	return c, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(b.all, k)
	}
}

// ring wakes who waits for k, if anybody does.
func (b *bells[K]) ring(k K) {
	b.mu.Lock()
	defer b.mu.Unlock()
	pull(b.all[k])
}

func (b *bells[K]) ringAll() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, c := range b.all {
		pull(c)
	}
}

// pull rings once; a bell that rings already, or is none, needs no other.
func pull(bell chan struct{}) {
	select {
	case bell <- struct{}{}:
	default:
	}
}
