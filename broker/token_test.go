package broker_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
)

func TestNotebookGetsANarrowedToken(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		tok := r.token(p, broker.Want{})
		if tok.Provider != "keycloak" || tok.Audience != "storage" || !cmp.Equal(tok.Scopes, []string{"read", "write"}) {
			t.Errorf("token is for %s, %s, %v", tok.Provider, tok.Audience, tok.Scopes)
		}
		lasts(t, tok, 5*time.Minute)
		if again := r.token(p, broker.Want{}); !again.Access.Equal(tok.Access) {
			t.Error("the second request got another token; want the cached one")
		}
		if n := r.provider.Calls("exchange"); n != 1 {
			t.Errorf("%d exchanges for two requests, want 1", n)
		}
		if n := r.provider.Calls("refresh"); n != 0 {
			t.Errorf("%d refreshes while the login's token was fresh, want 0", n)
		}
		lines := r.audit.entries(t, "token")
		if len(lines) != 2 || lines[0].Ref != tok.Ref || lines[0].Token != tok.Access.Fingerprint() || lines[0].Rule != 1 ||
			lines[0].User != "alice" || lines[0].Container == "" || lines[0].Cached || !lines[1].Cached {
			t.Errorf("audit lines: %+v", lines)
		}
	})
}

func TestRequestsAreRefusedWithTheReason(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.provider.SetRoles("bob", "student")
		r.loggedIn("alice")
		r.loggedIn("bob")
		alice, bob := r.running("alice", 100), r.running("bob", 200)
		for _, tt := range []struct {
			why  string
			peer *broker.Peer
			want broker.Want
			err  *broker.Error
			says string
		}{
			{"the role is missing", bob, broker.Want{}, broker.ErrDenied,
				"a token for keycloak needs one of the roles researcher; you have student"},
			{"a scope too many", alice, broker.Want{Scopes: []string{"admin"}}, broker.ErrDenied,
				"no rule gives you a token for keycloak with scopes admin here"},
			{"another audience", alice, broker.Want{Audience: "compute"}, broker.ErrDenied,
				`no rule gives you a token for keycloak with audience "compute" here`},
			{"an unknown provider", alice, broker.Want{Provider: "gitlab"}, broker.ErrInvalid,
				`provider: there is no provider "gitlab"; there are keycloak`},
			{"no scope at all", alice, broker.Want{Scopes: []string{"read write"}}, broker.ErrInvalid,
				`scopes: "read write" is not a scope`},
			{"a life that is none", alice, broker.Want{MinTTL: -1}, broker.ErrInvalid,
				"min_ttl is not between 0 and 24 hours"},
			{"a fingerprint that is none", alice, broker.Want{Rejected: "abc"}, broker.ErrInvalid,
				"rejected_sha256 is not a SHA-256 in lower-case hex"},
			{"a process of another container", r.peer("alice", 200), broker.Want{}, broker.ErrUnknownPeer,
				"this process is not in the server's container"},
			{"a server nobody registered", r.peer("carol", 300), broker.Want{}, broker.ErrUnknownPeer,
				"this server is not registered with the token broker"},
		} {
			if said := r.refused(tt.peer, tt.want, tt.err); said.Sentence != tt.says {
				t.Errorf("%s: said %q, want %q", tt.why, said.Sentence, tt.says)
			}
		}
		for _, e := range r.audit.entries(t, "token") {
			if e.Outcome != "refused" || e.Code == "" || e.Reason == "" || e.Token != "" {
				t.Errorf("audit line of a refusal: %+v", e)
			}
		}
	})
}

func TestServerIsPendingUntilItsContainerRuns(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		if _, err := r.Register(context.Background(), "main", broker.RegisterRequest{User: "alice", ContainerName: "c"}); err != nil {
			t.Fatal(err)
		}
		p := r.peer("alice", 100)
		if said := r.refused(p, broker.Want{}, broker.ErrPending); said.RetryAfter <= 0 {
			t.Error("pending does not say when to try again")
		}
		r.attestor.Run("c", 100)
		synctest.Wait()
		r.token(p, broker.Want{})
	})
}

func TestLoginIsAskedForWhereThereIsNoGrant(t *testing.T) {
	inBubble(t, func(r *rig) {
		p := r.running("alice", 100)
		r.refused(p, broker.Want{}, broker.ErrLoginRequired)
		r.loggedIn("alice") // and the running container is served at once
		r.token(p, broker.Want{})
	})
}

func TestPeerIsAskedAboutWithEachRequest(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.token(p, broker.Want{})
		r.attestor.End(100)
		r.refused(p, broker.Want{}, broker.ErrUnknownPeer)
	})
}

func TestRestartedContainerIsBoundAgain(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		old := r.running("alice", 100)
		r.token(old, broker.Want{})
		r.attestor.Stop("jupyter-alice")
		synctest.Wait()
		if got := r.Registrations()[0].State; got != broker.Stopped {
			t.Errorf("the registration is %s after its container ended, want stopped", got)
		}
		r.refused(old, broker.Want{}, broker.ErrPending)
		r.attestor.Run("jupyter-alice", 101)
		synctest.Wait()
		r.token(r.peer("alice", 101), broker.Want{})
		r.refused(old, broker.Want{}, broker.ErrUnknownPeer)
	})
}

func TestWeakContainerIsRefusedUntilDockerSaysSomethingHappened(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		r.attestor.Refuse("jupyter-alice", broker.Errorf(broker.Denied, "the container is privileged"))
		p := r.running("alice", 100)
		for range 3 {
			if said := r.refused(p, broker.Want{}, broker.ErrDenied); said.Sentence != "the container is privileged" {
				t.Errorf("said %q", said.Sentence)
			}
		}
		if n := r.attestor.Binds(); n > 2 {
			t.Errorf("Docker was asked %d times, want once per hint", n)
		}
		if n := len(r.audit.entries(t, "bind")); n != 1 {
			t.Errorf("%d audit lines say so, want 1", n)
		}
		if got := r.Registrations()[0]; got.Reason != "the container is privileged" || got.State != broker.Reserved {
			t.Errorf("the registration is %s because %q", got.State, got.Reason)
		}
		r.attestor.Refuse("jupyter-alice", nil)
		r.attestor.Run("jupyter-alice", 101)
		synctest.Wait()
		r.token(r.peer("alice", 101), broker.Want{})
	})
}

func TestTwoServersMayNotShareAContainer(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.running("alice", 100)
		_, err := r.Register(context.Background(), "main", broker.RegisterRequest{User: "mallory", ContainerName: "jupyter-alice"})
		if err != nil {
			t.Fatal(err)
		}
		r.refused(r.peer("mallory", 100), broker.Want{}, broker.ErrDenied)
	})
}

func TestNoRecordNoToken(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.audit.fail(errors.New("disk full"), 0)
		r.refused(p, broker.Want{}, broker.ErrUnavailable)
		r.audit.fail(nil, 0)
		r.token(p, broker.Want{})
	})
}

func TestDisconnectDuringASlowRecordStopsTheAnswer(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		other := r.second()
		defer other.Close()
		var once sync.Once
		r.audit.slow = func() {
			once.Do(func() {
				if _, _, err := other.Disconnect(context.Background(), "root", "main", "alice", ""); err != nil {
					t.Errorf("Disconnect: %v", err)
				}
				time.Sleep(time.Second) // a slow disk
			})
		}
		r.refused(p, broker.Want{}, broker.ErrUnavailable)
		r.refused(p, broker.Want{}, broker.ErrRevoked)
	})
}

func TestMinTTLRefreshesOnceAndNoMore(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.token(p, broker.Want{})
		time.Sleep(2 * time.Minute)
		tok := r.token(p, broker.Want{MinTTL: 4 * time.Minute})
		if tok.ExpiresIn < 4*time.Minute {
			t.Errorf("token lasts %s, want 4m at least", tok.ExpiresIn)
		}
		before := r.provider.Calls("exchange")
		for range 5 {
			r.token(p, broker.Want{MinTTL: time.Hour}) // more than the provider gives
		}
		if n := r.provider.Calls("exchange") - before; n > 0 {
			t.Errorf("%d more exchanges for a life that can't be had, want 0", n)
		}
	})
}

func TestRejectedTokenIsReplacedOncePerHalfMinute(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		first := r.token(p, broker.Want{})
		if tok := r.token(p, broker.Want{Rejected: first.Access.Fingerprint()}); !tok.Access.Equal(first.Access) {
			t.Error("a token of a moment ago was given up")
		}
		time.Sleep(31 * time.Second)
		second := r.token(p, broker.Want{Rejected: first.Access.Fingerprint()})
		if second.Access.Equal(first.Access) {
			t.Error("the rejected token was answered again")
		}
		if tok := r.token(p, broker.Want{Rejected: first.Access.Fingerprint()}); !tok.Access.Equal(second.Access) {
			t.Error("a token that is not the current one had an effect")
		}
	})
}

func TestTokenWiderThanTheDecisionIsNeitherAnsweredNorKept(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		// This provider can't narrow: its one token has scope "all".
		if said := r.refused(p, broker.Want{}, broker.ErrUnsatisfiable); said.Sentence != `keycloak adds the scope "all", which you did not ask for` {
			t.Errorf("said %q", said.Sentence)
		}
	}, func(c *broker.Config) {
		c.Providers = []broker.Provider{never{c.Providers[0]}}
	})
}

// never is a provider that can't narrow.
type never struct{ broker.Provider }

func (p never) Info() broker.ProviderInfo {
	info := p.Provider.Info()
	info.Narrowing = broker.Never
	return info
}

func TestRightsThatChangedWithoutARevisionAreSeenByTheNextRefresh(t *testing.T) {
	f := func(r *rig, want broker.Want) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		other := r.second()
		defer other.Close()
		q := other.running("alice", 200)
		expire()
		r.provider.SetRoles("alice", "student")
		if _, _, err := r.Providers(context.Background(), p); err != nil { // with the old roles
			t.Fatal(err)
		}
		r.store.Before(func(method string, _ broker.Key) error {
			if method == "Move" {
				return errors.New("the broker died")
			}
			return nil
		})
		other.refused(q, want, broker.ErrUnavailable)
		r.store.Before(nil)
		r.refused(p, want, broker.ErrDenied)
	}
	t.Run("narrowed by an exchange", func(t *testing.T) {
		inBubble(t, func(r *rig) { f(r, broker.Want{}) })
	})
	t.Run("not narrowed", func(t *testing.T) {
		inBubble(t, func(r *rig) { f(r, broker.Want{Scopes: []string{"all"}}) }, func(c *broker.Config) {
			c.Providers = []broker.Provider{never{c.Providers[0]}}
			c.Rules = []broker.Rule{{Provider: "keycloak", Roles: []string{"researcher"}, Scopes: []string{"all"}}}
		})
	})
}

func TestProviderDownServesWhatIsValid(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		first := r.token(p, broker.Want{})
		down := broker.ProviderError{Class: broker.TryLater, Status: 503, RetryAfter: 7 * time.Second}
		for range 9 {
			r.provider.Next(brokertest.Answer{Err: &down})
		}
		time.Sleep(4*time.Minute + 45*time.Second) // within the margin
		if tok := r.token(p, broker.Want{}); !tok.Access.Equal(first.Access) {
			t.Error("got another token from a provider that is down")
		}
		time.Sleep(time.Minute)
		if said := r.refused(p, broker.Want{}, broker.ErrProviderDown); said.RetryAfter != 7*time.Second {
			t.Errorf("said to retry after %s, want what the provider asked for", said.RetryAfter)
		}
	})
}

func TestStoreDownRefusesWithinALease(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.token(p, broker.Want{})
		r.store.Fail(errors.New("connection refused"))
		time.Sleep(300 * time.Millisecond)
		r.refused(p, broker.Want{}, broker.ErrUnavailable)
		r.store.Fail(nil)
		r.token(p, broker.Want{})
	})
}

func TestProvidersListsWhatCanBeHad(t *testing.T) {
	inBubble(t, func(r *rig) {
		p := r.running("alice", 100)
		want := []broker.ProviderStatus{{Name: "keycloak", Login: true, State: broker.NoGrant}}
		list, ref, err := r.Providers(context.Background(), p)
		if diff := cmp.Diff(want, list); err != nil || ref == "" || diff != "" {
			t.Errorf("before the login: %v, ref %q, %s", err, ref, diff)
		}
		r.loggedIn("alice")
		want[0].State, want[0].Audiences, want[0].Scopes = broker.Live, []string{"storage"}, []string{"read", "write"}
		list, _, err = r.Providers(context.Background(), p)
		if diff := cmp.Diff(want, list); err != nil || diff != "" {
			t.Errorf("after the login: %v, %s", err, diff)
		}
	})
}

func TestRevisionThatTookTooLongToReadProvesNothing(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.token(p, broker.Want{})
		other := r.second()
		defer other.Close()
		time.Sleep(time.Second)
		// From now on each answer of the store is a second old when it arrives.
		r.store.After(func(method string, _ broker.Key) error {
			if method == "Pulse" {
				time.Sleep(time.Second)
			}
			return nil
		})
		var stopped time.Time
		var both sync.WaitGroup
		both.Go(func() {
			time.Sleep(1100 * time.Millisecond)
			gone, _, err := other.Disconnect(context.Background(), "root", "main", "alice", "")
			if err != nil {
				t.Errorf("Disconnect: %v", err)
				return
			}
			stopped = gone[0].IssuingStoppedAt
		})
		_, err := r.Token(context.Background(), p, broker.Want{})
		left := time.Now()
		both.Wait()
		if err == nil && left.After(stopped) {
			t.Errorf("a token left at %s; issuing had stopped at %s", left, stopped)
		}
	})
}

func TestRuleWithoutAudienceAndScopesGetsAnExchangedToken(t *testing.T) {
	inBubble(t, func(r *rig) {
		handle := r.loggedIn("alice")
		p := r.running("alice", 100)
		tok := r.token(p, broker.Want{})
		if r.provider.Calls("exchange") != 1 || len(tok.Scopes) != 0 {
			t.Errorf("the container got a token with scopes %v after %d exchanges", tok.Scopes, r.provider.Calls("exchange"))
		}
		s, err := r.CheckSession(context.Background(), "main", "keycloak", handle, "alice", "")
		if err != nil || s.Token == nil || s.Token.Access.Equal(tok.Access) {
			t.Errorf("the hub got the container's token: %+v, %v", s, err)
		}
	}, func(c *broker.Config) {
		c.Rules = []broker.Rule{{Provider: "keycloak", Roles: []string{"researcher"}, Unverified: true}}
	})
}

func TestStoreThatHangsIsNoInternalError(t *testing.T) {
	inBubble(t, func(r *rig) {
		handle := r.loggedIn("alice")
		time.Sleep(1500 * time.Millisecond) // between two beats
		r.store.Before(func(method string, _ broker.Key) error {
			if method == "Pulse" {
				time.Sleep(10 * time.Second)
			}
			return nil
		})
		_, err := r.RefreshHub(context.Background(), "main", "keycloak", handle)
		refused(t, err, broker.ErrUnavailable)
	})
}

func TestRefusalNamesNoToken(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		r.token(r.running("alice", 100), broker.Want{})
		other := r.second()
		defer other.Close()
		p := other.running("alice", 200)
		var once sync.Once
		r.store.Before(func(method string, k broker.Key) error {
			if method == "Get" && k.Kind == "token" { // the other broker has matched, and looks for the token
				once.Do(func() {
					if _, _, err := r.Disconnect(context.Background(), "root", "main", "alice", ""); err != nil {
						t.Errorf("Disconnect: %v", err)
					}
					time.Sleep(time.Second)
				})
			}
			return nil
		})
		other.refused(p, broker.Want{}, broker.ErrRevoked)
		if e := other.audit.entries(t, "token"); len(e) != 1 || e[0].Token != "" || e[0].ExpiresAt != nil {
			t.Errorf("audit lines: %+v", e)
		}
	})
}

func TestServerThatIsUnregisteredMeanwhileGetsNoToken(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		expire()
		r.provider.Next(brokertest.Answer{Before: func() {
			if _, err := r.Unregister(context.Background(), "main", "alice", "", 0); err != nil {
				t.Errorf("Unregister: %v", err)
			}
		}})
		r.refused(p, broker.Want{}, broker.ErrUnknownPeer)
	})
}

func TestTokenOfOlderRightsIsNotServed(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.provider.SetRoles("alice", "researcher", "guest")
		handle := r.loggedIn("alice")
		p := r.running("alice", 100)
		first := r.token(p, broker.Want{})
		time.Sleep(10 * time.Second)
		r.provider.SetRoles("alice", "researcher")
		if _, err := r.RefreshHub(context.Background(), "main", "keycloak", handle); err != nil {
			t.Fatal(err)
		}
		if tok := r.token(p, broker.Want{}); tok.Access.Equal(first.Access) {
			t.Error("a token from before the roles changed was served")
		}
	})
}

func TestTokenIsNotServedInTheSecondThatItsEndMayFallInto(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.token(p, broker.Want{})
		time.Sleep(5*time.Minute - 500*time.Millisecond)
		r.provider.Next(brokertest.Answer{Err: &broker.ProviderError{Class: broker.TryLater}})
		r.refused(p, broker.Want{}, broker.ErrProviderDown)
	})
}
