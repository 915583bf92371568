package broker_test

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
)

// showingNothing has a rig whose provider shows roles at refreshes only.
func showingNothing(t *testing.T, f func(r *rig), edit ...func(*broker.ProviderInfo)) {
	t.Helper()
	p := brokertest.NewProvider("keycloak", edit...)
	p.SetRoles("alice", "researcher")
	p.SetLife(time.Hour)
	p.OnLook(func(*broker.Identity) error {
		return &broker.ProviderError{Class: broker.Misconfigured, Reason: "unsupported"}
	})
	inBubble(t, func(r *rig) {
		r.provider = p
		f(r)
	}, func(c *broker.Config) { c.Providers = []broker.Provider{p} })
}

func TestWhereOnlyARefreshShowsRolesALostOneIsRefusedInTime(t *testing.T) {
	showingNothing(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.token(p, broker.Want{})
		for round := range 10 { // wherever in a round the change comes
			n := r.provider.Calls("refresh")
			for r.provider.Calls("refresh") == n {
				time.Sleep(time.Second)
			}
			time.Sleep(time.Duration(round) * 100 * time.Millisecond)
			r.provider.SetRoles("alice", "student")
			time.Sleep(broker.SpendingWithin + 250*time.Millisecond)
			r.refused(p, broker.Want{}, broker.ErrDenied)
			r.provider.SetRoles("alice", "researcher")
			time.Sleep(broker.SpendingWithin + 250*time.Millisecond)
			r.token(p, broker.Want{})
		}
		if n := strings.Count(r.log.String(), "does not show roles between refreshes"); n != 1 {
			t.Errorf("the log says it %d times, want once", n)
		}
		if strings.Contains(r.log.String(), "could not be rechecked") {
			t.Error("the log speaks of trouble")
		}
	})
}

func TestAGrantIsRefreshedForItsRolesOnceWhoeverDoesIt(t *testing.T) {
	for _, brokers := range []int{1, 2} {
		showingNothing(t, func(r *rig) {
			r.loggedIn("alice")
			r.running("alice", 100)
			if brokers == 2 {
				time.Sleep(15 * time.Second) // half a round
				other := r.second()
				defer other.Close()
				other.running("alice", 200)
			}
			// Whoever is first is still at it when the other has its round.
			answers := make([]brokertest.Answer, 100)
			for i := range answers {
				answers[i].Before = func() { time.Sleep(25 * time.Second) }
			}
			r.provider.Next(answers...)
			time.Sleep(2 * time.Hour)
			if n := r.provider.Calls("refresh"); n < 7200/330 || n > 7200/202 {
				t.Errorf("%d brokers: %d refreshes in two hours, want one in four minutes or so", brokers, n)
			}
		})
	}
}

func TestNobodyIsRefreshedForRolesWithoutARunningServer(t *testing.T) {
	showingNothing(t, func(r *rig) {
		r.loggedIn("alice")
		r.running("alice", 100)
		r.attestor.Stop("jupyter-alice")
		synctest.Wait()
		time.Sleep(time.Hour)
		if n := r.provider.Calls("refresh"); n != 0 {
			t.Errorf("%d refreshes for nobody", n)
		}
	})
}

func TestWhoseTokensARefreshEndsIsNotRefreshedForRoles(t *testing.T) {
	showingNothing(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.token(p, broker.Want{})
		was := r.provider.Calls("refresh")
		time.Sleep(30 * time.Minute)
		r.token(p, broker.Want{})
		if n := r.provider.Calls("refresh"); n != was {
			t.Errorf("%d refreshes, each of which ended a token in use", n-was)
		}
	}, func(i *broker.ProviderInfo) { i.RefreshEndsAccess = true })
}

func TestATokenThatIsInUseIsNotRefreshedMoreOftenForRoles(t *testing.T) {
	showingNothing(t, func(r *rig) {
		r.provider.SetLife(5 * time.Minute)
		r.loggedIn("alice")
		p := r.running("alice", 100)
		for range 3600 {
			r.token(p, broker.Want{})
			time.Sleep(time.Second)
		}
		if n := r.provider.Calls("refresh"); n > 3600/195 {
			t.Errorf("%d refreshes in an hour", n)
		}
	})
}

func TestARefreshForRolesKeepsNothingWaiting(t *testing.T) {
	showingNothing(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.token(p, broker.Want{})
		under := make(chan bool)
		r.provider.Next(brokertest.Answer{Before: func() { close(under); time.Sleep(25 * time.Second) }})
		<-under
		began := time.Now()
		r.token(p, broker.Want{})
		if d := time.Since(began); d > time.Second {
			t.Errorf("a token that is there was answered after %v", d)
		}
	})
}

func TestRefreshesForRolesAreSpreadAndAFewAtATime(t *testing.T) {
	showingNothing(t, func(r *rig) {
		var users []broker.UserID
		for i := range 40 {
			users = append(users, broker.UserID(fmt.Sprintf("user-%d", i)))
		}
		r.allRunning(users)
		var now, most atomic.Int32
		tens := make(map[int]bool)
		began := time.Now()
		answers := make([]brokertest.Answer, 400)
		for i := range answers {
			answers[i].Before = func() {
				for m, n := most.Load(), now.Add(1); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
				}
				time.Sleep(time.Second)
				now.Add(-1)
			}
		}
		r.provider.Next(answers...)
		before := r.provider.Calls("refresh")
		for time.Since(began) < broker.SpendingWithin {
			n := r.provider.Calls("refresh")
			time.Sleep(10 * time.Second)
			if r.provider.Calls("refresh") > n {
				tens[int(time.Since(began)/(10*time.Second))] = true
			}
		}
		if n := r.provider.Calls("refresh") - before; n != 40 {
			t.Errorf("%d refreshes of 40 grants within the time", n)
		}
		if most.Load() > 4 || len(tens) < 5 {
			t.Errorf("%d at a time, in %d spans of ten seconds", most.Load(), len(tens))
		}
	})
}

func TestAProviderThatRefusesRefreshesForRolesIsLeftAloneUntilTheNextRound(t *testing.T) {
	showingNothing(t, func(r *rig) {
		var users []broker.UserID
		for i := range 40 {
			users = append(users, broker.UserID(fmt.Sprintf("user-%d", i)))
		}
		peers := r.allRunning(users)
		was := r.provider.Calls("refresh")
		answers := make([]brokertest.Answer, 1000)
		for i := range answers {
			answers[i].Err = &broker.ProviderError{Class: broker.TryLater, Reason: "busy", Status: 503}
		}
		r.provider.Next(answers...)
		time.Sleep(10 * time.Minute)
		if n := r.provider.Calls("refresh") - was; n > 14*(3+4) {
			t.Errorf("%d refreshes in 14 rounds, want three and those under way in each", n)
		}
		for _, p := range peers {
			r.token(p, broker.Want{}) // nothing has changed
		}
		if !strings.Contains(r.log.String(), "could not be rechecked") {
			t.Error("the log does not speak of it")
		}
	})
}

func TestAHintIsFollowedByARefreshWhereOnlyThatShowsRoles(t *testing.T) {
	showingNothing(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.token(p, broker.Want{})
		r.provider.SetRoles("alice", "student")
		time.Sleep(time.Second)
		if err := r.LookNow(context.Background(), "keycloak", "alice", "test"); err != nil {
			t.Fatal(err)
		}
		r.refused(p, broker.Want{}, broker.ErrDenied)
	})
}
