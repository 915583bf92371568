package broker_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
)

// What we promise of a grant, each promise a test of that name. The same on real
// processes, a real Redis and real kills is in deploy/faults, and at random in
// TestModelOfTheRefresh.

// At most one refresh in flight per grant, over all brokers, for any latency of
// the provider up to the time limit.
func TestPromiseAtMostOneRefreshInFlightPerGrant(t *testing.T) {
	for _, latency := range []time.Duration{0, 5 * time.Millisecond, 300 * time.Millisecond, 2500 * time.Millisecond, 9 * time.Second, 29 * time.Second} {
		t.Run(latency.String(), func(t *testing.T) {
			inBubble(t, func(r *rig) {
				handle := r.loggedIn("alice")
				p := r.running("alice", 100)
				other := r.second()
				defer other.Close()
				q := other.running("alice", 200)
				expire()
				r.provider.Next(brokertest.Answer{Before: func() { time.Sleep(latency) }})
				var all sync.WaitGroup
				for range 6 {
					all.Go(func() { r.token(p, broker.Want{}) })
					all.Go(func() { other.token(q, broker.Want{}) })
				}
				for _, b := range []*rig{r, other} {
					all.Go(func() { // who has less patience than the provider takes
						if _, err := b.RefreshHub(context.Background(), "main", "keycloak", handle); err != nil && latency < time.Second {
							t.Errorf("RefreshHub: %v", err)
						}
					})
				}
				all.Wait()
				if n := r.provider.Calls("refresh"); n != 1 {
					t.Errorf("%d refreshes for 14 requests, want 1", n)
				}
			})
		})
	}
	t.Run("a provider that never answers", func(t *testing.T) {
		var waits []time.Duration
		inBubble(t, func(r *rig) {
			r.loggedIn("alice")
			other := r.second()
			defer other.Close()
			p, q := r.running("alice", 100), other.running("alice", 200)
			expire()
			began := time.Now()
			var both sync.WaitGroup
			both.Go(func() { r.refused(p, broker.Want{}, broker.ErrProviderDown) })
			both.Go(func() { other.refused(q, broker.Want{}, broker.ErrProviderDown) })
			both.Wait()
			var sum time.Duration
			for _, w := range waits {
				sum += w
			}
			if took := time.Since(began); sum > took {
				t.Errorf("within %s the provider was waited for %s: at times by two", took, waits)
			}
		}, func(c *broker.Config) { c.Providers = []broker.Provider{hangs{c.Providers[0], &waits}} })
	})
}

// A caller's disconnect, timeout or crash never affects a grant.
func TestPromiseWhatHappensToACallerNeverAffectsAGrant(t *testing.T) {
	for name, caller := range map[string]func(r *rig, p *broker.Peer){
		"hangs up": func(r *rig, p *broker.Peer) {
			ctx, hangUp := context.WithCancel(context.Background())
			time.AfterFunc(time.Second, hangUp)
			r.Token(ctx, p, broker.Want{})
		},
		"loses patience": func(r *rig, p *broker.Peer) {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			r.Token(ctx, p, broker.Want{})
		},
		"is killed": func(r *rig, p *broker.Peer) {
			time.AfterFunc(time.Second, func() { r.attestor.Stop("jupyter-alice") })
			r.Token(context.Background(), p, broker.Want{})
		},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(r *rig) {
				r.loggedIn("alice")
				p := r.running("alice", 100)
				before := r.grant("alice").Version
				expire()
				r.provider.Next(brokertest.Answer{Before: func() { time.Sleep(2 * time.Second) }})
				caller(r, p)
				time.Sleep(3 * time.Second)
				g := r.grant("alice")
				if g.Version != before+1 || g.State != broker.Live || r.provider.Calls("refresh") != 1 {
					t.Errorf("the grant is %s at version %d after %d refreshes, want version %d after 1", g.State, g.Version, r.provider.Calls("refresh"), before+1)
				}
				expire()
				r.token(r.running("alice", 300), broker.Want{})
			})
		})
	}
}

// No grant is deleted because a refresh failed; it is marked, with the reason, and
// the user can be told why.
func TestPromiseNoGrantIsDeletedBecauseARefreshFailed(t *testing.T) {
	for _, tt := range []struct {
		class broker.ProviderClass
		want  *broker.Error
		state broker.GrantState
	}{
		{broker.TryLater, broker.ErrProviderDown, broker.Live},
		{broker.Misconfigured, broker.ErrProviderDown, broker.Live},
		{broker.UserAction, broker.ErrLoginRequired, broker.Live},
		{broker.Refused, broker.ErrUnsatisfiable, broker.Live},
		{broker.Disabled, broker.ErrDenied, broker.GrantDisabled},
		{broker.Dead, broker.ErrLoginRequired, broker.NeedsLogin},
	} {
		t.Run(string(tt.class), func(t *testing.T) {
			inBubble(t, func(r *rig) {
				r.loggedIn("alice")
				p := r.running("alice", 100)
				expire()
				r.provider.Next(brokertest.Answer{Err: &broker.ProviderError{Class: tt.class, Reason: "some_reason"}})
				said := r.refused(p, broker.Want{}, tt.want)
				g := r.grant("alice")
				if g.State != tt.state || (g.Reason == "") != (tt.state == broker.Live) {
					t.Errorf("the grant is %s (%q), want %s", g.State, g.Reason, tt.state)
				}
				time.Sleep(time.Minute)
				if tt.class == broker.Dead {
					if !strings.Contains(said.Sentence, "some_reason") {
						t.Errorf("the user is told %q", said.Sentence)
					}
					r.loggedIn("alice")
				}
				r.token(p, broker.Want{})
			})
		})
	}
}

// If the store can't accept a write, no refresh token is spent.
func TestPromiseNoRefreshTokenIsSpentWhileTheStoreCantAcceptAWrite(t *testing.T) {
	for name, write := range map[string]func() error{
		"it refuses": func() error { return errors.New("READONLY") },
		"it is slow": func() error { time.Sleep(20 * time.Second); return nil },
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(r *rig) {
				r.loggedIn("alice")
				p := r.running("alice", 100)
				expire()
				r.store.Before(func(method string, k broker.Key) error {
					if method == "Put" && k.Kind == "grant" {
						return write()
					}
					return nil
				})
				r.refused(p, broker.Want{}, broker.ErrUnavailable)
				if n := r.provider.Calls("refresh"); n != 0 {
					t.Errorf("the refresh token was sent %d times", n)
				}
				r.store.Before(nil)
				r.token(p, broker.Want{})
			})
		})
	}
}

// With a provider that allows a retry (no rotation, or a grace of 30 s at least)
// no single crash, lost answer or lost caller loses a grant.
func TestPromiseProviderThatAllowsARetryLosesNoGrant(t *testing.T) {
	dir := filepath.Dir(inMemory(t))
	for _, kind := range []string{modelKeeps, modelGrace} {
		for name, fault := range faults() {
			t.Run(kind+", "+name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					m := newModel(t, kind, dir)
					defer m.end()
					fault(m)
					m.calm()
					if s := m.idp.state(m.claimed); s != modelLives {
						t.Errorf("the session %s", s)
					}
				})
			})
		}
	}
}

// Nor do two crashes in a row, the second one in the retry, if the broker is back
// while the provider still forgives.
func TestBrokerThatIsKilledInTheRetryTriesAgainAfterARest(t *testing.T) {
	dir := filepath.Dir(inMemory(t))
	synctest.Test(t, func(t *testing.T) {
		m := newModel(t, modelGrace, dir)
		defer m.end()
		h, login := m.hosts[0], m.idp.sent() // which narrows the hub's own token
		h.life.arm(4)                        // when the answer comes
		m.refresh(modelAnswer{}, time.Hour)
		m.idp.next(modelAnswer{latency: time.Second})
		h.start(h.life.left) // tries again
		h.life.arm(0)
		h.start(h.life.left)
		if n := m.idp.sent() - login; n != 2 {
			t.Errorf("the token was sent %d times, want 2 before it has rested", n)
		}
		time.Sleep(15 * time.Second)
		if n := m.idp.sent() - login; n != 3 {
			t.Errorf("the token was sent %d times, want 3", n)
		}
		m.calm()
		if s := m.idp.state(m.claimed); s != modelLives {
			t.Errorf("the session %s", s)
		}
	})
}

// With a strict provider the only window of loss is between its answer and the
// journal's fsync; the user is told lost_response.
func TestPromiseStrictProviderLosesOnlyBetweenItsAnswerAndTheJournal(t *testing.T) {
	dir := filepath.Dir(inMemory(t))
	windows := 0
	for name, fault := range faults() {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := newModel(t, modelStrict, dir)
				defer m.end()
				fault(m)
				window := m.idp.unheard()
				if window {
					windows++
				}
				m.calm() // which fails if what is lost is not said to be
				if lost := m.idp.state(m.claimed) != modelLives; lost != window {
					t.Errorf("the grant is lost: %t; nobody got the provider's answer: %t", lost, window)
				}
			})
		})
	}
	if windows != 3 {
		t.Errorf("the window was met %d times, want 3: a crash in it, and two answers that got lost", windows)
	}
}

// After a failover of the store a stale version is detected, never silently used,
// on any host that wrote the newer one, and because that one puts it right at once,
// soon on no other.
func TestPromiseStaleVersionAfterAFailoverIsDetectedAndNeverUsed(t *testing.T) {
	for _, where := range []string{"where it was written", "on another host"} {
		t.Run(where, func(t *testing.T) {
			inBubble(t, func(r *rig) {
				r.store.Before(func(method string, _ broker.Key) error {
					if method == "Settle" {
						return errors.New("the replica lags")
					}
					return nil
				})
				r.loggedIn("alice")
				other := r.second()
				defer other.Close()
				p, q := r.running("alice", 100), other.running("alice", 200)
				replica := r.store.Copy()
				expire()
				r.token(p, broker.Want{})
				r.store.Fallback(replica)
				expire()
				if where == "on another host" {
					other.token(q, broker.Want{})
				} else {
					r.token(p, broker.Want{})
				}
				if g := r.grant("alice"); g.State != broker.Live {
					t.Errorf("the grant is %s (%s): a spent token was sent", g.State, g.Reason)
				}
				if !strings.Contains(r.log.String(), "the store fell back to an older grant") {
					t.Error("nobody was told")
				}
			})
		})
	}
	t.Run("although the journal has let go of the newer one", func(t *testing.T) {
		inBubble(t, func(r *rig) {
			r.loggedIn("alice")
			p := r.running("alice", 100)
			backup := r.store.Copy()
			expire()
			r.token(p, broker.Want{})
			time.Sleep(time.Minute)
			if n := r.Boxes(); n != 0 {
				t.Fatalf("%d grants are still in the journal", n)
			}
			r.store.Fallback(backup)
			expire()
			calls := r.provider.Calls("refresh")
			said := r.refused(p, broker.Want{}, broker.ErrLoginRequired)
			if !strings.Contains(said.Sentence, "store_lost") || r.provider.Calls("refresh") != calls {
				t.Errorf("said %q after %d refreshes", said.Sentence, r.provider.Calls("refresh")-calls)
			}
			r.loggedIn("alice")
			r.token(p, broker.Want{})
		})
	})
}

// faults are what may happen once to a refresh.
func faults() map[string]func(m *model) {
	all := map[string]func(m *model){
		"an answer that is lost":       func(m *model) { m.refresh(modelAnswer{lost: true}, time.Hour) },
		"a late answer that is lost":   func(m *model) { m.refresh(modelAnswer{lost: true, latency: 10 * time.Second}, time.Hour) },
		"a request that is lost":       func(m *model) { m.refresh(modelAnswer{cut: true}, time.Hour) },
		"a caller who hangs up":        func(m *model) { m.refresh(modelAnswer{latency: 10 * time.Second}, time.Second) },
		"a caller who is gone at once": func(m *model) { m.refresh(modelAnswer{latency: 10 * time.Second}, 0) },
	}
	for step := range 14 {
		all[fmt.Sprintf("a crash at step %d", step+1)] = func(m *model) {
			m.hosts[0].life.arm(step + 1)
			m.refresh(modelAnswer{latency: time.Second}, time.Hour)
		}
	}
	return all
}

// refresh has the first broker refresh, and the provider answer it like that.
func (m *model) refresh(a modelAnswer, patience time.Duration) {
	m.idp.next(a)
	l := m.hosts[0].life
	m.asked.Go(func() { _ = m.ask(l, broker.Want{Scopes: []string{"a"}}, patience) })
	time.Sleep(a.latency + time.Millisecond)
	synctest.Wait()
}
