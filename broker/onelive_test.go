package broker_test

import (
	"context"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"tokenbroker/broker"
)

// There is one live registration of a server, the last one: whatever came before it
// gets no token, on whichever host, and can't take anything from it.

func (r *rig) registers(container string) (broker.Registered, error) {
	return r.Register(context.Background(), "main", broker.RegisterRequest{User: "alice", ContainerName: container})
}

func TestOfTwoRegistrationsOfAServerTheLastIsLive(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		first, err := r.registers("one")
		r.noError(err)
		r.attestor.Run("one", 100)
		synctest.Wait()
		old := r.peer("alice", 100)
		r.token(old, broker.Want{})

		second, err := r.registers("two")
		r.noError(err)
		if second.Generation <= first.Generation || second.Directory != first.Directory {
			t.Errorf("registered %+v after %+v", second, first)
		}
		r.refused(old, broker.Want{}, broker.ErrPending) // nor does its container count any more
		r.attestor.Run("two", 101)
		synctest.Wait()
		r.token(r.peer("alice", 101), broker.Want{})
		r.refused(old, broker.Want{}, broker.ErrUnknownPeer)

		if ref, err := r.Unregister(context.Background(), "main", "alice", "", first.Generation); ref != "" || err != nil {
			t.Errorf("a late Unregister of the first: %q, %v", ref, err)
		}
		r.token(r.peer("alice", 101), broker.Want{})
		if got := r.Registrations(); len(got) != 1 || got[0].Generation != second.Generation || len(r.sockets.Opened()) != 1 {
			t.Errorf("registered are %+v", got)
		}
	})
}

func TestOfManyRegistrationsAtOnceOneIsLive(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		other := r.second()
		other.name = r.name
		defer other.Close()
		r.store.Before(func(string, broker.Key) error { time.Sleep(10 * time.Millisecond); return nil })
		names := []string{"a", "b", "c", "d"}
		var mu sync.Mutex // guards the two
		var last broker.Registered
		var at *rig
		seen := make(map[int64]bool)
		var all sync.WaitGroup
		for i, on := range []*rig{r, other, r, other} {
			on.attestor.Run(names[i], int32(100+i))
			all.Go(func() {
				got, err := on.registers(names[i])
				if err != nil {
					t.Error(err)
				}
				mu.Lock()
				defer mu.Unlock()
				if seen[got.Generation] = true; got.Generation > last.Generation {
					last, at = got, on
				}
			})
		}
		all.Wait()
		r.store.Before(nil)
		time.Sleep(time.Second)
		served := 0
		for _, on := range []*rig{r, other} {
			on.attestor.Hint("")
			synctest.Wait()
			for i := range names {
				if _, err := on.Token(context.Background(), on.peer("alice", int32(100+i)), broker.Want{}); err == nil {
					served++
					if got := on.Registrations()[0]; on != at || got.Generation != last.Generation || got.ContainerName != names[i] {
						t.Errorf("%s gets a token on %s, of %+v; the last is %d", names[i], on.cfg.Host, got, last.Generation)
					}
				}
			}
		}
		if served != 1 || len(seen) != 4 {
			t.Errorf("%d containers get tokens, of generations %v; want one, and four", served, seen)
		}
	})
}

func TestAServerThatIsRegisteredOnAnotherHostHasEndedHere(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		old := r.running("alice", 100)
		first := r.Registrations()[0]
		r.token(old, broker.Want{})
		watched := make(chan error, 1)
		go func() {
			watched <- r.Watch(context.Background(), old, broker.Want{}, func(broker.Update) error { return nil })
		}()
		synctest.Wait()

		other := r.second()
		other.name = r.name
		defer func() { other.Close() }()
		next := other.running("alice", 200)
		moved := time.Now()
		other.token(next, broker.Want{})
		if time.Sleep(300 * time.Millisecond); time.Since(moved) > time.Second {
			t.Fatal("too late to show anything")
		}
		for range 2 { // after a restart, too
			said := r.refused(old, broker.Want{}, broker.ErrUnknownPeer)
			if !strings.Contains(said.Sentence, "started anew in another place") || strings.Contains(said.Sentence+said.Next, "host2") {
				t.Errorf("told %q, %q", said.Sentence, said.Next)
			}
			if _, _, err := r.Providers(context.Background(), old); err == nil {
				t.Error("its providers are listed")
			}
			lines := r.audit.entries(t, "token")
			if e := lines[len(lines)-1]; !strings.Contains(e.Reason, "is registered on host2 with generation") || e.Container == "" || e.Level == "" {
				t.Errorf("the audit says %+v", e)
			}
			r.Close()
			r.start()
			old = r.peer("alice", 100)
		}
		refused(t, <-watched, broker.ErrUnknownPeer)

		// The first one's end, and a late one of it, take nothing from the second.
		for range 2 {
			if _, err := r.Unregister(context.Background(), "main", "alice", "", first.Generation); err != nil {
				t.Error(err)
			}
		}
		if len(r.sockets.Opened()) != 0 || len(r.Registrations()) != 0 {
			t.Errorf("on host1 there are %v", r.Registrations())
		}
		if ref, err := other.Unregister(context.Background(), "main", "alice", "", first.Generation); ref != "" || err != nil {
			t.Errorf("the first one's end, said on host2: %q, %v", ref, err)
		}
		other.token(next, broker.Want{})

		// And back.
		time.Sleep(time.Second)
		r.token(r.running("alice", 101), broker.Want{})
		time.Sleep(300 * time.Millisecond)
		other.refused(next, broker.Want{}, broker.ErrUnknownPeer)
	})
}

func (r *rig) noError(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}
