package rolewatch_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"tokenbroker/broker"
	"tokenbroker/broker/rolewatch"
)

const alice = "9acf7695-ea63-41b7-9ff1-19903e4c6fea"

// What a real Keycloak 26.5.5 has stored for each of these.
func TestWhomAnEventIsAbout(t *testing.T) {
	all, nobody := "*", ""
	for _, tt := range []struct{ why, operation, resource, path, who string }{
		{"a role is taken", "DELETE", "REALM_ROLE_MAPPING", "users/" + alice + "/role-mappings/realm", alice},
		{"a role is given", "CREATE", "REALM_ROLE_MAPPING", "users/" + alice + "/role-mappings/realm", alice},
		{"a client's role is taken", "DELETE", "CLIENT_ROLE_MAPPING", "users/" + alice + "/role-mappings/clients/0af0ce75", alice},
		{"a group is left", "DELETE", "GROUP_MEMBERSHIP", "users/" + alice + "/groups/e7bfd171", alice},
		{"switched off, or edited", "UPDATE", "USER", "users/" + alice, alice},
		{"deleted", "DELETE", "USER", "users/" + alice, alice},
		{"logged out by an administrator", "ACTION", "USER", "users/" + alice + "/logout", alice},
		{"overwritten by an import", "UPDATE", "REALM", "users/" + alice, alice},
		{"something of a later Keycloak about a user", "DELETE", "USER_PASSKEY", "users/" + alice + "/passkeys/1", alice},
		{"a session is ended", "DELETE", "USER_SESSION", "sessions/SkShHt3it5U-30n5yxn4yyrF", all},
		{"all sessions are ended", "ACTION", "REALM", "logout-all", all},
		{"the realm is edited", "UPDATE", "REALM", "", all},
		{"a role is deleted", "DELETE", "REALM_ROLE", "roles/gpu", all},
		{"a role is deleted by its id", "DELETE", "REALM_ROLE", "roles-by-id/19c70759", all},
		{"a composite role gets a part", "CREATE", "REALM_ROLE", "roles/gpu/composites", all},
		{"a composite role loses a part", "DELETE", "REALM_ROLE", "roles-by-id/19c70759/composites", all},
		{"a client's role is deleted", "DELETE", "CLIENT_ROLE", "clients/0af0ce75/roles/w", all},
		{"a group loses a role", "DELETE", "REALM_ROLE_MAPPING", "groups/e7bfd171/role-mappings/realm", all},
		{"a group moves", "UPDATE", "GROUP", "groups/e7bfd171/children", all},
		{"a group is deleted", "DELETE", "GROUP", "groups/e7bfd171", all},
		{"a client is edited", "UPDATE", "CLIENT", "clients/ae41aa47", all},
		{"a scope is taken from a client", "DELETE", "CLIENT_SCOPE_CLIENT_MAPPING", "clients/ae41/default-client-scopes/eb16", all},
		{"a mapper is made", "CREATE", "PROTOCOL_MAPPER", "client-scopes/eb16/protocol-mappers/models/6f40", all},
		{"a scope maps a role", "CREATE", "REALM_SCOPE_MAPPING", "client-scopes/eb16/scope-mappings/realm", all},
		{"LDAP is edited", "UPDATE", "COMPONENT", "components/1", all},
		{"a role is made", "CREATE", "REALM_ROLE", "roles/gpu", nobody},
		{"a group is made", "CREATE", "GROUP", "groups/e7bfd171", nobody},
		{"a client is made", "CREATE", "CLIENT", "clients/1", nobody},
		{"a login flow is edited", "UPDATE", "AUTH_EXECUTION", "authentication/executions/1", nobody},
		{"something unknown", "DELETE", "TELEPORTER", "teleporters/1", nobody},
		{"nobody", "DELETE", "USER", "users/", nobody},
	} {
		t.Run(tt.why, func(t *testing.T) {
			inBubble(t, func(r *rig) {
				r.lookedAt(started)
				r.did("e1", tt.operation, tt.resource, tt.path, 0)
				if tt.who == nobody {
					r.saw()
					return
				}
				cause := "admin event " + tt.operation + " " + tt.resource
				r.saw(tt.who + ": " + cause)
			})
		})
	}
}

func TestWhatUsersDo(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.lookedAt(started)
		for i, kind := range []string{"LOGOUT", "REVOKE_GRANT", "DELETE_ACCOUNT", "UPDATE_PROFILE", "USER_DISABLED_BY_PERMANENT_LOCKOUT", "LOGIN", "LOGOUT_ERROR", "CODE_TO_TOKEN"} {
			r.userDid(fmt.Sprint(i), kind, "user-of-"+kind)
		}
		r.userDid("nobody's", "LOGOUT", "")
		var want []string
		for _, kind := range []string{"DELETE_ACCOUNT", "LOGOUT", "REVOKE_GRANT", "UPDATE_PROFILE", "USER_DISABLED_BY_PERMANENT_LOCKOUT"} {
			want = append(want, "user-of-"+kind+": user event "+kind)
		}
		r.saw(want...)
		if !slices.Contains(r.types, "LOGOUT") || slices.Contains(r.types, "LOGIN") {
			t.Errorf("asked for user events of types %q", r.types)
		}
	})
}

// An event is in many answers, since a poll reads a minute again.
func TestAnEventIsFollowedOnce(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.lookedAt(started)
		r.lost("e1", alice)
		r.saw(alice + ": admin event DELETE REALM_ROLE_MAPPING")
		r.lost("e2", "bob")
		r.saw("bob: admin event DELETE REALM_ROLE_MAPPING")
		for range 30 {
			r.saw()
		}
	})
}

// Keycloak stores an event with all that belongs to it, and others may be there first.
func TestAnEventThatComesLateIsSeen(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.lookedAt(started)
		r.wait(5 * time.Minute)
		r.lost("e1", "bob")
		r.saw("bob: admin event DELETE REALM_ROLE_MAPPING")
		r.did("e0", "DELETE", "USER", "users/"+alice, 50*time.Second)
		r.saw(alice + ": admin event DELETE USER")
	})
}

func TestMoreThanAPageIsReadPageByPage(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.lookedAt(started)
		var want []string
		for i := range 900 {
			user := fmt.Sprintf("user%03d", i)
			r.lost("e"+user, user)
			if i%3 == 0 {
				time.Sleep(time.Millisecond)
			}
			want = append(want, user+": admin event DELETE REALM_ROLE_MAPPING")
		}
		r.saw(want...)
		r.saw()
	})
}

// What was followed before a page failed is not followed again with each try.
func TestAPageThatFails(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.lookedAt(started)
		for i := range 300 {
			r.lost(fmt.Sprint(i), fmt.Sprint(i))
			time.Sleep(time.Millisecond)
		}
		page := 0
		r.in(func(path string) (int, string) {
			if path == "/admin-events" {
				page++
			}
			return []int{0, 503}[(page+1)%2], ""
		})
		r.wait(20 * time.Second)
		if n := len(r.looked()); n != 250 || page < 4 {
			t.Errorf("%d looks, want 250, in %d requests", n, page)
		}
		r.in(nil)
		r.wait(30 * time.Second)
		if n := len(r.looked()); n != 50 {
			t.Errorf("%d looks afterwards, want 50", n)
		}
	})
}

func TestMoreThanAPollReadsIsALookAtEverybody(t *testing.T) {
	for _, atOnce := range []bool{false, true} {
		inBubble(t, func(r *rig) {
			r.lookedAt(started)
			r.cfg.Log = nil
			for i := range 5200 {
				r.did(fmt.Sprint(i), "UPDATE", "USER", "users/somebody", 0)
				if !atOnce && i%4 == 0 {
					time.Sleep(time.Millisecond)
				}
			}
			r.requests()
			r.wait(seenBy)
			if got := r.looked(); !slices.Contains(got, "*: more events than can be read") {
				t.Errorf("at once: %t: %d looks, and none at everybody", atOnce, len(got))
			}
			if n := len(r.requests()); n > 30 || atOnce && n > 10 {
				t.Errorf("at once: %t: %d requests", atOnce, n)
			}
			r.wait(2 * time.Minute)
			r.looked()
			r.lost("e1", alice)
			r.saw(alice + ": admin event DELETE REALM_ROLE_MAPPING")
		})
	}
}

// One user's look that takes long, as a refresh may, holds up nobody else's; and
// when too many wait, everybody is looked at.
func TestALookThatTakesLongHoldsUpNobody(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.lookedAt(started)
		hold := make(chan struct{})
		defer close(hold)
		r.hold = map[string]chan struct{}{"slow": hold}
		r.lost("e1", "slow")
		r.saw("slow: admin event DELETE REALM_ROLE_MAPPING")
		r.lost("e2", alice)
		r.saw(alice + ": admin event DELETE REALM_ROLE_MAPPING")
	})
	inBubble(t, func(r *rig) {
		r.lookedAt(started)
		hold := make(chan struct{})
		r.hold = map[string]chan struct{}{}
		for i := range 1100 {
			user := fmt.Sprint(i)
			r.hold[user] = hold
			r.lost(user, user)
			time.Sleep(time.Duration(i%2) * time.Millisecond)
		}
		r.wait(seenBy)
		if got := r.looked(); !slices.Contains(got, "*: more hints than can be followed") {
			t.Errorf("%d looks: %.200q", len(got), got)
		}
		close(hold)
		r.wait(0)
		if n := len(r.looked()); n != 1024 {
			t.Errorf("%d hints were kept, want 1024", n)
		}
	})
}

// Somebody edits roles all day; the provider is not asked about everybody all day.
func TestLooksAtEverybodyRestAsLongAsTheyTook(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.lookedAt(started)
		r.hold = map[string]chan struct{}{"*": make(chan struct{})}
		edit := func(n int) {
			for i := range n {
				r.did(fmt.Sprintf("%d-%d", n, i), "UPDATE", "REALM_ROLE", "roles/gpu", 0)
			}
		}
		edit(1)
		r.saw("*: admin event UPDATE REALM_ROLE")
		edit(5) // while that look is under way
		r.wait(20 * time.Second)
		r.lookedAt()
		close(r.hold["*"])
		r.wait(15 * time.Second)
		r.lookedAt()
		r.wait(10 * time.Second)
		r.lookedAt("*: admin event UPDATE REALM_ROLE") // one for all five
	})
}

func TestAnEventThatCannotBeUnderstoodStopsNoOther(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.lookedAt(started)
		for _, odd := range []string{
			`null`, `17`, `"event"`, `[]`, `{}`, `{"id":7,"time":1}`, `{"id":"x","time":"yesterday","resourcePath":"users/x"}`,
			`{"id":"y","time":-5,"resourcePath":"users/y"}`, `{"time":1,"resourcePath":"users/z"}`,
			`{"id":"w","time":99999999999999999999,"resourcePath":"users/w"}`, `{"id":"v","time":1,"resourcePath":{"users":"v"}}`,
		} {
			r.raw(odd)
		}
		r.lost("e1", alice)
		r.did("e2", "DELETE\nfake log line", strings.Repeat("X", 100), "users/bob", 0)
		r.saw(alice+": admin event DELETE REALM_ROLE_MAPPING", "bob: admin event ? ?")
		r.saw()
		r.says("can't be understood", 1)
	})
}

// Keycloak's clock is compared with itself only.
func TestKeycloaksClockMayBeWrong(t *testing.T) {
	for _, ahead := range []time.Duration{-time.Hour, time.Hour} {
		inBubble(t, func(r *rig) {
			r.lookedAt(started)
			for i := range 100 {
				r.lost(fmt.Sprint(i), alice)
				r.saw(alice + ": admin event DELETE REALM_ROLE_MAPPING")
			}
		}, func(r *rig) { r.ahead = ahead })
	}
}

func TestKeycloaksClockMayBeSet(t *testing.T) {
	for _, tt := range []struct {
		by   time.Duration
		look []string
	}{
		{time.Hour, []string{"*: Keycloak's events could not be read for a while"}},
		{-time.Hour, []string{"*: Keycloak's clock was set back"}},
		{-10 * time.Second, nil},
	} {
		inBubble(t, func(r *rig) {
			r.lookedAt(started)
			r.wait(5 * time.Minute)
			r.change(func() { r.ahead = tt.by })
			r.wait(r.life) // until the source has a token that says so
			r.lookedAt(tt.look...)
			r.lost("e1", alice)
			r.saw(alice + ": admin event DELETE REALM_ROLE_MAPPING")
		})
	}
}

// A node of a cluster whose clock is wrong writes one event with the time of
// tomorrow.
func TestAnEventOfTomorrowHidesNoneOfToday(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.lookedAt(started)
		r.did("e0", "DELETE", "USER", "users/bob", -24*time.Hour)
		r.saw("bob: admin event DELETE USER")
		r.wait(10 * time.Minute)
		r.lost("e1", alice)
		r.saw(alice + ": admin event DELETE REALM_ROLE_MAPPING")
	})
}

func TestEachStartLooksAtEverybodyOnce(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.lookedAt(started)
		stop := r.run()
		r.lookedAt(started)
		r.saw()
		stop()
	})
}

// What happens before Keycloak is there, or while it is not, is not lost.
func TestKeycloakIsAwayForAWhile(t *testing.T) {
	away := func(string) (int, string) { return 502, "<html>Bad Gateway</html>" }
	t.Run("short", func(t *testing.T) {
		inBubble(t, func(r *rig) {
			r.lookedAt(started)
			r.in(away)
			r.wait(20 * time.Second)
			r.lost("e1", alice)
			r.in(nil)
			r.wait(30 * time.Second)
			r.lookedAt(alice + ": admin event DELETE REALM_ROLE_MAPPING")
			r.says("Keycloak answered 502", 1)
			r.says("can be read again", 1)
			r.says("Bad Gateway", 0)
		})
	})
	t.Run("long, and the events of that time are no more", func(t *testing.T) {
		inBubble(t, func(r *rig) {
			r.lookedAt(started)
			r.in(away)
			r.wait(time.Hour)
			r.lookedAt()
			r.in(nil)
			r.wait(30 * time.Second)
			r.lookedAt("*: Keycloak's events could not be read for a while")
			r.says("Keycloak answered 502", 1)
		})
	})
	t.Run("from the start", func(t *testing.T) {
		inBubble(t, func(r *rig) {
			r.wait(time.Hour)
			r.lookedAt()
			r.in(nil)
			r.wait(30 * time.Second)
			r.lookedAt(started)
		}, func(r *rig) { r.in(away) })
	})
}

func TestAKeycloakInTroubleIsAskedLessOften(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.in(func(path string) (int, string) { return 500, "" })
		r.wait(10 * time.Minute)
		r.requests()
		r.wait(time.Hour)
		if n := len(r.requests()); n < 100 || n > 400 {
			t.Errorf("%d requests in an hour", n)
		}
	})
}

// One list may be had and the other not.
func TestOneListInTroubleDoesNotStopTheOther(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.lookedAt(started)
		r.in(func(path string) (int, string) {
			if path == "/admin-events" {
				return 503, ""
			}
			return 0, ""
		})
		r.userDid("u1", "LOGOUT", alice)
		r.saw(alice + ": user event LOGOUT")
	})
	inBubble(t, func(r *rig) {
		r.lookedAt(started)
		r.in(func(path string) (int, string) {
			if path == "/events" {
				return 500, `{"error":"unknown_error"}` // a Keycloak that doesn't know one of the types
			}
			return 0, ""
		})
		r.wait(time.Hour)
		r.lookedAt()
		r.lost("e1", alice)
		r.wait(30 * time.Second)
		r.lookedAt(alice + ": admin event DELETE REALM_ROLE_MAPPING")
		r.in(nil)
		r.wait(30 * time.Second)
		r.lookedAt("*: Keycloak's events could not be read for a while")
	})
}

func TestATokenThatIsTakenBackIsReplacedAtOnce(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.lookedAt(started)
		r.change(func() { clear(r.good) }) // all sessions of the realm were ended
		r.lost("e1", alice)
		r.saw(alice + ": admin event DELETE REALM_ROLE_MAPPING")
		r.says("level=WARN", 0)
		r.requests()
		r.wait(time.Hour)
		tokens := 0
		for _, asked := range r.requests() {
			if asked == "POST /token" {
				tokens++
			}
		}
		if tokens < 60 || tokens > 90 {
			t.Errorf("%d tokens in an hour, want one for each minute", tokens)
		}
	}, func(r *rig) { r.life = time.Hour })
}

// Rights are the token's, so that one which lacks the role is not used again.
func TestARoleThatIsGivenCountsAtOnce(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.says("lacks the role view-events", 1)
		r.wait(2 * every)
		r.lookedAt(started)
		r.says("can be read again", 1)
	}, func(r *rig) {
		r.in(func(path string) (int, string) {
			if path != "/token" && r.issued == 1 {
				return 403, ""
			}
			return 0, ""
		})
	})
}

// Each trouble is said once, with what to do, and asks are what they were when it
// is over. Nobody is looked at for it.
func TestTroubleIsSaidOnce(t *testing.T) {
	only := func(path string, status int) func(string) (int, string) {
		return func(p string) (int, string) {
			if p == path {
				return status, `{"error":"e30.secret"}`
			}
			return 0, ""
		}
	}
	for _, tt := range []struct {
		why     string
		trouble func(string) (int, string)
		says    string
	}{
		{"a wrong secret", only("/token", 401), `does not take the client \"events\" that reads events: correct events.client_id and events.client_secret_file`},
		{"a missing role", only("/admin-events", 403), `lacks the role view-events of the client realm-management`},
		{"a missing role for settings", only("/events/config", 403), `lacks the role view-events`},
		{"a token that is never taken", only("/events", 401), `does not take the token`},
		{"no such realm", only("/admin-events", 404), `there is nothing at https://sso.example.org/auth/admin/realms/lab/admin-events: correct events.url`},
		{"elsewhere", only("/admin-events", 302), `Keycloak answered 302 in place of its events (at https://sso.example.org/auth/admin/realms/lab/admin-events)`},
		{"overrun", only("/admin-events", 503), `Keycloak answered 503`},
		{"garbage", only("/admin-events", 200), `what Keycloak answered about its events can't be read`},
		{"no token", only("/token", 200), `what Keycloak answered about its events can't be read`},
	} {
		t.Run(tt.why, func(t *testing.T) {
			inBubble(t, func(r *rig) {
				r.lookedAt(started)
				r.in(tt.trouble)
				if tt.why == "no token" || tt.why == "a wrong secret" {
					r.change(func() { clear(r.good) })
				}
				r.wait(90 * time.Second)
				r.lookedAt()
				r.says(tt.says, 1)
				if err := r.source().Check(context.Background()); err == nil || !strings.HasPrefix(err.Error(), "events: ") {
					t.Errorf("Check: %v", err)
				}
				r.in(nil)
				r.wait(time.Minute)
				r.says("can be read again", 1)
				if err := r.source().Check(context.Background()); err != nil {
					t.Errorf("Check afterwards: %v", err)
				}
			})
		})
	}
}

func TestARealmThatKeepsNoEventsIsNamed(t *testing.T) {
	for _, tt := range []struct{ settings, says string }{
		{`{"eventsEnabled":true,"enabledEventTypes":["LOGOUT","REVOKE_GRANT"],"adminEventsEnabled":false}`, "does not keep the events of administrators: switch on"},
		{`{"eventsEnabled":false,"enabledEventTypes":["LOGOUT","REVOKE_GRANT"],"adminEventsEnabled":true}`, "does not keep the events of users (LOGOUT and REVOKE_GRANT at least)"},
		{`{"eventsEnabled":true,"enabledEventTypes":["LOGOUT"],"adminEventsEnabled":true}`, "does not keep the events of users (LOGOUT and REVOKE_GRANT at least)"},
		{`{"eventsEnabled":true,"enabledEventTypes":["REVOKE_GRANT"],"adminEventsEnabled":true}`, "does not keep the events of users (LOGOUT and REVOKE_GRANT at least)"},
		{`{"eventsEnabled":true,"enabledEventTypes":["LOGIN"],"adminEventsEnabled":false}`, "of administrators and of users (LOGOUT"},
	} {
		inBubble(t, func(r *rig) {
			r.lookedAt(started)
			r.says(tt.says, 1)
			if err := r.source().Check(context.Background()); err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("Check: %v", err)
			}
			r.lost("e1", alice) // what there is is read all the same
			r.saw(alice + ": admin event DELETE REALM_ROLE_MAPPING")
			r.change(func() { r.settings = newRealm().settings })
			r.wait(2 * time.Minute)
			r.says("can be read again", 1)
		}, func(r *rig) { r.settings = tt.settings })
	}
}

func TestAHintThatCannotBeFollowedIsSaid(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.says("not everybody could be looked at", 1)
		r.lost("e1", alice)
		r.wait(seenBy)
		r.says("a hint could not be followed", 1)
	}, func(r *rig) { r.fail = errNothingKnown })
}

// A stop waits for nothing that hangs.
func TestRunEndsAtOnce(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.lost("e1", alice)
		r.wait(seenBy)
		began := time.Now()
		stop := r.run()
		stop()
		if d := time.Since(began); d != 0 {
			t.Errorf("stopped after %s", d)
		}
	}, func(r *rig) { r.hold = map[string]chan struct{}{"*": make(chan struct{}), alice: make(chan struct{})} })
}

// On a real socket: a redirect would carry the token away.
func TestTheTokenGoesNowhereElse(t *testing.T) {
	thief := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		t.Errorf("the thief was sent %s %s, Authorization %q", r.Method, r.URL, r.Header.Get("Authorization"))
	}))
	defer thief.Close()
	for _, path := range []string{"/token", "/events/config", "/admin-events"} {
		lab := newRealm()
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if strings.HasSuffix(r.URL.Path, path) {
				http.Redirect(w, r, thief.URL, http.StatusTemporaryRedirect)
				return
			}
			lab.ServeHTTP(w, r)
		}))
		k, err := rolewatch.NewKeycloak(rolewatch.KeycloakConfig{
			Provider: "keycloak", URL: s.URL + "/auth/admin/realms/lab", ClientID: "events", ClientSecret: broker.NewSecret("s3%cret"),
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := k.Check(t.Context()); err == nil || !strings.Contains(err.Error(), "Keycloak answered 307") {
			t.Errorf("%s: %v", path, err)
		}
		s.Close()
		if err := k.Check(t.Context()); err == nil || !strings.Contains(err.Error(), "can't be reached") {
			t.Errorf("%s, gone: %v", path, err)
		}
	}
}

func TestAdminURL(t *testing.T) {
	for realm, want := range map[string]string{
		"https://sso.example.org/realms/lab":                               "https://sso.example.org/admin/realms/lab",
		"https://sso.example.org/auth/realms/lab/":                         "https://sso.example.org/auth/admin/realms/lab",
		"http://keycloak:8080/realms/lab/.well-known/openid-configuration": "http://keycloak:8080/admin/realms/lab",
		"https://sso.example.org":                                          "",
		"https://sso.example.org/realms/lab/protocol":                      "",
		"": "",
	} {
		if got := rolewatch.AdminURL(realm); got != want {
			t.Errorf("AdminURL(%q): got %q, want %q", realm, got, want)
		}
	}
}

func TestConfigurationThatCannotWork(t *testing.T) {
	good := rolewatch.KeycloakConfig{URL: "https://sso/admin/realms/lab", ClientID: "events", ClientSecret: broker.NewSecret("s")}
	for want, edit := range map[string]func(*rolewatch.KeycloakConfig){
		"events.url":                func(c *rolewatch.KeycloakConfig) { c.URL = "https://sso/realms/lab" },
		"events.client_id":          func(c *rolewatch.KeycloakConfig) { c.ClientID = "" },
		"events.client_secret_file": func(c *rolewatch.KeycloakConfig) { c.ClientSecret = broker.Secret{} },
	} {
		c := good
		edit(&c)
		if _, err := rolewatch.NewKeycloak(c); err == nil || !strings.HasPrefix(err.Error(), want+":") {
			t.Errorf("NewKeycloak: got %v, want it to name %s", err, want)
		}
	}
}

// Whatever Keycloak answers: the source goes on, and its next event is seen.
func FuzzAnswers(f *testing.F) {
	f.Add([]byte(`[{"id":"a","time":1795627435021,"operationType":"DELETE","resourceType":"REALM_ROLE_MAPPING","resourcePath":"users/u/role-mappings/realm"}]`))
	f.Add([]byte(`[{"id":"a","time":1,"type":"LOGOUT","userId":"u"},`))
	f.Add([]byte(`{"error":"unknown_error"}`))
	f.Add([]byte(`[1,null,"x",[[]],{}]x`))
	f.Fuzz(func(t *testing.T, answer []byte) {
		inBubble(t, func(r *rig) {
			r.in(func(path string) (int, string) {
				if path == "/admin-events" {
					return 200, string(answer)
				}
				return 0, ""
			})
			r.wait(30 * time.Second)
			r.looked()
			r.in(nil)
			r.lost("e1", alice)
			r.wait(30 * time.Second)
			if got := r.looked(); !slices.Contains(got, alice+": admin event DELETE REALM_ROLE_MAPPING") {
				t.Errorf("looked at %q", got)
			}
		})
	})
}
