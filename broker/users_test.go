package broker_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
)

// rebound gives alice's name at keycloak to sub.
func (r *rig) rebound(sub string) broker.Rebinding {
	r.t.Helper()
	done, err := r.Rebind(context.Background(), "uid 0", "main", "alice", "keycloak", sub)
	if err != nil {
		r.t.Fatalf("Rebind: %v", err)
	}
	return done
}

// claims reports what Claim says to a login of sub as user.
func (r *rig) claims(user broker.UserID, sub string) error {
	_, err := r.Claim(context.Background(), "main", "keycloak", r.login(sub), user)
	return err
}

func TestReassignedNameInheritsNothingBeforeOrAfterItsRebind(t *testing.T) {
	inBubble(t, func(r *rig) {
		other := r.second()
		defer other.Close()
		old := r.loggedIn("alice")
		p, q := r.running("alice", 100), other.running("alice", 200)
		r.token(p, broker.Want{})
		other.token(q, broker.Want{})

		// The hub gives the name alice to eve. Before the rebind she gets nothing.
		r.provider.SetRoles("eve", "researcher")
		said := refused(t, r.claims("alice", "eve"), broker.ErrDenied)
		if !strings.Contains(said.Next, "it@lab.example") {
			t.Errorf("eve is told %q", said.Next)
		}
		if s, err := r.CheckSession(context.Background(), "main", "keycloak", r.login("eve"), "alice", ""); err != nil || s.Active || s.Token != nil {
			t.Errorf("CheckSession before: %+v, %v", s, err)
		}
		const command = `tokenbroker users rebind 'alice' --hub main --provider keycloak --sub 'eve'`
		for _, action := range []string{"claim", "session"} {
			if lines := r.audit.entries(t, action); !strings.Contains(lines[len(lines)-1].Reason, command) {
				t.Errorf("the audit of %s does not name the command: %+v", action, lines[len(lines)-1])
			}
		}

		done := r.rebound("eve")
		if done.Was != "alice" || done.Sub != "eve" || len(done.Ended) != 1 || !done.Ended[0].OutstandingUntil.After(time.Now()) || done.Ended[0].IssuingStoppedAt.IsZero() {
			t.Errorf("Rebind: %+v", done)
		}
		time.Sleep(time.Second) // other brokers confirm within the lease
		r.refused(p, broker.Want{}, broker.ErrDenied)
		other.refused(q, broker.Want{}, broker.ErrDenied)
		if _, err := r.RefreshHub(context.Background(), "main", "keycloak", old); !errors.Is(err, broker.ErrRevoked) {
			t.Errorf("the old handle: %v", err)
		}

		// Eve logs in: what runs since before is not hers.
		if err := r.claims("alice", "eve"); err != nil {
			t.Fatalf("eve's login after: %v", err)
		}
		r.refused(p, broker.Want{}, broker.ErrDenied)
		other.refused(q, broker.Want{}, broker.ErrDenied)
		if _, _, err := other.Providers(context.Background(), q); !errors.Is(err, broker.ErrDenied) {
			t.Errorf("Providers of an old server: %v", err)
		}
		if s, err := r.CheckSession(context.Background(), "main", "keycloak", old, "alice", ""); err != nil || s.Active || s.Token != nil {
			t.Errorf("the old session: %+v, %v", s, err)
		}
		r.attestor.Stop("jupyter-alice")
		r.token(r.running("alice", 101), broker.Want{})
		if e := r.audit.entries(t, "token"); e[len(e)-1].Sub != "eve" {
			t.Errorf("the token is %q's", e[len(e)-1].Sub)
		}
	})
}

func TestRebindIsInTheAuditWithWhoAsked(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		done := r.rebound("eve")
		e := r.audit.entries(t, "rebind")[0]
		if e.By != "uid 0" || e.User != "alice" || e.Hub != "main" || e.Provider != "keycloak" || e.Sub != "eve" || e.Reason != `was sub "alice"` || e.Ref != done.Ref {
			t.Errorf("the line is %+v", e)
		}
	})
}

func TestLeaverMayComeUnderAnotherName(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		waiting := r.login("alice") // a login that was not claimed in time for the rebind
		time.Sleep(time.Second)
		r.rebound("")
		_, err := r.Claim(context.Background(), "main", "keycloak", waiting, "alice")
		refused(t, err, broker.ErrRevoked)
		if err := r.claims("alice2", "alice"); err != nil {
			t.Fatalf("under another name: %v", err)
		}
		r.token(r.running("alice2", 100), broker.Want{})
		if err := r.claims("alice", "eve"); err != nil {
			t.Fatalf("whoever logs in next: %v", err)
		}
		refused(t, r.claims("alice", "alice"), broker.ErrDenied)
	})
}

func TestRenamedUserIsFreedByTheCommandThatTheAuditNames(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		refused(t, r.claims("alice2", "alice"), broker.ErrDenied)
		lines := r.audit.entries(t, "claim")
		if e := lines[len(lines)-1]; !strings.Contains(e.Reason, `tokenbroker users rebind 'alice' --hub main --provider keycloak`) {
			t.Errorf("the audit says %q", e.Reason)
		}
		r.rebound("")
		if err := r.claims("alice2", "alice"); err != nil {
			t.Errorf("after it: %v", err)
		}
	})
}

func TestRebindAtTheLoginProviderEndsTheOthersToo(t *testing.T) {
	gitlab := brokertest.NewProvider("gitlab")
	both := func(c *broker.Config) {
		c.Providers = append(c.Providers, gitlab)
		c.Rules = append(c.Rules, broker.Rule{Provider: "gitlab", Scopes: []string{"api"}})
	}
	for _, tt := range []struct {
		provider broker.ProviderID
		ended    int
		keycloak error // what the running server then gets there
		gitlab   error
	}{
		{"keycloak", 2, broker.ErrDenied, broker.ErrDenied},
		{"gitlab", 1, nil, broker.ErrLoginRequired},
	} {
		t.Run(string(tt.provider), func(t *testing.T) {
			inBubble(t, func(r *rig) {
				ctx := context.Background()
				r.loggedIn("alice")
				login, err := r.Login(ctx, "main", "gitlab", codeOf("alice@gitlab"))
				if err == nil {
					_, err = r.Claim(ctx, "main", "gitlab", login.Handle, "alice")
				}
				if err != nil {
					t.Fatal(err)
				}
				p := r.running("alice", 100)
				r.token(p, broker.Want{Provider: "gitlab"})
				done, err := r.Rebind(ctx, "uid 0", "", "alice", tt.provider, "")
				if err == nil || len(done.Ended) != 0 {
					t.Errorf("two hubs and none named: %+v, %v", done, err)
				}
				done, err = r.Rebind(ctx, "uid 0", "main", "alice", tt.provider, "somebody")
				if err != nil || len(done.Ended) != tt.ended {
					t.Errorf("Rebind: %+v, %v; want %d ended", done, err, tt.ended)
				}
				for id, want := range map[broker.ProviderID]error{"keycloak": tt.keycloak, "gitlab": tt.gitlab} {
					if _, err := r.Token(ctx, p, broker.Want{Provider: id}); !errors.Is(err, want) {
						t.Errorf("then at %s: %v, want %v", id, err, want)
					}
				}
			}, both)
		})
	}
}

func TestRefreshUnderWayIsNotStoredOverARebind(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		expire()
		asked, answer := make(chan struct{}), make(chan struct{})
		r.provider.Next(brokertest.Answer{Before: func() { close(asked); <-answer }})
		got := make(chan error)
		go func() {
			_, err := r.Token(context.Background(), p, broker.Want{})
			got <- err
		}()
		<-asked
		r.rebound("eve")
		close(answer)
		if err := <-got; err == nil {
			t.Error("a token was given after the rebind")
		}
		synctest.Wait()
		if fresh := r.provider.RefreshToken("alice"); !slices.Contains(r.provider.Revoked(), fresh) {
			t.Error("the new refresh token, which nobody may have, was not revoked")
		}
	})
}

func TestRebindHalfDoneIsFinishedByTheNext(t *testing.T) {
	for _, method := range []string{"Put link", "Move"} {
		t.Run(method, func(t *testing.T) {
			inBubble(t, func(r *rig) {
				r.loggedIn("alice")
				p := r.running("alice", 100)
				other := r.second()
				defer other.Close()
				q := other.running("alice", 200)
				other.token(q, broker.Want{})
				r.store.Before(func(m string, k broker.Key) error {
					if strings.TrimSpace(m+" "+k.Kind) == method {
						return errors.New("the store goes away")
					}
					return nil
				})
				if _, err := r.Rebind(context.Background(), "uid 0", "main", "alice", "keycloak", "eve"); !errors.Is(err, broker.ErrUnavailable) {
					t.Fatalf("Rebind: %v", err)
				}
				r.store.Before(nil)
				r.rebound("eve")
				r.refused(p, broker.Want{}, broker.ErrDenied)
				time.Sleep(time.Second)
				other.refused(q, broker.Want{}, broker.ErrDenied)
				if err := r.claims("alice", "eve"); err != nil {
					t.Errorf("eve's login: %v", err)
				}
				refused(t, r.claims("alice", "alice"), broker.ErrDenied)
			})
		})
	}
}

func TestRebindSaysWhatIsWrong(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		r.provider.SetRoles("bob", "researcher")
		r.loggedIn("bob")
		for _, tt := range []struct {
			user     broker.UserID
			provider broker.ProviderID
			sub      string
			says     string
		}{
			{"", "keycloak", "", "user is empty"},
			{"alice", "", "", `provider: there is no provider ""; there are keycloak`},
			{"nobody", "keycloak", "", `user: "nobody" has no account at keycloak that could be taken away`},
			{"alice", "keycloak", "alice", `sub: "alice" is linked to that account already`},
			{"alice", "keycloak", "bob", `sub: that account is linked to the user "bob"`},
			{"alice", "keycloak", "a\nb", "sub holds a control character"},
		} {
			_, err := r.Rebind(context.Background(), "uid 0", "main", tt.user, tt.provider, tt.sub)
			if said := refused(t, err, broker.ErrInvalid); said.Sentence != tt.says {
				t.Errorf("said %q, want %q", said.Sentence, tt.says)
			}
		}
		expire()
		r.token(r.running("alice", 100), broker.Want{})
		r.token(r.running("bob", 200), broker.Want{})
	})
}

func TestNameMayBeGivenToAnAccountBeforeItsFirstLogin(t *testing.T) {
	inBubble(t, func(r *rig) {
		p := r.running("alice", 100)
		r.rebound("alice")
		refused(t, r.claims("alice", "eve"), broker.ErrDenied)
		r.loggedIn("alice")
		r.token(p, broker.Want{}) // nobody had the name before
	})
}

func TestUserReportSaysWhoSomebodyIs(t *testing.T) {
	inBubble(t, func(r *rig) {
		ctx := context.Background()
		r.loggedIn("alice")
		_, err := r.Register(ctx, "main", broker.RegisterRequest{User: "alice", ContainerName: "jupyter-alice", Groups: []string{"staff", "lab"}})
		if err != nil {
			t.Fatal(err)
		}
		other := r.second()
		defer other.Close()
		time.Sleep(time.Second)
		_, err = other.Register(ctx, "main", broker.RegisterRequest{User: "alice", Server: "gpu", ContainerName: "jupyter-alice-gpu", Groups: []string{"lab"}})
		if err != nil {
			t.Fatal(err)
		}
		other.running("bob", 300)
		u, err := r.User(ctx, "main", "alice")
		if err != nil {
			t.Fatal(err)
		}
		var servers []string
		for _, s := range u.Servers {
			servers = append(servers, string(s.Host)+" "+string(s.Key.User)+" "+string(s.Key.Server))
		}
		if diff := cmp.Diff([]string{"host1 alice ", "host2 alice gpu"}, servers); diff != "" {
			t.Errorf("servers: %s", diff)
		}
		if diff := cmp.Diff([]string{"lab"}, u.Groups); diff != "" {
			t.Errorf("groups as last said: %s", diff)
		}
		if len(u.Accounts) != 1 || u.Accounts[0].Sub != "alice" || !u.Accounts[0].Login || u.Accounts[0].Grant.State != broker.Live ||
			u.OutstandingUntil != u.Accounts[0].Grant.OutstandingUntil || u.OutstandingUntil.IsZero() || !u.Rebound.IsZero() {
			t.Errorf("got %+v", u)
		}
		if _, err := r.User(ctx, "main", "nobody"); !errors.Is(err, broker.ErrInvalid) {
			t.Errorf("nobody: %v", err)
		}
		r.rebound("eve")
		if u, err := r.User(ctx, "main", "alice"); err != nil || u.Rebound.IsZero() || u.Accounts[0].Sub != "eve" || u.Accounts[0].Grant != nil {
			t.Errorf("after a rebind: %+v, %v", u, err)
		}
	})
}
