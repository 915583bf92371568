package broker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"
)

// A UserReport is all that is known of one user of a hub.
type UserReport struct {
	Hub      HubID
	User     UserID
	Groups   []string  // at the hub, as it last said; sorted
	Rebound  time.Time // when the name was last given to another person; zero: never
	Accounts []Account // sorted by provider
	Servers  []Registration
	// OutstandingUntil is until when some token of the user may still work.
	OutstandingUntil time.Time
}

// An Account is who a hub's user is at a provider.
type Account struct {
	Provider ProviderID
	Login    bool // it is the one that the hub's users log in with
	Sub      string
	Grant    *GrantReport // nil: there is none yet
}

// User reports on a user. An empty hub means the only one.
func (b *Broker) User(ctx context.Context, hub HubID, user UserID) (UserReport, error) {
	u, err := b.userReport(ctx, hub, user)
	if err != nil {
		return u, public(err, b.cfg.Contact, "")
	}
	return u, nil
}

func (b *Broker) userReport(ctx context.Context, hub HubID, user UserID) (u UserReport, err error) {
	if hub, err = b.onlyHub(hub); err == nil {
		err = cmp.Or(checkUser(user), b.pulse.sync(ctx))
	}
	if err != nil {
		return u, err
	}
	u = UserReport{Hub: hub, User: user}
	l, err := b.loadLink(ctx, userKey{hub, user})
	if err != nil {
		return u, err
	}
	servers, err := b.everywhere(ctx, func(k ServerKey) bool { return k.Hub == hub && k.User == user })
	if err != nil {
		return u, err
	}
	if len(l.Subs)+len(servers) == 0 {
		return u, Errorf(Invalid, "user: hub %s has no user %q with an account or a server here", hub, user).Hint("tokenbroker sessions list shows who has")
	}
	u.Rebound, u.Groups = l.ReboundAt, l.Groups
	for _, s := range servers {
		u.Servers = append(u.Servers, s.Registration)
	}
	for _, p := range slices.Sorted(maps.Keys(l.Subs)) {
		a, err := b.account(ctx, userKey{hub, user}, p, l.Subs[p], servers)
		if err != nil {
			return u, err
		}
		if a.Grant != nil {
			u.OutstandingUntil = latest(u.OutstandingUntil, a.Grant.OutstandingUntil)
		}
		u.Accounts = append(u.Accounts, a)
	}
	return u, nil
}

func (b *Broker) account(ctx context.Context, k userKey, p ProviderID, sub string, servers []seenServer) (Account, error) {
	a := Account{Provider: p, Login: p == b.cfg.Hubs[k.hub].Login, Sub: sub}
	g, err := b.loadGrant(ctx, GrantKey{k.hub, p, sub})
	if err == nil && g.User == k.user {
		r := b.reportOf(g, servers)
		a.Grant = &r
	}
	return a, unlessAbsent(err)
}

// A Rebinding is what has changed with a rebind.
type Rebinding struct {
	Provider ProviderID
	Was      string // the subject until now; empty: none
	Sub      string // the subject from now on; empty: the next to log in
	Ended    []Disconnection
	Ref      string
}

// Rebind gives a user's name to another account at a provider: sub, or, if that
// is empty, whichever logs in next under the name. The grants of the account
// before are ended and nobody's. At the provider that the hub's users log in
// with another account is another person, who inherits nothing: then the user's
// grants at all providers end, and servers that run get no tokens until they are
// started anew. by says who asked, for the audit.
func (b *Broker) Rebind(ctx context.Context, by string, hub HubID, user UserID, provider ProviderID, sub string) (Rebinding, error) {
	e := b.entry("rebind", nil)
	e.By, e.Hub, e.User, e.Provider, e.Sub = by, hub, user, provider, sub
	r, err := b.rebind(ctx, hub, user, provider, sub, e)
	if err := b.record(ctx, e, err); err != nil {
		return Rebinding{}, err
	}
	r.Ref = e.Ref
	return r, nil
}

func (b *Broker) rebind(ctx context.Context, hub HubID, user UserID, provider ProviderID, sub string, e *Entry) (r Rebinding, err error) {
	if hub, err = b.onlyHub(hub); err != nil {
		return r, err
	}
	e.Hub = hub
	k := userKey{hub, user}
	l, err := b.checkRebind(ctx, k, provider, sub)
	if err != nil {
		return r, err
	}
	r = Rebinding{Provider: provider, Was: l.Subs[provider], Sub: sub}
	e.Reason = fmt.Sprintf("was sub %q", r.Was)
	// The grants first: while the link still names them this can be done again.
	leaving := b.leaving(k, l, provider)
	r.Ended, err = b.endAll(ctx, k, leaving)
	if err := cmp.Or(b.stopIssuing(ctx, hub, user, r.Ended), b.replicated(ctx), err); err != nil {
		return r, err
	}
	if err := b.relink(ctx, k, leaving, provider, sub); err != nil {
		return r, err
	}
	b.views.drop(k)
	if err := b.moveRevision(ctx); err != nil {
		return r, err
	}
	b.revokeGone(ctx, hub, r.Ended)
	return r, nil
}

// leaving are the accounts that k no longer has once provider's is another.
func (b *Broker) leaving(k userKey, l linkRecord, provider ProviderID) map[ProviderID]string {
	was, linked := l.Subs[provider]
	switch {
	case !linked:
		return nil
	case provider == b.cfg.Hubs[k.hub].Login:
		return l.Subs
	}
	return map[ProviderID]string{provider: was}
}

// endAll ends the grants of k's accounts, which are nobody's then. With an error
// it returns those that it has ended.
func (b *Broker) endAll(ctx context.Context, k userKey, accounts map[ProviderID]string) (ended []Disconnection, err error) {
	how := ending{state: Disconnected, reason: fmt.Sprintf("the name %s was given to another account", k.user), revoke: true, unlink: true}
	for _, p := range slices.Sorted(maps.Keys(accounts)) {
		g, err := b.tombstone(ctx, GrantKey{k.hub, p, accounts[p]}, k.user, how)
		switch {
		case errors.Is(err, ErrAbsent):
		case err != nil:
			return ended, err
		default:
			ended = append(ended, Disconnection{Provider: p, Sub: g.Key.Sub, OutstandingUntil: g.OutstandingUntil})
		}
	}
	return ended, nil
}

// checkRebind says what is wrong with a rebind; else it returns who k was.
func (b *Broker) checkRebind(ctx context.Context, k userKey, provider ProviderID, sub string) (l linkRecord, err error) {
	_, err = b.provider(provider)
	err = cmp.Or(checkUser(k.user), checkName("sub", sub), err)
	if err == nil {
		err = b.pulse.sync(ctx)
	}
	if err != nil {
		return l, err
	}
	if l, err = b.loadLink(ctx, k); err != nil {
		return l, err
	}
	was, linked := l.Subs[provider]
	switch {
	case !linked && sub == "":
		return l, Errorf(Invalid, "user: %q has no account at %s that could be taken away", k.user, provider).
			Hint("there is nothing to do: the next login under the name links its account")
	case linked && was == sub:
		return l, Errorf(Invalid, "sub: %q is linked to that account already", k.user).
			Hint("tokenbroker users show %s shows who is who", quote(k.user))
	case sub == "":
		return l, nil
	}
	g, err := b.loadGrant(ctx, GrantKey{k.hub, provider, sub})
	if err == nil && g.User != "" && g.User != k.user {
		return l, Errorf(Invalid, "sub: that account is linked to the user %q", g.User).
			Hint("if it is not his any more: tokenbroker users rebind %s --hub %s --provider %s, then this again", quote(g.User), k.hub, provider)
	}
	return l, unlessAbsent(err)
}

// relink makes sub, unless it is empty, k's subject at provider and forgets the
// others that leave.
func (b *Broker) relink(ctx context.Context, k userKey, leaving map[ProviderID]string, provider ProviderID, sub string) error {
	_, err := update(ctx, &b.vault, k.record(), forever[linkRecord], func(l *linkRecord, _ bool) error {
		if len(leaving) > 0 && provider == b.cfg.Hubs[k.hub].Login {
			l.ReboundAt, l.Groups = b.pulse.now(), nil // nor are the other's groups his
		}
		for p, was := range leaving {
			if l.Subs[p] == was {
				delete(l.Subs, p)
			}
		}
		if sub == "" {
			return nil
		}
		if l.Subs == nil {
			l.Subs = make(map[ProviderID]string)
		}
		l.Subs[provider] = sub
		return nil
	})
	return err
}
