package broker

import (
	"context"
	"errors"
	"sync"
	"time"
)

const (
	// watchEvery is how often a Watch looks although nothing hints that anything
	// changed: notes of other brokers get lost, and tokens are renewed before
	// they end.
	watchEvery = 2 * time.Second
	// watchRest is the least time between two looks of one Watch, however fast the
	// deployment's rights move.
	watchRest = 250 * time.Millisecond
	// watchesPerServer bounds the open Watches of one server.
	watchesPerServer = 32
)

// An Update is what a Watch tells: the next token, or why there is none for now.
type Update struct {
	// Event is token, role_lost if policy denies what it allowed before, or else
	// the code of Refusal.
	Event   string
	Token   Token
	Refusal *Error // nil with token
}

const (
	eventToken    = "token"
	eventRoleLost = "role_lost"
)

// Watch tells p of each token that want stands for, the next one before the one
// before ends, and of each reason why there is none. What it told stays true until
// it tells something else, at most watchEvery later than a request would learn of
// it. Each token walks the whole line and is in the audit.
//
// A refusal doesn't end it: a role that comes back, or a login, brings the next
// token. It returns when ctx ends, when send fails, and with the reason when there
// is no use in waiting: the caller is nobody, asks for what makes no sense, or the
// broker restarts. It calls send from one goroutine, which must not wait for long.
func (b *Broker) Watch(ctx context.Context, p *Peer, want Want, send func(Update) error) error {
	leave, ok := b.watchers.enter(p.Server, watchesPerServer)
	if !ok {
		return b.Refuse(p, "watch", Errorf(Limited, "this server has %d watches open already", watchesPerServer))
	}
	defer leave()
	want.Rejected = ""
	w := watch{Broker: b, peer: p, want: want}
	for {
		moved, changed := b.pulse.moves(), b.servers.changes(p.Server)
		again, err := w.look(ctx, send)
		if err != nil {
			return err
		}
		if err := b.until(ctx, moved, changed, again); err != nil {
			return err
		}
	}
}

// until waits for a move of the revision or a change of the server, and at most for
// d. An error says why there is no use in it.
func (b *Broker) until(ctx context.Context, moved, changed <-chan struct{}, d time.Duration) error {
	if err := pause(ctx, watchRest); err != nil {
		return err
	}
	t := time.NewTimer(d - watchRest)
	defer t.Stop()
	select {
	case <-t.C:
	case <-moved:
	case <-changed:
	case <-ctx.Done():
		return ctx.Err()
	case <-b.closing:
		return Errorf(Unavailable, "the token broker is being restarted")
	}
	return nil
}

// A watch is one open Watch.
type watch struct {
	*Broker
	peer *Peer
	want Want
	told Update
	held bool // a token was told of, ever
}

// look walks the line and tells what it has not told yet. again is when to look
// again at the latest.
func (w *watch) look(ctx context.Context, send func(Update) error) (again time.Duration, err error) {
	t, err := w.issue(ctx, w.peer, w.want, "watch", w.knows)
	again = watchEvery
	if errors.Is(err, errKeep) {
		if w.told.Refusal != nil {
			again = max(again, w.told.Refusal.RetryAfter)
		}
		return again, nil
	}
	if ctx.Err() != nil {
		return 0, ctx.Err()
	}
	w.told = Update{Event: eventToken, Token: t}
	if err != nil {
		w.told = w.refusal(err)
		again = max(again, w.told.Refusal.RetryAfter)
	}
	w.held = w.held || err == nil
	if hopeless(err) {
		return 0, err
	}
	return again, send(w.told)
}

// knows says whether what came of a look was told already.
func (w *watch) knows(a answer, err error) bool {
	if err == nil {
		return w.told.Event == eventToken && w.told.Token.Access.Equal(a.token.Access)
	}
	r := w.told.Refusal
	said := public(err, w.cfg.Contact, "")
	return r != nil && r.Code == said.Code && r.Sentence == said.Sentence
}

func (w *watch) refusal(err error) Update {
	said := public(err, w.cfg.Contact, "")
	var recorded *Error
	if errors.As(err, &recorded) {
		said.Ref = recorded.Ref
	}
	u := Update{Event: string(said.Code), Refusal: said}
	if said.Code == Denied && w.held {
		u.Event = eventRoleLost
	}
	return u
}

// hopeless says whether err stays as it is, whatever changes.
func hopeless(err error) bool {
	return errors.Is(err, ErrUnknownPeer) || errors.Is(err, ErrInvalid)
}

// visitors counts who is inside, by key. The zero value is ready.
type visitors[K comparable] struct {
	mu  sync.Mutex // guards the map
	all map[K]int
}

// enter lets one more in, unless that would be more than most.
func (v *visitors[K]) enter(k K, most int) (leave func(), ok bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.all == nil {
		v.all = make(map[K]int)
	}
	if v.all[k] >= most {
		return nil, false
	}
	v.all[k]++
	return func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		if v.all[k]--; v.all[k] == 0 {
			delete(v.all, k)
		}
	}, true
}
