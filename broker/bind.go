package broker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

// bindGap is how long a server that asks before its container is known waits
// until Docker is asked again. Hints from Docker don't wait.
const bindGap = 200 * time.Millisecond

// attest returns the server that p may speak for. It asks the kernel about p
// once per connection and workload, and whether p still lives each time. e is told
// which container the server is bound to, whether p is in it or not.
func (b *Broker) attest(ctx context.Context, p *Peer, e *Entry) (*server, error) {
	s := b.servers.get(p.Server)
	if s == nil {
		return nil, Errorf(UnknownPeer, "this server is not registered with the token broker").
			Hint("stop and start the server from the hub")
	}
	if s.workload == nil {
		var err error
		if s, err = b.bound(ctx, s); err != nil {
			return nil, err
		}
	}
	w := s.workload
	e.Container, e.Posture = w.Container, w.Posture
	e.Level, _ = b.cfg.Attestor.Worth(w.Level)
	if p.attested.Load() != w {
		if err := b.cfg.Attestor.Attest(p, w); err != nil {
			return nil, err
		}
		p.attested.Store(w)
		return s, nil
	}
	return s, b.cfg.Attestor.Alive(p)
}

// bound is bind for a caller who waits.
func (b *Broker) bound(ctx context.Context, s *server) (*server, error) {
	if s.refused != nil {
		return nil, s.refused
	}
	return b.binds.do(ctx, s.Key, func(ctx context.Context) (*server, error) {
		s, err := b.bind(ctx, s.Key)
		if errors.Is(err, ErrPending) {
			pause(ctx, bindGap) // those who ask meanwhile share this answer
		}
		return s, err
	})
}

// bind looks for the workload of the server at k and, if it is there, binds the
// two. A bound server whose workload lives is left alone.
func (b *Broker) bind(ctx context.Context, k ServerKey) (*server, error) {
	leave, err := b.bindTurns.take(ctx, k)
	if err != nil {
		return nil, err
	}
	defer leave()
	s := b.servers.get(k)
	switch {
	case s == nil:
		return nil, Errorf(UnknownPeer, "this server is not registered with the token broker")
	case s.workload != nil && !ended(s.workload):
		return s, nil
	}
	w, err := b.cfg.Attestor.Bind(ctx, s.Registration)
	if err == nil {
		err = b.onlyOne(k, w)
	}
	if err != nil {
		return nil, b.notBound(ctx, s, err)
	}
	next := &server{Registration: s.Registration, workload: w}
	next.State, next.Container, next.Level, next.Reason = Bound, w.Container, w.Level, ""
	return b.nowBound(ctx, next)
}

// onlyOne refuses what another server is bound to, by its container or by any of
// its cgroups: then one of the two hubs, or somebody with Docker's socket, is
// playing tricks, and a caller could be either's.
func (b *Broker) onlyOne(k ServerKey, w *Workload) error {
	if w.Container == "" {
		return nil
	}
	other := b.servers.find(func(s *server) bool {
		return s.Key != k && s.workload != nil && overlap(s.workload, w)
	})
	if other == nil {
		return nil
	}
	why := fmt.Errorf("it is in a cgroup of the %s's", other.Key)
	if other.Container == w.Container {
		why = fmt.Errorf("it is already bound to the %s", other.Key)
	}
	return Errorf(Denied, "the container %s can't be told apart from another server's", w.Name).Because(why)
}

// overlap says whether a process could be in both.
func overlap(a, b *Workload) bool {
	if a.Container == b.Container || a.CgroupID != 0 && a.CgroupID == b.CgroupID {
		return true
	}
	for hierarchy, path := range a.Cgroups {
		if b.Cgroups[hierarchy] == path {
			return true
		}
	}
	return false
}

// nowBound records the bind, makes it known and waits for its end.
func (b *Broker) nowBound(ctx context.Context, bound *server) (*server, error) {
	bound.Changed = b.pulse.now()
	e := b.serverEntry("bind", bound)
	e.Posture = bound.workload.Posture
	if err := b.record(ctx, e, nil); err != nil {
		return nil, err
	}
	next, ok := b.servers.change(bound.Key, func(now *server) bool {
		again := now.Generation != bound.Generation
		bound.Shared = now.Shared // the hub may have spoken meanwhile
		*now = *bound
		return !again
	})
	if !ok {
		return nil, Errorf(Pending, "the server was registered anew meanwhile")
	}
	b.storeState(ctx, next)
	if next.workload.Done != nil {
		b.work.Go(func() { b.untilEnd(next) })
	}
	return next, nil
}

// notBound keeps why a server could not be bound, and records it once: a caller
// in a loop asks again and again.
func (b *Broker) notBound(ctx context.Context, s *server, err error) error {
	why := reason(err)
	if errors.Is(err, ErrPending) || why == s.Reason {
		return err
	}
	next := &server{Registration: s.Registration}
	next.Reason, next.Changed = why, b.pulse.now()
	if next.State == Bound {
		next.State = Stopped
	}
	if errors.Is(err, ErrDenied) {
		next.refused = err // a no, not trouble: it stands until Docker says that something happened
	}
	if b.servers.replace(s, next) {
		b.storeState(ctx, next)
	}
	return b.record(ctx, b.serverEntry("bind", next), err)
}

// serverEntry begins the record of something that happened to s.
func (b *Broker) serverEntry(action string, s *server) *Entry {
	e := b.entry(action, nil)
	e.Hub, e.User, e.Server, e.Container, e.Level = s.Key.Hub, s.Key.User, s.Key.Server, s.Container, s.Level
	return e
}

// storeState writes what others see of a server. The registration's own facts
// are in the store already, so trouble is logged and no more.
func (b *Broker) storeState(ctx context.Context, s *server) {
	_, err := b.changeRegistration(ctx, s.Key, func(r *Registration, exists bool) error {
		if !exists || r.Generation != s.Generation {
			return errKeep
		}
		shared := r.Shared // is the hub's to say, also at this moment
		*r = s.Registration
		r.Shared = shared
		return nil
	})
	if err != nil {
		b.cfg.Log.Warn("a registration's state could not be stored", "server", s.Key, "state", s.State, "err", err)
	}
}

// untilEnd waits for the end of s's workload and marks s as stopped. The same
// container may be running again by then, so it looks once more.
func (b *Broker) untilEnd(s *server) {
	select {
	case <-s.workload.Done:
	case <-b.closing:
		return
	}
	next, ok := b.servers.change(s.Key, func(now *server) bool {
		same := now.workload == s.workload
		now.workload, now.State, now.Changed = nil, Stopped, b.pulse.now()
		return same
	})
	if !ok {
		return
	}
	b.hangUp(s)
	ctx := context.Background()
	_ = b.record(ctx, b.serverEntry("stopped", s), nil) // nothing is answered for it; record has logged why
	b.storeState(ctx, next)
	b.hint(s.ContainerName)
}

// hangUp ends the connections that s's workload leaves behind, handed to processes
// elsewhere. Its own processes are gone before its first one is, and those of the
// next run, which may be here already, live.
func (b *Broker) hangUp(s *server) {
	b.cfg.Sockets.Hangup(s.Key, func(p *Peer) bool { return b.cfg.Attestor.Alive(p) != nil })
}

func ended(w *Workload) bool {
	select {
	case <-w.Done:
		return true
	default:
		return false // also if nobody watches
	}
}

// hint looks at the servers whose container is called name; an empty name means
// all of them.
func (b *Broker) hint(name string) {
	for _, s := range b.servers.list() {
		if name != "" && s.ContainerName != name {
			continue
		}
		if b.closes() {
			return
		}
		b.work.Go(func() {
			select {
			case b.slots <- struct{}{}:
			case <-b.closing:
				return
			}
			defer func() { <-b.slots }()
			_, err := b.bind(context.Background(), s.Key)
			if err != nil && !errors.Is(err, ErrPending) {
				b.cfg.Log.Warn("a server is not bound", "server", s.Key, "container", s.ContainerName, "err", err)
			}
		})
	}
}

// restore brings this host's registrations back from the store and opens their
// sockets. A registration that can't be read is named and left where it is.
func (b *Broker) restore(ctx context.Context) error {
	members, err := b.cfg.Store.Members(ctx, b.registrationsKey())
	if err != nil {
		return storeError(err, b.registrationsKey())
	}
	for _, m := range members {
		var k ServerKey
		if err := json.Unmarshal([]byte(m), &k); err != nil {
			b.cfg.Log.Error("an entry in the list of registrations can't be read", "err", err)
			continue
		}
		if err := b.restoreOne(ctx, k); err != nil {
			b.cfg.Log.Error("a registration can't be restored; stop and start the server from the hub", "server", k, "err", err)
		}
	}
	return nil
}

func (b *Broker) restoreOne(ctx context.Context, k ServerKey) error {
	var r Registration
	if _, err := b.vault.load(ctx, b.registrationKey(k), &r); err != nil {
		return err
	}
	if _, ok := b.cfg.Hubs[k.Hub]; !ok {
		return fmt.Errorf("hub %q is not in the configuration any more", k.Hub)
	}
	if err := b.cfg.Sockets.Open(k); err != nil {
		return fmt.Errorf("open socket: %w", err)
	}
	if r.State == Bound {
		r.State = Stopped // until it is bound again
	}
	b.servers.put(&server{Registration: r})
	return nil
}

// reason is what an operator reads in a list: the sentence where there is one, and
// what a no rests on, which callers are not told.
func reason(err error) string {
	var e *Error
	switch {
	case !errors.As(err, &e):
		return err.Error()
	case e.Code == Denied && e.cause != nil:
		return e.Sentence + ": " + e.cause.Error()
	}
	return e.Sentence
}
