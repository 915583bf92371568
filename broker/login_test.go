package broker_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
)

func TestHubGetsAHandleInThePlaceOfTheRefreshToken(t *testing.T) {
	inBubble(t, func(r *rig) {
		tok, err := r.Login(context.Background(), "main", "keycloak", codeOf("alice"))
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(tok.Handle.Reveal(), "tbh_") || tok.Access.IsZero() || tok.IDToken.IsZero() || tok.Type != "Bearer" || tok.Ref == "" {
			t.Errorf("the hub got %+v", tok)
		}
	})
}

func TestLoginThatTheHubRefusesLeavesNothing(t *testing.T) {
	inBubble(t, func(r *rig) {
		live := r.loggedIn("alice")
		before := r.grant("alice")
		refusedLater := r.login("alice")
		time.Sleep(11 * time.Minute)
		if g := r.grant("alice"); g.LoginAt != before.LoginAt {
			t.Error("a login that was never claimed is in the grant")
		}
		_, err := r.Claim(context.Background(), "main", "keycloak", refusedLater, "alice")
		refused(t, err, broker.ErrLoginRequired)
		if _, err := r.Claim(context.Background(), "main", "keycloak", live, "alice"); err != nil {
			t.Errorf("the live handle: %v", err)
		}
		r.login("mallory")
		if all, err := r.Grants(context.Background(), "", "mallory"); err != nil || len(all) != 0 {
			t.Errorf("an unclaimed login left the grants %v, %v", all, err)
		}
	})
}

func TestLostClaimIsMadeGood(t *testing.T) {
	inBubble(t, func(r *rig) {
		s, err := r.CheckSession(context.Background(), "main", "keycloak", r.login("alice"), "alice", "")
		if err != nil || !s.Active || r.grant("alice").State != broker.Live {
			t.Errorf("by CheckSession: %+v, %v", s, err)
		}
		got, err := r.Register(context.Background(), "main", broker.RegisterRequest{User: "bob", ContainerName: "b", Handle: r.login("bob")})
		if err != nil || got.Grant != broker.Live || r.grant("bob").State != broker.Live {
			t.Errorf("by Register: %+v, %v", got, err)
		}
	})
}

func TestClaimHalfDoneIsFinishedByTheNext(t *testing.T) {
	for _, kind := range []string{"link", "grant", "handle"} {
		t.Run("after the "+kind, func(t *testing.T) {
			inBubble(t, func(r *rig) {
				handle := r.login("alice")
				r.store.After(func(method string, k broker.Key) error {
					if method == "Put" && k.Kind == kind {
						return errors.New("the answer is lost")
					}
					return nil
				})
				if _, err := r.Claim(context.Background(), "main", "keycloak", handle, "alice"); !errors.Is(err, broker.ErrUnavailable) {
					t.Fatalf("Claim: %v", err)
				}
				r.store.After(nil)
				if _, err := r.Claim(context.Background(), "main", "keycloak", handle, "alice"); err != nil {
					t.Fatalf("the second Claim: %v", err)
				}
				before := r.grant("alice")
				time.Sleep(time.Second)
				if _, err := r.Claim(context.Background(), "main", "keycloak", handle, "alice"); err != nil {
					t.Fatalf("the third Claim: %v", err)
				}
				if after := r.grant("alice"); after.Version != before.Version {
					t.Error("the login was stored twice")
				}
				r.token(r.running("alice", 100), broker.Want{})
			})
		})
	}
}

func TestClaimAfterARefreshDoesNotBringTheOldTokenBack(t *testing.T) {
	inBubble(t, func(r *rig) {
		handle := r.login("alice")
		r.store.Before(func(method string, k broker.Key) error {
			if method == "Put" && k.Kind == "handle" {
				return errors.New("the store goes away before the handle is written")
			}
			return nil
		})
		r.Claim(context.Background(), "main", "keycloak", handle, "alice")
		r.store.Before(nil)
		expire()
		p := r.running("alice", 100)
		r.token(p, broker.Want{}) // rotates
		if _, err := r.Claim(context.Background(), "main", "keycloak", handle, "alice"); err != nil {
			t.Fatal(err)
		}
		expire()
		r.token(p, broker.Want{})
	})
}

func TestGrantBelongsToOneUserAndAUserToOneSubject(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		_, err := r.Claim(context.Background(), "main", "keycloak", r.login("alice"), "mallory")
		refused(t, err, broker.ErrDenied)
		_, err = r.Claim(context.Background(), "main", "keycloak", r.login("eve"), "alice")
		refused(t, err, broker.ErrDenied)
		s, err := r.CheckSession(context.Background(), "main", "keycloak", r.login("eve"), "alice", "")
		if err != nil || s.Active {
			t.Errorf("CheckSession with another's handle: %+v, %v", s, err)
		}
		if g := r.grant("alice"); g.Key.Sub != "alice" {
			t.Errorf("the grant is %s's", g.Key.Sub)
		}
	})
}

func TestHandleIsWorthNothingElsewhere(t *testing.T) {
	inBubble(t, func(r *rig) {
		handle := r.loggedIn("alice")
		_, err := r.Claim(context.Background(), "other", "keycloak", handle, "alice")
		refused(t, err, broker.ErrLoginRequired)
		_, err = r.RefreshHub(context.Background(), "other", "keycloak", handle)
		refused(t, err, broker.ErrLoginRequired)
		_, err = r.RefreshHub(context.Background(), "main", "keycloak", broker.NewSecret("tbh_made_up"))
		refused(t, err, broker.ErrLoginRequired)
		if n := r.provider.Calls("refresh"); n != 0 {
			t.Errorf("a handle was sent to the provider %d times", n)
		}
	}, adopting)
}

func TestLoginWithoutItsProofsIsNotExchanged(t *testing.T) {
	inBubble(t, func(r *rig) {
		for _, tt := range []struct {
			code, verifier, redirect, says string
		}{
			{"", "v", "https://hub/cb", "code is empty"},
			{"alice", "", "https://hub/cb", "code_verifier is empty"},
			{"alice", "v", "https://evil/cb", "redirect_uri is not the one in the token broker's configuration"},
		} {
			_, err := r.Login(context.Background(), "main", "keycloak", broker.CodeGrant{
				Code: broker.NewSecret(tt.code), Verifier: broker.NewSecret(tt.verifier), RedirectURI: tt.redirect,
			})
			if said := refused(t, err, broker.ErrInvalid); said.Sentence != tt.says {
				t.Errorf("said %q, want %q", said.Sentence, tt.says)
			}
		}
		if n := r.provider.Calls("login"); n != 0 {
			t.Errorf("%d codes were exchanged", n)
		}
	}, func(c *broker.Config) {
		p := brokertest.NewProvider("keycloak", func(i *broker.ProviderInfo) { i.RedirectURI = "https://hub/cb" })
		c.Providers = []broker.Provider{p}
	})
}

func TestNamesAreWhateverAHubAllows(t *testing.T) {
	inBubble(t, func(r *rig) {
		for _, user := range []broker.UserID{"a b", "a/b", "{a}", "ünï", "a@b.c", broker.UserID(strings.Repeat("ä", 255))} {
			handle := r.login(string(user))
			if _, err := r.Claim(context.Background(), "main", "keycloak", handle, user); err != nil {
				t.Errorf("Claim for %q: %v", user, err)
			}
			if g := r.grant(user); g.User != user {
				t.Errorf("the grant of %q is %q's", user, g.User)
			}
		}
		for _, user := range []broker.UserID{"", "a\x00b", "a\nb", "\xff", broker.UserID(strings.Repeat("a", 256))} {
			_, err := r.Claim(context.Background(), "main", "keycloak", r.login("x"), user)
			if said := refused(t, err, broker.ErrInvalid); !strings.HasPrefix(said.Sentence, "user ") {
				t.Errorf("Claim for %q: said %q, want the field's name first", user, said.Sentence)
			}
		}
	})
}

func TestUnclaimedLoginsAreBounded(t *testing.T) {
	inBubble(t, func(r *rig) {
		for range 1000 {
			r.login("alice")
		}
		_, err := r.Login(context.Background(), "main", "keycloak", codeOf("bob"))
		refused(t, err, broker.ErrLimited)
		time.Sleep(11 * time.Minute)
		r.loggedIn("bob")
	})
}

func TestHubIsNeverGivenTheTokenItGaveUp(t *testing.T) {
	inBubble(t, func(r *rig) {
		handle := r.loggedIn("alice")
		ask := func() broker.HubToken {
			t.Helper()
			tok, err := r.RefreshHub(context.Background(), "main", "keycloak", handle)
			if err != nil {
				t.Fatalf("RefreshHub: %v", err)
			}
			if !tok.Handle.Equal(handle) {
				t.Error("the handle changed")
			}
			return tok
		}
		first := ask()
		if again := ask(); !again.Access.Equal(first.Access) {
			t.Error("two who asked at once got different tokens")
		}
		time.Sleep(6 * time.Second)
		if later := ask(); later.Access.Equal(first.Access) {
			t.Error("the hub got back the token it had been given")
		}
	})
}

func TestHubIsNotGivenTheTokenOfItsLoginAgain(t *testing.T) {
	inBubble(t, func(r *rig) {
		login, err := r.Login(context.Background(), "main", "keycloak", codeOf("alice"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.Claim(context.Background(), "main", "keycloak", login.Handle, "alice"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(6 * time.Second)
		tok, err := r.RefreshHub(context.Background(), "main", "keycloak", login.Handle)
		if err != nil || tok.Access.Equal(login.Access) {
			t.Errorf("RefreshHub after the login's token was refused: the same one again, or %v", err)
		}
	})
}

func TestHubIsAnsweredWithinItsPatience(t *testing.T) {
	inBubble(t, func(r *rig) {
		handle := r.loggedIn("alice")
		expire()
		r.provider.Next(brokertest.Answer{Before: func() { time.Sleep(20 * time.Second) }})
		began := time.Now()
		_, err := r.RefreshHub(context.Background(), "main", "keycloak", handle)
		refused(t, err, broker.ErrProviderDown)
		s, err := r.CheckSession(context.Background(), "main", "keycloak", handle, "alice", "")
		if err != nil || !s.Active || !s.Stale || s.Reason == "" {
			t.Errorf("CheckSession while the provider hangs: %+v, %v", s, err)
		}
		if took := time.Since(began); took > 6*time.Second {
			t.Errorf("two answers took %s", took)
		}
		time.Sleep(20 * time.Second)
		if _, err := r.RefreshHub(context.Background(), "main", "keycloak", handle); err != nil {
			t.Errorf("after the provider's late answer: %v", err)
		}
		if n := r.provider.Calls("refresh"); n != 1 {
			t.Errorf("%d refreshes, want the one", n)
		}
	})
}

func TestCheckSessionBringsAnotherTokenOnlyIfThereIsOne(t *testing.T) {
	inBubble(t, func(r *rig) {
		tok, err := r.Login(context.Background(), "main", "keycloak", codeOf("alice"))
		if err != nil {
			t.Fatal(err)
		}
		check := func(have broker.Secret) broker.Session {
			t.Helper()
			s, err := r.CheckSession(context.Background(), "main", "keycloak", tok.Handle, "alice", have.Fingerprint())
			if err != nil || !s.Active || s.Stale {
				t.Fatalf("CheckSession: %+v, %v", s, err)
			}
			return s
		}
		if s := check(tok.Access); s.Token != nil {
			t.Error("the hub was told a token that it has")
		}
		expire()
		s := check(tok.Access)
		if s.Token == nil || s.Token.Access.Equal(tok.Access) || !s.Token.Handle.Equal(tok.Handle) {
			t.Errorf("after expiry: %+v", s.Token)
		}
	})
}

// adopting lets refresh tokens from before the broker become grants.
func adopting(c *broker.Config) {
	c.Providers = []broker.Provider{adopts{c.Providers[0]}}
}

type adopts struct{ broker.Provider }

func (p adopts) Info() broker.ProviderInfo {
	info := p.Provider.Info()
	info.Adopt = true
	return info
}

func TestRefreshTokenFromBeforeTheBrokerIsAdopted(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.provider.Login(context.Background(), codeOf("alice")) // not through the broker
		old := broker.NewSecret(r.provider.RefreshToken("alice"))
		var all sync.WaitGroup
		for range 4 {
			all.Go(func() {
				s, err := r.CheckSession(context.Background(), "main", "keycloak", old, "alice", "")
				if err != nil || !s.Active || s.Token == nil || !strings.HasPrefix(s.Token.Handle.Reveal(), "tbh_") {
					t.Errorf("CheckSession: %+v, %v", s, err)
				}
			})
		}
		all.Wait()
		if n := r.provider.Calls("refresh"); n != 1 {
			t.Errorf("the old token was sent %d times", n)
		}
		r.token(r.running("alice", 100), broker.Want{})
		// Requests that still carry the old token go on working.
		s, err := r.CheckSession(context.Background(), "main", "keycloak", old, "alice", "")
		if err != nil || !s.Active || s.Token == nil {
			t.Errorf("with the old token again: %+v, %v", s, err)
		}
	}, adopting)
}

func TestAdoptionByTheTokenEndpointIsClaimedLater(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.provider.Login(context.Background(), codeOf("alice"))
		tok, err := r.RefreshHub(context.Background(), "main", "keycloak", broker.NewSecret(r.provider.RefreshToken("alice")))
		if err != nil || !strings.HasPrefix(tok.Handle.Reveal(), "tbh_") {
			t.Fatalf("RefreshHub: %+v, %v", tok, err)
		}
		if _, err := r.Claim(context.Background(), "main", "keycloak", tok.Handle, "alice"); err != nil {
			t.Fatalf("Claim: %v", err)
		}
		r.token(r.running("alice", 100), broker.Want{})
	}, adopting)
}

func TestAdoptionFailsAsARefreshDoes(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.provider.Login(context.Background(), codeOf("alice"))
		old := broker.NewSecret(r.provider.RefreshToken("alice"))
		r.provider.Next(brokertest.Answer{Err: &broker.ProviderError{Class: broker.TryLater}})
		s, err := r.CheckSession(context.Background(), "main", "keycloak", old, "alice", "")
		if err != nil || !s.Active || !s.Stale {
			t.Errorf("with the provider down: %+v, %v; want active and stale", s, err)
		}
		r.provider.EndSession("alice")
		for range 2 {
			s, err = r.CheckSession(context.Background(), "main", "keycloak", old, "alice", "")
			if err != nil || s.Active {
				t.Errorf("with a dead token: %+v, %v; want not active", s, err)
			}
		}
		if n := r.provider.Calls("refresh"); n != 2 {
			t.Errorf("%d refreshes, want 2: a dead token is sent once", n)
		}
	}, adopting)
}

func TestLostAnswerOfAnAdoptionIsTriedAgainOnce(t *testing.T) {
	for _, spent := range []bool{false, true} {
		inBubble(t, func(r *rig) {
			r.provider.Login(context.Background(), codeOf("alice"))
			old := broker.NewSecret(r.provider.RefreshToken("alice"))
			r.provider.Next(lostAnswer(spent))
			s, err := r.CheckSession(context.Background(), "main", "keycloak", old, "alice", "")
			if err != nil || s.Active == spent || s.Stale {
				t.Errorf("spent %t: the session is %+v, %v", spent, s, err)
			}
			if n := r.provider.Calls("refresh"); n != 2 {
				t.Errorf("spent %t: %d requests, want the one and its one retry", spent, n)
			}
		}, adopting)
	}
}

func TestUnknownTokenIsNotSentWhereAdoptionIsOff(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.provider.Login(context.Background(), codeOf("alice"))
		s, err := r.CheckSession(context.Background(), "main", "keycloak", broker.NewSecret(r.provider.RefreshToken("alice")), "alice", "")
		if err != nil || s.Active || r.provider.Calls("refresh") != 0 {
			t.Errorf("%+v, %v, %d refreshes", s, err, r.provider.Calls("refresh"))
		}
	})
}

func TestRegisterSaysWhatTheUserHas(t *testing.T) {
	inBubble(t, func(r *rig) {
		ctx := context.Background()
		got, err := r.Register(ctx, "main", broker.RegisterRequest{User: "alice", ContainerName: "c"})
		if err != nil || got.Grant != broker.NoGrant || got.Directory == "" || got.Helper != "/opt/access-token" {
			t.Errorf("a user without a grant: %+v, %v", got, err)
		}
		_, err = r.Register(ctx, "main", broker.RegisterRequest{User: "alice", ContainerName: "c", RequireGrant: true})
		refused(t, err, broker.ErrLoginRequired)
		_, err = r.Register(ctx, "main", broker.RegisterRequest{User: "alice", ContainerName: "c", Provider: "gitlab"})
		refused(t, err, broker.ErrInvalid)
		_, err = r.Register(ctx, "main", broker.RegisterRequest{User: "alice", Server: "a\tb"})
		refused(t, err, broker.ErrInvalid)
	})
}

func TestLateWordsOfAnOlderGenerationAreVoid(t *testing.T) {
	inBubble(t, func(r *rig) {
		ctx := context.Background()
		r.loggedIn("alice")
		p := r.running("alice", 100)
		first := r.Registrations()[0].Generation
		r.running("alice", 101)
		if ref, err := r.Unregister(ctx, "main", "alice", "", first); err != nil || ref != "" {
			t.Errorf("Unregister of the generation before: %q, %v; want nothing done", ref, err)
		}
		r.token(r.peer("alice", 101), broker.Want{})
		r.refused(p, broker.Want{}, broker.ErrUnknownPeer)
		if ref, err := r.Unregister(ctx, "main", "nobody", "", 0); err != nil || ref != "" {
			t.Errorf("Unregister of somebody unknown: %q, %v", ref, err)
		}
		if ref, err := r.Unregister(ctx, "main", "alice", "", 0); err != nil || ref == "" {
			t.Errorf("Unregister: %q, %v", ref, err)
		}
		r.refused(r.peer("alice", 101), broker.Want{}, broker.ErrUnknownPeer)
		if len(r.sockets.Opened()) != 0 || len(r.Registrations()) != 0 {
			t.Error("the server's socket or registration is still there")
		}
		time.Sleep(time.Second)
		r.running("alice", 102)
		if again := r.Registrations()[0].Generation; again <= first {
			t.Errorf("generation %d after %d: it fell", again, first)
		}
	})
}

func TestOneServerPerUID(t *testing.T) {
	inBubble(t, func(r *rig) {
		uid := uint32(1000)
		ctx := context.Background()
		if _, err := r.Register(ctx, "main", broker.RegisterRequest{User: "alice", UID: &uid}); err != nil {
			t.Fatal(err)
		}
		_, err := r.Register(ctx, "main", broker.RegisterRequest{User: "bob", UID: &uid})
		refused(t, err, broker.ErrInvalid)
		if _, err := r.Register(ctx, "main", broker.RegisterRequest{User: "alice", UID: &uid}); err != nil {
			t.Errorf("the same server again: %v", err)
		}
	})
}

func TestRestartedBrokerServesRunningContainers(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		before := r.token(p, broker.Want{})
		r.Close()
		r.sockets = brokertest.NewSockets()
		r.cfg.Sockets = r.sockets
		r.start()
		synctest.Wait()
		if got := r.Registrations(); len(got) != 1 || got[0].State != broker.Bound || len(r.sockets.Opened()) != 1 {
			t.Errorf("after the restart: %+v", got)
		}
		if tok := r.token(r.peer("alice", 100), broker.Want{}); !tok.Access.Equal(before.Access) {
			t.Error("the token in the store was not used")
		}
	})
}

func TestStartNeedsTheStoreAndNothingElse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.store.Fail(errors.New("connection refused"))
		b, err := broker.New(r.cfg)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Start(context.Background()); !errors.Is(err, broker.ErrUnavailable) {
			t.Errorf("Start without a store: %v", err)
		}
		b.Close()
	})
}

func TestChangedRecordIsAClearError(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		var at broker.Key
		r.store.Each(func(k broker.Key, _ broker.Record) {
			if k.Kind == "grant" {
				at = k
			}
		})
		r.store.Tamper(at, []byte("somebody else's box"))
		time.Sleep(31 * time.Second) // what was read before is no longer believed
		_, err := r.Token(context.Background(), p, broker.Want{})
		var said *broker.Error
		if !errors.As(err, &said) || said.Code != broker.Internal || said.Ref == "" {
			t.Fatalf("got %v", err)
		}
		if !strings.Contains(r.audit.String(), `grant[\"main\" \"keycloak\" \"alice\"]`) {
			t.Errorf("the audit does not name the record: %s", r.audit.String())
		}
	})
}

func TestNewNamesWhatIsMissing(t *testing.T) {
	_, err := broker.New(broker.Config{
		Hubs:  map[broker.HubID]broker.Hub{"main": {Login: "nowhere"}},
		Rules: []broker.Rule{{Provider: "elsewhere"}},
	})
	for _, want := range []string{"Store is missing", "Audit is missing", "hub main: login", "rule 1: "} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("New: %v; want %q in it", err, want)
		}
	}
}

func TestUnregisterHalfDoneIsFinishedByTheNext(t *testing.T) {
	inBubble(t, func(r *rig) {
		ctx := context.Background()
		r.running("alice", 100)
		r.store.Before(func(method string, _ broker.Key) error {
			if method == "Delete" {
				return errors.New("away")
			}
			return nil
		})
		_, err := r.Unregister(ctx, "main", "alice", "", 0)
		refused(t, err, broker.ErrUnavailable)
		r.store.Before(nil)
		if ref, err := r.Unregister(ctx, "main", "alice", "", 0); err != nil || ref == "" {
			t.Errorf("Unregister again: %q, %v", ref, err)
		}
		r.Close()
		r.start()
		if got := r.Registrations(); len(got) != 0 {
			t.Errorf("after a restart there are still %+v", got)
		}
	})
}

func TestRegisterHalfDoneCanBeUnregistered(t *testing.T) {
	inBubble(t, func(r *rig) {
		ctx := context.Background()
		r.running("alice", 100)
		before := r.Registrations()[0].Generation
		r.store.Before(func(method string, k broker.Key) error {
			if method == "Add" && k.Kind == "registrations" {
				return errors.New("away")
			}
			return nil
		})
		_, err := r.Register(ctx, "main", broker.RegisterRequest{User: "alice", ContainerName: "jupyter-alice"})
		refused(t, err, broker.ErrUnavailable)
		r.store.Before(nil)
		if ref, err := r.Unregister(ctx, "main", "alice", "", before); err != nil || ref == "" {
			t.Errorf("Unregister: %q, %v", ref, err)
		}
		r.Close()
		r.start()
		if got := r.Registrations(); len(got) != 0 {
			t.Errorf("after a restart there are still %+v", got)
		}
	})
}

func TestOneServerPerUIDAlsoAtOnce(t *testing.T) {
	inBubble(t, func(r *rig) {
		uid := uint32(1000)
		r.store.Before(func(method string, k broker.Key) error {
			time.Sleep(time.Second)
			return nil
		})
		var all sync.WaitGroup
		for _, user := range []broker.UserID{"alice", "bob"} {
			all.Go(func() { r.Register(context.Background(), "main", broker.RegisterRequest{User: user, UID: &uid}) })
		}
		all.Wait()
		r.store.Before(nil)
		if got := r.Registrations(); len(got) != 1 {
			t.Errorf("%d servers run as uid 1000, want 1: %+v", len(got), got)
		}
	})
}

func TestHubIsNeverGivenTheTokenOfItsLoginAgain(t *testing.T) {
	inBubble(t, func(r *rig) {
		first, err := r.Login(context.Background(), "main", "keycloak", codeOf("alice"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.Claim(context.Background(), "main", "keycloak", first.Handle, "alice"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		got, err := r.RefreshHub(context.Background(), "main", "keycloak", first.Handle)
		if err != nil || got.Access.Equal(first.Access) {
			t.Errorf("RefreshHub: %v; want another token than the login's", err)
		}
	})
}

func TestHubIsNotGivenTheTokenItGaveUpWhileTheProviderIsDown(t *testing.T) {
	inBubble(t, func(r *rig) {
		handle := r.loggedIn("alice")
		if _, err := r.RefreshHub(context.Background(), "main", "keycloak", handle); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		r.provider.Next(brokertest.Answer{Err: &broker.ProviderError{Class: broker.TryLater}})
		_, err := r.RefreshHub(context.Background(), "main", "keycloak", handle)
		refused(t, err, broker.ErrProviderDown)
	})
}

func TestHubsTokenDoesNotLeaveAfterADisconnect(t *testing.T) {
	ask := map[string]func(r *rig, h broker.Secret) error{
		"RefreshHub": func(r *rig, h broker.Secret) error {
			_, err := r.RefreshHub(context.Background(), "main", "keycloak", h)
			return err
		},
		"CheckSession": func(r *rig, h broker.Secret) error {
			s, err := r.CheckSession(context.Background(), "main", "keycloak", h, "alice", "")
			if err == nil && s.Token == nil {
				err = errors.New("no token")
			}
			return err
		},
	}
	for name, ask := range ask {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(r *rig) {
				handle := r.loggedIn("alice")
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
				if err := ask(r, handle); err == nil {
					t.Error("a token left after the disconnect")
				}
			})
		})
	}
}

func TestDisabledAccountIsNotServedByAClaimThatWasHalfDone(t *testing.T) {
	inBubble(t, func(r *rig) {
		handle := r.login("alice")
		r.store.Before(func(method string, k broker.Key) error {
			if method == "Put" && k.Kind == "handle" {
				return errors.New("the store goes away before the handle is written")
			}
			return nil
		})
		r.Claim(context.Background(), "main", "keycloak", handle, "alice")
		r.store.Before(nil)
		p := r.running("alice", 100)
		tok := r.token(p, broker.Want{})
		time.Sleep(31 * time.Second)
		r.provider.EndSession("alice")
		r.provider.Next(brokertest.Answer{Err: &broker.ProviderError{Class: broker.Disabled}})
		r.refused(p, broker.Want{Rejected: tok.Access.Fingerprint()}, broker.ErrDenied)
		s, err := r.CheckSession(context.Background(), "main", "keycloak", handle, "alice", "")
		if err != nil || s.Active {
			t.Errorf("CheckSession of a disabled account: %+v, %v", s, err)
		}
	})
}

func TestTwoBrokersAdoptOnce(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.provider.Login(context.Background(), codeOf("alice"))
		old := broker.NewSecret(r.provider.RefreshToken("alice"))
		other := r.second()
		defer other.Close()
		r.provider.Next(brokertest.Answer{Before: func() { time.Sleep(time.Second) }})
		var all sync.WaitGroup
		for _, b := range []*rig{r, other} {
			all.Go(func() {
				s, err := b.CheckSession(context.Background(), "main", "keycloak", old, "alice", "")
				if err != nil || !s.Active {
					t.Errorf("CheckSession: %+v, %v", s, err)
				}
			})
		}
		all.Wait()
		for _, b := range []*rig{r, other} {
			s, err := b.CheckSession(context.Background(), "main", "keycloak", old, "alice", "")
			if err != nil || !s.Active || s.Stale || s.Token == nil {
				t.Errorf("CheckSession afterwards: %+v, %v", s, err)
			}
		}
		if n := r.provider.Calls("refresh"); n != 1 {
			t.Errorf("the old token was sent %d times", n)
		}
	}, adopting)
}

func TestAdoptedTokenIsStoredOnceTheStoreIsBack(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.provider.Login(context.Background(), codeOf("alice"))
		old := broker.NewSecret(r.provider.RefreshToken("alice"))
		r.provider.Next(brokertest.Answer{Before: func() { r.store.Fail(errors.New("away")) }})
		time.AfterFunc(10*time.Second, func() { r.store.Fail(nil) })
		r.CheckSession(context.Background(), "main", "keycloak", old, "alice", "")
		time.Sleep(20 * time.Second)
		s, err := r.CheckSession(context.Background(), "main", "keycloak", old, "alice", "")
		if err != nil || !s.Active || s.Token == nil {
			t.Errorf("CheckSession: %+v, %v", s, err)
		}
		if n := r.provider.Calls("refresh"); n != 1 {
			t.Errorf("the old token was sent %d times", n)
		}
	}, adopting)
}

func TestAdoptedTokenThatNobodyClaimedIsNotSpentAgain(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.provider.Login(context.Background(), codeOf("alice"))
		old := broker.NewSecret(r.provider.RefreshToken("alice"))
		tok, err := r.RefreshHub(context.Background(), "main", "keycloak", old)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.Claim(context.Background(), "main", "keycloak", tok.Handle, "alice"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(11 * time.Minute)
		r.CheckSession(context.Background(), "main", "keycloak", old, "alice", "") // by somebody who still has it
		r.token(r.running("alice", 100), broker.Want{})
	}, adopting)
}

func TestAdoptionDoesNotReviveADisconnectedGrant(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		if _, _, err := r.Disconnect(context.Background(), "root", "main", "alice", ""); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		r.provider.Login(context.Background(), codeOf("alice")) // not through the broker
		old := broker.NewSecret(r.provider.RefreshToken("alice"))
		s, err := r.CheckSession(context.Background(), "main", "keycloak", old, "alice", "")
		if err != nil || s.Active {
			t.Errorf("CheckSession: %+v, %v; want not active", s, err)
		}
		r.refused(p, broker.Want{}, broker.ErrRevoked)
		r.loggedIn("alice")
		r.token(p, broker.Want{})
	}, adopting)
}

func TestLiveHandleIsWorthNothingToAnotherUser(t *testing.T) {
	inBubble(t, func(r *rig) {
		handle := r.loggedIn("alice")
		s, err := r.CheckSession(context.Background(), "main", "keycloak", handle, "mallory", "")
		if err != nil || s.Active || s.Token != nil {
			t.Errorf("CheckSession of alice's handle for mallory: %+v, %v", s, err)
		}
	})
}

func TestLoginFromBeforeADisconnectIsNotClaimed(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		handle := r.login("alice")
		time.Sleep(time.Second)
		if _, _, err := r.Disconnect(context.Background(), "root", "main", "alice", ""); err != nil {
			t.Fatal(err)
		}
		_, err := r.Claim(context.Background(), "main", "keycloak", handle, "alice")
		refused(t, err, broker.ErrRevoked)
	})
}
