package broker

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"
)

// What an administrator is told of grants: why they are as they are, and what
// becomes of them. Nothing here changes anything.

// A GrantReport is a grant with what it doesn't say itself.
type GrantReport struct {
	Grant
	Outlook Outlook
	Running []HostID // where the user has a running server, sorted
}

// An Outlook says why a grant is in its state, and what happens next.
type Outlook struct {
	Why  string // a sentence
	Next NextStep
	At   time.Time // when Next happens or is over; zero: not known
	Says string    // Next and At as a sentence
}

// NextStep is what happens to a grant next.
type NextStep string

const (
	NextRefreshing NextStep = "refreshing" // a broker is asking the provider, until At at the latest
	NextKept       NextStep = "keep_alive" // refreshed at about At, for a running server
	NextAsked      NextStep = "on_request" // refreshed when a token is asked for; ends at At if none is
	NextRetry      NextStep = "retry"      // a refresh got no answer; the next one tells, not before At
	NextEnds       NextStep = "end"        // ends at At, whoever refreshes
	NextLogin      NextStep = "login"      // waits for the user to log in
	NextNothing    NextStep = "nothing"    // its provider is not in the configuration
)

// Outlook looks ahead from now. issuer is its provider's; empty if there is no
// such provider. running are the hosts on which the user has a running server.
func (g *Grant) Outlook(issuer string, now time.Time, running []HostID) Outlook {
	login := Outlook{Next: NextLogin, Says: "waits for the user to log in"}
	switch {
	case g.State == NeedsLogin:
		login.Why = fmt.Sprintf("%s; since %s", refusals.of(g.Reason), day(g.Since))
		return login
	case !g.Tombstone.IsZero():
		login.Why = fmt.Sprintf("%s on %s", g.Reason, day(g.Tombstone))
		if g.User == "" {
			login.Says = "linked to nobody; waits for a login of this account"
		}
		return login
	case issuer == "":
		return Outlook{Why: fmt.Sprintf("%s is not a provider of this broker's configuration", g.Key.Provider), Next: NextNothing, Says: "can't be used or refreshed"}
	case g.Issuer != issuer:
		login.Why = fmt.Sprintf("%s had another issuer, %s, when the user logged in", g.Key.Provider, g.Issuer)
		return login
	case g.Refresh.IsZero():
		login.Why = fmt.Sprintf("%s gave no refresh token at the login on %s", g.Key.Provider, day(g.LoginAt))
		return login
	}
	o := g.refreshAhead(now, running)
	o.Why = fmt.Sprintf("the user logged in on %s", day(g.LoginAt))
	if g.State == GrantDisabled {
		o.Why = fmt.Sprintf("%s says that the account is disabled; since %s", g.Key.Provider, day(g.Since))
	}
	return o
}

// refreshAhead is Outlook for a grant that can be refreshed.
func (g *Grant) refreshAhead(now time.Time, running []HostID) Outlook {
	var o Outlook
	switch {
	case g.Lease.Until.After(now):
		return Outlook{Next: NextRefreshing, At: g.Lease.Until, Says: fmt.Sprintf("being refreshed by %s until %s at the latest",
			cmp.Or(g.Lease.Host, "a broker"), clock(g.Lease.Until, now))}
	case g.Mark.Rest.After(now) && !g.offRests():
		return Outlook{Next: NextRetry, At: g.Mark.Rest, Says: "a refresh and its retry got no answer; the next one, not before " +
			clock(g.Mark.Rest, now) + ", tells"}
	case g.End.Fixed && g.Expires.After(now):
		o = Outlook{Next: NextEnds, At: g.Expires, Says: fmt.Sprintf("ends at %s and can't be extended: session maximum", clock(g.Expires, now))}
	case g.State == Live && len(running) > 0 && !g.keepAt().IsZero():
		o = g.keptAlive(now, running)
	default:
		o = g.whenAsked(now)
	}
	if g.Mark.Attempt != "" {
		o.Next, o.Says = NextRetry, "an earlier refresh got no answer; the next one tells: "+o.Says
	}
	return o
}

// keptAlive is the outlook of a grant whose user has a running server.
func (g *Grant) keptAlive(now time.Time, running []HostID) Outlook {
	at := g.keepAt()
	when := "at about " + clock(at, now)
	if !at.After(now) {
		when = "within " + keepAliveEvery.String()
	}
	return Outlook{Next: NextKept, At: at, Says: fmt.Sprintf("refreshed again %s (kept alive for a running server on %s)", when, list(texts(running)))}
}

// whenAsked is the outlook of a grant that nobody keeps alive.
func (g *Grant) whenAsked(now time.Time) Outlook {
	o := Outlook{Next: NextAsked, At: g.Expires}
	switch {
	case g.State == GrantDisabled:
		o.Says = "asked again when a token is asked for"
	case g.Expires.IsZero():
		o.Says = "refreshed when a token is asked for; the provider sets no end"
	case g.Expires.After(now):
		o.Says = fmt.Sprintf("refreshed when a token is asked for; ends at %s if none is", clock(g.Expires, now))
	default:
		o.Says = fmt.Sprintf("by the provider's word it ended at %s; the next request for a token tells", clock(g.Expires, now))
	}
	return o
}

// refusals are the reasons of a grant that waits for a login, as sentences.
var refusals = reasons{
	"expired":             "the provider says that the refresh token has expired",
	"revoked":             "the provider has revoked the refresh token",
	"session_ended":       "the session at the provider has ended, by a logout, by its time limit or by an administrator there",
	"reuse_detected":      "the provider saw a refresh token used twice and ended the session",
	"lost_response":       "the provider's answer to a refresh was lost, and it does not take the old refresh token again (lost_response)",
	"logged_out":          "the user has logged out of the hub",
	"not_allowed":         "the hub does not allow the user any more",
	"role_lost":           "the user has lost a role, and policy ends the session then (on_role_lost)",
	"group_lost":          "the user has left a group of the hub, and policy ends the session then (on_role_lost)",
	"store_lost":          "the store has lost the newest refresh token (store_lost)",
	"subject_changed":     "the provider answered a refresh for another account",
	"offline_not_allowed": "the account may not have offline access any more",
}

type reasons map[string]string

// of is the sentence for a reason; an unknown one is quoted.
func (r reasons) of(reason string) string {
	return cmp.Or(r[reason], fmt.Sprintf("the provider does not take the refresh token any more (%s)", reason))
}

// clock writes a time that is near now shorter than day does.
func clock(t, now time.Time) string {
	t, now = t.UTC(), now.UTC()
	switch {
	case t.Format(time.DateOnly) != now.Format(time.DateOnly):
		return day(t)
	case t.Sub(now).Abs() < 10*time.Minute:
		return t.Format("15:04:05 MST")
	}
	return t.Format("15:04 MST")
}

// An Ending is what the refreshes of a grant have shown of its end. A provider
// gives each refresh token the session's idle limit to live, the same each time,
// until the session's maximum is nearer: then each one gets less than the one
// before, and no refresh moves Expires any more.
//
// An idle limit that is lowered at the provider looks like that once, and no
// longer after the next refresh; so Fixed is for people, and stops no refresh.
type Ending struct {
	Fixed bool          // refreshes don't move Expires any more
	Life  time.Duration // what a refresh token was given to live
	At    time.Time     // when
}

// endSlack is by how much lives differ that are meant to be equal: providers
// count in whole seconds.
const endSlack = 5 * time.Second

// see takes note of a refresh token that was given life at now; 0 says nothing.
func (e *Ending) see(life time.Duration, now time.Time) {
	switch {
	case life <= 0:
	case e.Life == 0 || life > e.Life+endSlack:
		*e = Ending{Life: life, At: now}
	case life < e.Life-endSlack:
		*e = Ending{Fixed: true, Life: life, At: now}
	case now.Sub(e.At) > 2*endSlack: // as much as before, but later
		*e = Ending{Life: life, At: now}
	}
}

// Report is Grants with what becomes of them. An empty provider narrows nothing.
func (b *Broker) Report(ctx context.Context, hub HubID, user UserID, provider ProviderID) ([]GrantReport, error) {
	all, err := b.report(ctx, func(k GrantKey, u UserID) bool {
		return (hub == "" || hub == k.Hub) && (user == "" || user == u) && (provider == "" || provider == k.Provider)
	})
	if err != nil {
		return nil, public(err, b.cfg.Contact, "")
	}
	return all, nil
}

func (b *Broker) report(ctx context.Context, wanted func(GrantKey, UserID) bool) ([]GrantReport, error) {
	if err := b.pulse.sync(ctx); err != nil {
		return nil, err
	}
	grants, err := b.grants(ctx, wanted)
	if err != nil {
		return nil, err
	}
	about := make(map[userKey]bool)
	for _, g := range grants {
		about[userKey{g.Key.Hub, g.User}] = true
	}
	servers, err := b.everywhere(ctx, func(k ServerKey) bool { return about[userKey{k.Hub, k.User}] })
	if err != nil {
		return nil, err
	}
	var all []GrantReport
	for _, g := range grants {
		all = append(all, b.reportOf(g, servers))
	}
	return all, nil
}

// reportOf looks ahead for g, whose refresh token it drops. servers are all of
// its user's, and others.
func (b *Broker) reportOf(g Grant, servers []seenServer) GrantReport {
	r := GrantReport{Running: runningFor(userKey{g.Key.Hub, g.User}, servers)}
	issuer := ""
	if p, ok := b.providers[g.Key.Provider]; ok {
		issuer = p.Info().Issuer
	}
	r.Outlook = g.Outlook(issuer, b.pulse.now(), r.Running)
	g.Refresh = Secret{}
	r.Grant = g
	return r
}

// A seenServer is a registration on any host. Its state is as the host's broker
// has last written it; answers is whether that one was seen within a minute.
type seenServer struct {
	Registration
	answers bool
}

func runningFor(k userKey, servers []seenServer) (on []HostID) {
	for _, s := range servers {
		if s.Key.Hub == k.hub && s.Key.User == k.user && s.State == Bound && s.answers {
			on = append(on, s.Host)
		}
	}
	slices.Sort(on)
	return slices.Compact(on)
}

// everywhere lists the registrations of the deployment that are wanted, sorted.
func (b *Broker) everywhere(ctx context.Context, wanted func(ServerKey) bool) ([]seenServer, error) {
	var all []seenServer
	for _, s := range b.servers.list() {
		if wanted(s.Key) {
			all = append(all, seenServer{s.Registration, true})
		}
	}
	brokers, err := KeyKeeper{Deployment: b.cfg.Deployment, Store: b.cfg.Store, Keys: b.cfg.Keys}.Brokers(ctx)
	if err != nil {
		return nil, storeError(err, brokersKey)
	}
	for _, o := range brokers {
		if o.Host == b.cfg.Host {
			continue
		}
		there, err := b.registeredOn(ctx, o.Host, wanted)
		if err != nil {
			return nil, err
		}
		for _, r := range there {
			all = append(all, seenServer{r, o.Present})
		}
	}
	slices.SortFunc(all, func(a, b seenServer) int {
		return cmp.Or(cmp.Compare(a.Key.Hub, b.Key.Hub), cmp.Compare(a.Key.User, b.Key.User), cmp.Compare(a.Key.Server, b.Key.Server), cmp.Compare(a.Host, b.Host))
	})
	return all, nil
}

// registeredOn reads the registrations of another host that are wanted.
func (b *Broker) registeredOn(ctx context.Context, host HostID, wanted func(ServerKey) bool) (list []Registration, err error) {
	set := registrationsOn(host)
	members, err := b.cfg.Store.Members(ctx, set)
	if err != nil {
		return nil, storeError(err, set)
	}
	for _, m := range members {
		var k ServerKey
		if json.Unmarshal([]byte(m), &k) != nil || !wanted(k) {
			continue
		}
		var r Registration
		_, err := b.vault.load(ctx, registrationOn(host, k), &r)
		switch {
		case errors.Is(err, ErrAbsent): // unregistered meanwhile
		case err != nil:
			return nil, err
		default:
			list = append(list, r)
		}
	}
	return list, nil
}
