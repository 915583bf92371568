package broker_test

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
)

// onLogout has the provider's logout tokens followed as o.
func onLogout(o broker.OnLogout) func(*broker.Config) {
	return func(c *broker.Config) { c.Providers = []broker.Provider{logsOut{c.Providers[0], o}} }
}

type logsOut struct {
	broker.Provider
	on broker.OnLogout
}

func (p logsOut) Info() broker.ProviderInfo {
	info := p.Provider.Info()
	info.OnLogout = p.on
	return info
}

// logout is a logout token that holds for two minutes from now.
func logout(id, sub, session string) broker.Secret {
	return brokertest.LogoutTokenOf(broker.Logout{ID: id, Sub: sub, Session: session, Until: time.Now().Add(2 * time.Minute)})
}

// loggedOut has the provider say l, and returns what the audit says of it.
func (r *rig) loggedOut(l broker.Secret) broker.Entry {
	r.t.Helper()
	if _, err := r.ProviderLogout(context.Background(), "keycloak", l); err != nil {
		r.t.Fatalf("ProviderLogout: %v", err)
	}
	all := r.audit.entries(r.t, "provider_logout")
	return all[len(all)-1]
}

// afterTheLooks lets the looks that follow a logout token happen.
func afterTheLooks() { time.Sleep(6 * time.Second) }

func TestLogoutAtTheProviderDoesWhatTheProviderIsConfiguredFor(t *testing.T) {
	for _, tt := range []struct {
		on      broker.OnLogout
		ends    bool
		revokes bool
	}{{"", true, false}, {broker.StopIssuing, true, false}, {broker.RevokeAll, true, true}, {broker.OnlyLook, false, false}} {
		t.Run(string(tt.on), func(t *testing.T) {
			inBubble(t, func(r *rig) {
				handle := r.loggedIn("alice")
				p := r.running("alice", 100)
				r.token(p, broker.Want{})
				looks := r.provider.Calls("look")
				e := r.loggedOut(logout("1", "alice", r.provider.Session("alice")))
				what := map[bool]string{true: "ended", false: "looked at"}[tt.ends]
				if e.Outcome != "done" || e.User != "alice" || e.Hub != "main" || e.Reason != string(cmp.Or(tt.on, broker.StopIssuing))+": main/alice: "+what {
					t.Errorf("the audit says %+v", e)
				}
				if n := r.provider.Calls("look") - looks; n != 0 {
					t.Errorf("%d looks before the provider had its answer", n)
				}
				if !tt.ends {
					r.token(p, broker.Want{}) // the session lives on, as the look shows
					afterTheLooks()
					r.token(p, broker.Want{})
					if n := r.provider.Calls("look") - looks; n < 2 || r.provider.Calls("refresh") != 0 {
						t.Errorf("%d looks", n)
					}
					return
				}
				said := r.refused(p, broker.Want{}, broker.ErrLoginRequired)
				if !strings.Contains(said.Sentence, "logged_out") {
					t.Errorf("the user is told %q", said.Sentence)
				}
				afterTheLooks()
				if revoked := len(r.provider.Revoked()) > 0; revoked != tt.revokes {
					t.Errorf("revoked at the provider: %t", revoked)
				}
				if s, err := r.CheckSession(context.Background(), "main", "keycloak", handle, "alice", ""); err != nil || s.Active {
					t.Errorf("the hub's session is %+v, %v", s, err)
				}
				r.loggedIn("alice")
				r.token(p, broker.Want{}) // the same kernel goes on
			}, onLogout(tt.on))
		})
	}
}

// Keycloak sends one token, with one session, for all that it has ended.
func TestALogoutOfAnotherSessionEndsWhatTheLookShowsToHaveEnded(t *testing.T) {
	for _, ended := range []bool{true, false} {
		inBubble(t, func(r *rig) {
			r.loggedIn("alice")
			p := r.running("alice", 100)
			r.token(p, broker.Want{})
			if ended {
				r.provider.EndSession("alice")
			}
			if e := r.loggedOut(logout("1", "alice", "of another browser")); e.Reason != "stop_issuing: main/alice: looked at" {
				t.Errorf("the audit says %q", e.Reason)
			}
			afterTheLooks()
			if ended {
				r.refused(p, broker.Want{}, broker.ErrLoginRequired)
			} else if r.token(p, broker.Want{}); r.provider.Calls("refresh") != 0 || r.provider.Calls("look") < 2 {
				t.Errorf("looked %d times, refreshed %d times", r.provider.Calls("look"), r.provider.Calls("refresh"))
			}
		})
	}
}

func TestALogoutTokenMayBeLateAndStillTellOfRoles(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.token(p, broker.Want{})
		time.Sleep(time.Second)
		r.loggedOut(logout("1", "alice", "of another browser"))
		time.Sleep(time.Second) // the first look was too early
		r.provider.SetRoles("alice", "student")
		time.Sleep(5 * time.Second)
		r.refused(p, broker.Want{}, broker.ErrDenied)
	})
}

// A logout token concerns every hub, each by the session it has.
func TestALogoutEndsAtEachHubWhatRestsOnItsSession(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		first := r.provider.Session("alice")
		r.loggedInAtOther("alice")
		if e := r.loggedOut(logout("1", "alice", first)); e.Reason != "stop_issuing: main/alice: ended, other/alice: looked at" || e.Hub != "" {
			t.Errorf("the audit says %+v", e)
		}
		afterTheLooks()
		if g := r.grant("alice"); g.State != broker.NeedsLogin || g.Reason != "logged_out" {
			t.Errorf("at main: %s (%s)", g.State, g.Reason)
		}
		other, err := r.Grants(context.Background(), "other", "alice")
		if err != nil || other[0].State != broker.Live {
			t.Errorf("at other: %+v, %v", other, err)
		}
		if e := r.loggedOut(logout("2", "alice", "")); e.Reason != "stop_issuing: other/alice: ended" {
			t.Errorf("a logout without a session: %+v", e)
		}
	})
}

func (r *rig) loggedInAtOther(user broker.UserID) {
	r.t.Helper()
	token, err := r.Login(context.Background(), "other", "keycloak", codeOf(string(user)))
	if err == nil {
		_, err = r.Claim(context.Background(), "other", "keycloak", token.Handle, user)
	}
	if err != nil {
		r.t.Fatal(err)
	}
}

func TestALogoutWithoutASubjectFindsTheSession(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.provider.SetRoles("bob", "researcher")
		r.loggedIn("alice")
		r.loggedIn("bob")
		if e := r.loggedOut(logout("1", "", r.provider.Session("bob"))); e.User != "bob" || e.Sub != "bob" || !strings.Contains(e.Reason, "ended") {
			t.Errorf("the audit says %+v", e)
		}
		if a, b := r.grant("alice"), r.grant("bob"); a.State != broker.Live || b.State != broker.NeedsLogin {
			t.Errorf("alice's grant is %s, bob's %s", a.State, b.State)
		}
		for i, l := range []broker.Secret{logout("2", "", "nobody's"), logout("3", "nobody", "")} {
			if e := r.loggedOut(l); e.Outcome != "done" || e.Reason != "stop_issuing: no grant rests on it" {
				t.Errorf("logout %d of nobody: %+v", i, e)
			}
		}
	})
}

func TestALogoutTokenIsFollowedOnce(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		l := logout("1", "alice", "")
		r.loggedOut(l)
		afterTheLooks()
		r.loggedIn("alice")
		before, looks := r.grant("alice"), r.provider.Calls("look")
		if e := r.loggedOut(l); e.Outcome != "done" || !strings.Contains(e.Reason, "followed before") {
			t.Errorf("the audit says %+v", e)
		}
		afterTheLooks()
		r.token(p, broker.Want{})
		if is := r.grant("alice"); is.Epoch != before.Epoch || r.provider.Calls("look") != looks {
			t.Error("the second delivery did something")
		}
		time.Sleep(3 * time.Minute)
		_, err := r.ProviderLogout(context.Background(), "keycloak", l)
		refused(t, err, broker.ErrInvalid)
		r.store.Each(func(k broker.Key, _ broker.Record) {
			if k.Kind == "logout" {
				t.Errorf("%s is kept", k)
			}
		})
	})
}

// A broker that dies between the two has not heard the token.
func TestALogoutTokenThatWasNotRememberedIsFollowedAgain(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		away := true
		r.store.Before(func(method string, k broker.Key) error {
			if method == "Put" && k.Kind == "logout" && away {
				return errors.New("away")
			}
			return nil
		})
		l := logout("1", "alice", "")
		_, err := r.ProviderLogout(context.Background(), "keycloak", l)
		refused(t, err, broker.ErrUnavailable)
		r.refused(p, broker.Want{}, broker.ErrLoginRequired)
		time.Sleep(time.Second)
		r.loggedIn("alice")
		away = false
		if e := r.loggedOut(l); e.Reason != "stop_issuing: main/alice: ended" {
			t.Errorf("the audit says %+v", e)
		}
		r.refused(p, broker.Want{}, broker.ErrLoginRequired)
	})
}

func TestALogoutThatCanNotBeStoredIsNotRemembered(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		away := true
		r.store.Before(func(method string, k broker.Key) error {
			if method == "Put" && k.Kind == "grant" && away {
				return errors.New("away")
			}
			return nil
		})
		l := logout("1", "alice", "")
		_, err := r.ProviderLogout(context.Background(), "keycloak", l)
		refused(t, err, broker.ErrUnavailable)
		r.token(p, broker.Want{})
		away = false
		r.loggedOut(l)
		r.refused(p, broker.Want{}, broker.ErrLoginRequired)
	})
}

func TestALogoutTokenThatDoesNotHoldDoesNothing(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.token(p, broker.Want{})
		before := r.grant("alice")
		for _, l := range []broker.Secret{broker.NewSecret("alice"), brokertest.LogoutTokenOf(broker.Logout{ID: "1", Sub: "alice", Until: time.Now()})} {
			_, err := r.ProviderLogout(context.Background(), "keycloak", l)
			refused(t, err, broker.ErrInvalid)
		}
		_, err := r.ProviderLogout(context.Background(), "nowhere", logout("1", "alice", ""))
		refused(t, err, broker.ErrInvalid)
		afterTheLooks()
		if is := r.grant("alice"); is.Epoch != before.Epoch || r.provider.Calls("look") != 0 {
			t.Error("something was done")
		}
	})
}

// The store's time decides, and it may be an hour away from the host's.
func TestLogoutTokensAreHeldAgainstTheStoresTime(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.store.Advance(time.Hour)
		time.Sleep(time.Second)
		r.loggedIn("alice")
		_, err := r.ProviderLogout(context.Background(), "keycloak", logout("1", "alice", ""))
		refused(t, err, broker.ErrInvalid)
		r.loggedOut(brokertest.LogoutTokenOf(broker.Logout{ID: "1", Sub: "alice", Until: time.Now().Add(time.Hour + time.Minute)}))
		if g := r.grant("alice"); g.State != broker.NeedsLogin {
			t.Errorf("the grant is %s", g.State)
		}
	})
}

func TestALogoutTokenDoesNotSoftenADisconnect(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.disconnect()
		r.loggedOut(logout("1", "alice", ""))
		r.refused(p, broker.Want{}, broker.ErrRevoked)
	})
}

// A refresh that is under way when the provider says so must not bring the grant back.
func TestLogoutAtTheProviderDuringARefresh(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		expire()
		r.provider.Next(brokertest.Answer{Before: func() { r.loggedOut(logout("1", "alice", r.provider.Session("alice"))) }})
		r.refused(p, broker.Want{}, broker.ErrLoginRequired)
		if g := r.grant("alice"); g.State != broker.NeedsLogin || g.Tombstone.IsZero() {
			t.Errorf("the grant is %s", g.State)
		}
		if !slices.Contains(r.provider.Revoked(), r.provider.RefreshToken("alice")) {
			t.Error("the token that nobody keeps any more was not revoked")
		}
	})
}

func TestALogoutIsNotWaitedForWhileTheBrokerCloses(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		r.loggedOut(logout("1", "alice", "of another browser"))
		began := time.Now()
		r.Close()
		if waited := time.Since(began); waited > 0 {
			t.Errorf("Close took %s", waited)
		}
		r.start() // for the bubble to close
	})
}

// The session of a grant is that of its newest ID token.
func TestTheSessionOfAGrantFollowsItsTokens(t *testing.T) {
	says := "session-1"
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		for _, tt := range []struct{ says, want string }{{"", "session-1"}, {"session-2", "session-2"}, {"", "session-2"}} {
			says = tt.says
			expire()
			r.token(p, broker.Want{})
			if g := r.grant("alice"); g.Session != tt.want {
				t.Errorf("after a refresh that says %q it is %q, want %q", tt.says, g.Session, tt.want)
			}
		}
		r.loggedIn("alice") // says none: what is known is of the old one
		if g := r.grant("alice"); g.Session != "" {
			t.Errorf("after a login that says none it is %q", g.Session)
		}
		if e := r.loggedOut(logout("1", "alice", "session-2")); !strings.HasSuffix(e.Reason, "ended") {
			t.Errorf("a session that is not known may be the one: %s", e.Reason)
		}
	}, func(c *broker.Config) { c.Providers = []broker.Provider{namesSessions{c.Providers[0], &says}} })
}

// namesSessions is a provider whose tokens name the session that says says.
type namesSessions struct {
	broker.Provider
	says *string
}

func (p namesSessions) Login(ctx context.Context, c broker.CodeGrant) (broker.Identity, broker.Issued, error) {
	id, iss, err := p.Provider.Login(ctx, c)
	id.Session = *p.says
	return id, iss, err
}

func (p namesSessions) Refresh(ctx context.Context, refresh broker.Secret, sub string, scopes []string) (broker.Identity, broker.Issued, error) {
	id, iss, err := p.Provider.Refresh(ctx, refresh, sub, scopes)
	id.Session = *p.says
	return id, iss, err
}
