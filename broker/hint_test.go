package broker_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
)

// lookNow hints at sub, some time after what was done before.
func (r *rig) lookNow(sub string) {
	r.t.Helper()
	time.Sleep(time.Second)
	if err := r.LookNow(context.Background(), "keycloak", sub, "a test"); err != nil {
		r.t.Errorf("LookNow: %v", err)
	}
}

func TestAHintIsFollowedAtOnce(t *testing.T) {
	for _, left := range [][]string{nil, {"student"}} {
		inBubble(t, func(r *rig) {
			r.provider.SetRoles("alice", "researcher", "guest")
			r.loggedIn("alice")
			p := r.running("alice", 100)
			r.token(p, broker.Want{})
			r.provider.SetRoles("alice", left...)
			r.lookNow("alice")
			r.refused(p, broker.Want{}, broker.ErrDenied)
			r.provider.SetRoles("alice", "researcher")
			r.lookNow("alice")
			r.token(p, broker.Want{})
		})
	}
}

// Who hints, or sends a logout token, tells one broker of the deployment.
func TestAHintIsFollowedForHubsOfOtherBrokersToo(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.token(p, broker.Want{})
		other := r.away()
		defer other.Close()
		r.provider.SetRoles("alice", "student")
		r.provider.SetRoles(`al"ice`, "researcher") // whose name needs an escape in the list
		r.loggedIn(`al"ice`)
		other.lookNow("alice")
		r.refused(p, broker.Want{}, broker.ErrDenied)
		r.provider.SetRoles(`al"ice`, "student")
		other.lookNow(`al"ice`)
		if g := r.grant(`al"ice`); len(g.Roles) != 1 || g.Roles[0] != "keycloak:roles/student" {
			t.Errorf("the roles are %v", g.Roles)
		}
		e := other.loggedOut(logout("1", "alice", r.provider.Session("alice")))
		if g := r.grant("alice"); g.State != broker.NeedsLogin || e.Hub != "main" || e.User != "alice" {
			t.Errorf("the grant is %s, and the audit says %+v", g.State, e)
		}
		if n := len(other.audit.entries(t, "roles")); n != 2 {
			t.Errorf("%d changes of roles are in the audit of the broker that was told, want 2", n)
		}
	})
}

func TestAHintWithoutAChangeChangesNothing(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.token(p, broker.Want{})
		was := r.grant("alice")
		r.lookNow("alice")
		r.lookNow("nobody we know")
		if is := r.grant("alice"); is.Epoch != was.Epoch || is.Version != was.Version || r.provider.Calls("refresh") != 0 {
			t.Errorf("the grant went from %+v to %+v", was, is)
		}
	})
}

func TestAHintAboutASessionThatEndedAsksForALogin(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.token(p, broker.Want{})
		r.provider.EndSession("alice")
		r.lookNow("alice")
		r.refused(p, broker.Want{}, broker.ErrLoginRequired)
	})
}

// Requests let a disabled account rest. A hint may be that it was switched on.
func TestAHintAboutADisabledAccountIsFollowedAtOnce(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		expire()
		off := brokertest.Answer{Err: &broker.ProviderError{Class: broker.Disabled}}
		r.provider.Next(off)
		r.refused(p, broker.Want{}, broker.ErrDenied)
		r.provider.Next(off)
		r.lookNow("alice") // of something else
		if g := r.grant("alice"); g.State != broker.GrantDisabled || r.provider.Calls("refresh") != 2 {
			t.Errorf("the grant is %s after %d refreshes, want two that found it disabled", g.State, r.provider.Calls("refresh"))
		}
		r.refused(p, broker.Want{}, broker.ErrDenied)
		if n := r.provider.Calls("refresh"); n != 2 {
			t.Errorf("%d refreshes: a request does not let the account rest", n)
		}
		before := r.log.String()
		r.lookNow("alice")
		if g := r.grant("alice"); g.State != broker.Live {
			t.Errorf("the grant is %s", g.State)
		}
		r.token(p, broker.Want{})
		if said := strings.TrimPrefix(r.log.String(), before); strings.Contains(said, "WARN") {
			t.Errorf("the log complains: %s", said)
		}
	})
}

// What rests because a retry got no answer rests also for hints.
func TestAHintDoesNotShortenTheRestAfterALostRetry(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		expire()
		lost := brokertest.Answer{Err: &broker.ProviderError{Class: broker.Lost}}
		r.provider.Next(brokertest.Answer{Err: &broker.ProviderError{Class: broker.Disabled}})
		r.refused(p, broker.Want{}, broker.ErrDenied)
		r.provider.Next(lost, lost)
		r.lookNow("alice")
		n := r.provider.Calls("refresh")
		if n != 3 {
			t.Fatalf("%d refreshes, want the first, the lost one and its retry", n)
		}
		r.lookNow("alice")
		if r.provider.Calls("refresh") != n {
			t.Error("the token was sent again")
		}
	})
}

func TestAHintThatCannotBeFollowedSaysSo(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.provider.OnLook(func(*broker.Identity) error { return &broker.ProviderError{Class: broker.TryLater} })
		if err := r.LookNow(context.Background(), "keycloak", "alice", "a test"); err == nil {
			t.Error("LookNow says nothing although nothing is known")
		}
		r.token(p, broker.Want{})
		if err := r.LookNow(context.Background(), "nowhere", "alice", "a test"); !errors.Is(err, broker.ErrInvalid) {
			t.Errorf("LookNow at an unknown provider: %v", err)
		}
	})
}

func TestAProviderThatShowsNothingIsAskedByARefresh(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.provider.OnLook(func(*broker.Identity) error {
			return &broker.ProviderError{Class: broker.Misconfigured, Reason: "unsupported"}
		})
		r.token(p, broker.Want{})
		r.provider.SetRoles("alice", "student")
		r.lookNow("alice")
		r.refused(p, broker.Want{}, broker.ErrDenied)
	})
}

// Whoever hints while a look is under way may know of what that look was too early
// to see.
func TestManyHintsCostALookAndOneMore(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		before := r.provider.Calls("look")
		release := make(chan struct{})
		r.provider.OnLook(func(*broker.Identity) error { <-release; return nil })
		time.Sleep(time.Second)
		var all sync.WaitGroup
		look := func() {
			if err := r.LookNow(context.Background(), "keycloak", "alice", "a test"); err != nil {
				t.Errorf("LookNow: %v", err)
			}
		}
		all.Go(look)
		synctest.Wait() // not lookNow, which sleeps first: then nobody would hint yet
		for range 50 {
			all.Go(look)
		}
		synctest.Wait()
		close(release)
		all.Wait()
		if n := r.provider.Calls("look") - before; n != 2 {
			t.Errorf("%d looks for 51 hints, want 2", n)
		}
	})
}

func TestAllSubjectsAreLookedAtWithTheCautionOfARound(t *testing.T) {
	inBubble(t, func(r *rig) {
		users := []broker.UserID{"u1", "u2", "u3", "u4"}
		for _, u := range users {
			r.provider.SetRoles(string(u), "researcher")
		}
		peers := r.allRunning(users)
		r.provider.SetRoles("u1", "student")
		if err := r.LookAtAll(context.Background(), "keycloak", "a role was deleted"); err != nil {
			t.Errorf("LookAtAll: %v", err)
		}
		r.refused(peers["u1"], broker.Want{}, broker.ErrDenied)
		r.token(peers["u2"], broker.Want{})

		// Nobody has a role any more, says the provider: a mistake of its own.
		r.provider.OnLook(func(id *broker.Identity) error { id.Roles = nil; return nil })
		if err := r.LookAtAll(context.Background(), "keycloak", "a storm"); err != nil {
			t.Errorf("LookAtAll: %v", err)
		}
		r.token(peers["u2"], broker.Want{})
	})
}

// Right after a start no container is bound again, and yet all who are here are meant.
func TestAllSubjectsAreLookedAtBeforeTheirContainersAreBoundAgain(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.token(p, broker.Want{})
		r.provider.SetRoles("alice", "student") // no broker runs
		r.attestor.Refuse("jupyter-alice", broker.Errorf(broker.Pending, "not yet"))
		r.restarted()
		if err := r.LookAtAll(context.Background(), "keycloak", "the broker has started"); err != nil {
			t.Errorf("LookAtAll: %v", err)
		}
		r.attestor.Refuse("jupyter-alice", nil)
		r.refused(p, broker.Want{}, broker.ErrDenied)
	})
}

func TestLogoutAtTheHubDoesWhatTheHubIsConfiguredFor(t *testing.T) {
	for _, tt := range []struct {
		on      broker.OnLogout
		ends    bool
		revokes bool
	}{{"", false, false}, {broker.Keep, false, false}, {broker.StopIssuing, true, false}, {broker.RevokeAll, true, true}} {
		t.Run(string(tt.on), func(t *testing.T) {
			inBubble(t, func(r *rig) {
				handle := r.loggedIn("alice")
				p := r.running("alice", 100)
				r.token(p, broker.Want{})
				for range 2 { // it may be said twice
					if _, err := r.HubLogout(context.Background(), "main", "alice", false); err != nil {
						t.Fatalf("HubLogout: %v", err)
					}
				}
				if _, err := r.HubLogout(context.Background(), "main", "nobody", false); err != nil {
					t.Errorf("HubLogout of a user without a grant: %v", err)
				}
				if revoked := len(r.provider.Revoked()) > 0; revoked != tt.revokes {
					t.Errorf("revoked at the provider: %t", revoked)
				}
				if !tt.ends {
					r.token(p, broker.Want{})
					return
				}
				r.refused(p, broker.Want{}, broker.ErrLoginRequired)
				if s, err := r.CheckSession(context.Background(), "main", "keycloak", handle, "alice", ""); err != nil || s.Active {
					t.Errorf("the hub's session is %+v, %v", s, err)
				}
				time.Sleep(time.Second)
				r.loggedIn("alice")
				r.token(p, broker.Want{}) // the same kernel goes on
			}, func(c *broker.Config) { c.Hubs["main"] = broker.Hub{Login: "keycloak", OnLogout: tt.on} })
		})
	}
}

func TestWhomTheHubNoLongerAllowsGetsNoTokenWhateverALogoutDoes(t *testing.T) {
	for _, on := range []broker.OnLogout{"", broker.Keep, broker.StopIssuing, broker.RevokeAll} {
		t.Run(string(on), func(t *testing.T) {
			inBubble(t, func(r *rig) {
				handle := r.loggedIn("alice")
				p := r.running("alice", 100)
				r.token(p, broker.Want{})
				w := r.watch(p, broker.Want{})
				w.tells("token", time.Second)
				for range 2 {
					if _, err := r.HubLogout(context.Background(), "main", "alice", true); err != nil {
						t.Fatalf("HubLogout: %v", err)
					}
				}
				r.refused(p, broker.Want{}, broker.ErrLoginRequired)
				w.tells("login_required", time.Second)
				if s, err := r.CheckSession(context.Background(), "main", "keycloak", handle, "alice", ""); err != nil || s.Active {
					t.Errorf("the hub's session is %+v, %v", s, err)
				}
				if revoked := len(r.provider.Revoked()) > 0; revoked != (on == broker.RevokeAll) {
					t.Errorf("revoked at the provider: %t", revoked)
				}
				if e := r.audit.entries(t, "logout")[0]; e.Reason != "the hub does not allow the user any more" || r.grant("alice").Reason != "not_allowed" {
					t.Errorf("the audit says %+v, the grant %q", e, r.grant("alice").Reason)
				}
				time.Sleep(time.Second)
				r.loggedIn("alice") // he is allowed again
				w.tells("token", time.Second)
				w.hangUp()
				w.ends(nil, time.Second)
			}, func(c *broker.Config) { c.Hubs["main"] = broker.Hub{Login: "keycloak", OnLogout: on} })
		})
	}
}

func TestLogoutDoesNotSoftenADisconnect(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.disconnect()
		if _, err := r.HubLogout(context.Background(), "main", "alice", false); err != nil {
			t.Fatal(err)
		}
		r.refused(p, broker.Want{}, broker.ErrRevoked)
	}, func(c *broker.Config) { c.Hubs["main"] = broker.Hub{Login: "keycloak", OnLogout: broker.StopIssuing} })
}

// A refresh that is under way when the user logs out must not bring the grant back.
func TestLogoutDuringARefresh(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		expire()
		r.provider.Next(brokertest.Answer{Before: func() {
			if _, err := r.HubLogout(context.Background(), "main", "alice", false); err != nil {
				t.Error(err)
			}
		}})
		r.refused(p, broker.Want{}, broker.ErrLoginRequired)
		if g := r.grant("alice"); g.State != broker.NeedsLogin || g.Tombstone.IsZero() {
			t.Errorf("the grant is %s", g.State)
		}
		if !slices.Contains(r.provider.Revoked(), r.provider.RefreshToken("alice")) {
			t.Error("the token that nobody keeps any more was not revoked")
		}
	}, func(c *broker.Config) { c.Hubs["main"] = broker.Hub{Login: "keycloak", OnLogout: broker.StopIssuing} })
}
