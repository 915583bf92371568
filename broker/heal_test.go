package broker_test

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
)

// restarted closes r's broker and starts it again, as after a crash: what it had
// in memory is gone, its journal and the store are there.
func (r *rig) restarted() {
	r.t.Helper()
	r.Close()
	r.start()
}

func TestAnswerThatTheStoreNeverTookIsRestoredAtTheStart(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		expire()
		r.provider.Next(brokertest.Answer{Before: func() { r.store.Fail(errors.New("away")) }})
		r.refused(p, broker.Want{}, broker.ErrUnavailable) // and the broker gave up
		r.store.Fail(nil)
		r.restarted()
		r.token(r.peer("alice", 100), broker.Want{})
		if g := r.grant("alice"); g.State != broker.Live {
			t.Errorf("the grant is %s (%s): the answer was lost", g.State, g.Reason)
		}
	})
}

// lagging makes the replica of r's store lag from now on.
func (r *rig) lagging() {
	r.store.Before(func(method string, _ broker.Key) error {
		if method == "Replicated" || method == "Settle" {
			return errors.New("the replica lags")
		}
		return nil
	})
}

func TestNoRefreshTokenIsSpentThatAReplicaTakesForNew(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		other := r.second()
		defer func() { other.Close() }()
		q := other.running("alice", 200)
		expire()
		r.lagging()
		r.refused(p, broker.Want{}, broker.ErrUnavailable)
		if n := r.provider.Calls("refresh"); n != 0 {
			t.Errorf("%d refresh tokens were spent", n)
		}
		r.store.Before(nil)
		began := time.Now()
		other.token(q, broker.Want{})
		if took := time.Since(began); took > time.Second {
			t.Errorf("the other broker waited %s for a lease that nobody used", took)
		}
	})
}

func TestNewRightsAreToldOnceNoFailOverTakesThemBack(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		expire()
		r.provider.SetRoles("alice", "researcher", "admin")
		r.provider.Next(brokertest.Answer{Before: r.lagging})
		r.refused(p, broker.Want{}, broker.ErrUnavailable)
		if d := r.disconnect(); !strings.Contains(d.NotKept, "the replica lags") {
			t.Errorf("of the disconnect it is said: %q", d.NotKept)
		}
		r.store.Before(nil)
		if d := r.disconnect(); d.NotKept != "" {
			t.Errorf("of the same again: %q", d.NotKept)
		}
	})
}

func TestStoreThatFallsBackIsPutRightUnasked(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		other := r.second()
		defer func() { other.Close() }()
		q := other.running("alice", 200)
		var replica *brokertest.MemCopy
		expire()
		r.provider.Next(brokertest.Answer{Before: func() { replica = r.store.Copy(); r.lagging() }})
		r.token(p, broker.Want{})
		r.store.Fallback(replica) // with the lease, and without what came of it
		r.store.Before(nil)
		other.token(q, broker.Want{}) // waits until r has looked
		if g := r.grant("alice"); g.State != broker.Live || r.provider.Calls("refresh") != 2 {
			t.Errorf("the grant is %s (%s) after %d refreshes: a spent token was sent", g.State, g.Reason, r.provider.Calls("refresh"))
		}
	})
}

func TestDisconnectOutlivesAStoreThatForgetsIt(t *testing.T) {
	for _, restart := range []bool{false, true} {
		inBubble(t, func(r *rig) {
			r.loggedIn("alice")
			p := r.running("alice", 100)
			other := r.second()
			defer func() { other.Close() }()
			q := other.running("alice", 200)
			backup := r.store.Copy()
			time.Sleep(time.Second)
			r.token(p, broker.Want{})
			if _, _, err := r.Disconnect(context.Background(), "root", "main", "alice", ""); err != nil {
				t.Fatal(err)
			}
			r.store.Fallback(backup)
			if restart {
				r.restarted()
				p = r.peer("alice", 100)
			}
			time.Sleep(time.Second)
			r.refused(p, broker.Want{}, broker.ErrRevoked)
			time.Sleep(time.Second)
			other.refused(q, broker.Want{}, broker.ErrRevoked) // put right for all
		})
	}
}

func TestDisconnectedGrantNeverComesBackFromAJournal(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		other := r.second()
		defer func() { other.Close() }()
		expire()
		r.token(r.running("alice", 100), broker.Want{}) // r's journal has the newest token
		r.Close()                                       // and r is dead
		if _, _, err := other.Disconnect(context.Background(), "root", "main", "alice", ""); err != nil {
			t.Fatal(err)
		}
		r.start()
		r.refused(r.peer("alice", 100), broker.Want{}, broker.ErrRevoked)
		if g := r.grant("alice"); g.Tombstone.IsZero() {
			t.Error("the tombstone is gone")
		}
	})
}

func TestAnswerOfADeadBrokerIsNotStoredOverADisconnect(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		other := r.second()
		defer func() { other.Close() }()
		expire()
		r.provider.Next(brokertest.Answer{Before: func() { r.store.Fail(errors.New("away")) }})
		r.refused(p, broker.Want{}, broker.ErrUnavailable)
		r.Close() // and r is dead; the newest refresh token is in its journal and nowhere else
		r.store.Fail(nil)
		newest := r.provider.RefreshToken("alice")
		if _, _, err := other.Disconnect(context.Background(), "root", "main", "alice", ""); err != nil {
			t.Fatal(err)
		}
		r.start()
		for range 3 {
			r.refused(r.peer("alice", 100), broker.Want{}, broker.ErrRevoked)
			time.Sleep(time.Minute) // what was read is read again
		}
		if !slices.Contains(r.provider.Revoked(), newest) {
			t.Error("the token that is not kept is good at the provider for ever")
		}
		if n := strings.Count(r.log.String(), "the store fell back"); n != 1 {
			t.Errorf("the log says %d times that the store fell back, want once", n)
		}
	})
}

func TestLostRoleStaysLostInAStoreThatForgetsIt(t *testing.T) {
	for _, restart := range []bool{false, true} {
		inBubble(t, func(r *rig) {
			r.provider.SetLife(time.Hour)
			r.loggedIn("alice")
			p := r.running("alice", 100)
			r.token(p, broker.Want{})
			other := r.second()
			defer func() { other.Close() }()
			q := other.running("alice", 200)
			other.token(q, broker.Want{})
			backup := r.store.Copy()
			r.afterALook()
			r.provider.SetRoles("alice", "student")
			time.Sleep(seenBy)
			r.refused(p, broker.Want{}, broker.ErrDenied)
			r.store.Fallback(backup)
			r.provider.OnLook(func(*broker.Identity) error { return errors.New("away") }) // nobody sees it again
			if restart {
				r.restarted()
				p = r.peer("alice", 100)
			}
			time.Sleep(time.Second)
			r.refused(p, broker.Want{}, broker.ErrDenied)
			time.Sleep(time.Second)
			other.refused(q, broker.Want{}, broker.ErrDenied) // put right for all
		})
	}
}

func TestLoginAfterAllWasLostIsNotReplacedByAnOlderToken(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		for range 3 {
			expire()
			r.token(p, broker.Want{})
		}
		other := r.second()
		defer func() { other.Close() }()
		r.store.Fallback(nil)
		other.loggedIn("alice")
		r.restarted()
		other.token(other.running("alice", 200), broker.Want{})
		expire()
		if _, err := other.CheckSession(context.Background(), "main", "keycloak", other.login("alice"), "alice", ""); err != nil {
			t.Fatal(err)
		}
		if g := other.grant("alice"); g.State != broker.Live {
			t.Errorf("the grant is %s (%s)", g.State, g.Reason)
		}
	})
}

func TestJournalKeepsWhatTheStoreDoesNotSettle(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.store.Before(func(method string, _ broker.Key) error {
			if method == "Settle" {
				return errors.New("no persistence")
			}
			return nil
		})
		r.loggedIn("alice")
		time.Sleep(time.Minute)
		if n := r.Boxes(); n != 1 {
			t.Errorf("%d grants in the journal, want the one that is not safe", n)
		}
		r.store.Before(nil)
		time.Sleep(time.Minute)
		if n := r.Boxes(); n != 0 {
			t.Errorf("%d grants in the journal, want none", n)
		}
	})
}

func TestFullDiskSpendsNoRefreshToken(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		expire()
		if err := r.FillDisk(); err != nil {
			t.Fatal(err)
		}
		said := r.refused(p, broker.Want{}, broker.ErrUnavailable)
		if !strings.Contains(said.Sentence, "disk") || r.provider.Calls("refresh") != 0 {
			t.Errorf("said %q after %d refreshes", said.Sentence, r.provider.Calls("refresh"))
		}
	})
}

func TestSecondBrokerOnOneJournalRefusesToStart(t *testing.T) {
	inBubble(t, func(r *rig) {
		b, err := broker.New(r.cfg)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Start(context.Background()); err == nil || !strings.Contains(err.Error(), "only one broker") {
			t.Errorf("Start: %v", err)
		}
		b.Close()
	})
}

func TestBrokerThatCrashedDoesNotWaitForItsOwnLease(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		other := r.second()
		defer other.Close()
		q := other.running("alice", 200)
		expire()
		dead := make(chan struct{})
		r.provider.Next(brokertest.Answer{Before: func() { <-dead }, Err: errors.New("killed")})
		var killed sync.WaitGroup
		killed.Go(func() { r.Token(context.Background(), p, broker.Want{}) })
		synctest.Wait()
		began := time.Now()
		waited := make(chan struct{})
		go func() { other.token(q, broker.Want{}); close(waited) }()
		synctest.Wait()

		crashed := *r
		journal, err := os.ReadFile(r.cfg.Journal) // which the dead process no longer has locked
		if err != nil {
			t.Fatal(err)
		}
		r.cfg.Journal += "2"
		if err := os.WriteFile(r.cfg.Journal, journal, 0o600); err != nil {
			t.Fatal(err)
		}
		r.start()
		<-waited
		r.token(p, broker.Want{})
		if took := time.Since(began); took > time.Second {
			t.Errorf("it took %s", took)
		}
		close(dead)
		killed.Wait()
		crashed.Close()
		if g := r.grant("alice"); g.State != broker.Live || r.provider.Calls("refresh") != 2 {
			t.Errorf("the grant is %s (%s) after %d refreshes", g.State, g.Reason, r.provider.Calls("refresh"))
		}
	})
}

func TestReadingDuringACommitIsNoFallBack(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		expire()
		r.provider.Next(brokertest.Answer{Before: func() {
			r.store.Before(func(method string, k broker.Key) error {
				if method == "Put" && k.Kind == "grant" {
					r.store.Before(nil)
					r.grant("alice") // somebody looks while the journal is ahead
				}
				return nil
			})
		}})
		r.token(p, broker.Want{})
		if strings.Contains(r.log.String(), "fell back") {
			t.Error("the log says that the store fell back")
		}
	})
}

func TestAnAnswerThatIsRefusedIsNoFallBack(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		expire()
		r.provider.Next(brokertest.Answer{Before: func() { r.disconnect() }})
		r.refused(p, broker.Want{}, broker.ErrRevoked)
		time.Sleep(time.Minute)
		r.refused(p, broker.Want{}, broker.ErrRevoked)
		if strings.Contains(r.log.String(), "fell back") {
			t.Error("the log says that the store fell back")
		}
	})
}

func TestGrantThatIsRestoredHasTheRolesOfNow(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.onSettle(func() error { return errors.New("the replica lags") })
		r.provider.SetLife(time.Hour)
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.token(p, broker.Want{}) // with it the journal has the grant
		r.afterALook()
		r.provider.SetRoles("alice", "student")
		time.Sleep(seenBy)
		r.refused(p, broker.Want{}, broker.ErrDenied)
		k := broker.Key{Kind: "grant", Parts: []string{"main", "keycloak", "alice"}}
		rec, err := r.store.Get(context.Background(), k)
		if err == nil {
			err = r.store.Delete(context.Background(), k, rec.Revision)
		}
		if err != nil {
			t.Fatal(err)
		}
		r.provider.OnLook(func(*broker.Identity) error { return errors.New("away") }) // nobody sees it again
		time.Sleep(time.Minute)                                                       // what was read is read again
		r.refused(p, broker.Want{}, broker.ErrDenied)
	})
}

func TestLogoutThatTheStoreForgetsIsStillALogout(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		backup := r.store.Copy()
		time.Sleep(time.Second)
		if _, err := r.HubLogout(context.Background(), "main", "alice", false); err != nil {
			t.Fatal(err)
		}
		r.store.Fallback(backup)
		time.Sleep(time.Second)
		if said := r.refused(p, broker.Want{}, broker.ErrLoginRequired); !strings.Contains(said.Sentence, "logged_out") {
			t.Errorf("said %q", said.Sentence)
		}
		time.Sleep(time.Minute)
		if n := len(r.provider.Revoked()); n != 0 {
			t.Errorf("%d tokens were revoked at the provider, which nobody asked for", n)
		}
	}, func(c *broker.Config) {
		c.Hubs = map[broker.HubID]broker.Hub{"main": {Login: "keycloak", OnLogout: broker.StopIssuing}}
	})
}

func TestAnswerThatWaitsInTheJournalOfALivingBrokerIsRevokedToo(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		other := r.second()
		defer other.Close()
		expire()
		r.provider.Next(brokertest.Answer{Before: func() { r.store.Fail(errors.New("away")) }})
		r.refused(p, broker.Want{}, broker.ErrUnavailable) // and the broker gave up
		r.store.Fail(nil)
		newest := r.provider.RefreshToken("alice")
		other.disconnect()
		r.store.Fallback(r.store.Copy()) // it restarts, and nothing is lost
		time.Sleep(time.Minute)
		if !slices.Contains(r.provider.Revoked(), newest) {
			t.Error("the token that is not kept is good at the provider for ever")
		}
		r.refused(p, broker.Want{}, broker.ErrRevoked)
	})
}
