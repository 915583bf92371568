package broker_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
)

func TestOutlookSaysWhatHappensNext(t *testing.T) {
	now := time.Date(2026, 10, 5, 14, 0, 0, 0, time.UTC)
	const issuer = "https://sso.example"
	here := []broker.HostID{"host1"}
	for _, tt := range []struct {
		why     string
		edit    func(*broker.Grant)
		running []broker.HostID
		next    broker.NextStep
		at      time.Time
		says    string
		state   string // part of Why
	}{
		{"nobody there", func(g *broker.Grant) {}, nil, broker.NextAsked, now.Add(20 * time.Minute),
			"refreshed when a token is asked for; ends at 14:20 UTC if none is", ""},
		{"no end known", func(g *broker.Grant) { g.Expires = time.Time{} }, here, broker.NextAsked, time.Time{},
			"refreshed when a token is asked for; the provider sets no end", ""},
		{"over, by the clock", func(g *broker.Grant) { g.Expires = now.Add(-time.Hour) }, nil, broker.NextAsked, now.Add(-time.Hour),
			"by the provider's word it ended at 13:00 UTC; the next request for a token tells", ""},
		{"the session's maximum", func(g *broker.Grant) { g.Expires, g.End.Fixed = now.Add(4*time.Hour), true }, here, broker.NextEnds, now.Add(4 * time.Hour),
			"ends at 18:00 UTC and can't be extended: session maximum", ""},
		{"… tomorrow", func(g *broker.Grant) { g.Expires, g.End.Fixed = now.Add(14*time.Hour), true }, here, broker.NextEnds, now.Add(14 * time.Hour),
			"ends at 2026-10-06 04:00 UTC and can't be extended: session maximum", ""},
		{"another broker at it", func(g *broker.Grant) {
			g.Lease = broker.Lease{Holder: "x", Host: "host2", Until: now.Add(45 * time.Second)}
			g.Mark.Attempt = "x"
		}, here, broker.NextRefreshing, now.Add(45 * time.Second), "being refreshed by host2 until 14:00:45 UTC at the latest", ""},
		{"an answer that never came", func(g *broker.Grant) { g.Mark.Attempt = "x" }, nil, broker.NextRetry, now.Add(20 * time.Minute),
			"an earlier refresh got no answer; the next one tells: refreshed when a token is asked for; ends at 14:20 UTC if none is", ""},
		{"… twice", func(g *broker.Grant) {
			g.Mark = broker.Mark{Attempt: "x", Lost: true, Rest: now.Add(10 * time.Second)}
		}, here, broker.NextRetry, now.Add(10 * time.Second), "a refresh and its retry got no answer; the next one, not before 14:00:10 UTC, tells", ""},
		{"refused", func(g *broker.Grant) { g.State, g.Reason, g.Since = broker.NeedsLogin, "session_ended", now }, here, broker.NextLogin, time.Time{},
			"waits for the user to log in", "the session at the provider has ended, by a logout, by its time limit or by an administrator there; since 2026-10-05 14:00 UTC"},
		{"refused for who knows what", func(g *broker.Grant) { g.State, g.Reason = broker.NeedsLogin, "odd" }, here, broker.NextLogin, time.Time{},
			"waits for the user to log in", "the provider does not take the refresh token any more (odd)"},
		{"logged out", func(g *broker.Grant) { g.State, g.Reason, g.Tombstone = broker.NeedsLogin, "logged_out", now }, here, broker.NextLogin, time.Time{},
			"waits for the user to log in", "the user has logged out of the hub"},
		{"disconnected", func(g *broker.Grant) {
			g.State, g.Reason, g.Tombstone = broker.Disconnected, "disconnected by an administrator", now
			g.Lease = broker.Lease{Holder: "x", Until: now.Add(time.Second)}
		}, here, broker.NextLogin, time.Time{}, "waits for the user to log in", "disconnected by an administrator on 2026-10-05 14:00 UTC"},
		{"nobody's", func(g *broker.Grant) { g.User, g.Tombstone = "", now }, nil, broker.NextLogin, time.Time{},
			"linked to nobody; waits for a login of this account", ""},
		{"switched off", func(g *broker.Grant) { g.State, g.Since = broker.GrantDisabled, now }, here, broker.NextAsked, now.Add(20 * time.Minute),
			"asked again when a token is asked for", "keycloak says that the account is disabled; since 2026-10-05 14:00 UTC"},
		{"another issuer", func(g *broker.Grant) { g.Issuer = "https://old.example" }, here, broker.NextLogin, time.Time{},
			"waits for the user to log in", "keycloak had another issuer, https://old.example, when the user logged in"},
		{"no refresh token", func(g *broker.Grant) { g.Refresh = broker.Secret{} }, here, broker.NextLogin, time.Time{},
			"waits for the user to log in", "keycloak gave no refresh token at the login on 2026-10-05 09:00 UTC"},
	} {
		g := broker.Grant{
			Key: broker.GrantKey{Hub: "main", Provider: "keycloak", Sub: "alice"}, User: "alice", Issuer: issuer, State: broker.Live,
			Refresh: broker.NewSecret("r"), LoginAt: now.Add(-5 * time.Hour), RefreshedAt: now.Add(-10 * time.Minute), Expires: now.Add(20 * time.Minute),
		}
		tt.edit(&g)
		got := g.Outlook(issuer, now, tt.running)
		if got.Next != tt.next || got.Says != tt.says || !strings.Contains(got.Why, tt.state) || got.Why == "" {
			t.Errorf("%s: got %+v, want %s, %q and why %q", tt.why, got, tt.next, tt.says, tt.state)
		}
		if diff := got.At.Sub(tt.at).Abs(); diff > time.Second || got.At.IsZero() != tt.at.IsZero() {
			t.Errorf("%s: at %s, want %s", tt.why, got.At, tt.at)
		}
	}
	g := broker.Grant{
		Issuer: issuer, State: broker.Live, Refresh: broker.NewSecret("r"), RefreshedAt: now, Expires: now.Add(4 * time.Hour),
	}
	got := g.Outlook(issuer, now, here)
	if early, late := now.Add(2*time.Hour), now.Add(3*time.Hour); got.Next != broker.NextKept || got.At.Before(early) || got.At.After(late) ||
		got.Says != "refreshed again at about "+got.At.Format("15:04")+" UTC (kept alive for a running server on host1)" {
		t.Errorf("kept alive: %+v, want between %s and %s", got, early, late)
	}
	got = g.Outlook(issuer, now.Add(210*time.Minute), here)
	if got.Says != "refreshed again within 1m0s (kept alive for a running server on host1)" {
		t.Errorf("due: %+v", got)
	}
	if got := g.Outlook("", now, nil); got.Next != broker.NextNothing || !strings.Contains(got.Why, "configuration") {
		t.Errorf("a provider that is no more: %+v", got)
	}
}

// report is what is told of user's one grant.
func (r *rig) report(user broker.UserID) broker.GrantReport {
	r.t.Helper()
	all, err := r.Report(context.Background(), "", user, "")
	if err != nil || len(all) != 1 {
		r.t.Fatalf("Report of %s: %v, %v", user, all, err)
	}
	if !all[0].Refresh.IsZero() {
		r.t.Error("a report holds the refresh token")
	}
	return all[0]
}

func TestSessionMaximumIsKnownBeforeItComes(t *testing.T) {
	for _, every := range []time.Duration{0, 2 * time.Second, time.Minute} { // how often a token is wanted; 0: never
		inBubble(t, func(r *rig) {
			r.provider.SetIdle(30 * time.Minute)
			r.provider.SetMaximum(3 * time.Hour)
			began := time.Now()
			r.loggedIn("alice")
			p := r.running("alice", 100)
			work := func(until time.Duration) {
				time.Sleep(time.Until(began.Add(until - 10*time.Minute)))
				for every > 0 && time.Since(began) < until {
					r.token(p, broker.Want{})
					time.Sleep(every)
				}
				time.Sleep(time.Until(began.Add(until)))
			}
			work(2*time.Hour + 20*time.Minute)
			if g := r.report("alice"); g.End.Fixed || g.Outlook.Next != broker.NextKept {
				t.Errorf("every %s, long before: %+v", every, g.Outlook)
			}
			work(2*time.Hour + 52*time.Minute)
			g := r.report("alice")
			if end := began.Add(3 * time.Hour); !g.End.Fixed || g.Outlook.Next != broker.NextEnds || g.Outlook.At.Sub(end).Abs() > 2*time.Second {
				t.Errorf("every %s, before it comes: %+v, want its end at %s", every, g.Outlook, end)
			}
			r.loggedIn("alice")
			if g := r.report("alice"); g.End.Fixed {
				t.Errorf("every %s: a new login has the old one's end", every)
			}
		}, func(c *broker.Config) { c.Providers[0].(*brokertest.Provider).SetLife(5 * time.Second) })
	}
}

func TestEndIsFixedOnlyWhenLivesGetShorter(t *testing.T) {
	const s = time.Second
	type step struct{ after, life time.Duration }
	for _, tt := range []struct {
		why   string
		steps []step
		want  bool
	}{
		{"the first", []step{{0, 1800 * s}}, false},
		{"the same again", []step{{0, 1800 * s}, {600 * s, 1800 * s}}, false},
		{"a second lost to rounding", []step{{0, 1800 * s}, {2 * s, 1799 * s}, {600 * s, 1800 * s}, {600 * s, 1799 * s}}, false},
		{"less", []step{{0, 1800 * s}, {600 * s, 1500 * s}}, true},
		{"less, a second at a time", []step{{0, 1800 * s}, {s, 1799 * s}, {s, 1798 * s}, {s, 1797 * s}, {s, 1796 * s}, {s, 1795 * s}, {s, 1794 * s}}, true},
		{"nothing said", []step{{0, 1800 * s}, {600 * s, 1500 * s}, {600 * s, 0}}, true},
		{"less once, then the same", []step{{0, 1800 * s}, {600 * s, 1200 * s}, {600 * s, 1200 * s}}, false},
		{"more", []step{{0, 1800 * s}, {600 * s, 1200 * s}, {600 * s, 3600 * s}}, false},
	} {
		var e broker.Ending
		now := time.Date(2026, 10, 5, 14, 0, 0, 0, time.UTC)
		for _, st := range tt.steps {
			now = now.Add(st.after)
			e.See(st.life, now)
		}
		if e.Fixed != tt.want {
			t.Errorf("%s: fixed is %t", tt.why, e.Fixed)
		}
	}
}

func TestLoweredIdleLimitIsNoMaximum(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.provider.SetIdle(30 * time.Minute)
		r.loggedIn("alice")
		r.running("alice", 100)
		time.Sleep(time.Hour)
		r.provider.SetIdle(20 * time.Minute)
		time.Sleep(time.Hour)
		if g := r.report("alice"); g.End.Fixed || g.Outlook.Next != broker.NextKept {
			t.Errorf("got %+v", g.Outlook)
		}
	})
}

func TestReportKnowsTheServersOfOtherHosts(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.provider.SetIdle(30 * time.Minute)
		r.loggedIn("alice")
		if g := r.report("alice"); g.Outlook.Next != broker.NextAsked {
			t.Errorf("without a server: %+v", g.Outlook)
		}
		other := r.second()
		other.running("alice", 200)
		g := r.report("alice")
		if diff := cmp.Diff([]broker.HostID{"host2"}, g.Running); diff != "" || g.Outlook.Next != broker.NextKept {
			t.Errorf("with one on host2: %+v %s", g.Outlook, diff)
		}
		other.Close()
		time.Sleep(2 * time.Minute)
		if g := r.report("alice"); g.Outlook.Next != broker.NextAsked {
			t.Errorf("with its broker gone: %+v", g.Outlook)
		}
	})
}

func TestReportNamesWhoRefreshesAndWhatGotNoAnswer(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		expire()
		asked, answer := make(chan struct{}), make(chan struct{})
		lost := brokertest.Answer{Err: errors.New("no answer")}
		first := lost
		first.Before = func() { close(asked); <-answer }
		r.provider.Next(first, lost)
		done := make(chan struct{})
		go func() {
			defer close(done)
			r.Token(context.Background(), p, broker.Want{})
		}()
		<-asked
		if g := r.report("alice"); g.Outlook.Next != broker.NextRefreshing || !strings.HasPrefix(g.Outlook.Says, "being refreshed by host1 until ") {
			t.Errorf("while the provider is asked: %+v", g.Outlook)
		}
		close(answer)
		<-done
		synctest.Wait()
		if g := r.report("alice"); g.Outlook.Next != broker.NextRetry || g.Outlook.At.IsZero() {
			t.Errorf("after two lost answers: %+v", g.Outlook)
		}
		time.Sleep(time.Minute)
		r.token(p, broker.Want{})
		if g := r.report("alice"); g.Outlook.Next != broker.NextAsked || g.Mark.Attempt != "" {
			t.Errorf("after an answer: %+v", g.Outlook)
		}
	})
}
