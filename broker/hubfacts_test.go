package broker_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
)

// forGroup makes the rule want the hub's group lab in place of a role.
func forGroup(c *broker.Config) {
	c.Rules[0].Roles, c.Rules[0].Groups = nil, []string{"lab"}
}

func (r *rig) inGroups(user broker.UserID, groups ...string) (ref string) {
	r.t.Helper()
	ref, err := r.SetGroups(context.Background(), "main", user, groups)
	if err != nil {
		r.t.Fatalf("SetGroups: %v", err)
	}
	return ref
}

func (r *rig) shares(user broker.UserID, shared bool) (ref string) {
	r.t.Helper()
	ref, err := r.SetShared(context.Background(), "main", user, "", shared)
	if err != nil {
		r.t.Fatalf("SetShared: %v", err)
	}
	return ref
}

func TestHubGroupsComeAndGoInARunningNotebook(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.refused(p, broker.Want{}, broker.ErrDenied)
		r.inGroups("alice", "staff", "lab")
		r.token(p, broker.Want{})
		r.inGroups("alice", "staff")
		if said := r.refused(p, broker.Want{}, broker.ErrDenied); said.Sentence != "a token for keycloak needs one of the hub's groups lab; you are in staff" {
			t.Errorf("said %q", said.Sentence)
		}
		var lines []string
		for _, e := range r.audit.entries(t, "groups") {
			lines = append(lines, string(e.Hub)+" "+string(e.User)+" "+e.Reason)
		}
		want := []string{"main alice gone: ; gained: lab staff", "main alice gone: lab; gained: "}
		if diff := cmp.Diff(want, lines); diff != "" {
			t.Errorf("audit (-want +got):\n%s", diff)
		}
	}, forGroup)
}

func TestRegisterBringsTheGroupsOfNow(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		register := func(groups ...string) {
			_, err := r.Register(context.Background(), "main", broker.RegisterRequest{User: "alice", ContainerName: "jupyter-alice", Groups: groups})
			if err != nil {
				t.Fatal(err)
			}
		}
		r.attestor.Run("jupyter-alice", 100)
		register("lab")
		r.token(r.peer("alice", 100), broker.Want{})
		register()
		r.refused(r.peer("alice", 100), broker.Want{}, broker.ErrDenied)
	}, forGroup)
}

func TestAGroupThatIsLostIsRefusedByEveryBroker(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		r.inGroups("alice", "lab")
		other := r.second()
		defer other.Close()
		p := other.running("alice", 200) // on the other host, which sets what Register says
		other.inGroups("alice", "lab")
		other.token(p, broker.Want{})
		r.inGroups("alice")
		time.Sleep(250*time.Millisecond + 1)
		other.refused(p, broker.Want{}, broker.ErrDenied)
	}, forGroup)
}

func TestGroupsOfOneHubAreNotThoseOfAnother(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		if _, err := r.SetGroups(context.Background(), "other", "alice", []string{"lab"}); err != nil {
			t.Fatal(err)
		}
		r.refused(p, broker.Want{}, broker.ErrDenied)
	}, forGroup)
}

// A hub says them with each refresh of each user, and a revision that moves
// costs every broker a look at each user.
func TestGroupsThatAreNoOthersChangeNothing(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.inGroups("alice", "a", "b")
		before, lines, puts := r.Status(context.Background()).Revision, len(r.audit.String()), r.store.Calls("Put")
		if ref := r.inGroups("alice", "b", "a", "b"); ref != "" {
			t.Errorf("ref %q of what was not done", ref)
		}
		r.inGroups("bob")
		if n := r.store.Calls("Put") - puts; n != 0 {
			t.Errorf("%d records were written", n)
		}
		time.Sleep(time.Second)
		if after := r.Status(context.Background()).Revision; after != before {
			t.Errorf("the revision moved from %d to %d", before, after)
		}
		if r.audit.String()[lines:] != "" {
			t.Errorf("the audit says %s", r.audit.String()[lines:])
		}
	})
}

// The link that a login makes and the groups are one record.
func TestALoginKeepsTheGroups(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.inGroups("alice", "lab")
		r.loggedIn("alice")
		if ref := r.inGroups("alice", "lab"); ref != "" {
			t.Error("the login has dropped them")
		}
		r.inGroups("alice", "staff")
		if r.grant("alice").State != broker.Live {
			t.Error("the groups have dropped the grant")
		}
	})
}

func TestTokensAreOffWhileAServerIsShared(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.token(p, broker.Want{})
		if ref := r.shares("alice", true); ref == "" {
			t.Error("a change without an audit line")
		}
		said := r.refused(p, broker.Want{}, broker.ErrDenied) // though a token is in the cache
		if said.Sentence != "tokens are off while this server is shared" {
			t.Errorf("said %q", said.Sentence)
		}
		if ref := r.shares("alice", true); ref != "" {
			t.Error("an audit line for no change")
		}
		r.shares("alice", false)
		r.token(p, broker.Want{})
		if ref, err := r.SetShared(context.Background(), "main", "alice", "unknown", true); err != nil || ref != "" {
			t.Errorf("of an unknown server: %q, %v", ref, err)
		}
	})
}

func TestARuleMayAllowTokensOnASharedServer(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.shares("alice", true)
		r.token(p, broker.Want{})
	}, func(c *broker.Config) { c.Rules[0].Shared = true })
}

// Whoever is about to get a token when the server is shared gets none.
func TestSharingStopsAnAnswerThatIsUnderWay(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.store.Advance(time.Hour) // the login's own token has ended
		r.inGroups("bob", "x")     // the revision moves, so that the time is read
		r.provider.Next(brokertest.Answer{Before: func() { time.Sleep(10 * time.Second) }})
		answered := make(chan error)
		go func() {
			_, err := r.Token(context.Background(), p, broker.Want{})
			answered <- err
		}()
		synctest.Wait()
		r.shares("alice", true)
		refused(t, <-answered, broker.ErrDenied)
	})
}

func TestSharingSurvivesARestart(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.shares("alice", true)
		r.Close()
		r.start()
		r.refused(p, broker.Want{}, broker.ErrDenied)
		_, err := r.Register(context.Background(), "main", broker.RegisterRequest{User: "alice", ContainerName: "jupyter-alice", Shared: true})
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		r.refused(p, broker.Want{}, broker.ErrDenied)
	})
}

// A change of the sharing replaces what is known of the server; its end must be
// noticed all the same, and keep what the hub has said.
func TestAServerEndsAfterItsSharingChanged(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.running("alice", 100)
		r.shares("alice", true)
		r.attestor.Stop("jupyter-alice")
		synctest.Wait()
		if got := r.Registrations()[0]; got.State != broker.Stopped || !got.Shared {
			t.Errorf("registration: %s, shared %v; want stopped and shared", got.State, got.Shared)
		}
		r.Close()
		r.start()
		if got := r.Registrations()[0]; !got.Shared {
			t.Error("the store has forgotten that it is shared")
		}
	})
}

func TestTheHubSpeaksWhileAServerIsBeingBound(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		_, err := r.Register(context.Background(), "main", broker.RegisterRequest{User: "alice", ContainerName: "jupyter-alice"})
		if err != nil {
			t.Fatal(err)
		}
		r.attestor.Run("jupyter-alice", 100)
		synctest.Wait()
		r.shares("alice", true)
		time.Sleep(2 * time.Second)
		if got := r.Registrations()[0]; got.State != broker.Bound || !got.Shared {
			t.Errorf("registration: %s, shared %v; want bound and shared", got.State, got.Shared)
		}
		r.refused(r.peer("alice", 100), broker.Want{}, broker.ErrDenied)
	}, func(c *broker.Config) {
		c.Attestor = binds{c.Attestor.(*brokertest.Attestor), "pidfd+ns", time.Second}
	})
}

// With the store away a server is shared all the same, and the hub hears that it
// must say so again.
func TestSharingHoldsWithoutTheStore(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		r.running("alice", 100)
		r.store.Fail(errors.New("away"))
		_, err := r.SetShared(context.Background(), "main", "alice", "", true)
		refused(t, err, broker.ErrUnavailable)
		r.store.Fail(nil)
		r.refused(r.peer("alice", 100), broker.Want{}, broker.ErrDenied)
		if ref := r.shares("alice", true); ref == "" {
			t.Error("the second time has not stored it")
		}
	})
}

func TestARuleMayRequireALevelOfAttestation(t *testing.T) {
	for level, want := range map[string]string{
		"pidfd+ns": "", "pidfd": "",
		"proc": "a token for keycloak needs attestation pidfd or better; this server has proc",
	} {
		t.Run(level, func(t *testing.T) {
			inBubble(t, func(r *rig) {
				r.loggedIn("alice")
				p := r.running("alice", 100)
				if want == "" {
					r.token(p, broker.Want{})
				} else if said := r.refused(p, broker.Want{}, broker.ErrDenied); said.Sentence != want {
					t.Errorf("said %q, want %q", said.Sentence, want)
				}
			}, func(c *broker.Config) {
				c.Rules[0].RequireAttestation = "pidfd"
				c.Attestor = binds{c.Attestor.(*brokertest.Attestor), level, 0}
			})
		})
	}
}

// binds is an attestor of another level, and that takes its time.
type binds struct {
	*brokertest.Attestor
	level string
	takes time.Duration
}

func (a binds) Bind(ctx context.Context, r broker.Registration) (*broker.Workload, error) {
	time.Sleep(a.takes)
	w, err := a.Attestor.Bind(ctx, r)
	if err == nil {
		w.Level = a.level
	}
	return w, err
}

func TestWhatALostGroupGaveIsRevoked(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		r.inGroups("alice", "lab", "staff")
		p := r.peer("alice", 100)
		r.attestor.Run("jupyter-alice", 100)
		_, err := r.Register(context.Background(), "main", broker.RegisterRequest{User: "alice", ContainerName: "jupyter-alice", Groups: []string{"lab", "staff"}})
		if err != nil {
			t.Fatal(err)
		}
		token := r.token(p, broker.Want{})
		r.inGroups("alice", "lab")
		synctest.Wait()
		r.revoked()
		r.inGroups("alice", "staff")
		synctest.Wait()
		r.revoked(token.Access.Fingerprint())
	}, forGroup)
}

func TestTheHubSpeaksWhileAServersEndIsStored(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.running("alice", 100)
		waits := true
		r.store.Before(func(method string, k broker.Key) error {
			if waits && method == "Get" && k.Kind == "registration" {
				waits = false
				r.shares("alice", true)
			}
			return nil
		})
		r.attestor.Stop("jupyter-alice")
		synctest.Wait()
		r.store.Before(nil)
		r.Close()
		r.start()
		if got := r.Registrations()[0]; waits || got.State != broker.Stopped || !got.Shared {
			t.Errorf("registration: %s, shared %v; want stopped and shared", got.State, got.Shared)
		}
	})
}
