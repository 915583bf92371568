package broker

import (
	"context"
	"encoding/hex"
	"errors"
	"slices"
	"strings"
	"time"
)

// Want is what a container asks for; see GetTokenRequest in workload.proto.
type Want struct {
	Provider ProviderID
	Audience string
	Scopes   []string
	MinTTL   time.Duration
	Rejected string // fingerprint of a token that a service refused
}

// A Token is what a container gets.
type Token struct {
	Access    Secret
	Type      string
	Provider  ProviderID
	Audience  string
	Scopes    []string
	ExpiresAt time.Time     // by the store's clock
	ExpiresIn time.Duration // from the moment of the answer
	Ref       string
}

// ProviderStatus says what a request for a provider would meet.
type ProviderStatus struct {
	Name      ProviderID
	Login     bool
	State     GrantState
	Audiences []string
	Scopes    []string
}

// oldAfter is how long a caller waits for a new token while the old one works.
const oldAfter = 3 * time.Second

// Token answers one request of a container. It is the straight line: attest,
// match, decide, cache, refresh, narrow, confirm, record.
func (b *Broker) Token(ctx context.Context, p *Peer, want Want) (Token, error) {
	return b.issue(ctx, p, want, "token", func(answer, error) bool { return false })
}

// issue walks the line and records what comes of it, as action. What told says is
// told already is not recorded again; then it returns errKeep.
func (b *Broker) issue(ctx context.Context, p *Peer, want Want, action string, told func(answer, error) bool) (Token, error) {
	e := b.entry(action, p)
	e.Audience, e.Scopes = want.Audience, want.Scopes
	a, err := b.answer(ctx, p, want, e)
	if told(a, err) {
		return Token{}, errKeep
	}
	if err := b.record(ctx, e, err); err != nil {
		return Token{}, err
	}
	// The record may have taken longer than what was confirmed before it holds.
	if ok, err := b.stands(ctx, a); err != nil || !ok {
		return Token{}, b.record(ctx, e, Errorf(Unavailable, "your rights changed while the answer was recorded").Because(err))
	}
	failpoint("before answer")
	now := b.pulse.now()
	return Token{
		Access: a.token.Access, Type: a.token.Type, Provider: a.decision.Provider,
		Audience: a.decision.Target.Audience, Scopes: a.token.Scopes,
		ExpiresAt: a.token.ExpiresAt, ExpiresIn: a.token.ExpiresAt.Sub(now), Ref: e.Ref,
	}, nil
}

// An answer is a token and what it rests on.
type answer struct {
	server   *server
	view     *view
	decision Decision
	token    cachedToken
}

// answer walks the line until what it found still stands at its end. Rights
// that move that often within one request are an alarm, not a reason to go on.
func (b *Broker) answer(ctx context.Context, p *Peer, want Want, e *Entry) (answer, error) {
	if err := b.complete(p.Server.Hub, &want); err != nil {
		return answer{}, err
	}
	e.Provider = want.Provider
	for range 5 {
		a, err := b.once(ctx, p, want, e)
		if errors.Is(err, errMoved) {
			// The revision need not have: whoever changed the rights may have died
			// before he could move it.
			b.views.drop(userKey{p.Server.Hub, p.Server.User})
			continue
		}
		if err != nil {
			return a, err
		}
		ok, err := b.stands(ctx, a)
		if err != nil {
			return a, err
		}
		if ok {
			e.Token, e.ExpiresAt = a.token.Print, &a.token.ExpiresAt
			return a, nil
		}
	}
	return answer{}, Errorf(Unavailable, "your rights are being changed at this moment")
}

func (b *Broker) once(ctx context.Context, p *Peer, want Want, e *Entry) (a answer, err error) {
	if a.server, err = b.attest(ctx, p, e); err != nil {
		return a, err
	}
	if a.view, err = b.match(ctx, p.Server.Hub, p.Server.User); err != nil {
		return a, err
	}
	if err := a.view.admits(&a.server.Registration); err != nil {
		return a, err
	}
	g, d, err := b.decide(a.view, b.facts(a.view, a.server, want.Provider), want)
	if err != nil {
		return a, err
	}
	a.decision = d
	e.Rule, e.Audience, e.Scopes = a.decision.Rule, a.decision.Target.Audience, a.decision.Target.Scopes
	e.Sub, e.Epoch = g.Key.Sub, g.Epoch
	a.token, e.Cached, err = b.obtain(ctx, g, a.decision, want)
	return a, err
}

// decide is what policy says of want, and the grant that it would come from.
// With an error the decision holds no more than its rule.
func (b *Broker) decide(v *view, f Facts, want Want) (Grant, Decision, error) {
	g, err := v.grant(want.Provider)
	if err != nil && offered(b.cfg.Rules, f, want.Provider) {
		return g, Decision{}, err // before policy, which would miss the roles a login brings
	}
	d, err := Decide(b.cfg.Rules, f, want)
	return g, d, err
}

// stands reports whether what a rests on is still so: the server runs as it was
// attested, and nobody's rights moved since they were read. What says so is no
// older than confirmLease.
func (b *Broker) stands(ctx context.Context, a answer) (bool, error) {
	rev, err := b.pulse.revision(ctx)
	return rev == a.view.revision && b.servers.current(a.server), err
}

// obtain returns a token of g that lies inside d: a cached one if it will do.
func (b *Broker) obtain(ctx context.Context, g Grant, d Decision, want Want) (t cachedToken, cached bool, err error) {
	p, err := b.provider(d.Provider)
	if err != nil {
		return t, false, err
	}
	info := p.Info()
	if err := g.usable(info.Issuer); err != nil {
		return t, false, err
	}
	now := b.pulse.now()
	good := func(t *cachedToken) bool {
		return t.Epoch == g.Epoch && t.lasts(g.Key, now, want.MinTTL) && !t.refused(want.Rejected, now)
	}
	t, cached = b.recall(ctx, d.key(g.Key), good)
	if !cached {
		t, cached, err = b.fetchOr(ctx, p, g, d, good)
	}
	switch {
	case err != nil:
	case t.Epoch != g.Epoch:
		err = errMoved // g is older than the refresh that brought t: decide again
	default:
		err = d.holds(info, &t)
	}
	return t, cached, err
}

// fetchOr gets a new token, or goes on with the old one while that lives: the
// provider's trouble need not be the user's.
func (b *Broker) fetchOr(ctx context.Context, p Provider, g Grant, d Decision, good func(*cachedToken) bool) (t cachedToken, cached bool, err error) {
	k := d.key(g.Key)
	works := func(t *cachedToken) bool { return t.Epoch == g.Epoch && t.valid(b.pulse.now()) }
	if _, ok := b.recall(ctx, k, works); ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, oldAfter)
		defer cancel()
	}
	t, err = b.fetch(ctx, p, g, d, good)
	if errors.Is(err, ErrProviderDown) {
		if old, ok := b.recall(context.WithoutCancel(ctx), k, works); ok {
			return old, true, nil
		}
	}
	return t, false, err
}

// fetch gets a new token the way the provider narrows.
func (b *Broker) fetch(ctx context.Context, p Provider, g Grant, d Decision, good func(*cachedToken) bool) (cachedToken, error) {
	info := p.Info()
	check := func(t *cachedToken) error { return d.holds(info, t) }
	switch info.Narrowing {
	case ByExchange:
		return b.exchange(ctx, p, g, d, good)
	case ByScope:
		return b.renew(ctx, errand{d.key(g.Key), d.target(info).Scopes, good, check})
	default:
		return b.whole(ctx, g.Key, good)
	}
}

// whole returns the token of the whole grant. A hub without scopes gets it, and
// exchanges start from it; a container, or a hub with scopes, gets it only where the
// provider can't narrow.
func (b *Broker) whole(ctx context.Context, k GrantKey, good func(*cachedToken) bool) (cachedToken, error) {
	if t, ok := b.recall(ctx, wholeKey(k), good); ok {
		return t, nil
	}
	return b.renew(ctx, errand{key: wholeKey(k), good: good})
}

// exchange narrows the whole grant's token (RFC 8693), once for all who ask for
// the same at the same time.
func (b *Broker) exchange(ctx context.Context, p Provider, g Grant, d Decision, good func(*cachedToken) bool) (cachedToken, error) {
	k := d.key(g.Key)
	t, err := b.exchanges.do(ctx, k, func(ctx context.Context) (cachedToken, error) {
		if t, ok := b.recall(ctx, k, good); ok {
			return t, nil
		}
		return b.narrow(ctx, p, g, d)
	})
	return t, notYet(ctx, d.Provider, err)
}

// narrow exchanges once; if the provider refuses the token it starts from, whose
// session may have been renewed since, once more from a new one.
func (b *Broker) narrow(ctx context.Context, p Provider, g Grant, d Decision) (cachedToken, error) {
	now := b.pulse.now()
	whole, err := b.whole(ctx, g.Key, func(t *cachedToken) bool { return t.Epoch == g.Epoch && t.lasts(g.Key, now, 0) })
	if err != nil {
		return whole, err
	}
	t, err := b.exchangeFrom(ctx, p, g, d, whole)
	var pe *ProviderError
	if !errors.As(err, &pe) || pe.Class != Dead {
		return t, err
	}
	whole, err = b.renew(ctx, errand{key: wholeKey(g.Key), good: func(t *cachedToken) bool {
		return t.Epoch == g.Epoch && t.Print != whole.Print && t.valid(now)
	}})
	if err != nil {
		return whole, err
	}
	t, err = b.exchangeFrom(ctx, p, g, d, whole)
	if errors.As(err, &pe) && pe.Class == Dead {
		err = Errorf(ProviderDown, "%s does not take the token back that it has just given", d.Provider).Because(pe)
	}
	return t, err
}

func (b *Broker) exchangeFrom(ctx context.Context, p Provider, g Grant, d Decision, whole cachedToken) (cachedToken, error) {
	if whole.Epoch != g.Epoch {
		return whole, errMoved // the refresh brought other roles: decide again
	}
	t, err := b.trade(ctx, p, whole, d)
	if err != nil {
		return t, err
	}
	if err := b.outstanding(ctx, g, t); err != nil {
		return t, err
	}
	return t, b.keep(ctx, d.key(g.Key), t)
}

// trade makes of a token of the whole grant one that lies inside d.
func (b *Broker) trade(ctx context.Context, p Provider, whole cachedToken, d Decision) (cachedToken, error) {
	info := p.Info()
	iss, err := p.Exchange(ctx, whole.Access, d.target(info))
	if err != nil {
		var pe *ProviderError
		if !errors.As(err, &pe) {
			pe = &ProviderError{Class: TryLater, Err: err}
		}
		return cachedToken{}, told(d.Provider, pe)
	}
	t := newCachedToken(iss, whole.Epoch, b.pulse.now())
	if d.Rule == 0 && t.IDToken.IsZero() {
		t.IDToken = whole.IDToken // a hub reads there who its user is
	}
	return t, d.holds(info, &t)
}

// outstanding raises the grant's OutstandingUntil before t leaves, so that a
// later disconnect can say how long t may still work.
func (b *Broker) outstanding(ctx context.Context, g Grant, t cachedToken) error {
	_, err := b.changeGrant(ctx, g.Key, func(now *Grant, exists bool) error {
		switch {
		case !exists || now.Epoch != g.Epoch:
			return errMoved
		case !t.outstandingUntil().After(now.OutstandingUntil):
			return errKeep
		}
		now.OutstandingUntil = t.outstandingUntil()
		return nil
	})
	return err
}

// Providers lists what the container could ask for.
func (b *Broker) Providers(ctx context.Context, p *Peer) (list []ProviderStatus, ref string, err error) {
	e := b.entry("providers", p)
	list, err = b.providersOf(ctx, p, e)
	if err := b.record(ctx, e, err); err != nil {
		return nil, "", err
	}
	return list, e.Ref, nil
}

func (b *Broker) providersOf(ctx context.Context, p *Peer, e *Entry) ([]ProviderStatus, error) {
	s, err := b.attest(ctx, p, e)
	if err != nil {
		return nil, err
	}
	v, err := b.match(ctx, p.Server.Hub, p.Server.User)
	if err == nil {
		err = v.admits(&s.Registration)
	}
	if err != nil {
		return nil, err
	}
	var all []ProviderStatus
	for _, id := range b.providerNames() {
		f := b.facts(v, s, id)
		if !offered(b.cfg.Rules, f, id) {
			continue
		}
		audiences, scopes := offers(b.cfg.Rules, f, id)
		all = append(all, ProviderStatus{
			Name: id, Login: id == b.cfg.Hubs[p.Server.Hub].Login,
			State: v.state(id), Audiences: audiences, Scopes: scopes,
		})
	}
	return all, nil
}

// complete fills in the provider and checks the rest.
func (b *Broker) complete(hub HubID, w *Want) error {
	if w.Provider == "" {
		w.Provider = b.cfg.Hubs[hub].Login
	}
	if _, err := b.provider(w.Provider); err != nil {
		return err
	}
	if err := checkName("audience", w.Audience); err != nil {
		return err
	}
	if len(w.Scopes) > 64 {
		return Errorf(Invalid, "scopes holds more than 64 scopes")
	}
	for _, s := range w.Scopes {
		if !IsScope(s) {
			return Errorf(Invalid, "scopes: %q is not a scope", s).Hint("a scope is printable ASCII without space, quote and backslash (RFC 6749, section 3.3)")
		}
	}
	w.Scopes = sorted(w.Scopes)
	if w.MinTTL < 0 || w.MinTTL > 24*time.Hour {
		return Errorf(Invalid, "min_ttl is not between 0 and 24 hours")
	}
	if d, err := hex.DecodeString(w.Rejected); err != nil || len(d) != 0 && len(d) != 32 || w.Rejected != strings.ToLower(w.Rejected) {
		return Errorf(Invalid, "rejected_sha256 is not a SHA-256 in lower-case hex")
	}
	return nil
}

// IsScope says whether s is one scope: scope-token of RFC 6749, section 3.3.
func IsScope(s string) bool {
	return s != "" && len(s) <= maxName && !slices.ContainsFunc([]byte(s), func(c byte) bool {
		return c < 0x21 || c > 0x7e || c == '"' || c == '\\'
	})
}
