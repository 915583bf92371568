package broker_test

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"tokenbroker/broker"
)

// A fakeHub is a hub's API in memory.
type fakeHub struct {
	mu      sync.Mutex // guards all below
	users   map[broker.UserID][]broker.ServerName
	fail    error
	stopped []broker.UserID
}

func (h *fakeHub) api() *broker.HubAPI {
	return &broker.HubAPI{
		Users: func(context.Context) (map[broker.UserID][]broker.ServerName, error) {
			h.mu.Lock()
			defer h.mu.Unlock()
			return maps.Clone(h.users), h.fail
		},
		Stop: func(_ context.Context, u broker.UserID, s broker.ServerName) error {
			h.mu.Lock()
			defer h.mu.Unlock()
			if h.fail == nil {
				h.stopped = append(h.stopped, u)
			}
			return h.fail
		},
	}
}

func (h *fakeHub) set(f func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f()
}

func (h *fakeHub) of(c *broker.Config) {
	c.Hubs = map[broker.HubID]broker.Hub{"main": {Login: "keycloak", API: h.api()}}
}

func TestServersAndUsersThatTheHubNoLongerHasAreEnded(t *testing.T) {
	hub := &fakeHub{users: map[broker.UserID][]broker.ServerName{"alice": {""}, "bob": {""}}}
	inBubble(t, func(r *rig) {
		r.provider.SetRoles("bob", "researcher")
		for i, u := range []broker.UserID{"alice", "bob"} {
			r.loggedIn(u)
			r.running(u, int32(100+i))
		}
		p := r.peer("alice", 100)
		time.Sleep(10*broker.SweepEvery + broker.SweepEvery/2) // between two lists
		r.token(p, broker.Want{})

		hub.set(func() { hub.users["alice"] = nil }) // the server is gone, one list says
		time.Sleep(broker.SweepEvery)
		r.token(p, broker.Want{})
		time.Sleep(broker.SweepEvery)
		r.refused(p, broker.Want{}, broker.ErrUnknownPeer)

		hub.set(func() { delete(hub.users, "alice") })
		time.Sleep(2 * broker.SweepEvery)
		if g := r.grant("alice"); g.State != broker.Disconnected {
			t.Errorf("the grant of a deleted user is %s", g.State)
		}
		lines := r.audit.entries(t, "disconnect")
		if len(lines) != 1 || !strings.Contains(lines[0].By, "hub main") || lines[0].User != "alice" {
			t.Errorf("audit: %+v", lines)
		}
		r.token(r.peer("bob", 101), broker.Want{})
	}, hub.of)
}

func TestAHubThatIsMistakenEndsNothing(t *testing.T) {
	for name, mistake := range map[string]func(*fakeHub){
		"it answers errors":           func(h *fakeHub) { h.fail = errors.New("503") },
		"all of its users are gone":   func(h *fakeHub) { h.users = nil },
		"most of its users are gone":  func(h *fakeHub) { h.users = map[broker.UserID][]broker.ServerName{"u4": {""}} },
		"one list has none of alices": nil,
	} {
		t.Run(name, func(t *testing.T) {
			users := []broker.UserID{"u1", "u2", "u3", "u4"}
			hub := &fakeHub{users: map[broker.UserID][]broker.ServerName{}}
			for _, u := range users {
				hub.users[u] = []broker.ServerName{""}
			}
			all := hub.users
			inBubble(t, func(r *rig) {
				for _, u := range users {
					r.provider.SetRoles(string(u), "researcher")
					r.loggedIn(u)
				}
				if mistake == nil {
					hub.set(func() { hub.users = map[broker.UserID][]broker.ServerName{"u1": nil, "u2": nil, "u3": nil} })
					time.Sleep(broker.SweepEvery)
					hub.set(func() { hub.users = all })
				} else {
					hub.set(func() { mistake(hub) })
				}
				time.Sleep(5 * broker.SweepEvery)
				for _, u := range users {
					if g := r.grant(u); g.State != broker.Live {
						t.Errorf("%s's grant is %s", u, g.State)
					}
				}
			}, hub.of)
		})
	}
}

func TestAStartingServerIsNotSweptAway(t *testing.T) {
	hub := &fakeHub{users: map[broker.UserID][]broker.ServerName{"alice": nil}}
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		for range 5 { // each start is a registration anew
			r.running("alice", 100)
			time.Sleep(broker.SweepEvery * 3 / 4)
			r.token(r.peer("alice", 100), broker.Want{})
		}
	}, hub.of)
}

// onRoleLost makes the first rule do what when its role is lost, and adds one that
// gives students something.
func onRoleLost(what broker.OnRoleLost) func(*broker.Config) {
	return func(c *broker.Config) {
		c.Rules[0].OnRoleLost = what
		c.Rules = append(c.Rules, broker.Rule{Provider: "keycloak", Roles: []string{"student"}, Audiences: []string{"library"}, Scopes: []string{"read"}})
	}
}

func TestALostRoleCanEndTheSession(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.token(p, broker.Want{Audience: "storage"})
		refresh := r.provider.RefreshToken("alice")
		r.provider.SetRoles("alice", "student")
		r.lookNow("alice")
		r.refused(p, broker.Want{Audience: "storage"}, broker.ErrDenied)
		r.refused(p, broker.Want{Audience: "library"}, broker.ErrLoginRequired)
		time.Sleep(time.Second)
		if !slices.Contains(r.provider.Revoked(), refresh) {
			t.Error("the session at the provider goes on")
		}
		r.loggedIn("alice")
		r.refused(p, broker.Want{Audience: "storage"}, broker.ErrDenied)
		r.token(p, broker.Want{Audience: "library"})
	}, onRoleLost(broker.RevokeGrants))
}

func TestALostRoleCanStopServersThatLostTheirPurpose(t *testing.T) {
	for _, tt := range []struct {
		name  string
		left  []string
		stops bool
	}{{"nothing is left", []string{"guest"}, true}, {"another rule gives something", []string{"student"}, false}} {
		t.Run(tt.name, func(t *testing.T) {
			hub := &fakeHub{users: map[broker.UserID][]broker.ServerName{"alice": {""}}}
			inBubble(t, func(r *rig) {
				r.loggedIn("alice")
				r.running("alice", 100)
				r.provider.SetRoles("alice", tt.left...)
				r.lookNow("alice")
				time.Sleep(time.Second)
				hub.set(func() {
					if (len(hub.stopped) > 0) != tt.stops {
						t.Errorf("stopped: %v", hub.stopped)
					}
				})
				if lines := r.audit.entries(t, "stop_server"); (len(lines) > 0) != tt.stops || tt.stops && (lines[0].Rule != 1 || lines[0].User != "alice") {
					t.Errorf("audit: %+v", lines)
				}
			}, hub.of, onRoleLost(broker.StopServer))
		})
	}
}

// A role may be gone before anybody looks, and the next login be the first to show
// it: what it gave is taken back all the same, but the login itself stands.
func TestARoleThatALoginDoesNotBringIsLost(t *testing.T) {
	t.Run("tokens and servers", func(t *testing.T) {
		hub := &fakeHub{users: map[broker.UserID][]broker.ServerName{"alice": {""}}}
		inBubble(t, func(r *rig) {
			r.loggedIn("alice")
			token := r.token(r.running("alice", 100), broker.Want{Audience: "storage"})
			r.provider.SetRoles("alice", "guest")
			time.Sleep(time.Second)
			r.loggedIn("alice")
			time.Sleep(time.Second)
			if !slices.Contains(r.provider.Revoked(), token.Access.Reveal()) {
				t.Error("the token of the role works on")
			}
			hub.set(func() {
				if len(hub.stopped) != 1 {
					t.Errorf("stopped: %v", hub.stopped)
				}
			})
		}, hub.of, onRoleLost(broker.StopServer))
	})
	t.Run("the new session", func(t *testing.T) {
		inBubble(t, func(r *rig) {
			r.loggedIn("alice")
			p := r.running("alice", 100)
			r.provider.SetRoles("alice", "student")
			time.Sleep(time.Second)
			r.loggedIn("alice")
			time.Sleep(time.Second)
			r.refused(p, broker.Want{Audience: "storage"}, broker.ErrDenied)
			r.token(p, broker.Want{Audience: "library"})
		}, onRoleLost(broker.RevokeGrants))
	})
}

// byGroup has the first rule want the hub's group lab besides its role, and do what
// when either is lost.
func byGroup(what broker.OnRoleLost) func(*broker.Config) {
	return func(c *broker.Config) {
		onRoleLost(what)(c)
		c.Rules[0].Groups = []string{"lab"}
		c.Rules[1].Roles, c.Rules[1].Groups = nil, []string{"library"}
	}
}

func TestALostGroupCanEndTheSession(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.inGroups("alice", "lab", "library")
		r.token(p, broker.Want{Audience: "storage"})
		refresh := r.provider.RefreshToken("alice")
		r.inGroups("alice", "library")
		time.Sleep(time.Second)
		r.refused(p, broker.Want{Audience: "library"}, broker.ErrLoginRequired)
		if g := r.grant("alice"); g.Reason != "group_lost" || !slices.Contains(r.provider.Revoked(), refresh) {
			t.Errorf("the grant ended by %q, and the session goes on: %t", g.Reason, !slices.Contains(r.provider.Revoked(), refresh))
		}
		if lines := r.audit.entries(t, "disconnect"); len(lines) != 1 || lines[0].By != "policy: a group was lost" {
			t.Errorf("audit: %+v", lines)
		}
		r.loggedIn("alice")
		r.token(p, broker.Want{Audience: "library"})
		r.inGroups("alice", "library", "staff") // of what is lost already nothing is lost
		time.Sleep(time.Second)
		r.token(p, broker.Want{Audience: "library"})
	}, byGroup(broker.RevokeGrants))
}

func TestALostGroupCanStopServersThatLostTheirPurpose(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*rig)
		stops  string // by what
	}{
		{"nothing is left", func(r *rig) { r.inGroups("alice", "staff") }, "policy: a group was lost"},
		{"the role goes, and the group stays", func(r *rig) { r.provider.SetRoles("alice", "guest"); r.lookNow("alice") }, "policy: a role was lost"},
		{"another rule gives something", func(r *rig) { r.inGroups("alice", "library") }, ""},
		{"the group is not all that is needed", func(r *rig) { r.inGroups("alice", "lab", "staff") }, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			hub := &fakeHub{users: map[broker.UserID][]broker.ServerName{"alice": {""}}}
			inBubble(t, func(r *rig) {
				r.loggedIn("alice")
				r.running("alice", 100)
				r.inGroups("alice", "lab")
				time.Sleep(time.Second)
				tt.change(r)
				time.Sleep(time.Second)
				by := ""
				if lines := r.audit.entries(t, "stop_server"); len(lines) > 0 {
					by = lines[0].By
				}
				hub.set(func() {
					if by != tt.stops || (len(hub.stopped) > 0) != (tt.stops != "") {
						t.Errorf("stopped %v by %q, want %q", hub.stopped, by, tt.stops)
					}
				})
			}, hub.of, byGroup(broker.StopServer))
		})
	}
}

// The hub's word on groups may come with the start of a server: that one is started
// for what is left.
func TestAServerThatStartsAfterTheLossIsNotStopped(t *testing.T) {
	hub := &fakeHub{users: map[broker.UserID][]broker.ServerName{"alice": {"", "new"}}}
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		r.running("alice", 100)
		r.inGroups("alice", "lab")
		time.Sleep(time.Second)
		_, err := r.Register(context.Background(), "main", broker.RegisterRequest{User: "alice", Server: "new", ContainerName: "jupyter-alice-new"})
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Second)
		for _, e := range r.audit.entries(t, "stop_server") {
			if e.Server != "" {
				t.Errorf("the server %q was stopped", e.Server)
			}
		}
		if _, err := r.Unregister(context.Background(), "main", "alice", "", 0); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		hub.set(func() {
			if len(hub.stopped) == 0 {
				t.Error("the server from before was not stopped")
			}
			hub.stopped = nil
		})
		time.Sleep(time.Minute)
		hub.set(func() {
			if len(hub.stopped) > 0 {
				t.Error("stopping goes on")
			}
		})
	}, hub.of, byGroup(broker.StopServer))
}

// Sharing is the user's own act, which he undoes himself.
func TestASharedServerGetsNoTokensAndIsLeftRunning(t *testing.T) {
	for _, what := range []broker.OnRoleLost{broker.RevokeGrants, broker.StopServer} {
		hub := &fakeHub{users: map[broker.UserID][]broker.ServerName{"alice": {""}}}
		inBubble(t, func(r *rig) {
			r.loggedIn("alice")
			p := r.running("alice", 100)
			r.token(p, broker.Want{Audience: "storage"})
			r.shares("alice", true)
			r.refused(p, broker.Want{Audience: "storage"}, broker.ErrDenied)
			r.provider.SetRoles("alice", "researcher", "student") // and what follows from a change
			r.lookNow("alice")
			time.Sleep(time.Minute)
			if g := r.grant("alice"); g.State != broker.Live || len(hub.stopped) > 0 {
				t.Errorf("%s: the grant is %s, stopped are %v", what, g.State, hub.stopped)
			}
			r.shares("alice", false)
			r.token(p, broker.Want{Audience: "storage"})
		}, hub.of, onRoleLost(what))
	}
}

// A hub that this broker is not configured for is another's to ask.
func TestWhatIsToBeStoppedAtAnothersHubIsLeftToIt(t *testing.T) {
	hub := &fakeHub{users: map[broker.UserID][]broker.ServerName{"alice": {""}}, fail: errors.New("503")}
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		r.running("alice", 100)
		r.provider.SetRoles("alice", "guest")
		r.lookNow("alice")
		other := r.away()
		defer other.Close()
		time.Sleep(time.Minute) // the other broker has looked at what is to be done
		hub.set(func() { hub.fail = nil })
		time.Sleep(time.Minute)
		hub.set(func() {
			if len(hub.stopped) == 0 {
				t.Error("the other broker has forgotten that the server is to be stopped")
			}
		})
	}, hub.of, onRoleLost(broker.StopServer))
}

func TestStoppingAServerIsTriedUntilItIsDoneOrTheRoleIsBack(t *testing.T) {
	for _, back := range []bool{false, true} {
		hub := &fakeHub{users: map[broker.UserID][]broker.ServerName{"alice": {""}}}
		inBubble(t, func(r *rig) {
			r.loggedIn("alice")
			r.running("alice", 100)
			hub.set(func() { hub.fail = errors.New("503") })
			r.provider.SetRoles("alice", "guest")
			r.lookNow("alice")
			r.restarted()
			time.Sleep(30 * time.Second)
			if back {
				r.provider.SetRoles("alice", "researcher")
				r.lookNow("alice")
			}
			hub.set(func() { hub.fail = nil })
			time.Sleep(30 * time.Second)
			hub.set(func() {
				if (len(hub.stopped) > 0) == back {
					t.Errorf("role back: %t, stopped: %v", back, hub.stopped)
				}
			})
			if back {
				return
			}
			if _, err := r.Unregister(context.Background(), "main", "alice", "", 0); err != nil {
				t.Fatal(err)
			}
			time.Sleep(30 * time.Second)
			hub.set(func() { hub.stopped = nil })
			time.Sleep(time.Minute)
			hub.set(func() {
				if len(hub.stopped) > 0 {
					t.Error("a server that is gone is stopped again and again")
				}
			})
		}, hub.of, onRoleLost(broker.StopServer))
	}
}
