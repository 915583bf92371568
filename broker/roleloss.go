package broker

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"time"
)

// OnRoleLost is what the loss of a rule's last role, or of its last group at the
// hub, brings about besides that its tokens are refused and, where that is possible,
// revoked.
//
// A server that somebody else may open by now only gets no tokens, whatever its rule
// says here. To share it is what its user does and undoes himself, and the session
// and the server are his as before: to end them would take his work, and the others',
// for a click. What its guests find in it are tokens that end soon by themselves.
type OnRoleLost string

const (
	Deny         OnRoleLost = "deny"          // nothing else
	RevokeGrants OnRoleLost = "revoke_grants" // the user's session at the rule's provider ends, too
	StopServer   OnRoleLost = "stop_server"   // the hub stops the servers that no rule gives anything any more
)

// byLoss ends a grant whose user has lost a role or a group. A login brings it back,
// and with it what other rules give.
func byLoss(what string) ending {
	return ending{state: NeedsLogin, reason: what + "_lost", revoke: true}
}

// rights are what a user has, or had, for rules to ask for.
type rights struct {
	roles  []string // canonical
	groups []string
	before bool // in the session before this one, which a login has replaced
}

// afterChange does what follows from a change of k's rights, which every broker has
// been told of; had is what of the one kind that changed he had before.
func (b *Broker) afterChange(ctx context.Context, k userKey, had rights) {
	if err := b.revokeUnallowed(ctx, k.hub, k.user); err != nil {
		b.cfg.Log.Error("tokens of roles or groups that were lost can't be revoked; they work until they end", "hub", k.hub, "user", k.user, "err", err)
	}
	if err := b.rightsLost(ctx, k, had); err != nil {
		b.cfg.Log.Error("what policy wants done about a lost role or group can't be done", "hub", k.hub, "user", k.user, "err", err)
	}
}

// rightsLost does what the rules say about what k has lost since he had had.
func (b *Broker) rightsLost(ctx context.Context, k userKey, had rights) error {
	v, err := b.match(ctx, k.hub, k.user)
	if err != nil {
		return err
	}
	var errs []error
	for _, r := range b.cfg.Rules {
		what := r.lostWith(v, k.hub, had)
		switch {
		case what == "":
		case r.OnRoleLost == RevokeGrants && had.before: // it has ended, and the new one never had them
		case r.OnRoleLost == RevokeGrants:
			errs = append(errs, b.endForLoss(ctx, v, k.hub, r.Provider, what))
		case r.OnRoleLost == StopServer:
			errs = append(errs, b.stopSoon(ctx, toStop{k.hub, k.user, b.pulse.now().UnixMicro()}))
		}
	}
	return errors.Join(errs...)
}

// lacking says what v's user must have by r and has not: a role or a group; empty:
// he has all.
func (r *Rule) lacking(v *view) string {
	switch {
	case !r.hasRole(v.roles(r.Provider)):
		return "role"
	case !r.hasGroup(v.groups):
		return "group"
	}
	return ""
}

// lostWith is lacking if v's user met r with what he had besides.
func (r *Rule) lostWith(v *view, hub HubID, had rights) string {
	met := oneOf(r.Hubs, hub) && oneOf(r.Users, v.user) &&
		r.hasRole(slices.Concat(v.roles(r.Provider), had.roles)) && r.hasGroup(slices.Concat(v.groups, had.groups))
	if !met {
		return ""
	}
	return r.lacking(v)
}

// endForLoss ends the user's grant at p.
func (b *Broker) endForLoss(ctx context.Context, v *view, hub HubID, p ProviderID, what string) error {
	g, ok := v.grants[p]
	if !ok || !g.Tombstone.IsZero() {
		return nil
	}
	e := b.entry("disconnect", nil)
	e.By, e.Hub, e.User, e.Provider, e.Sub = "policy: a "+what+" was lost", hub, v.user, p, g.Key.Sub
	_, err := b.tombstone(ctx, g.Key, v.user, byLoss(what))
	if err == nil {
		err = b.move(ctx, g.Key)
	}
	if err == nil && !b.closes() {
		b.work.Go(func() { b.revokeOne(context.WithoutCancel(ctx), g.Key) })
	}
	return b.record(ctx, e, err)
}

// stopsKey is the set of toStop.
var stopsKey = Key{Kind: setStops}

// A toStop is a user of whose servers some are to be stopped. Which, and whether at
// all, is looked up when it is done: the role may be back. A server that is started
// after the loss is started for what is left, and is not stopped.
type toStop struct {
	Hub    HubID
	User   UserID
	Before int64 // compares with Registration.Generation
}

// stopEvery is how often it is tried.
const stopEvery = 10 * time.Second

func (s toStop) member() string {
	m, _ := json.Marshal(s) // strings and a number always marshal
	return string(m)
}

func parseToStop(m string) (s toStop) {
	_ = json.Unmarshal([]byte(m), &s) // what is none names nobody
	return s
}

func (b *Broker) stopSoon(ctx context.Context, s toStop) error {
	if err := b.cfg.Store.Add(ctx, stopsKey, s.member()); err != nil {
		return storeError(err, stopsKey)
	}
	if !b.closes() {
		b.work.Go(func() { b.stopOne(context.WithoutCancel(ctx), s) })
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
		b.stopOne(ctx, parseToStop(m))
	}
}

// stopOne stops the servers of s that lost their purpose, and forgets s once none
// is registered any more. A hub that only another broker is configured for is that
// broker's to ask.
func (b *Broker) stopOne(ctx context.Context, s toStop) {
	hub, ok := b.cfg.Hubs[s.Hub]
	if !ok {
		return
	}
	_, err := b.stops.do(ctx, s, func(ctx context.Context) (none struct{}, err error) {
		left, err := b.stopPurposeless(ctx, hub.API, s)
		if err == nil && left == 0 {
			err = storeError(b.cfg.Store.Remove(ctx, stopsKey, s.member()), stopsKey)
		}
		return none, err
	})
	if err != nil {
		b.cfg.Log.Warn("servers that lost their purpose can't be stopped at the moment; it is tried again", "hub", s.Hub, "user", s.User, "err", err)
	}
}

// stopPurposeless returns how many servers had to be stopped.
func (b *Broker) stopPurposeless(ctx context.Context, api *HubAPI, s toStop) (n int, err error) {
	if api == nil {
		return 0, nil // it was configured once
	}
	v, err := b.match(ctx, s.Hub, s.User)
	if err != nil {
		return 0, err
	}
	servers, err := b.everywhere(ctx, func(k ServerKey) bool { return k.Hub == s.Hub && k.User == s.User })
	if err != nil {
		return 0, err
	}
	var errs []error
	for _, r := range servers {
		rule, ok := v.purposeless(b.cfg.Rules, r.Key)
		if !ok || r.Generation >= s.Before {
			continue
		}
		n++
		e := b.entry("stop_server", nil)
		e.Hub, e.User, e.Server, e.Rule = s.Hub, s.User, r.Key.Server, rule
		e.By = "policy: a " + b.cfg.Rules[rule-1].lacking(v) + " was lost"
		errs = append(errs, b.record(ctx, e, api.Stop(ctx, s.User, r.Key.Server)))
	}
	return n, errors.Join(errs...)
}

// purposeless says by which rule, counted from 1, a server of v's user is to be
// stopped: a rule that stops servers is about it and lacks the role or the group, and
// no rule gives it anything. The image and the level are not known of a server elsewhere;
// they count as what the rules want, so that no server is stopped by mistake. So does
// whether it is shared: see OnRoleLost.
func (v *view) purposeless(rules []Rule, k ServerKey) (rule int, ok bool) {
	for i, r := range rules {
		about := oneOf(r.Hubs, k.Hub) && oneOf(r.Users, k.User) && oneOf(r.Servers, k.Server)
		switch lacks := r.lacking(v); {
		case about && lacks == "":
			return 0, false
		case about && r.OnRoleLost == StopServer && !ok:
			rule, ok = i+1, true
		}
	}
	return rule, ok
}
