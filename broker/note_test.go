package broker_test

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
)

// counting counts what one broker reads.
type counting struct {
	broker.Store
	records, pulses atomic.Int32
	after           func() // each pulse was read, before it arrives
}

func (c *counting) Get(ctx context.Context, k broker.Key) (broker.Record, error) {
	c.records.Add(1)
	return c.Store.Get(ctx, k)
}

func (c *counting) Pulse(ctx context.Context) (broker.Pulse, error) {
	c.pulses.Add(1)
	p, err := c.Store.Pulse(ctx)
	c.after()
	return p, err
}

// counted is a second broker whose reads are counted.
func (r *rig) counted() (*rig, *counting) {
	r.t.Helper()
	c := &counting{Store: r.store, after: func() {}}
	r.cfg.Store = c
	defer func() { r.cfg.Store = r.store }()
	return r.second(), c
}

// forged is a note that a refresh of the grant has ended.
func forged(user string) string {
	k, _ := json.Marshal(broker.GrantKey{Hub: "main", Provider: "keycloak", Sub: user})
	return "grant " + string(k)
}

// flood tells note each millisecond until the test's end or stop is called.
func (r *rig) flood(note string) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var ended sync.WaitGroup
	ended.Go(func() {
		for ctx.Err() == nil {
			r.store.Tell(ctx, note)
			time.Sleep(time.Millisecond)
		}
	})
	return func() { cancel(); ended.Wait() }
}

func TestWaitingForAnotherBrokersRefreshCostsFewReads(t *testing.T) {
	for _, tt := range []struct {
		name    string
		callers int
		setUp   func(r *rig) (end func())
		late    time.Duration // at most, after the refresh
		reads   int32         // at most
	}{
		{"notes arrive", 1, func(*rig) func() { return func() {} }, 100 * time.Millisecond, 40},
		{"notes arrive, for many callers", 20, func(*rig) func() { return func() {} }, 100 * time.Millisecond, 40 + 3*20},
		{"notes are lost", 1, func(r *rig) func() { r.store.DropNotes(true); return func() {} }, 1250 * time.Millisecond, 40},
		{"notes are forged", 1, func(r *rig) func() { return r.flood(forged("alice")) }, 100 * time.Millisecond, 250},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBubble(t, func(r *rig) {
				handle := r.loggedIn("alice")
				other, cost := r.counted()
				defer other.Close()
				p := other.running("alice", 200)
				expire()
				defer tt.setUp(r)()
				r.provider.Next(brokertest.Answer{Before: func() { time.Sleep(9 * time.Second) }})
				go r.RefreshHub(context.Background(), "main", "keycloak", handle)
				synctest.Wait()

				before, began := cost.records.Load(), time.Now()
				var all sync.WaitGroup
				for range tt.callers {
					all.Go(func() { other.token(p, broker.Want{}) })
				}
				all.Wait()
				took, reads := time.Since(began), cost.records.Load()-before
				t.Logf("%d callers waited %s with %d reads", tt.callers, took, reads)
				if took < 9*time.Second || took > 9*time.Second+tt.late {
					t.Errorf("waited %s for a refresh of 9 s, want %s more at most", took, tt.late)
				}
				if reads > tt.reads {
					t.Errorf("waiting cost %d reads, want %d at most", reads, tt.reads)
				}
				if n := r.provider.Calls("refresh"); n != 1 {
					t.Errorf("%d refreshes, want 1", n)
				}
			})
		})
	}
}

func TestWhoWaitsLearnsOfALoginAndOfAnEnd(t *testing.T) {
	for name, tt := range map[string]struct {
		event func(r *rig)
		want  *broker.Error // nil: a token
	}{
		"a login": {func(r *rig) { r.loggedIn("alice") }, nil},
		"a disconnect": {func(r *rig) {
			r.Disconnect(context.Background(), "root", "main", "alice", "")
		}, broker.ErrRevoked},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(r *rig) {
				handle := r.loggedIn("alice")
				other := r.second()
				defer other.Close()
				p := other.running("alice", 200)
				expire()
				r.provider.Next(brokertest.Answer{Before: func() { time.Sleep(20 * time.Second) }})
				go r.RefreshHub(context.Background(), "main", "keycloak", handle)
				synctest.Wait()
				began := time.Now()
				time.AfterFunc(5*time.Second, func() { tt.event(r) })
				if tt.want != nil {
					other.refused(p, broker.Want{}, tt.want)
				} else {
					other.token(p, broker.Want{})
				}
				if took := time.Since(began); took > 5100*time.Millisecond {
					t.Errorf("it was known after %s, want 5 s and a moment", took)
				}
			})
		})
	}
}

func TestDisconnectIsKnownToOtherBrokersAtOnceIfTheyHearOfIt(t *testing.T) {
	for name, tt := range map[string]struct {
		lost bool
		want time.Duration // until it is known
	}{
		"heard":                   {false, 0},
		"lost, but for the lease": {true, 250 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(r *rig) {
				r.loggedIn("alice")
				other := r.second()
				defer other.Close()
				q := other.running("alice", 200)
				time.Sleep(time.Second)       // of rest after what was told before
				other.token(q, broker.Want{}) // confirmed now, for a whole lease
				r.store.DropNotes(tt.lost)
				if _, _, err := r.Disconnect(context.Background(), "root", "main", "alice", ""); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				if tt.lost {
					other.token(q, broker.Want{}) // else nothing would be shown here
				}
				time.Sleep(tt.want)
				if tt.lost {
					time.Sleep(time.Nanosecond)
				}
				other.refused(q, broker.Want{}, broker.ErrRevoked)
			})
		})
	}
}

func TestWhoWasCutOffFromTheNotesLooksOnceHeHearsAgain(t *testing.T) {
	inBubble(t, func(r *rig) {
		handle := r.loggedIn("alice")
		r.provider.SetRoles("bob", "researcher")
		r.loggedIn("bob")
		other := r.second()
		defer other.Close()
		p, q := other.running("alice", 200), other.running("bob", 201)
		expire()
		r.provider.Next(brokertest.Answer{Before: func() { time.Sleep(5500 * time.Millisecond) }})
		go r.RefreshHub(context.Background(), "main", "keycloak", handle)
		synctest.Wait()
		var waits sync.WaitGroup
		began, took := time.Now(), time.Duration(0)
		waits.Go(func() { other.token(p, broker.Want{}); took = time.Since(began) })

		r.store.DropNotes(true)
		other.token(q, broker.Want{})
		time.Sleep(5600 * time.Millisecond)
		other.token(q, broker.Want{})
		if _, _, err := r.Disconnect(context.Background(), "root", "main", "bob", ""); err != nil {
			t.Fatal(err)
		}
		r.store.DropNotes(false)
		synctest.Wait()
		other.refused(q, broker.Want{}, broker.ErrRevoked)
		waits.Wait()
		if took > 5700*time.Millisecond {
			t.Errorf("the end of the refresh was known after %s, want it once notes are heard again, after 5.6 s", took)
		}
	})
}

func TestForgedNotesCostABoundedNumberOfReadsAndNoAnswer(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		other, cost := r.counted()
		defer other.Close()
		p := other.running("alice", 200)
		other.token(p, broker.Want{})
		moves := other.Moves()
		r.store.Before(func(method string, _ broker.Key) error {
			if method == "Pulse" {
				time.Sleep(10 * time.Millisecond) // so that notes come during each read
			}
			return nil
		})

		before, records := cost.pulses.Load(), cost.records.Load()
		stop := r.flood(fmt.Sprint("revision ", math.MaxInt64))
		for range 100 {
			other.token(p, broker.Want{})
			time.Sleep(10 * time.Millisecond)
		}
		stop()
		took := time.Second // and what the requests waited for reads
		reads := cost.pulses.Load() - before
		t.Logf("a thousand notes and more and a hundred requests cost %d reads of the revision", reads)
		if most := int32(2 * took / (25 * time.Millisecond)); reads > most {
			t.Errorf("%d reads of the revision, want %d at most", reads, most)
		}
		if n := cost.records.Load() - records; n > 0 {
			t.Errorf("%d records were read although nothing moved", n)
		}
		if isClosed(moves) {
			t.Error("a move was announced that nobody made")
		}
	})
}

func TestNotesThatMeanNothingDoNothing(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.token(p, broker.Want{})
		time.Sleep(time.Second) // of rest after what was told before
		known := r.Status(context.Background()).Revision
		before := r.store.Calls("Pulse")
		for _, note := range []string{
			fmt.Sprint("revision ", known), fmt.Sprint("revision ", known-1), " ", "revision", "revision ", "revision x", "revision -1", "revision 0", "revision 1e99", "revision 99999999999999999999", "Revision 9999999999999999",
			"grant", "grant ", "grant {", forged("nobody"), strings.Repeat("x", 1<<20), "\x00",
		} {
			r.store.Tell(context.Background(), note)
			time.Sleep(100 * time.Millisecond)
		}
		if n := r.store.Calls("Pulse") - before; n > 2 { // which is once a second in any case
			t.Errorf("they cost %d reads of the revision", n)
		}
	})
}

// isClosed reports whether c is, once all wait.
func isClosed(c <-chan struct{}) bool {
	synctest.Wait()
	select {
	case <-c:
		return true
	default:
		return false
	}
}

func TestMovesOfTheRevisionAreAnnouncedToWhatIsKeptOpen(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		r.provider.SetRoles("bob", "researcher")
		r.loggedIn("bob")
		other := r.second()
		defer other.Close()
		q := other.running("bob", 200)
		other.token(q, broker.Want{})
		time.Sleep(time.Second) // of rest after what was told before
		disconnect := func(user broker.UserID) {
			t.Helper()
			if _, _, err := r.Disconnect(context.Background(), "root", "main", user, ""); err != nil {
				t.Fatal(err)
			}
		}

		here, there := r.Moves(), other.Moves()
		if isClosed(here) || isClosed(there) {
			t.Error("a move was announced before there was one")
		}
		disconnect("alice")
		if !isClosed(here) || !isClosed(there) {
			t.Error("a move that was heard of was not announced on both brokers")
		}

		here, there = r.Moves(), other.Moves()
		other.token(q, broker.Want{})
		if isClosed(here) || isClosed(there) {
			t.Error("one move was announced twice")
		}
		r.store.DropNotes(true)
		disconnect("bob")
		if !isClosed(here) || isClosed(there) {
			t.Error("a move that nobody hears of is announced where it was made, and nowhere else yet")
		}
		time.Sleep(251 * time.Millisecond)
		other.refused(q, broker.Want{}, broker.ErrRevoked)
		if !isClosed(there) {
			t.Error("a move that a read found was not announced")
		}
	})
}

func TestAReadThatIsUnderWayWhenANoteArrivesIsNotBelieved(t *testing.T) {
	// The read that is under way takes 100 ms, those after it as long as it says.
	for name, then := range map[string]time.Duration{
		"and a later one takes longer": 200 * time.Millisecond,
		"and a later one overtakes it": 0,
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(r *rig) {
				r.loggedIn("alice")
				other, cost := r.counted()
				defer other.Close()
				q := other.running("alice", 200)
				other.token(q, broker.Want{})
				time.Sleep(1300 * time.Millisecond) // past the lease, and not at a beat
				moves, before := other.Moves(), cost.pulses.Load()
				cost.after = func() {
					if cost.pulses.Load() == before+1 {
						time.Sleep(100 * time.Millisecond)
					} else {
						time.Sleep(then)
					}
				}
				// It asks once, and is content with what comes.
				go other.CheckSession(context.Background(), "main", "keycloak", broker.NewSecret("tbh_unknown"), "alice", "")
				time.Sleep(10 * time.Millisecond)
				if _, _, err := r.Disconnect(context.Background(), "root", "main", "alice", ""); err != nil {
					t.Fatal(err)
				}
				time.Sleep(90 * time.Millisecond)
				if then == 0 && !isClosed(moves) {
					t.Error("the move was not announced, without a request that asks")
				}
				other.refused(q, broker.Want{}, broker.ErrRevoked)
				if !isClosed(moves) {
					t.Error("the move was not announced")
				}
				if n := cost.pulses.Load() - before; n != 3 {
					t.Errorf("the revision was read %d times, want 3: the one under way, the one that the note called for, and one after the grant was read", n)
				}
			})
		})
	}
}

func TestNobodyIsHurriedToRetryALostAnswer(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		expire()
		ctx, cancel := context.WithCancel(context.Background())
		var told atomic.Int32
		var ended sync.WaitGroup
		ended.Go(func() {
			r.store.Listen(ctx, func(note string) {
				if note == forged("alice") {
					told.Add(1)
				}
			})
		})
		r.provider.Next(lostAnswer(false))
		ended.Go(func() { r.token(p, broker.Want{}) })
		synctest.Wait()
		if n := told.Load(); n != 0 {
			t.Errorf("%d notes said that the grant is free before its retry", n)
		}
		time.Sleep(3 * time.Second)
		synctest.Wait()
		if n := told.Load(); n != 1 {
			t.Errorf("%d notes said that the refresh has ended, want 1", n)
		}
		cancel()
		ended.Wait()
	})
}
