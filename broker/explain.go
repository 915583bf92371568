package broker

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A Question is a container's request as an administrator imagines it.
type Question struct {
	Hub    HubID // empty: the only one
	User   UserID
	Server ServerName
	Want   Want
}

// An Explanation says how a request would be answered at this moment, and why.
type Explanation struct {
	Server ServerKey
	Want   Want // as it was completed
	// Assumed says which facts are not those of a running server.
	Assumed []string

	Refusal *Error // what the container would be told; nil: it would get a token
	// Rule is the rule that answers, counted from 1, or the first one that would
	// if the user had a role of it; 0: there is none.
	Rule     int
	RuleText string
	Needs    []string // roles of that rule, any of which will do; none: all users
	Has      []string // the user's roles, canonical
	Fits     []string // those of Has that the rule wants

	// What the token would be, if it is not refused by policy.
	Target     Target
	MaxTTL     time.Duration
	Unverified bool
	// AskedScopes are those that the provider is asked for.
	AskedScopes []string

	Grant *GrantReport // nil: there is none
	// CachedUntil is the end of the token that would be given at once; zero:
	// there is none, and the provider would be asked.
	CachedUntil time.Time
	// OutstandingUntil is until when some token of the grant may still work.
	OutstandingUntil time.Time
}

// Explain answers q by the steps of the straight line up to the point where a
// provider would be asked. It asks none, issues nothing and changes nothing.
func (b *Broker) Explain(ctx context.Context, q Question) (Explanation, error) {
	x, err := b.explain(ctx, q)
	if err != nil {
		return x, public(err, b.cfg.Contact, "")
	}
	return x, nil
}

func (b *Broker) explain(ctx context.Context, q Question) (x Explanation, err error) {
	if q.Hub, err = b.onlyHub(q.Hub); err != nil {
		return x, err
	}
	for _, check := range []func() error{
		func() error { return checkUser(q.User) },
		func() error { return checkName("server", string(q.Server)) },
		func() error { return b.complete(q.Hub, &q.Want) },
		func() error { return b.pulse.sync(ctx) },
	} {
		if err := check(); err != nil {
			return x, err
		}
	}
	x.Server, x.Want = ServerKey{q.Hub, q.User, q.Server}, q.Want
	s := b.imagined(ctx, &x)
	v, err := b.match(ctx, q.Hub, q.User)
	if err != nil {
		return x, err
	}
	refusal, err := b.wouldAnswer(ctx, &x, v, s)
	if err != nil {
		return x, err
	}
	if refusal != nil {
		x.Refusal = public(refusal, b.cfg.Contact, "")
	}
	return x, nil
}

// imagined is the server that x is about, if it runs here, else one that it might
// be; x says what of it is assumed.
func (b *Broker) imagined(ctx context.Context, x *Explanation) *server {
	s := b.servers.get(x.Server)
	if s != nil && s.workload != nil {
		return s
	}
	why := "is not registered here"
	if s != nil {
		why = "is " + string(s.State)
	}
	w := &Workload{}
	level, err := b.cfg.Attestor.Check(ctx)
	if err == nil {
		w.Level = level
	}
	x.Assumed = []string{
		fmt.Sprintf("the %s %s on %s; it is taken for one that is started now", x.Server, why, b.cfg.Host),
		"image: unknown, so rules that name images do not apply",
		fmt.Sprintf("attestation: %s, the best of this host", cmp.Or(w.Level, "unknown")),
		fmt.Sprintf("shared: %t, unless the hub says otherwise at its start", s != nil && s.Shared),
	}
	next := &server{Registration: Registration{Key: x.Server, Host: b.cfg.Host, Generation: later(0, b.pulse.now())}, workload: w}
	next.Shared = s != nil && s.Shared
	return next
}

// wouldAnswer walks the line for s and returns what would refuse the request.
func (b *Broker) wouldAnswer(ctx context.Context, x *Explanation, v *view, s *server) (refusal, err error) {
	f := b.facts(v, s, x.Want.Provider)
	g, d, refusal := b.decide(v, f, x.Want)
	x.decided(b.cfg.Rules, f, d)
	if g.Key != (GrantKey{}) {
		if g, err = b.seeGrant(ctx, x, g.Key); err != nil {
			return nil, err
		}
	}
	if r := v.admits(&s.Registration); r != nil {
		return r, nil
	}
	if refusal != nil {
		return refusal, nil
	}
	return b.wouldObtain(ctx, x, g, d), nil
}

// decided takes down which rule it was. The rule's own methods say what fits.
func (x *Explanation) decided(rules []Rule, f Facts, d Decision) {
	x.Has = f.Roles
	x.Rule, x.Target, x.MaxTTL, x.Unverified = d.Rule, d.Target, d.MaxTTL, d.Unverified
	if d.Rule == 0 {
		return
	}
	r := &rules[d.Rule-1]
	x.RuleText, x.Needs = r.String(), r.Roles
	for _, have := range f.Roles {
		if slices.ContainsFunc(r.Roles, func(want string) bool { return r.names(want, have) }) {
			x.Fits = append(x.Fits, have)
		}
	}
}

// seeGrant puts the grant at k, as it is now, into x.
func (b *Broker) seeGrant(ctx context.Context, x *Explanation, k GrantKey) (Grant, error) {
	g, err := b.loadGrant(ctx, k)
	if err != nil {
		return g, unlessAbsent(err)
	}
	servers, err := b.everywhere(ctx, func(s ServerKey) bool { return s.Hub == k.Hub && s.User == g.User })
	if err != nil {
		return g, err
	}
	r := b.reportOf(g, servers)
	x.Grant, x.OutstandingUntil = &r, g.OutstandingUntil
	return g, nil
}

// wouldObtain says what obtain would meet before it asks the provider.
func (b *Broker) wouldObtain(ctx context.Context, x *Explanation, g Grant, d Decision) error {
	p, err := b.provider(d.Provider)
	if err != nil {
		return err
	}
	info := p.Info()
	x.AskedScopes = d.target(info).Scopes
	if err := g.usable(info.Issuer); err != nil {
		return err
	}
	now := b.pulse.now()
	good := func(t *cachedToken) bool { return t.Epoch == g.Epoch && t.lasts(g.Key, now, x.Want.MinTTL) }
	t, ok := b.recall(ctx, d.key(g.Key), good)
	whole, hasWhole := b.recall(ctx, wholeKey(g.Key), good)
	if !ok && info.Narrowing == Never {
		t, ok = whole, hasWhole
	}
	switch {
	case ok:
		x.CachedUntil = t.ExpiresAt
		return d.holds(info, &t)
	case hasWhole && info.Narrowing == ByExchange:
		return nil // the refresh token is not needed
	}
	return g.spendable(info.Issuer, now)
}

// String writes r as it is written in the configuration.
func (r *Rule) String() string {
	var parts []string
	add := func(name, value string) { parts = append(parts, name+": "+value) }
	for _, l := range []struct {
		name   string
		values []string
	}{
		{"hubs", texts(r.Hubs)}, {"users", texts(r.Users)}, {"servers", texts(r.Servers)}, {"images", r.Images}, {"roles", r.Roles},
		{"groups", r.Groups}, {"audiences", r.Audiences}, {"scopes", r.Scopes},
	} {
		if len(l.values) > 0 {
			add(l.name, "["+strings.Join(quoted(l.values), ", ")+"]")
		}
	}
	if r.Shared {
		add("shared", "true")
	}
	if r.RequireAttestation != "" {
		add("require_attestation", r.RequireAttestation)
	}
	if r.OnRoleLost != "" {
		add("on_role_lost", string(r.OnRoleLost))
	}
	add("provider", string(r.Provider))
	if r.MaxTTL > 0 {
		add("max_ttl", r.MaxTTL.String())
	}
	if r.Unverified {
		add("unverified", "true")
	}
	return "{" + strings.Join(parts, ", ") + "}"
}

func texts[T ~string](list []T) (all []string) {
	for _, v := range list {
		all = append(all, string(v))
	}
	return all
}

// quoted puts those of list into quotes that YAML would not read as they are.
func quoted(list []string) (all []string) {
	for _, v := range list {
		if v == "" || strings.ContainsAny(v, " ,:[]{}#&*!|>'\"%@`\\") {
			v = strconv.Quote(v)
		}
		all = append(all, v)
	}
	return all
}
