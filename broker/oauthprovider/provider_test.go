//go:build !release

package oauthprovider_test

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"tokenbroker/broker"
	"tokenbroker/broker/devidp"
	"tokenbroker/broker/oauthprovider"
)

const home = "http://127.0.0.1:8000/hub/oauth_callback"

// hardTimeout is for calls that are meant to time out; the others of such a test
// have to fit into it on a busy machine.
const hardTimeout = 2 * time.Second

// A lab is a provider and our client of it.
type lab struct {
	*oauthprovider.Provider
	idp    *devidp.Server
	issuer string
}

// newLab starts a development provider and makes a client of it, changed by
// change.
func newLab(t *testing.T, change func(*oauthprovider.Config)) lab {
	t.Helper()
	idp, err := devidp.New(devidp.Config{AccessTTL: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	ts := httptest.NewServer(idp)
	t.Cleanup(ts.Close)
	id, secret := idp.Client()
	cfg := oauthprovider.Config{
		Name: "lab", Profile: "keycloak", Issuer: ts.URL, ClientID: id, ClientSecret: secret,
		Roles:     []string{"roles", "groups"},
		Audiences: map[string][]string{"storage": {"storage"}},
	}
	if change != nil {
		change(&cfg)
	}
	p, err := oauthprovider.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return lab{p, idp, ts.URL}
}

// login logs user in with scopes that cover all tests.
func (l lab) login(t *testing.T, user string) (broker.Identity, broker.Issued) {
	t.Helper()
	who, got, err := l.Login(t.Context(), l.code(t, user))
	if err != nil {
		t.Fatalf("Login: %v", err)
	}
	return who, got
}

func (l lab) code(t *testing.T, user string) broker.CodeGrant {
	t.Helper()
	code, verifier, err := devidp.CodeFor(t.Context(), l.issuer, l.Info().ClientID, home, user, "openid", "profile", "read", "write", "storage")
	if err != nil {
		t.Fatal(err)
	}
	return broker.CodeGrant{Code: broker.NewSecret(code), Verifier: broker.NewSecret(verifier), RedirectURI: home}
}

func TestALoginSaysWhoAndWhatTheTokenIsFor(t *testing.T) {
	for _, profile := range oauthprovider.Profiles() {
		t.Run(profile, func(t *testing.T) {
			l := newLab(t, func(c *oauthprovider.Config) { c.Profile = profile })
			who, got := l.login(t, "alice")
			want := broker.Identity{Sub: "sub-alice", Username: "alice", Roles: []string{"groups//lab-a", "roles/researcher"}, Known: true, Session: who.Session}
			if who.Session == "" {
				t.Error("the session is not named")
			}
			if diff := cmp.Diff(want, who); diff != "" {
				t.Errorf("identity (-want +got):\n%s", diff)
			}
			if got.RefreshToken.IsZero() || got.IDToken.IsZero() || got.TokenType != "Bearer" {
				t.Errorf("got refresh token %t, ID token %t, type %q", !got.RefreshToken.IsZero(), !got.IDToken.IsZero(), got.TokenType)
			}
			if diff := cmp.Diff([]string{"offline_access", "openid", "profile", "read", "storage", "write"}, got.Scopes); diff != "" || !got.ScopesKnown {
				t.Errorf("scopes, known %t (-want +got):\n%s", got.ScopesKnown, diff)
			}
			if diff := cmp.Diff([]string{"storage"}, got.Audience); diff != "" || !got.AudienceKnown {
				t.Errorf("audience, known %t (-want +got):\n%s", got.AudienceKnown, diff)
			}
			if got.ExpiresIn <= 0 || got.ExpiresIn > time.Minute {
				t.Errorf("the token lives for %v, want about a minute", got.ExpiresIn)
			}
		})
	}
}

func TestEveryWayToAuthenticateThatTheProviderKnows(t *testing.T) {
	for _, style := range []string{"", "client_secret_basic", "client_secret_post"} {
		l := newLab(t, func(c *oauthprovider.Config) { c.AuthStyle = style })
		if who, _ := l.login(t, "bob"); who.Sub != "sub-bob" {
			t.Errorf("style %q: got subject %q", style, who.Sub)
		}
	}
	l := newLab(t, func(c *oauthprovider.Config) { c.ClientSecret = broker.NewSecret("wrong") })
	_, _, err := l.Login(t.Context(), l.code(t, "bob"))
	wantClass(t, err, broker.Misconfigured, "client_refused")
}

func TestARefreshRotatesAndShowsTheRolesOfNow(t *testing.T) {
	l := newLab(t, nil)
	then, first := l.login(t, "alice")
	if err := l.idp.SetRoles("alice", "student"); err != nil {
		t.Fatal(err)
	}
	if err := l.idp.SetGroups("alice"); err != nil {
		t.Fatal(err)
	}
	who, got, err := l.Refresh(t.Context(), first.RefreshToken, "sub-alice", nil)
	if err != nil {
		t.Fatal(err)
	}
	if got.RefreshToken.IsZero() || got.RefreshToken.Equal(first.RefreshToken) {
		t.Error("there is no new refresh token")
	}
	if diff := cmp.Diff(broker.Identity{Sub: "sub-alice", Username: "alice", Roles: []string{"roles/student"}, Known: true, Session: then.Session}, who); diff != "" {
		t.Errorf("identity (-want +got):\n%s", diff)
	}
	if err := l.idp.SetRoles("alice"); err != nil {
		t.Fatal(err)
	}
	who, _, err = l.Refresh(t.Context(), got.RefreshToken, "sub-alice", nil)
	if err != nil || len(who.Roles) != 0 || !who.Known {
		t.Errorf("without any role: got %v, known %t, error %v", who.Roles, who.Known, err)
	}
}

func TestANarrowedRefreshLeavesTheGrantWhole(t *testing.T) {
	for _, profile := range oauthprovider.Profiles() {
		l := newLab(t, func(c *oauthprovider.Config) { c.Profile = profile })
		_, first := l.login(t, "alice")
		who, small, err := l.Refresh(t.Context(), first.RefreshToken, "sub-alice", []string{"read"})
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(small.Scopes, []string{"openid", "read"}) || slices.Contains(small.Audience, "storage") {
			t.Errorf("%s: narrowed to read: got scopes %q for %q", profile, small.Scopes, small.Audience)
		}
		if !who.Known || len(who.Roles) != 2 {
			t.Errorf("%s: a narrowed refresh tells roles %q, known %t", profile, who.Roles, who.Known)
		}
		_, whole, err := l.Refresh(t.Context(), small.RefreshToken, "sub-alice", nil)
		if err != nil || !slices.Equal(whole.Scopes, first.Scopes) {
			t.Errorf("%s: afterwards the grant has %q, error %v", profile, whole.Scopes, err)
		}
	}
}

func TestAScopeThatWasNotGrantedIsRefusedAndSpendsNothing(t *testing.T) {
	l := newLab(t, nil)
	_, first := l.login(t, "alice")
	_, _, err := l.Refresh(t.Context(), first.RefreshToken, "sub-alice", []string{"compute"})
	if e := wantClass(t, err, broker.Refused, "scope"); e.Status != 400 || e.Code != "invalid_scope" {
		t.Errorf("got status %d, code %q", e.Status, e.Code)
	}
	if _, _, err := l.Refresh(t.Context(), first.RefreshToken, "sub-alice", nil); err != nil {
		t.Errorf("the refresh token was spent: %v", err)
	}
}

func TestAReusedRefreshTokenIsDeadAndSoIsTheNewest(t *testing.T) {
	l := newLab(t, nil)
	_, first := l.login(t, "alice")
	_, second, err := l.Refresh(t.Context(), first.RefreshToken, "sub-alice", nil)
	if err != nil {
		t.Fatal(err)
	}
	_, _, err = l.Refresh(t.Context(), first.RefreshToken, "sub-alice", nil)
	wantClass(t, err, broker.Dead, "reuse_detected")
	_, _, err = l.Refresh(t.Context(), second.RefreshToken, "sub-alice", nil)
	wantClass(t, err, broker.Dead, "session_ended")
	_, _, err = l.Refresh(t.Context(), broker.NewSecret("no such token"), "sub-alice", nil)
	wantClass(t, err, broker.Dead, "refused")
}

func TestADisabledAccountComesBack(t *testing.T) {
	l := newLab(t, nil)
	_, first := l.login(t, "bob")
	if err := l.idp.Disable("bob"); err != nil {
		t.Fatal(err)
	}
	_, _, err := l.Refresh(t.Context(), first.RefreshToken, "sub-bob", nil)
	wantClass(t, err, broker.Disabled, "user_disabled")
	if err := l.idp.Enable("bob"); err != nil {
		t.Fatal(err)
	}
	if _, _, err = l.Refresh(t.Context(), first.RefreshToken, "sub-bob", nil); err != nil {
		t.Errorf("after the account was enabled: %v", err)
	}
}

func TestAnAnswerAboutSomebodyElseIsDeadButKept(t *testing.T) {
	l := newLab(t, nil)
	_, first := l.login(t, "alice")
	_, got, err := l.Refresh(t.Context(), first.RefreshToken, "sub-bob", nil)
	wantClass(t, err, broker.Dead, "subject_changed")
	if got.RefreshToken.IsZero() {
		t.Error("the answer is lost, nobody can revoke it")
	}
}

func TestAnAdoptedTokenSaysWhoseItIs(t *testing.T) {
	l := newLab(t, nil)
	_, first := l.login(t, "carol")
	who, got, err := l.Refresh(t.Context(), first.RefreshToken, "", nil)
	if err != nil || who.Sub != "sub-carol" || got.RefreshToken.IsZero() {
		t.Errorf("got %q, new refresh token %t, error %v", who.Sub, !got.RefreshToken.IsZero(), err)
	}
}

func TestAnExchangeNarrows(t *testing.T) {
	l := newLab(t, nil)
	_, whole := l.login(t, "alice")
	got, err := l.Exchange(t.Context(), whole.AccessToken, broker.Target{Audience: "storage", Scopes: []string{"read"}})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(got.Audience, []string{"storage"}) || !slices.Equal(got.Scopes, []string{"openid", "read", "storage"}) || !got.RefreshToken.IsZero() {
		t.Errorf("got scopes %q for %q, refresh token %t", got.Scopes, got.Audience, !got.RefreshToken.IsZero())
	}
	for _, tt := range []struct {
		why    string
		target broker.Target
		class  broker.ProviderClass
		reason string
	}{
		{"an audience there is not", broker.Target{Audience: "nowhere"}, broker.Refused, "audience"},
		{"an audience whose scope was not granted", broker.Target{Audience: "compute", Scopes: []string{"read"}}, broker.Refused, "audience"},
		{"a scope that was not granted", broker.Target{Audience: "storage", Scopes: []string{"compute"}}, broker.Refused, "scope"},
	} {
		_, err := l.Exchange(t.Context(), whole.AccessToken, tt.target)
		t.Run(tt.why, func(t *testing.T) { wantClass(t, err, tt.class, tt.reason) })
	}
	if _, err := l.Exchange(t.Context(), got.AccessToken, broker.Target{Scopes: []string{"write"}}); err == nil {
		t.Error("an exchange has widened a token")
	}
	if err := l.idp.EndSession("alice"); err != nil {
		t.Fatal(err)
	}
	_, err = l.Exchange(t.Context(), whole.AccessToken, broker.Target{Audience: "storage"})
	wantClass(t, err, broker.Dead, "access_token_refused")
	_, err = l.Exchange(t.Context(), broker.NewSecret("no such token"), broker.Target{Audience: "storage"})
	wantClass(t, err, broker.Dead, "access_token_refused")
}

func TestARevokedRefreshTokenIsDeadAndMayBeRevokedAgain(t *testing.T) {
	l := newLab(t, nil)
	_, got := l.login(t, "alice")
	for range 2 {
		if err := l.Revoke(t.Context(), got.RefreshToken, broker.RefreshToken); err != nil {
			t.Fatalf("Revoke: %v", err)
		}
	}
	if err := l.Revoke(t.Context(), broker.NewSecret("no such token"), broker.RefreshToken); err != nil {
		t.Errorf("Revoke of nothing: %v", err)
	}
	_, _, err := l.Refresh(t.Context(), got.RefreshToken, "sub-alice", nil)
	wantClass(t, err, broker.Dead, "session_ended")
}

func TestALostAnswerIsLostAndWasAskedForOnce(t *testing.T) {
	l := newLab(t, nil)
	_, first := l.login(t, "alice")
	l.idp.LoseNextAnswer()
	_, _, err := l.Refresh(t.Context(), first.RefreshToken, "sub-alice", nil)
	wantClass(t, err, broker.Lost, "no_answer")
	if n := l.idp.Requests()[devidp.Refresh]; n != 1 {
		t.Fatalf("the refresh token was sent %d times", n)
	}
	// The provider did rotate: a retry is a reuse, and must be the caller's decision.
	_, _, err = l.Refresh(t.Context(), first.RefreshToken, "sub-alice", nil)
	wantClass(t, err, broker.Dead, "reuse_detected")
}

func TestALostAnswerToAnExchangeIsNoLoss(t *testing.T) {
	l := newLab(t, nil)
	_, whole := l.login(t, "alice")
	l.idp.LoseNextAnswer()
	_, err := l.Exchange(t.Context(), whole.AccessToken, broker.Target{Audience: "storage"})
	wantClass(t, err, broker.TryLater, "no_answer")
}

func TestASlowProviderIsLostOnceItHasTheToken(t *testing.T) {
	l := newLab(t, func(c *oauthprovider.Config) { c.Timeout = hardTimeout })
	_, first := l.login(t, "alice")
	arrived, release := l.idp.Hold()
	defer release()
	_, _, err := l.Refresh(t.Context(), first.RefreshToken, "sub-alice", nil)
	<-arrived
	if e := wantClass(t, err, broker.Lost, "no_answer"); !errors.Is(e, context.DeadlineExceeded) {
		t.Errorf("got cause %v, want the deadline", e.Err)
	}
}

func TestACallerThatGoesAwayLosesWhatWasSent(t *testing.T) {
	l := newLab(t, nil)
	_, first := l.login(t, "alice")
	arrived, release := l.idp.Hold()
	defer release()
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-arrived; cancel() }()
	_, _, err := l.Refresh(ctx, first.RefreshToken, "sub-alice", nil)
	wantClass(t, err, broker.Lost, "no_answer")
	_, _, err = l.Refresh(ctx, first.RefreshToken, "sub-alice", nil)
	wantClass(t, err, broker.TryLater, "unreachable") // cancelled before it began
}

func TestTheProviderInItsOwnWordsIsNotLost(t *testing.T) {
	l := newLab(t, nil)
	_, first := l.login(t, "alice")
	l.idp.Fail(1, 500, `{"error":"server_error"}`)
	_, _, err := l.Refresh(t.Context(), first.RefreshToken, "sub-alice", nil)
	wantClass(t, err, broker.TryLater, "provider_error")
	if _, _, err := l.Refresh(t.Context(), first.RefreshToken, "sub-alice", nil); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

func TestDiscoveryIsLazySharedAndRetried(t *testing.T) {
	idp, err := devidp.New(devidp.Config{})
	if err != nil {
		t.Fatal(err)
	}
	var asked, up atomic.Int32
	ready := make(chan struct{})
	ts := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/.well-known/") {
			asked.Add(1)
			<-ready
		}
		if up.Load() == 0 {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		idp.ServeHTTP(w, r)
	}))
	defer ts.Close()
	id, secret := idp.Client()
	p, err := oauthprovider.New(oauthprovider.Config{Name: "lab", Issuer: ts.URL, ClientID: id, ClientSecret: secret})
	if err != nil || asked.Load() != 0 {
		t.Fatalf("New has asked %d times, error %v", asked.Load(), err)
	}
	close(ready)
	_, _, err = p.Refresh(t.Context(), broker.NewSecret("x"), "sub", nil)
	wantClass(t, err, broker.TryLater, "discovery_busy")

	up.Store(1)
	ready = make(chan struct{})
	asked.Store(0)
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			if err := p.Revoke(t.Context(), broker.NewSecret("x"), broker.AccessToken); err != nil {
				t.Errorf("Revoke: %v", err)
			}
		})
	}
	close(ready)
	all.Wait()
	if asked.Load() != 1 || idp.Requests()[devidp.Revoke] != 20 {
		t.Errorf("20 callers: the document was asked for %d times, then %d revocations", asked.Load(), idp.Requests()[devidp.Revoke])
	}
	if err := p.Check(t.Context()); err != nil || asked.Load() != 2 {
		t.Errorf("Check asked %d times, error %v", asked.Load()-1, err)
	}
}

func TestNothingPrintsASecret(t *testing.T) {
	l := newLab(t, nil)
	_, first := l.login(t, "alice")
	l.idp.Fail(1, 400, `{"error":"`+first.RefreshToken.Reveal()+`","error_description":"Refresh token for value `+first.RefreshToken.Reveal()+` was not found"}`)
	_, _, err := l.Refresh(t.Context(), first.RefreshToken, "sub-alice", nil)
	wantClass(t, err, broker.TryLater, "unknown_answer")
	if strings.Contains(err.Error(), first.RefreshToken.Reveal()) {
		t.Error("the error holds the refresh token")
	}
}

func TestALookSpendsNothingAndShowsTheRolesOfNow(t *testing.T) {
	l := newLab(t, nil)
	who, got := l.login(t, "alice")
	if err := l.idp.SetRoles("alice", "student"); err != nil {
		t.Fatal(err)
	}
	want := broker.Identity{Sub: "sub-alice", Username: "alice", Roles: []string{"groups//lab-a", "roles/student"}, Known: true}
	for range 2 {
		now, err := l.Look(t.Context(), got.RefreshToken, who.Sub)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, now); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	}
	fresh, newer, err := l.Refresh(t.Context(), got.RefreshToken, who.Sub, nil)
	if err != nil {
		t.Fatalf("a refresh after looks: %v", err)
	}
	fresh.Session = "" // which a look does not tell
	if diff := cmp.Diff(want, fresh); diff != "" {
		t.Errorf("a look and a refresh tell two things (-look +refresh):\n%s", diff)
	}
	if _, err := l.Look(t.Context(), got.RefreshToken, who.Sub); err != nil {
		t.Errorf("a look at the spent token: %v", err)
	}
	if err := l.idp.Disable("alice"); err != nil {
		t.Fatal(err)
	}
	_, err = l.Look(t.Context(), newer.RefreshToken, who.Sub)
	wantClass(t, err, broker.Dead, "session_ended")
	if err := l.idp.Enable("alice"); err != nil {
		t.Fatal(err)
	}
	if _, _, err := l.Refresh(t.Context(), newer.RefreshToken, who.Sub, nil); err != nil {
		t.Errorf("a refresh after the account is back: %v", err)
	}
}
