package broker_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"tokenbroker/broker"
)

// onSettle has f called before each Settle of the store.
func (r *rig) onSettle(f func() error) {
	r.store.Before(func(method string, _ broker.Key) error {
		if method == "Settle" {
			return f()
		}
		return nil
	})
}

func TestDisconnectAnswersOnceTheStoreHasSettled(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.token(p, broker.Want{})
		time.Sleep(10 * time.Second) // the journal has asked the store, and is content
		settled := make(chan struct{})
		r.onSettle(func() error { <-settled; return nil })
		answered := false
		var asked sync.WaitGroup
		asked.Go(func() {
			if d := r.disconnect(); d.NotKept != "" {
				t.Errorf("not kept: %s", d.NotKept)
			}
			answered = true
		})
		time.Sleep(time.Second)
		if answered {
			t.Error("it was answered before the store had it for sure")
		}
		r.refused(p, broker.Want{}, broker.ErrRevoked) // which nobody waits for
		close(settled)
		asked.Wait()
	})
}

func TestDisconnectThatTheStoreMayForgetSaysSo(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		r.onSettle(func() error { return errors.New("it keeps what it is given in memory only") })
		d := r.disconnect()
		if !strings.Contains(d.NotKept, "in memory only") || !strings.Contains(d.NotKept, "run the command again") {
			t.Errorf("it says %q", d.NotKept)
		}
		if lines := r.audit.entries(t, "disconnect"); !strings.Contains(lines[0].Reason, "in memory only") {
			t.Errorf("the audit says %+v", lines[0])
		}
		r.store.Before(nil)
		if d := r.disconnect(); d.NotKept != "" { // as it was told
			t.Errorf("then it says %q", d.NotKept)
		}
	})
}

func TestDisconnectIsMadeAgainWhereTheStoreFellBackMeanwhile(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		other := r.second()
		replica := r.store.Copy()
		r.onSettle(func() error {
			r.store.Before(nil)
			r.store.Fallback(replica)
			return errors.New("another took its place")
		})
		if d := other.disconnect(); d.NotKept != "" {
			t.Errorf("not kept: %s", d.NotKept)
		}
		other.Close() // nobody is left who knows of it, but the store
		time.Sleep(time.Second)
		r.refused(p, broker.Want{}, broker.ErrRevoked)
	})
}

func TestDisconnectIsFinishedAlthoughTheCallerHangsUp(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.token(p, broker.Want{})
		ctx, hangUp := context.WithCancel(context.Background())
		r.store.Before(func(method string, _ broker.Key) error {
			if method == "Move" {
				hangUp()
			}
			return nil
		})
		r.Disconnect(ctx, "root", "main", "alice", "") // whatever it says, nobody hears it
		time.Sleep(time.Second)
		r.refused(p, broker.Want{}, broker.ErrRevoked)
	})
}

func TestManyDisconnectsShareWhatTheyWaitFor(t *testing.T) {
	inBubble(t, func(r *rig) {
		const users = 20
		for i := range users {
			r.loggedIn(broker.UserID(fmt.Sprint("user", i)))
		}
		time.Sleep(10 * time.Second)
		before := r.store.Calls("Settle")
		r.onSettle(func() error { time.Sleep(2 * time.Second); return nil })
		began := time.Now()
		var all sync.WaitGroup
		for i := range users {
			all.Go(func() {
				if _, _, err := r.Disconnect(context.Background(), "root", "main", broker.UserID(fmt.Sprint("user", i)), ""); err != nil {
					t.Error(err)
				}
			})
			if i == users/2 {
				synctest.Wait() // the second half comes while the first is being settled
			}
		}
		all.Wait()
		if n := r.store.Calls("Settle") - before; n > 2 || time.Since(began) > 4*time.Second {
			t.Errorf("%d disconnects took %d calls and %s", users, n, time.Since(began))
		}
	})
}

// A disconnect that a broker has only seen is as safe with it as with the one
// that made it.
func TestWhoHasSeenADisconnectRemembersIt(t *testing.T) {
	for _, restart := range []bool{false, true} {
		inBubble(t, func(r *rig) {
			r.loggedIn("alice")
			p := r.running("alice", 100)
			other := r.second()
			backup := r.store.Copy()
			time.Sleep(time.Second)
			other.disconnect()
			time.Sleep(time.Second)
			r.refused(p, broker.Want{}, broker.ErrRevoked)
			other.Close() // and its host is gone, with the journal
			r.store.Fallback(backup)
			if restart {
				r.restarted()
				p = r.peer("alice", 100)
			}
			time.Sleep(time.Second)
			r.refused(p, broker.Want{}, broker.ErrRevoked)
		})
	}
}

// A broker that sees that the store has fallen back answers nobody until the one
// that knows of the disconnect, to whom nobody says anything, has looked too.
func TestNobodyIsServedBeforeAllHaveLookedAtAStoreThatFellBack(t *testing.T) {
	for _, sinceBeat := range []time.Duration{
		100 * time.Millisecond, // within the lease: what is read next is not what was confirmed
		300 * time.Millisecond,
	} {
		inBubble(t, func(r *rig) {
			r.loggedIn("alice")
			p := r.running("alice", 100)
			r.token(p, broker.Want{})
			other := r.second()
			defer other.Close()
			backup := r.store.Copy()
			time.Sleep(time.Second)
			other.disconnect()
			time.Sleep(2*time.Second + sinceBeat)
			r.ForgetJournal() // as if it had never seen any of it
			r.store.Fallback(backup)
			r.refused(p, broker.Want{}, broker.ErrRevoked)
			if !strings.Contains(r.log.String(), "the store has forgotten what was written last") {
				t.Error("nobody was told")
			}
		})
	}
}

// Whoever moves the revision of a store that fell back hides that it fell; that it
// is another server shows all the same.
func TestStoreThatFellBackIsNoticedAlthoughItsRevisionRose(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		other := r.second()
		backup := r.store.Copy()
		time.Sleep(time.Second)
		other.disconnect()
		time.Sleep(time.Second)
		r.ForgetJournal()
		defer other.Close()
		r.store.Fallback(backup)
		if _, err := r.store.Move(context.Background()); err != nil {
			t.Fatal(err)
		}
		r.refused(p, broker.Want{}, broker.ErrRevoked)
		if !strings.Contains(other.log.String(), "another server has taken its place") {
			t.Error("nobody was told")
		}
	})
}
