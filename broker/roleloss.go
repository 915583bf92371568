package broker

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"time"
)

// OnRoleLost is what the loss of a rule's last role brings about besides that
// its tokens are refused and, where that is possible, revoked.
type OnRoleLost string

const (
	Deny         OnRoleLost = "deny"          // nothing else
	RevokeGrants OnRoleLost = "revoke_grants" // the user's session at the rule's provider ends, too
	StopServer   OnRoleLost = "stop_server"   // the hub stops the servers that no rule gives anything any more
)

// byRoleLoss ends a grant whose user has lost a role. A login brings it back, and
// with it what other rules give.
var byRoleLoss = ending{state: NeedsLogin, reason: "role_lost", revoke: true}

// roleLost does what the rules say that is's user has lost with was.
func (b *Broker) roleLost(ctx context.Context, was, is Grant) error {
	v, err := b.match(ctx, is.Key.Hub, is.User)
	if err != nil {
		return err
	}
	var errs []error
	for _, r := range b.cfg.Rules {
		if !r.lostWith(v, is.Key.Hub, was.Roles) {
			continue
		}
		switch r.OnRoleLost {
		case RevokeGrants:
			errs = append(errs, b.endForLoss(ctx, v, is.Key.Hub, r.Provider))
		case StopServer:
			errs = append(errs, b.stopSoon(ctx, userKey{is.Key.Hub, is.User}))
		}
	}
	return errors.Join(errs...)
}

// lostWith says whether r was met by the roles that v's user had with old, and is
// not by those he has.
func (r *Rule) lostWith(v *view, hub HubID, old []string) bool {
	now := v.roles(r.Provider)
	return oneOf(r.Hubs, hub) && oneOf(r.Users, v.user) && !r.hasRole(now) && r.hasRole(slices.Concat(now, old))
}

// endForLoss ends the user's grant at p.
func (b *Broker) endForLoss(ctx context.Context, v *view, hub HubID, p ProviderID) error {
	g, ok := v.grants[p]
	if !ok || !g.Tombstone.IsZero() {
		return nil
	}
	e := b.entry("disconnect", nil)
	e.By, e.Hub, e.User, e.Provider, e.Sub = "policy: a role was lost", hub, v.user, p, g.Key.Sub
	_, err := b.tombstone(ctx, g.Key, v.user, byRoleLoss)
	if err == nil {
		err = b.move(ctx, g.Key)
	}
	if err == nil && !b.closes() {
		b.work.Go(func() { b.revokeOne(context.WithoutCancel(ctx), g.Key) })
	}
	return b.record(ctx, e, err)
}

// stopsKey is the set of users of whose servers some are to be stopped. Which,
// and whether at all, is looked up when it is done: the role may be back.
var stopsKey = Key{Kind: setStops}

// stopEvery is how often it is tried.
const stopEvery = 10 * time.Second

func (k userKey) member() string { return ServerKey{Hub: k.hub, User: k.user}.member() }

func parseUserKey(m string) userKey {
	var k ServerKey
	_ = json.Unmarshal([]byte(m), &k) // what is no key names nobody
	return userKey{k.Hub, k.User}
}

func (b *Broker) stopSoon(ctx context.Context, k userKey) error {
	if err := b.cfg.Store.Add(ctx, stopsKey, k.member()); err != nil {
		return storeError(err, stopsKey)
	}
	if !b.closes() {
		b.work.Go(func() { b.stopOne(context.WithoutCancel(ctx), k) })
	}
	return nil
}

// stopAll works on the whole set.
func (b *Broker) stopAll(ctx context.Context) {
	members, err := b.cfg.Store.Members(ctx, stopsKey)
	if err != nil {
		b.cfg.Log.Warn("which servers are to be stopped can't be read", "err", err)
		return
	}
	for _, m := range members {
		b.stopOne(ctx, parseUserKey(m))
	}
}

// stopOne stops the servers of k that lost their purpose, and forgets k once none
// is registered any more.
func (b *Broker) stopOne(ctx context.Context, k userKey) {
	_, err := b.stops.do(ctx, k, func(ctx context.Context) (none struct{}, err error) {
		left, err := b.stopPurposeless(ctx, k)
		if err == nil && left == 0 {
			err = storeError(b.cfg.Store.Remove(ctx, stopsKey, k.member()), stopsKey)
		}
		return none, err
	})
	if err != nil {
		b.cfg.Log.Warn("servers that lost their purpose can't be stopped at the moment; it is tried again", "hub", k.hub, "user", k.user, "err", err)
	}
}

// stopPurposeless returns how many servers had to be stopped.
func (b *Broker) stopPurposeless(ctx context.Context, k userKey) (n int, err error) {
	api := b.cfg.Hubs[k.hub].API
	if api == nil {
		return 0, nil // it was configured once
	}
	v, err := b.match(ctx, k.hub, k.user)
	if err != nil {
		return 0, err
	}
	servers, err := b.everywhere(ctx, func(s ServerKey) bool { return s.Hub == k.hub && s.User == k.user })
	if err != nil {
		return 0, err
	}
	var errs []error
	for _, s := range servers {
		rule, ok := v.purposeless(b.cfg.Rules, s.Key)
		if !ok {
			continue
		}
		n++
		e := b.entry("stop_server", nil)
		e.Hub, e.User, e.Server, e.Rule, e.By = k.hub, k.user, s.Key.Server, rule, "policy: a role was lost"
		errs = append(errs, b.record(ctx, e, api.Stop(ctx, k.user, s.Key.Server)))
	}
	return n, errors.Join(errs...)
}

// purposeless says by which rule, counted from 1, a server of v's user is to be
// stopped: a rule that stops servers is about it and lacks the role, and no rule
// gives it anything. The image and the level are not known of a server elsewhere;
// they count as what the rules want, so that no server is stopped by mistake.
func (v *view) purposeless(rules []Rule, k ServerKey) (rule int, ok bool) {
	for i, r := range rules {
		about := oneOf(r.Hubs, k.Hub) && oneOf(r.Users, k.User) && oneOf(r.Servers, k.Server)
		switch has := r.hasRole(v.roles(r.Provider)); {
		case about && has && r.hasGroup(v.groups):
			return 0, false
		case about && !has && r.OnRoleLost == StopServer && !ok:
			rule, ok = i+1, true
		}
	}
	return rule, ok
}
