package broker_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
)

// seenBy is when a change of roles at the provider counts at the latest: what the
// README says, and the lease.
const seenBy = time.Minute + 250*time.Millisecond

// afterALook waits until alice has just been looked at, which is the worst moment
// for a change: the next look is a round away.
func (r *rig) afterALook() {
	r.t.Helper()
	looks := r.provider.Calls("look")
	for range 2 * broker.RecheckWithin / (100 * time.Millisecond) {
		if r.provider.Calls("look") > looks {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	r.t.Fatal("nobody looks")
}

func TestALostRoleIsRefusedWithinTheRecheckAlthoughTheTokenIsValid(t *testing.T) {
	for _, tt := range []struct {
		name      string
		left      []string
		refreshes int
		audit     string
	}{
		{"another role is left", []string{"student"}, 0, "gone: keycloak:roles/researcher; gained: keycloak:roles/student; seen by: recheck"},
		{"none is left, which a refresh confirms", nil, 1, "gone: keycloak:roles/researcher; gained: ; seen by: refresh"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBubble(t, func(r *rig) {
				r.provider.SetLife(time.Hour)
				r.loggedIn("alice")
				p := r.running("alice", 100)
				r.token(p, broker.Want{})
				before := r.provider.Calls("refresh")
				was := r.grant("alice")
				r.afterALook()
				r.provider.SetRoles("alice", tt.left...)
				r.refusedSoon(p, was)
				is := r.grant("alice")
				if n := r.provider.Calls("refresh") - before; n != tt.refreshes || is.Version != was.Version+int64(n) || is.Epoch <= was.Epoch {
					t.Errorf("%d refreshes, version %d → %d, epoch %d → %d", n, was.Version, is.Version, was.Epoch, is.Epoch)
				}
				lines := r.audit.entries(t, "roles")
				if len(lines) != 1 || lines[0].Reason != tt.audit || lines[0].User != "alice" || lines[0].Provider != "keycloak" || lines[0].Epoch != is.Epoch {
					t.Errorf("audit: %+v, want one line that says %q", lines, tt.audit)
				}
			})
		})
	}
}

// refusedSoon fails unless p, who asks all the time, is denied within seenBy, and
// within the lease once his grant is no longer was.
func (r *rig) refusedSoon(p *broker.Peer, was broker.Grant) {
	r.t.Helper()
	var moved time.Time
	for deadline := time.Now().Add(seenBy); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if _, err := r.Token(context.Background(), p, broker.Want{}); err != nil {
			refused(r.t, err, broker.ErrDenied)
			return
		}
		if moved.IsZero() && r.grant(p.Server.User).Epoch != was.Epoch {
			moved = time.Now()
		}
		if !moved.IsZero() && time.Since(moved) > 250*time.Millisecond {
			r.t.Fatal("a token was issued although the roles are known to be others")
		}
	}
	r.refused(p, broker.Want{}, broker.ErrDenied)
}

func TestAGainedRoleWorksWithoutALogin(t *testing.T) {
	for _, before := range [][]string{nil, {"student"}} {
		inBubble(t, func(r *rig) {
			r.provider.SetRoles("alice", before...)
			r.loggedIn("alice")
			p := r.running("alice", 100)
			r.refused(p, broker.Want{}, broker.ErrDenied)
			r.afterALook()
			r.provider.SetRoles("alice", append(before, "researcher")...)
			time.Sleep(seenBy)
			r.token(p, broker.Want{})
			if n := r.provider.Calls("login"); n != 1 {
				t.Errorf("%d logins, want the first one only", n)
			}
		})
	}
}

func TestALookWithoutAnAnswerChangesNothing(t *testing.T) {
	for _, err := range []error{
		&broker.ProviderError{Class: broker.TryLater, Reason: "unreachable"},
		&broker.ProviderError{Class: broker.Misconfigured, Reason: "client_refused", Status: 401},
		&broker.ProviderError{Class: broker.Lost, Reason: "no_answer"},
		fmt.Errorf("something else"),
	} {
		inBubble(t, func(r *rig) {
			r.provider.SetLife(time.Hour)
			r.loggedIn("alice")
			p := r.running("alice", 100)
			r.token(p, broker.Want{})
			was := r.grant("alice")
			r.provider.SetRoles("alice")
			r.provider.OnLook(func(*broker.Identity) error { return err })
			time.Sleep(5 * broker.RecheckWithin)
			r.token(p, broker.Want{})
			if diff := cmp.Diff(was, r.grant("alice"), cmp.AllowUnexported(broker.Secret{})); diff != "" {
				t.Errorf("%v: the grant changed (-was +is):\n%s", err, diff)
			}
			if !strings.Contains(r.log.String(), "roles could not be rechecked") {
				t.Errorf("%v: the log says nothing", err)
			}
			r.provider.OnLook(nil)
			time.Sleep(seenBy)
			r.refused(p, broker.Want{}, broker.ErrDenied)
		})
	}
}

func TestASessionThatEndedAsksForALogin(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.provider.SetLife(time.Hour)
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.token(p, broker.Want{})
		r.afterALook()
		r.provider.EndSession("alice")
		time.Sleep(seenBy)
		r.refused(p, broker.Want{}, broker.ErrLoginRequired)
		if g := r.grant("alice"); g.State != broker.NeedsLogin {
			t.Errorf("state %s", g.State)
		}
		looks := r.provider.Calls("look")
		time.Sleep(10 * broker.RecheckWithin)
		if n := r.provider.Calls("look"); n != looks {
			t.Errorf("%d looks at a session that is over", n-looks)
		}
	})
}

func TestAnInactiveTokenIsOnlyAReasonToAskByARefresh(t *testing.T) {
	inactive := func(*broker.Identity) error {
		return &broker.ProviderError{Class: broker.Dead, Reason: "session_ended"}
	}
	t.Run("a disabled account comes back without a login", func(t *testing.T) {
		inBubble(t, func(r *rig) {
			r.provider.SetLife(time.Hour)
			r.loggedIn("alice")
			p := r.running("alice", 100)
			r.token(p, broker.Want{})
			r.provider.OnLook(inactive)
			r.provider.Next(brokertest.Answer{Err: &broker.ProviderError{Class: broker.Disabled, Reason: "user_disabled"}})
			time.Sleep(seenBy)
			if g := r.grant("alice"); g.State != broker.GrantDisabled {
				t.Fatalf("state %s, want disabled", g.State)
			}
			r.provider.OnLook(nil)
			time.Sleep(time.Minute)
			r.token(p, broker.Want{})
			if n := r.provider.Calls("login"); n != 1 {
				t.Errorf("%d logins", n)
			}
		})
	})
	t.Run("a false alarm costs a refresh and nothing else", func(t *testing.T) {
		inBubble(t, func(r *rig) {
			r.loggedIn("alice")
			p := r.running("alice", 100)
			was := r.grant("alice")
			r.provider.OnLook(inactive)
			time.Sleep(2 * broker.RecheckWithin)
			r.token(p, broker.Want{})
			if is := r.grant("alice"); is.State != broker.Live || is.Epoch != was.Epoch {
				t.Errorf("state %s, epoch %d → %d", is.State, was.Epoch, is.Epoch)
			}
			if n := r.provider.Calls("refresh"); n < 3 || n > 5 {
				t.Errorf("%d refreshes in 4 rounds", n)
			}
		})
	})
}

func TestALookThatShowsLessThanTheTokensLocksNobodyOut(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		was := r.grant("alice")
		r.provider.OnLook(func(id *broker.Identity) error { id.Roles = nil; return nil })
		for range 600 {
			time.Sleep(time.Second)
			r.token(p, broker.Want{})
		}
		if is := r.grant("alice"); is.Epoch != was.Epoch {
			t.Error("the epoch moved although no right changed")
		}
		if !strings.Contains(r.log.String(), "does not bear out") {
			t.Error("the log does not say what is wrong")
		}
	})
}

func TestThatAllHaveLostAllRolesAtOnceIsNotBelieved(t *testing.T) {
	users := []broker.UserID{"alice", "bob", "carol"}
	for _, tt := range []struct {
		name  string
		kept  string // whose role stays
		users []broker.UserID
		stays bool // everybody's access
	}{
		{"three of three", "", users, true},
		{"two of three", "carol", users, false},
		{"two of two", "", users[:2], false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBubble(t, func(r *rig) {
				r.provider.SetLife(time.Hour)
				peers := r.allRunning(tt.users)
				refreshes := r.provider.Calls("refresh")
				for _, u := range tt.users {
					if string(u) != tt.kept {
						r.provider.SetRoles(string(u))
					}
				}
				time.Sleep(2 * seenBy)
				for u, p := range peers {
					if tt.stays || string(u) == tt.kept {
						r.token(p, broker.Want{})
					} else {
						r.refused(p, broker.Want{}, broker.ErrDenied)
					}
				}
				if alarm := strings.Contains(r.log.String(), "has lost its last role at once"); alarm != tt.stays {
					t.Errorf("alarm: %t, want %t", alarm, tt.stays)
				}
				if n := r.provider.Calls("refresh") - refreshes; tt.stays && n != 0 {
					t.Errorf("%d refreshes, which would have taken the roles away", n)
				}
			})
		})
	}
}

// allRunning logs users in as researchers, starts their servers and gets each a token.
func (r *rig) allRunning(users []broker.UserID) map[broker.UserID]*broker.Peer {
	r.t.Helper()
	peers := make(map[broker.UserID]*broker.Peer)
	for i, u := range users {
		r.provider.SetRoles(string(u), "researcher")
		r.loggedIn(u)
		peers[u] = r.running(u, int32(100+i))
		r.token(peers[u], broker.Want{})
	}
	return peers
}

func TestNobodyIsLookedAtWithoutARunningServer(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		time.Sleep(10 * broker.RecheckWithin)
		if n := r.provider.Calls("look"); n != 0 {
			t.Errorf("%d looks at alice, who runs nothing", n)
		}
		r.running("alice", 100)
		r.afterALook()
		r.attestor.Stop("jupyter-alice")
		synctest.Wait()
		n := r.provider.Calls("look")
		time.Sleep(10 * broker.RecheckWithin)
		if more := r.provider.Calls("look") - n; more != 0 {
			t.Errorf("%d looks after her server stopped", more)
		}
	})
}

func TestEachGrantIsLookedAtOncePerRoundAFewAtATime(t *testing.T) {
	inBubble(t, func(r *rig) {
		var users []broker.UserID
		for i := range 40 {
			users = append(users, broker.UserID(fmt.Sprintf("user-%d", i)))
		}
		r.allRunning(users)
		var now, most atomic.Int32
		var mu sync.Mutex
		at := make(map[time.Duration]int) // looks per second of a round
		began := time.Now()
		r.provider.OnLook(func(*broker.Identity) error {
			mu.Lock()
			at[time.Since(began).Truncate(time.Second)]++
			mu.Unlock()
			n := now.Add(1)
			defer now.Add(-1)
			for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
			}
			time.Sleep(time.Second)
			return nil
		})
		refreshes := r.provider.Calls("refresh")
		time.Sleep(broker.RecheckWithin)
		if n := r.provider.Calls("look"); n < 40 || n > 80 {
			t.Errorf("%d looks in two rounds at 40 grants", n)
		}
		if n := most.Load(); n > 4 {
			t.Errorf("%d looks at the same time", n)
		}
		mu.Lock()
		spread := len(at)
		mu.Unlock()
		if spread < 15 {
			t.Errorf("the looks came in %d different seconds, want them spread", spread)
		}
		if n := r.provider.Calls("refresh"); n != refreshes {
			t.Errorf("%d refreshes, want none: a look spends nothing", n-refreshes)
		}
	})
}

func TestAProviderThatDoesNotAnswerIsLeftAloneUntilTheNextRound(t *testing.T) {
	for _, tt := range []struct {
		name     string
		fails    func(n int32) bool
		min, max int // looks at 40 grants in two rounds and less
	}{
		{"never an answer", func(int32) bool { return true }, 2 * 3, 2 * 6},
		{"every other time", func(n int32) bool { return n%2 == 0 }, 70, 80},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inBubble(t, func(r *rig) {
				var users []broker.UserID
				for i := range 40 {
					users = append(users, broker.UserID(fmt.Sprintf("user-%d", i)))
				}
				r.allRunning(users)
				var n atomic.Int32
				r.provider.OnLook(func(*broker.Identity) error {
					if !tt.fails(n.Add(1)) {
						return nil
					}
					return &broker.ProviderError{Class: broker.TryLater, Reason: "no_answer"}
				})
				time.Sleep(broker.RecheckWithin + broker.RecheckWithin/2 - time.Second)
				if got := r.provider.Calls("look"); got < tt.min || got > tt.max {
					t.Errorf("%d looks, want %d to %d", got, tt.min, tt.max)
				}
			})
		})
	}
}

func TestARefreshUnderWayElsewhereSeesTheRolesItself(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.provider.SetLife(10 * time.Second)
		handle := r.loggedIn("alice")
		p := r.running("alice", 100)
		other := r.second() // runs no server of hers, so it does not look
		defer other.Close()
		r.afterALook()
		r.provider.SetRoles("alice", "student")
		time.Sleep(20 * time.Second)
		was := r.grant("alice")
		r.provider.Next(brokertest.Answer{Before: func() { time.Sleep(25 * time.Second) }})
		var refresh sync.WaitGroup
		refresh.Go(func() {
			other.RefreshHub(context.Background(), "main", "keycloak", handle) // its patience ends, the refresh goes on
		})
		looks := r.provider.Calls("look")
		time.Sleep(20 * time.Second)
		if r.provider.Calls("look") == looks || r.grant("alice").Epoch != was.Epoch {
			t.Error("there was no look beside the refresh, or it changed the grant under it")
		}
		refresh.Wait()
		time.Sleep(6 * time.Second) // the refresh's end
		if r.grant("alice").Version != was.Version+1 {
			t.Error("the refresh came to nothing")
		}
		r.refused(p, broker.Want{}, broker.ErrDenied)
		if n := len(r.audit.entries(t, "roles")) + len(other.audit.entries(t, "roles")); n != 1 {
			t.Errorf("the change is on record %d times", n)
		}
	})
}

func TestNoTokenIsLookedAtThatIsBeingSpent(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.provider.SetLife(20 * time.Second)
		r.loggedIn("alice")
		p := r.running("alice", 100)
		var spending, looking, both atomic.Bool
		spend := func() {
			spending.Store(true)
			if looking.Load() {
				both.Store(true)
			}
			time.Sleep(40 * time.Second) // past the next look
			spending.Store(false)
		}
		var asking sync.WaitGroup
		r.provider.OnLook(func(*broker.Identity) error {
			looking.Store(true)
			if spending.Load() {
				both.Store(true)
			}
			asking.Go(func() { r.Token(context.Background(), p, broker.Want{}) })
			time.Sleep(2 * time.Second)
			looking.Store(false)
			return nil
		})
		for range 10 {
			r.provider.Next(brokertest.Answer{Before: spend})
			time.Sleep(2 * time.Minute)
		}
		asking.Wait()
		if looks, spent := r.provider.Calls("look"), r.provider.Calls("refresh"); looks < 10 || spent < 10 {
			t.Fatalf("%d looks and %d refreshes: they had no occasion to meet", looks, spent)
		}
		if both.Load() {
			t.Error("a token was looked at while it was being spent")
		}
	})
}

func TestARoleClaimThatOnlyALookShowsIsNotBelieved(t *testing.T) {
	provider := brokertest.NewProvider("keycloak", func(i *broker.ProviderInfo) { i.RoleClaims = []string{"roles", "groups"} })
	inBubble(t, func(r *rig) {
		provider.SetRoles("alice", "researcher")
		r.provider = provider
		r.loggedIn("alice")
		r.running("alice", 100)
		was := r.grant("alice")
		provider.OnLook(func(id *broker.Identity) error { id.Roles = append(id.Roles, "groups//admins"); return nil })
		time.Sleep(3 * seenBy)
		if is := r.grant("alice"); is.Epoch != was.Epoch || len(is.Roles) != 1 {
			t.Errorf("roles %v → %v", was.Roles, is.Roles)
		}
		if provider.Calls("look") == 0 {
			t.Error("nobody looked")
		}
	}, func(c *broker.Config) { c.Providers = []broker.Provider{provider} })
}

func TestTwoBrokersThatSeeTheSameChangeMakeItOnce(t *testing.T) {
	for _, left := range [][]string{{"student"}, nil} {
		inBubble(t, func(r *rig) {
			r.provider.SetLife(time.Hour)
			r.loggedIn("alice")
			p := r.running("alice", 100)
			r.token(p, broker.Want{})
			other := r.second()
			defer other.Close()
			q := other.running("alice", 200)
			other.token(q, broker.Want{})
			refreshes := r.provider.Calls("refresh")
			r.afterALook()
			r.provider.SetRoles("alice", left...)
			// Both have read the grant before one of them changes it.
			r.provider.OnLook(func(*broker.Identity) error { time.Sleep(time.Second); return nil })
			time.Sleep(10 * seenBy)
			r.refused(p, broker.Want{}, broker.ErrDenied)
			other.refused(q, broker.Want{}, broker.ErrDenied)
			lines := append(r.audit.entries(t, "roles"), other.audit.entries(t, "roles")...)
			if len(lines) != 1 || r.grant("alice").Epoch != lines[0].Epoch {
				t.Errorf("left %v: the change was made %d times: %+v", left, len(lines), lines)
			}
			if n := r.provider.Calls("refresh") - refreshes; n > 1 {
				t.Errorf("left %v: %d refreshes for one change", left, n)
			}
		})
	}
}
