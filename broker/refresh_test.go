package broker_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
)

// expire lets alice's tokens end.
func expire() { time.Sleep(6 * time.Minute) }

func TestRoleThatIsLostStopsTheNextToken(t *testing.T) {
	inBubble(t, func(r *rig) {
		handle := r.loggedIn("alice")
		p := r.running("alice", 100)
		r.token(p, broker.Want{})
		epoch := r.grant("alice").Epoch
		expire()
		r.provider.SetRoles("alice", "student")
		r.refused(p, broker.Want{}, broker.ErrDenied)
		if r.provider.Calls("exchange") != 1 {
			t.Error("a token was exchanged under rights that had ended")
		}
		if r.grant("alice").Epoch <= epoch {
			t.Error("the epoch did not move with the roles")
		}
		expire()
		r.provider.SetRoles("alice", "researcher")
		if s, err := r.CheckSession(context.Background(), "main", "keycloak", handle, "alice", ""); err != nil || !s.Active {
			t.Fatalf("CheckSession: %+v, %v", s, err)
		}
		r.token(p, broker.Want{}) // a role gained needs no new login
	})
}

func TestRoleThatIsGainedCountsAtOnce(t *testing.T) {
	inBubble(t, func(r *rig) {
		handle := r.loggedIn("alice")
		p := r.running("alice", 100)
		r.provider.SetRoles("alice", "student")
		expire()
		r.refused(p, broker.Want{}, broker.ErrDenied)
		expire()
		var later atomic.Bool
		r.store.After(func(method string, k broker.Key) error {
			if method == "Get" && k.Kind == "grant" && !later.Swap(true) {
				time.Sleep(time.Second) // with the old roles in hand
			}
			return nil
		})
		var slow sync.WaitGroup
		slow.Go(func() { r.Token(context.Background(), p, broker.Want{}) })
		synctest.Wait()
		r.provider.SetRoles("alice", "researcher")
		if s, err := r.CheckSession(context.Background(), "main", "keycloak", handle, "alice", ""); err != nil || !s.Active {
			t.Fatalf("CheckSession: %+v, %v", s, err)
		}
		r.token(p, broker.Want{})
		slow.Wait()
	})
}

func TestDeadRefreshTokenIsQuarantinedAndALoginRevivesTheContainer(t *testing.T) {
	inBubble(t, func(r *rig) {
		handle := r.loggedIn("alice")
		p := r.running("alice", 100)
		r.token(p, broker.Want{})
		expire()
		r.provider.EndSession("alice")
		said := r.refused(p, broker.Want{}, broker.ErrLoginRequired)
		if !strings.Contains(said.Sentence, "(expired)") {
			t.Errorf("said %q, want the reason in it", said.Sentence)
		}
		g := r.grant("alice")
		if g.State != broker.NeedsLogin || g.Reason != "expired" {
			t.Errorf("the grant is %s (%s)", g.State, g.Reason)
		}
		r.refused(p, broker.Want{}, broker.ErrLoginRequired)
		if n := r.provider.Calls("refresh"); n != 1 {
			t.Errorf("the dead token was sent %d times, want once", n)
		}
		s, err := r.CheckSession(context.Background(), "main", "keycloak", handle, "alice", "")
		if err != nil || s.Active {
			t.Errorf("CheckSession of a dead session: %+v, %v", s, err)
		}
		r.loggedIn("alice")
		r.token(p, broker.Want{})
		if s, err := r.CheckSession(context.Background(), "main", "keycloak", handle, "alice", ""); err != nil || !s.Active {
			t.Errorf("the old handle of a live grant: %+v, %v", s, err)
		}
	})
}

func lostAnswer(spend bool) brokertest.Answer {
	return brokertest.Answer{Err: &broker.ProviderError{Class: broker.Lost, Err: errors.New("timeout")}, Spend: spend}
}

func TestLostAnswerIsTriedAgainOnceWithTheSameToken(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		expire()
		r.provider.Next(lostAnswer(false))
		before := r.provider.RefreshToken("alice")
		r.token(p, broker.Want{})
		if n := r.provider.Calls("refresh"); n != 2 || r.provider.RefreshToken("alice") == before {
			t.Errorf("%d requests, want 2, the second with success", n)
		}
	})
}

func TestTokenWhoseRetryIsLostTooRests(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		expire()
		r.provider.Next(lostAnswer(false), lostAnswer(false))
		for range 3 {
			if said := r.refused(p, broker.Want{}, broker.ErrProviderDown); said.RetryAfter <= 0 {
				t.Errorf("no time to try again is told: %+v", said)
			}
		}
		if n := r.provider.Calls("refresh"); n != 2 {
			t.Errorf("%d requests, want the one and its one retry", n)
		}
		time.Sleep(11 * time.Second)
		r.token(p, broker.Want{})
	})
}

func TestRetryIsMadeThoughTheBrokerCloses(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		expire()
		asked := make(chan struct{})
		lost := lostAnswer(false)
		lost.Before = func() { close(asked) }
		r.provider.Next(lost)
		go r.Token(context.Background(), p, broker.Want{})
		<-asked
		r.Close()
		if n := r.provider.Calls("refresh"); n != 2 {
			t.Errorf("%d requests, want the one and its one retry", n)
		}
		r.start()
	})
}

func TestRefreshThatACrashBrokeOffIsFinishedAtTheStart(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		r.running("alice", 100)
		expire()
		// The crash: the answer never comes, and from then on nothing is written.
		r.provider.Next(brokertest.Answer{
			Before: func() { r.store.Fail(errors.New("away")) },
			Err:    &broker.ProviderError{Class: broker.Lost},
		})
		r.refused(r.peer("alice", 100), broker.Want{}, broker.ErrUnavailable)
		r.store.Fail(nil)
		before := r.provider.Calls("refresh")
		r.restarted()
		if n := r.provider.Calls("refresh"); n != before+1 {
			t.Errorf("%d refreshes at the start, want 1", n-before)
		}
		if g := r.grant("alice"); g.Mark.Attempt != "" || g.State != broker.Live {
			t.Errorf("the grant is %s with the mark %+v", g.State, g.Mark)
		}
	})
}

func TestAnswerIsStoredOnceTheStoreIsBack(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		expire()
		r.provider.Next(brokertest.Answer{Before: func() { r.store.Fail(errors.New("away")) }})
		time.AfterFunc(10*time.Second, func() { r.store.Fail(nil) })
		r.token(p, broker.Want{})
		expire()
		r.token(p, broker.Want{}) // with the token that was stored
	})
}

func TestFrozenBrokerDoesNotSendUnderAnOldLease(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		expire()
		r.store.After(func(method string, k broker.Key) error {
			if method == "Put" && k.Kind == "grant" {
				time.Sleep(20 * time.Second)
			}
			return nil
		})
		r.refused(p, broker.Want{}, broker.ErrUnavailable)
		if n := r.provider.Calls("refresh"); n != 0 {
			t.Errorf("the refresh token was sent %d times", n)
		}
	})
}

func TestLeaseOfABrokerThatNeverComesBackRunsOut(t *testing.T) {
	inBubble(t, func(r *rig) {
		handle := r.loggedIn("alice")
		other := r.second()
		p := other.running("alice", 100)
		expire()
		back := make(chan struct{})
		r.provider.Next(brokertest.Answer{Before: func() { <-back }, Err: errors.New("killed")})
		go r.CheckSession(context.Background(), "main", "keycloak", handle, "alice", "")
		synctest.Wait()
		before := time.Now()
		other.token(p, broker.Want{})
		if waited := time.Since(before); waited < 40*time.Second || waited > 50*time.Second {
			t.Errorf("the other broker waited %s, want the 45 s of the lease", waited)
		}
		close(back)
		synctest.Wait()
		if g := r.grant("alice"); g.State != broker.Live {
			t.Errorf("the late answer made the grant %s (%s)", g.State, g.Reason)
		}
		other.Close()
	})
}

func TestDisconnectDuringARefreshRevokesWhatItBrings(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		expire()
		r.provider.Next(brokertest.Answer{Before: func() {
			if _, _, err := r.Disconnect(context.Background(), "root", "main", "alice", ""); err != nil {
				t.Errorf("Disconnect: %v", err)
			}
		}})
		r.refused(p, broker.Want{}, broker.ErrRevoked)
		if !slices.Contains(r.provider.Revoked(), r.provider.RefreshToken("alice")) {
			t.Error("the refresh token that came under the tombstone was not revoked at the provider")
		}
		if g := r.grant("alice"); g.State != broker.Disconnected {
			t.Errorf("the grant is %s", g.State)
		}
	})
}

func TestAnswerThatIsRefusedLeavesNothingInTheJournal(t *testing.T) {
	for name, meanwhile := range map[string]func(r *rig){
		"a disconnect": func(r *rig) {
			if _, _, err := r.Disconnect(context.Background(), "root", "main", "alice", ""); err != nil {
				t.Errorf("Disconnect: %v", err)
			}
		},
		"a login": func(r *rig) { r.loggedIn("alice") },
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(r *rig) {
				r.loggedIn("alice")
				p := r.running("alice", 100)
				expire()
				r.provider.SetRoles("alice", "researcher", "admin") // which moves the epoch
				r.provider.Next(brokertest.Answer{Before: func() { meanwhile(r); time.Sleep(time.Second) }})
				r.Token(context.Background(), p, broker.Want{})
				r.grant("alice")
				if strings.Contains(r.log.String(), "fell back") {
					t.Error("what the store had refused is taken for something it has lost")
				}
			})
		})
	}
}

func TestLoginDuringARefreshWins(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		expire()
		r.provider.Next(brokertest.Answer{Before: func() { r.loggedIn("alice") }, Err: nil})
		r.token(p, broker.Want{})
		if len(r.provider.Revoked()) != 0 {
			t.Error("the answer to the older token was revoked; on Keycloak that ends the newer session")
		}
		expire()
		r.token(p, broker.Want{})
	})
}

func TestDisconnectEndsTokensOnEveryBroker(t *testing.T) {
	inBubble(t, func(r *rig) {
		handle := r.loggedIn("alice")
		p := r.running("alice", 100)
		other := r.second()
		defer other.Close()
		q := other.running("alice", 200)
		r.token(p, broker.Want{})
		last := other.token(q, broker.Want{})
		gone, ref, err := r.Disconnect(context.Background(), "root", "", "alice", "")
		if errors.Is(err, broker.ErrInvalid) { // two hubs: one has to be named
			gone, ref, err = r.Disconnect(context.Background(), "root", "main", "alice", "")
		}
		if err != nil || ref == "" || len(gone) != 1 {
			t.Fatalf("Disconnect: %v, %v", gone, err)
		}
		if gone[0].OutstandingUntil.Before(last.ExpiresAt) {
			t.Errorf("outstanding until %s, but a token lives until %s", gone[0].OutstandingUntil, last.ExpiresAt)
		}
		time.Sleep(time.Until(gone[0].IssuingStoppedAt) + time.Millisecond)
		for _, b := range []struct {
			*rig
			p *broker.Peer
		}{{r, p}, {other, q}} {
			b.refused(b.p, broker.Want{}, broker.ErrRevoked)
			s, err := b.CheckSession(context.Background(), "main", "keycloak", handle, "alice", "")
			if err != nil || s.Active {
				t.Errorf("CheckSession after the disconnect: %+v, %v", s, err)
			}
		}
		_, err = r.Register(context.Background(), "main", broker.RegisterRequest{User: "alice", ContainerName: "c"})
		refused(t, err, broker.ErrRevoked)

		r.loggedIn("alice")
		r.token(p, broker.Want{})
		if s, err := r.CheckSession(context.Background(), "main", "keycloak", handle, "alice", ""); err != nil || s.Active {
			t.Errorf("a handle from before the disconnect came back to life: %+v, %v", s, err)
		}
	})
}

func TestOtherBrokersWaitUntilTheNewTokenIsShared(t *testing.T) {
	inBubble(t, func(r *rig) {
		handle := r.loggedIn("alice")
		p := r.running("alice", 100)
		other := r.second()
		defer other.Close()
		expire()
		r.store.Before(func(method string, k broker.Key) error {
			if method == "Put" && k.Kind == "whole" {
				time.Sleep(time.Second)
			}
			return nil
		})
		r.provider.Next(brokertest.Answer{Before: func() { time.Sleep(time.Second) }})
		var both sync.WaitGroup
		both.Go(func() { r.token(p, broker.Want{}) })
		both.Go(func() {
			time.Sleep(500 * time.Millisecond)
			if s, err := other.CheckSession(context.Background(), "main", "keycloak", handle, "alice", ""); err != nil || s.Stale {
				t.Errorf("CheckSession: %+v, %v", s, err)
			}
		})
		both.Wait()
		if n := r.provider.Calls("refresh"); n != 1 {
			t.Errorf("%d refreshes, want 1 for both brokers", n)
		}
	})
}

func TestCloseDoesNotWaitForAnotherBrokersLease(t *testing.T) {
	inBubble(t, func(r *rig) {
		handle := r.loggedIn("alice")
		other := r.second()
		p := other.running("alice", 100)
		expire()
		r.provider.Next(brokertest.Answer{Before: func() { time.Sleep(20 * time.Second) }})
		go r.CheckSession(context.Background(), "main", "keycloak", handle, "alice", "")
		synctest.Wait()
		go other.Token(context.Background(), p, broker.Want{})
		time.Sleep(5 * time.Second) // so that it looks at the grant once a second only
		synctest.Wait()
		began := time.Now()
		other.Close()
		if took := time.Since(began); took > 100*time.Millisecond {
			t.Errorf("Close took %s; it had no refresh of its own under way", took)
		}
	})
}

func TestDisconnectEndsWhatItCan(t *testing.T) {
	both := func(c *broker.Config) { c.Providers = append(c.Providers, brokertest.NewProvider("gitlab")) }
	login := func(r *rig) {
		r.loggedIn("alice")
		tok, err := r.Login(context.Background(), "main", "gitlab", codeOf("alice"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.Claim(context.Background(), "main", "gitlab", tok.Handle, "alice"); err != nil {
			t.Fatal(err)
		}
	}
	t.Run("although one grant can't be read", func(t *testing.T) {
		inBubble(t, func(r *rig) {
			login(r)
			p := r.running("alice", 100)
			r.token(p, broker.Want{})
			away := errors.New("away")
			r.store.Before(func(method string, k broker.Key) error {
				if method == "Get" && k.Kind == "grant" && k.Parts[1] == "gitlab" {
					return away
				}
				return nil
			})
			if _, _, err := r.Disconnect(context.Background(), "root", "main", "alice", ""); !errors.Is(err, broker.ErrUnavailable) {
				t.Errorf("Disconnect: %v; want it to say that one grant could not be ended", err)
			}
			r.store.Before(nil)
			r.refused(p, broker.Want{}, broker.ErrRevoked)
		}, both)
	})
	t.Run("although a provider is not configured any more", func(t *testing.T) {
		inBubble(t, func(r *rig) {
			login(r)
			r.Close()
			r.cfg.Providers = r.cfg.Providers[:1]
			r.start()
			gone, _, err := r.Disconnect(context.Background(), "root", "main", "alice", "")
			if err != nil || len(gone) != 2 {
				t.Errorf("Disconnect: %+v, %v; want both grants ended", gone, err)
			}
		}, both)
	})
}

func TestRolesOfACommitWhoseAnswerIsLostCountAtOnce(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		expire()
		r.provider.SetRoles("alice", "student")
		r.provider.Next(brokertest.Answer{Before: func() { // begin is over: the next Put is the commit's
			var once sync.Once
			r.store.After(func(method string, k broker.Key) (err error) {
				if method == "Put" && k.Kind == "grant" {
					once.Do(func() { err = errors.New("the answer is lost") })
				}
				return err
			})
		}})
		r.refused(p, broker.Want{}, broker.ErrDenied)
		if n := r.provider.Calls("refresh"); n != 1 {
			t.Errorf("%d refreshes, want the one whose answer was stored", n)
		}
	})
}

func TestProviderThatHangsIsGivenUpBeforeTheLeaseEnds(t *testing.T) {
	var waits []time.Duration
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		expire()
		r.refused(p, broker.Want{}, broker.ErrProviderDown)
		if len(waits) != 2 || slices.Max(waits) > 30*time.Second {
			t.Errorf("the provider was given %s, want 30 s at most, twice", waits)
		}
	}, func(c *broker.Config) { c.Providers = []broker.Provider{hangs{c.Providers[0], &waits}} })
}

func TestTokenThatStillWorksIsServedWhileTheProviderHangs(t *testing.T) {
	var waits []time.Duration
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		old := r.token(p, broker.Want{})
		time.Sleep(time.Until(old.ExpiresAt) - 20*time.Second) // no longer fresh
		began := time.Now()
		tok := r.token(p, broker.Want{})
		if tok.Access.Fingerprint() != old.Access.Fingerprint() || time.Since(began) > 5*time.Second {
			t.Errorf("after %s came another token, or too late", time.Since(began))
		}
	}, func(c *broker.Config) { c.Providers = []broker.Provider{hangs{c.Providers[0], &waits}} })
}

// hangs is a provider whose refreshes end with their context, or after an hour,
// and that notes how long each was waited for.
type hangs struct {
	broker.Provider
	waits *[]time.Duration
}

func (p hangs) Refresh(ctx context.Context, _ broker.Secret, _ string, _ []string) (broker.Identity, broker.Issued, error) {
	began := time.Now()
	defer func() { *p.waits = append(*p.waits, time.Since(began)) }()
	select {
	case <-ctx.Done():
		return broker.Identity{}, broker.Issued{}, ctx.Err()
	case <-time.After(time.Hour):
		return broker.Identity{}, broker.Issued{}, errors.New("too late")
	}
}

func TestDisabledAccountIsAskedForTwiceAMinuteAtMost(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		expire()
		r.provider.Next(brokertest.Answer{Err: &broker.ProviderError{Class: broker.Disabled}})
		for range 3 {
			r.refused(p, broker.Want{}, broker.ErrDenied)
		}
		if n := r.provider.Calls("refresh"); n != 1 {
			t.Errorf("the provider was asked %d times within a moment", n)
		}
	})
}

func TestLostAnswerIsRememberedThroughOtherTrouble(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		expire()
		r.provider.Next(
			brokertest.Answer{Err: &broker.ProviderError{Class: broker.Lost}, Spend: true},
			brokertest.Answer{Err: &broker.ProviderError{Class: broker.TryLater}})
		r.refused(p, broker.Want{}, broker.ErrLoginRequired)
		if n := r.provider.Calls("refresh"); n != 3 {
			t.Errorf("%d requests, want the lost one, one that was turned away, and the retry", n)
		}
		if g := r.grant("alice"); g.Reason != "lost_response" {
			t.Errorf("the reason is %q, want lost_response", g.Reason)
		}
	})
}

func TestDisconnectSaysHowLongAnExchangedTokenMayWork(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		time.Sleep(2 * time.Minute)
		tok := r.token(p, broker.Want{}) // ends two minutes after the login's
		gone, _, err := r.Disconnect(context.Background(), "root", "main", "alice", "")
		if err != nil || gone[0].OutstandingUntil.Before(tok.ExpiresAt) {
			t.Errorf("outstanding until %+v, %v; a token lives until %s", gone, err, tok.ExpiresAt)
		}
	})
}
