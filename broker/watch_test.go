package broker_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"tokenbroker/broker"
)

// A watcher keeps what a Watch told.
type watcher struct {
	r       *rig
	updates chan broker.Update
	ended   chan error
	hangUp  context.CancelFunc
}

func (r *rig) watch(p *broker.Peer, want broker.Want) *watcher {
	ctx, cancel := context.WithCancel(context.Background())
	w := &watcher{r: r, updates: make(chan broker.Update, 1000), ended: make(chan error, 1), hangUp: cancel}
	go func() {
		w.ended <- r.Watch(ctx, p, want, func(u broker.Update) error { w.updates <- u; return nil })
	}()
	synctest.Wait()
	return w
}

// tells fails unless the next update comes within d and is event.
func (w *watcher) tells(event string, d time.Duration) broker.Update {
	w.r.t.Helper()
	select {
	case u := <-w.updates:
		if u.Event != event {
			w.r.t.Fatalf("told %q (%v), want %q", u.Event, u.Refusal, event)
		}
		if (u.Refusal == nil) != (event == "token") || u.Refusal != nil && (u.Refusal.Next == "" || u.Refusal.Ref == "") {
			w.r.t.Errorf("%s: told %+v", event, u.Refusal)
		}
		return u
	case err := <-w.ended:
		w.r.t.Fatalf("the watch ended: %v; want %q", err, event)
	case <-time.After(d):
		w.r.t.Fatalf("nothing is told within %s, want %q", d, event)
	}
	return broker.Update{}
}

func (w *watcher) tellsNothing(d time.Duration) {
	w.r.t.Helper()
	select {
	case u := <-w.updates:
		w.r.t.Errorf("told %q (%v), want nothing", u.Event, u.Refusal)
	case err := <-w.ended:
		w.r.t.Errorf("the watch ended: %v", err)
	case <-time.After(d):
	}
}

func (w *watcher) ends(want *broker.Error, d time.Duration) {
	w.r.t.Helper()
	select {
	case err := <-w.ended:
		if want == nil && !errors.Is(err, context.Canceled) || want != nil && !errors.Is(err, want) {
			w.r.t.Errorf("it ended with %v", err)
		}
	case <-time.After(d):
		w.r.t.Errorf("it has not ended within %s", d)
	}
}

func TestWatchBringsTheNextTokenBeforeTheOldOneEnds(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		w := r.watch(p, broker.Want{})
		old := w.tells("token", time.Second).Token
		for range 10 {
			next := w.tells("token", 5*time.Minute).Token
			if left := time.Until(old.ExpiresAt); left < 10*time.Second || next.Access.Equal(old.Access) {
				t.Errorf("the next token came %s before the end of the old one", left)
			}
			old = next
		}
		if n := len(r.audit.entries(t, "watch")); n != 11 {
			t.Errorf("%d audit lines for 11 tokens", n)
		}
		w.hangUp()
		w.ends(nil, time.Second)
	})
}

func TestWatchTellsWhatChanges(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.provider.SetRoles("alice", "researcher", "student")
		r.loggedIn("alice")
		p := r.running("alice", 100)
		w := r.watch(p, broker.Want{})
		w.tells("token", time.Second)
		time.Sleep(time.Second)

		r.provider.SetRoles("alice", "student")
		r.lookNow("alice")
		w.tells("role_lost", time.Second)
		w.tellsNothing(time.Minute) // what was said is not said again
		r.provider.SetRoles("alice", "researcher", "student")
		r.lookNow("alice")
		w.tells("token", time.Second)

		r.disconnect()
		w.tells("revoked", time.Second)
		time.Sleep(time.Second)
		r.loggedIn("alice")
		w.tells("token", time.Second)

		r.provider.EndSession("alice")
		r.lookNow("alice")
		w.tells("login_required", time.Second)
		w.hangUp()
		w.ends(nil, time.Second)
	})
}

func TestWatchLearnsWithoutTheOtherBrokersNotes(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		other := r.second()
		defer func() { other.Close() }()
		w := other.watch(other.running("alice", 200), broker.Want{})
		w.tells("token", time.Second)
		r.store.DropNotes(true)
		r.disconnect()
		w.tells("revoked", 5*time.Second)
		w.hangUp()
		w.ends(nil, time.Second)
	})
}

func TestWatchOfSomebodyWithoutTheRoleSaysDenied(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.provider.SetRoles("alice", "student")
		r.loggedIn("alice")
		w := r.watch(r.running("alice", 100), broker.Want{})
		w.tells("denied", time.Second)
		w.hangUp()
		w.ends(nil, time.Second)
	})
}

func TestWatchEndsWhereThereIsNoUseInWaiting(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.watch(p, broker.Want{Provider: "nowhere"}).ends(broker.ErrInvalid, time.Second)

		w := r.watch(p, broker.Want{})
		w.tells("token", time.Second)
		if _, err := r.Unregister(context.Background(), "main", "alice", "", 0); err != nil {
			t.Fatal(err)
		}
		w.ends(broker.ErrUnknownPeer, 5*time.Second)

		p = r.running("alice", 101)
		w = r.watch(p, broker.Want{})
		w.tells("token", time.Second)
		r.Close()
		w.ends(broker.ErrUnavailable, time.Second)
		r.start()
	})
}

// With what the hub says of a server, and of its user, an open watch learns it at
// once, and not when it next looks by itself.
func TestWatchIsTheFirstToHearWhatTheHubSays(t *testing.T) {
	const atOnce = 300 * time.Millisecond // the rest between two looks, and no more
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		r.inGroups("alice", "lab")
		p := r.running("alice", 100)
		r.inGroups("alice", "lab") // which Register has taken away
		w := r.watch(p, broker.Want{})
		w.tells("token", time.Second)
		time.Sleep(time.Second)
		r.shares("alice", true)
		w.tells("role_lost", atOnce)
		time.Sleep(time.Second)
		r.shares("alice", false)
		w.tells("token", atOnce)
		time.Sleep(time.Second)
		r.inGroups("alice")
		w.tells("role_lost", atOnce)
		time.Sleep(time.Second)
		r.inGroups("alice", "lab")
		w.tells("token", atOnce)
		time.Sleep(time.Second)
		if _, err := r.Unregister(context.Background(), "main", "alice", "", 0); err != nil {
			t.Fatal(err)
		}
		w.ends(broker.ErrUnknownPeer, atOnce)
	}, forGroup)
}

func TestWatchesOfOneServerAreBounded(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		var all []*watcher
		for range 32 {
			all = append(all, r.watch(p, broker.Want{}))
		}
		r.watch(p, broker.Want{}).ends(broker.ErrLimited, time.Second)
		all[0].hangUp()
		all[0].ends(nil, time.Second)
		all[0] = r.watch(p, broker.Want{})
		for _, w := range all {
			w.tells("token", time.Second)
			w.hangUp()
			w.ends(nil, time.Second)
		}
	})
}

func TestWatchEndsWithAReaderThatTakesNothing(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		slow := errors.New("the reader is slow")
		if err := r.Watch(context.Background(), p, broker.Want{}, func(broker.Update) error { return slow }); !errors.Is(err, slow) {
			t.Errorf("it ended with %v", err)
		}
	})
}
