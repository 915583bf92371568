package broker_test

import (
	"context"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
)

// hubsScopes is what the hub's own token is narrowed to in these tests. The provider's
// whole token carries all and openid.
var hubsScopes = []string{"openid", "profile"}

// narrowedHub runs f with a hub that has scopes, for both ways in which a provider
// narrows.
func narrowedHub(t *testing.T, f func(r *rig), edit ...func(*broker.Config)) {
	t.Helper()
	for _, n := range []broker.Narrowing{broker.ByExchange, broker.ByScope} {
		t.Run(string(n), func(t *testing.T) {
			p := brokertest.NewProvider("keycloak", func(i *broker.ProviderInfo) { i.Narrowing = n })
			inBubble(t, func(r *rig) {
				r.provider = p
				p.SetRoles("alice", "researcher")
				f(r)
			}, append([]func(*broker.Config){func(c *broker.Config) {
				c.Providers = []broker.Provider{p}
				c.Hubs = map[broker.HubID]broker.Hub{"main": {Login: "keycloak", Scopes: []string{"profile", "openid"}}}
				c.Rules = []broker.Rule{{Provider: "keycloak", Scopes: []string{"openid", "profile", "read"}}}
			}}, edit...)...)
		})
	}
}

// isNarrow fails unless t is the hub's own token, narrowed.
func isNarrow(t testing.TB, when string, tok *broker.HubToken) {
	t.Helper()
	if tok == nil || tok.Access.IsZero() || !slices.Equal(tok.Scopes, hubsScopes) {
		t.Fatalf("%s the hub got %+v, want a token with the scopes %v", when, tok, hubsScopes)
	}
	if tok.IDToken.IsZero() || tok.ExpiresIn <= 0 {
		t.Errorf("%s the hub got no ID token, or one that is over: %+v", when, tok)
	}
}

func (r *rig) hubLogin(sub string) broker.HubToken {
	r.t.Helper()
	tok, err := r.Login(context.Background(), "main", "keycloak", codeOf(sub))
	if err != nil {
		r.t.Fatalf("Login: %v", err)
	}
	isNarrow(r.t, "at the login", &tok)
	return tok
}

func (r *rig) check(handle, have broker.Secret) broker.Session {
	r.t.Helper()
	s, err := r.CheckSession(context.Background(), "main", "keycloak", handle, "alice", have.Fingerprint())
	if err != nil {
		r.t.Fatalf("CheckSession: %v", err)
	}
	return s
}

func (r *rig) refreshed(handle broker.Secret) broker.HubToken {
	r.t.Helper()
	tok, err := r.RefreshHub(context.Background(), "main", "keycloak", handle)
	if err != nil {
		r.t.Fatalf("RefreshHub: %v", err)
	}
	return tok
}

func TestHubsOwnTokenIsNarrowedToItsScopes(t *testing.T) {
	narrowedHub(t, func(r *rig) {
		t := r.t
		slow := func() { time.Sleep(2 * time.Second) } // so that it outlives the whole grant's
		r.provider.OnExchange(func() error { slow(); return nil })
		r.provider.Next(brokertest.Answer{Before: slow})
		tok := r.hubLogin("alice")
		r.provider.Calm()
		again := r.refreshed(tok.Handle)
		if !again.Access.Equal(tok.Access) {
			t.Error("a login that waits to be claimed was answered with another token")
		}
		asked := r.provider.Calls("exchange") + r.provider.Calls("refresh")
		if s := r.check(tok.Handle, tok.Access); !s.Active || s.Stale || s.Token != nil {
			t.Errorf("the hub has the current token and was told %+v", s)
		}
		other := r.second()
		if s := other.check(tok.Handle, tok.Access); !s.Active || s.Token != nil {
			t.Errorf("on another broker: %+v", s)
		}
		other.Close()
		if n := r.provider.Calls("exchange") + r.provider.Calls("refresh") - asked; n != 0 {
			t.Errorf("the provider was asked %d times for a token that is there", n)
		}
		if until := r.grant("alice").OutstandingUntil; until.Before(time.Now().Add(tok.ExpiresIn)) {
			t.Errorf("outstanding until %s, and the hub's token lives for %s", until, tok.ExpiresIn)
		}

		time.Sleep(6 * time.Second)
		second := r.refreshed(tok.Handle)
		isNarrow(t, "after it was refused its token", &second)
		if second.Access.Equal(tok.Access) {
			t.Error("the hub got back the token that was refused")
		}
		s := r.check(tok.Handle, tok.Access)
		isNarrow(t, "with the refused token", s.Token)

		expire()
		s = r.check(tok.Handle, second.Access)
		isNarrow(t, "after expiry", s.Token)
		containers := r.token(r.running("alice", 100), broker.Want{Scopes: hubsScopes})
		if containers.Access.Equal(s.Token.Access) {
			t.Error("a container that asks for the same got the hub's token")
		}
		if got := r.token(r.peer("alice", 100), broker.Want{Scopes: []string{"read"}}); !slices.Equal(got.Scopes, []string{"read"}) {
			t.Errorf("a container's token has the scopes %v", got.Scopes)
		}
		for _, action := range []string{"login", "refresh", "session"} {
			for _, e := range r.audit.entries(t, action) {
				if e.Token != "" && !slices.Equal(e.Scopes, hubsScopes) {
					t.Errorf("the audit says of a %s: scopes %v", action, e.Scopes)
				}
			}
		}
	})
}

func TestHubsOwnTokenIsRevokedWithItsGrantAndNotWithARole(t *testing.T) {
	narrowedHub(t, func(r *rig) {
		t := r.t
		tok := r.hubLogin("alice")
		r.check(tok.Handle, tok.Access)
		r.token(r.running("alice", 100), broker.Want{})
		r.provider.SetRoles("alice", "student")
		time.Sleep(2 * time.Minute) // the recheck sees it
		if all := r.provider.Revoked(); len(all) == 0 || slices.Contains(all, tok.Access.Reveal()) {
			t.Errorf("with the role were revoked %d tokens, the hub's own: %t", len(all), slices.Contains(all, tok.Access.Reveal()))
		}
		if _, _, err := r.Disconnect(context.Background(), "root", "main", "alice", ""); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		if !slices.Contains(r.provider.Revoked(), tok.Access.Reveal()) {
			t.Error("the hub's own token was not revoked with its grant")
		}
	}, func(c *broker.Config) { c.Rules[0].Roles = []string{"researcher"} })
}

func TestLoginWhoseTokenIsNotNarrowedFailsAndSaysWhy(t *testing.T) {
	narrowedHub(t, func(r *rig) {
		t := r.t
		r.provider.SetWide(true)
		tok, err := r.Login(context.Background(), "main", "keycloak", codeOf("alice"))
		said := refused(t, err, broker.ErrUnsatisfiable)
		want := `the hub's own token can't be narrowed to openid, profile: keycloak adds the scope "all", which the hub did not ask for`
		if said.Sentence != want || !strings.Contains(said.Next, "hubs.main.scopes") || !tok.Access.IsZero() {
			t.Errorf("said %q and %q, want %q", said.Sentence, said.Next, want)
		}
		r.store.Each(func(k broker.Key, _ broker.Record) {
			if k.Kind != "broker" {
				t.Errorf("it left %s", k)
			}
		})
		r.provider.SetWide(false)
		r.hubLogin("alice")
	})
}

func TestLoginSaysWhatTheProviderDidInsteadOfNarrowing(t *testing.T) {
	narrowedHub(t, func(r *rig) {
		t := r.t
		for _, tt := range []struct {
			err  *broker.ProviderError
			want *broker.Error
			says string
		}{
			{&broker.ProviderError{Class: broker.Refused, Reason: "scope"}, broker.ErrUnsatisfiable, "keycloak does not give such a token (scope)"},
			{&broker.ProviderError{Class: broker.Misconfigured, Reason: "exchange_not_enabled"}, broker.ErrProviderDown,
				"keycloak does not accept this token broker's own credentials or settings"},
			{&broker.ProviderError{Class: broker.TryLater}, broker.ErrProviderDown, "keycloak can't be asked at the moment"},
		} {
			r.provider.OnExchange(func() error { return tt.err })
			r.provider.Next(brokertest.Answer{Err: tt.err})
			_, err := r.Login(context.Background(), "main", "keycloak", codeOf("alice"))
			if said := refused(t, err, tt.want); said.Sentence != "the hub's own token can't be narrowed to openid, profile: "+tt.says {
				t.Errorf("said %q", said.Sentence)
			}
			r.provider.Calm()
		}
	})
}

func TestHubIsNeverGivenTheWiderToken(t *testing.T) {
	narrowedHub(t, func(r *rig) {
		t := r.t
		tok := r.hubLogin("alice")
		r.check(tok.Handle, tok.Access)
		r.provider.SetWide(true)
		expire()
		_, err := r.RefreshHub(context.Background(), "main", "keycloak", tok.Handle)
		if said := refused(t, err, broker.ErrUnsatisfiable); !strings.Contains(said.Sentence, "openid, profile") {
			t.Errorf("said %q", said.Sentence)
		}
		if s := r.check(tok.Handle, tok.Access); !s.Active || !s.Stale || s.Token != nil || s.Reason == "" {
			t.Errorf("CheckSession: %+v", s)
		}
		r.provider.SetWide(false)
		s := r.check(tok.Handle, tok.Access)
		isNarrow(t, "when the provider narrows again", s.Token)
	})
}

func TestHubGoesOnWithItsNarrowedTokenWhileTheProviderIsDown(t *testing.T) {
	narrowedHub(t, func(r *rig) {
		t := r.t
		tok := r.hubLogin("alice")
		r.check(tok.Handle, tok.Access)
		down := &broker.ProviderError{Class: broker.TryLater}
		r.provider.OnExchange(func() error { return down })
		for range 40 {
			r.provider.Next(brokertest.Answer{Err: down})
		}
		time.Sleep(tok.ExpiresIn - 10*time.Second) // it works, and is not fresh
		s := r.check(tok.Handle, broker.NewSecret("another"))
		isNarrow(t, "while the provider is down", s.Token)
		if !s.Active || !s.Stale || !s.Token.Access.Equal(tok.Access) {
			t.Errorf("while the provider is down: %+v", s)
		}
		_, err := r.RefreshHub(context.Background(), "main", "keycloak", tok.Handle)
		refused(t, err, broker.ErrProviderDown) // it was refused this one

		time.Sleep(20 * time.Second)
		if s := r.check(tok.Handle, tok.Access); !s.Active || !s.Stale || s.Token != nil {
			t.Errorf("after its end: %+v", s)
		}
	})
}

func TestDisconnectWhileTheHubsTokenIsNarrowedHolds(t *testing.T) {
	narrowedHub(t, func(r *rig) {
		t := r.t
		first := r.hubLogin("alice")
		r.check(first.Handle, first.Access)
		during := func(f func()) {
			r.provider.OnExchange(func() error { f(); return nil })
			r.provider.Next(brokertest.Answer{Before: f})
		}
		disconnect := func() {
			time.Sleep(time.Second)
			if _, _, err := r.Disconnect(context.Background(), "root", "main", "alice", ""); err != nil {
				t.Errorf("Disconnect: %v", err)
			}
		}
		during(sync.OnceFunc(disconnect))
		tok, err := r.Login(context.Background(), "main", "keycloak", codeOf("alice"))
		if err == nil {
			_, err = r.Claim(context.Background(), "main", "keycloak", tok.Handle, "alice")
		}
		refused(t, err, broker.ErrRevoked)
		r.provider.Calm()

		tok = r.hubLogin("alice")
		r.check(tok.Handle, tok.Access)
		expire()
		var once sync.Once
		during(func() {
			if r.provider.Calls("refresh") > 0 { // the one that brings the whole token may end
				once.Do(disconnect)
			}
		})
		s := r.check(tok.Handle, tok.Access)
		if s.Active || s.Token != nil {
			t.Errorf("CheckSession during a disconnect: %+v", s)
		}
	})
}

func TestAdoptedSessionGivesTheHubItsNarrowedToken(t *testing.T) {
	for _, way := range []string{"check-session", "token endpoint"} {
		narrowedHub(t, func(r *rig) {
			t := r.t
			r.provider.Login(context.Background(), codeOf("alice")) // not through the broker
			old := broker.NewSecret(r.provider.RefreshToken("alice"))
			var handle broker.Secret
			if way == "check-session" {
				s := r.check(old, broker.NewSecret("the whole token"))
				isNarrow(t, "of "+way, s.Token)
				handle = s.Token.Handle
			} else {
				tok := r.refreshed(old)
				isNarrow(t, "of "+way, &tok)
				handle = tok.Handle
				if again := r.refreshed(old); !again.Access.Equal(tok.Access) {
					t.Error("who asked again got another token")
				}
			}
			if n := r.provider.Calls("refresh"); n != 1 {
				t.Errorf("%d refreshes, want 1", n)
			}
			expire()
			s := r.check(handle, broker.NewSecret("another"))
			isNarrow(t, "later", s.Token)
			r.token(r.running("alice", 100), broker.Want{})
		}, adopting)
	}
}

func TestAdoptedSessionIsNotLostWhenItsTokenCantBeNarrowed(t *testing.T) {
	narrowedHub(t, func(r *rig) {
		t := r.t
		r.provider.Login(context.Background(), codeOf("alice"))
		old := broker.NewSecret(r.provider.RefreshToken("alice"))
		r.provider.SetWide(true)
		for range 2 {
			_, err := r.RefreshHub(context.Background(), "main", "keycloak", old)
			refused(t, err, broker.ErrUnsatisfiable)
		}
		if n := r.provider.Calls("refresh"); n != 1 {
			t.Errorf("the old token was sent %d times", n)
		}
		r.provider.SetWide(false)
		s := r.check(old, broker.NewSecret("the whole token"))
		isNarrow(t, "when the provider narrows", s.Token)
	}, adopting)
}

func TestHubGetsItsTokenWhenRolesChangeWhileItIsNarrowed(t *testing.T) {
	narrowedHub(t, func(r *rig) {
		t := r.t
		tok := r.hubLogin("alice")
		r.check(tok.Handle, tok.Access)
		expire()
		r.provider.SetRoles("alice", "student")
		got := r.refreshed(tok.Handle)
		isNarrow(t, "after roles changed", &got)
	})
}

func TestHubsScopesAreFollowedFromTheNextStart(t *testing.T) {
	narrowedHub(t, func(r *rig) {
		t := r.t
		pending, claimed := r.hubLogin("alice"), r.hubLogin("bob")
		if _, err := r.Claim(context.Background(), "main", "keycloak", claimed.Handle, "bob"); err != nil {
			t.Fatal(err)
		}
		r.Close()
		r.cfg.Hubs = map[broker.HubID]broker.Hub{"main": {Login: "keycloak", Scopes: []string{"openid"}}}
		r.start()
		s, err := r.CheckSession(context.Background(), "main", "keycloak", claimed.Handle, "bob", claimed.Access.Fingerprint())
		if err != nil || s.Token == nil || !slices.Equal(s.Token.Scopes, []string{"openid"}) {
			t.Errorf("the hub of a live session got %+v, %v", s.Token, err)
		}
		tok, err := r.RefreshHub(context.Background(), "main", "keycloak", pending.Handle)
		if err == nil && !slices.Equal(tok.Scopes, []string{"openid"}) {
			t.Errorf("the hub of a login that waits got %v", tok.Scopes)
		}
	})
}

func TestFurtherProviderThatCantNarrowGivesTheHubItsWholeToken(t *testing.T) {
	second := brokertest.NewProvider("github", func(i *broker.ProviderInfo) { i.Narrowing = broker.Never })
	narrowedHub(t, func(r *rig) {
		t := r.t
		tok, err := r.Login(context.Background(), "main", "github", codeOf("alice"))
		if err != nil || !slices.Equal(tok.Scopes, []string{"all", "openid"}) {
			t.Errorf("Login: %+v, %v", tok, err)
		}
	}, func(c *broker.Config) { c.Providers = append(c.Providers, second) })
}

func TestHubsScopesAreChecked(t *testing.T) {
	for _, tt := range []struct {
		why    string
		scopes []string
		edit   func(*broker.ProviderInfo)
		says   string
	}{
		{"a provider that can't narrow", hubsScopes, func(i *broker.ProviderInfo) { i.Narrowing = broker.Never }, "broker: hub main: scopes: keycloak can't narrow the hub's token to them"},
		{"what is no scope", []string{"a b"}, func(*broker.ProviderInfo) {}, `broker: hub main: scopes: "a b" is not a scope`},
	} {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t)
			r.cfg.Providers = []broker.Provider{brokertest.NewProvider("keycloak", tt.edit)}
			r.cfg.Hubs = map[broker.HubID]broker.Hub{"main": {Login: "keycloak", Scopes: tt.scopes}}
			if _, err := broker.New(r.cfg); err == nil || err.Error() != tt.says {
				t.Errorf("%s: %v, want %q", tt.why, err, tt.says)
			}
		})
	}
}

func TestLoginWithoutARefreshTokenIsNotNarrowedByOne(t *testing.T) {
	p := brokertest.NewProvider("keycloak", func(i *broker.ProviderInfo) { i.Narrowing = broker.ByScope })
	inBubble(t, func(r *rig) {
		_, err := r.Login(context.Background(), "main", "keycloak", codeOf("alice"))
		if said := refused(t, err, broker.ErrUnsatisfiable); !strings.Contains(said.Sentence, "gave no refresh token") {
			t.Errorf("said %q", said.Sentence)
		}
	}, func(c *broker.Config) {
		c.Providers = []broker.Provider{frugal{p}}
		c.Hubs = map[broker.HubID]broker.Hub{"main": {Login: "keycloak", Scopes: hubsScopes}}
	})
}

// frugal is a provider that gives no refresh tokens.
type frugal struct{ broker.Provider }

func (p frugal) Login(ctx context.Context, c broker.CodeGrant) (broker.Identity, broker.Issued, error) {
	id, iss, err := p.Provider.Login(ctx, c)
	iss.RefreshToken = broker.Secret{}
	return id, iss, err
}
