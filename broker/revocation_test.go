package broker_test

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
)

// revoked fails unless the provider was told to end exactly the tokens with these
// fingerprints, and the audit has a line for each.
func (r *rig) revoked(want ...string) {
	r.t.Helper()
	var got, said []string
	for _, token := range r.provider.Revoked() {
		got = append(got, broker.NewSecret(token).Fingerprint())
	}
	for _, e := range r.audit.entries(r.t, "revoke") {
		said = append(said, e.Token)
	}
	slices.Sort(got)
	slices.Sort(said)
	slices.Sort(want)
	if !slices.Equal(got, want) || !slices.Equal(said, want) {
		r.t.Errorf("revoked were %d tokens, and the audit has %d of them; want %d", len(got), len(said), len(want))
	}
}

// disconnect disconnects alice and returns the one answer.
func (r *rig) disconnect() broker.Disconnection {
	r.t.Helper()
	gone, _, err := r.Disconnect(context.Background(), "root", "main", "alice", "")
	if err != nil || len(gone) != 1 {
		r.t.Fatalf("Disconnect: %v, %v", gone, err)
	}
	return gone[0]
}

func fingerprint(token string) string { return broker.NewSecret(token).Fingerprint() }

func TestDisconnectRevokesAllThatWasHandedOut(t *testing.T) {
	inBubble(t, func(r *rig) {
		hub := r.login("alice")
		if _, err := r.Claim(context.Background(), "main", "keycloak", hub, "alice"); err != nil {
			t.Fatal(err)
		}
		p := r.running("alice", 100)
		login, err := r.CheckSession(context.Background(), "main", "keycloak", hub, "alice", "")
		if err != nil {
			t.Fatal(err)
		}
		first := r.token(p, broker.Want{})
		time.Sleep(40 * time.Second)
		second := r.token(p, broker.Want{Rejected: first.Access.Fingerprint()}) // the first one still works
		refresh := r.provider.RefreshToken("alice")
		if got := r.disconnect().Revocation; got != broker.RevocationDone {
			t.Errorf("the revocation is %q, want done", got)
		}
		r.revoked(fingerprint(refresh), login.Token.Access.Fingerprint(), first.Access.Fingerprint(), second.Access.Fingerprint())
		time.Sleep(time.Hour)
		if n := r.provider.Calls("revoke"); n != 4 {
			t.Errorf("%d revocations, want 4: what is done is done", n)
		}
	})
}

func TestRevocationIsTriedUntilItIsDone(t *testing.T) {
	for _, restart := range []bool{false, true} {
		inBubble(t, func(r *rig) {
			r.loggedIn("alice")
			down := &broker.ProviderError{Class: broker.TryLater, Err: errors.New("down")}
			r.provider.OnRevoke(func() error { return down })
			refresh := r.provider.RefreshToken("alice")
			if got := r.disconnect().Revocation; got != broker.RevocationPending {
				t.Errorf("the revocation is %q, want pending", got)
			}
			if restart {
				r.restarted()
			}
			time.Sleep(time.Hour)
			if n := r.provider.Calls("revoke"); n < 10 || n > 60 {
				t.Errorf("%d tries in an hour", n)
			}
			r.provider.OnRevoke(nil)
			time.Sleep(6 * time.Minute)
			if got := r.grant("alice").Revocation; got != broker.RevocationDone {
				t.Errorf("the revocation is %q, want done", got)
			}
			r.revoked(fingerprint(refresh)) // its access token has ended by itself
		})
	}
}

func TestDisconnectDoesNotWaitForAProviderThatHangs(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.provider.OnRevoke(func() error { time.Sleep(20 * time.Second); return nil })
		began := time.Now()
		got := r.disconnect()
		if took := time.Since(began); got.Revocation != broker.RevocationPending || took > 5*time.Second {
			t.Errorf("after %s the revocation is %q, want pending", took, got.Revocation)
		}
		r.refused(p, broker.Want{}, broker.ErrRevoked)
		time.Sleep(time.Minute)
		if got := r.grant("alice").Revocation; got != broker.RevocationDone {
			t.Errorf("the revocation is %q, want done", got)
		}
	})
}

func TestWhatAProviderCannotBeToldIsSaid(t *testing.T) {
	for want, class := range map[broker.Revocation]*broker.ProviderError{
		broker.RevocationUnsupported: {Class: broker.Misconfigured, Reason: "unsupported"},
		broker.RevocationFailed:      {Class: broker.Misconfigured, Reason: "wrong_client"},
	} {
		inBubble(t, func(r *rig) {
			r.loggedIn("alice")
			r.provider.OnRevoke(func() error { return class })
			if got := r.disconnect().Revocation; got != want {
				t.Errorf("the revocation is %q, want %q", got, want)
			}
			n := r.provider.Calls("revoke")
			time.Sleep(time.Hour)
			if r.provider.Calls("revoke") != n {
				t.Error("it was tried again")
			}
		})
	}
}

// On Keycloak two logins of one browser are one session, which ends with the
// refresh token of either.
func TestLoginAfterADisconnectIsNotEndedByItsRevocation(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		r.provider.OnRevoke(func() error { return &broker.ProviderError{Class: broker.TryLater} })
		r.disconnect()
		time.Sleep(time.Second)
		r.loggedIn("alice")
		r.provider.OnRevoke(nil)
		time.Sleep(10 * time.Minute)
		for _, token := range r.provider.Revoked() {
			if len(token) > 7 && token[:7] == "refresh" {
				t.Error("a refresh token was revoked after the new login")
			}
		}
		r.token(r.running("alice", 100), broker.Want{})
	})
}

func TestRefreshTokenThatComesAfterTheDisconnectIsRevokedForSure(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		expire()
		r.provider.Next(brokertest.Answer{Before: func() {
			r.disconnect()
			r.provider.OnRevoke(func() error { return &broker.ProviderError{Class: broker.TryLater} })
		}})
		r.refused(p, broker.Want{}, broker.ErrRevoked)
		r.restarted()
		r.provider.OnRevoke(nil)
		time.Sleep(time.Minute)
		if all := r.provider.Revoked(); !slices.Contains(all, r.provider.RefreshToken("alice")) {
			t.Error("the new refresh token lives")
		}
	})
}

func TestLostRoleRevokesWhatNoRuleGivesAnyMore(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.provider.SetRoles("alice", "researcher", "student")
		r.loggedIn("alice")
		p := r.running("alice", 100)
		research := r.token(p, broker.Want{Audience: "storage"})
		r.token(p, broker.Want{Audience: "library"})
		r.provider.SetRoles("alice", "student")
		time.Sleep(2 * time.Minute) // the recheck sees it
		r.refused(p, broker.Want{Audience: "storage"}, broker.ErrDenied)
		r.revoked(research.Access.Fingerprint())
		r.token(p, broker.Want{Audience: "library"})
		r.provider.SetRoles("alice", "researcher", "student")
		time.Sleep(2 * time.Minute)
		r.token(p, broker.Want{Audience: "storage"}) // no login was needed
	}, func(c *broker.Config) {
		c.Rules = append(c.Rules, broker.Rule{Provider: "keycloak", Roles: []string{"student"}, Audiences: []string{"library"}, Scopes: []string{"read"}})
	})
}

func TestLostRoleRevokesNothingWhereThatMayEndTheSession(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.token(p, broker.Want{})
		r.provider.SetRoles("alice", "student")
		time.Sleep(2 * time.Minute)
		r.refused(p, broker.Want{}, broker.ErrDenied)
		r.revoked()
	}, func(c *broker.Config) {
		c.Providers = []broker.Provider{revokesAll{c.Providers[0]}}
	})
}

// revokesAll is a provider that ends the session with any of its tokens.
type revokesAll struct{ broker.Provider }

func (p revokesAll) Info() broker.ProviderInfo {
	i := p.Provider.Info()
	i.RevokesAccessAlone = false
	return i
}
