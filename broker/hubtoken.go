package broker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"
)

// The hub's own token is that of the whole grant, unless the hub has scopes. Then it
// is one more decision, which no rule has made: narrowed as containers' tokens are,
// checked as they are, and kept under a key of its own. Where the provider can narrow
// there is no way from here to the wider token: the hub gets the narrowed one or none.

// hubsDecision is what the hub's own token may be at most. narrow is false where it
// is that of the whole grant: the hub has no scopes, or the provider can't narrow.
func (b *Broker) hubsDecision(hub HubID, info ProviderInfo) (d Decision, narrow bool) {
	scopes := b.cfg.Hubs[hub].Scopes
	if len(scopes) == 0 || !info.Narrowing.Narrows() {
		return Decision{}, false
	}
	return Decision{Provider: info.Name, Target: Target{Scopes: sorted(scopes)}}, true
}

// notNarrowed says of err that it is about the hub's own token, and which it is.
func notNarrowed(hub HubID, d Decision, err error) error {
	var e *Error
	if !errors.As(err, &e) {
		return err
	}
	c := *e
	c.Sentence = fmt.Sprintf("the hub's own token can't be narrowed to %s: %s", list(d.Target.Scopes), e.Sentence)
	if c.Code == Unsatisfiable {
		c.Next = fmt.Sprintf("ask {contact}: hubs.%s.scopes of the token broker and what %s gives must fit", hub, d.Provider)
	}
	return &c
}

// unfit is notNarrowed for what the provider gave or would not give, and err itself
// where it is about something else.
func unfit(hub HubID, d Decision, err error) error {
	if !errors.Is(err, ErrUnsatisfiable) || len(d.Target.Scopes) == 0 {
		return err
	}
	return notNarrowed(hub, d, err)
}

// narrowLogin returns the token that the hub gets for the login t, of which nothing
// is stored yet: if it can't be narrowed nothing is lost, and the user logs in again.
func (b *Broker) narrowLogin(ctx context.Context, p Provider, t *ticket) (given cachedToken, err error) {
	info := p.Info()
	d, narrow := b.hubsDecision(t.hub, info)
	if !narrow {
		return t.Pending.Token.open(), nil
	}
	if info.Narrowing == ByExchange {
		given, err = b.trade(ctx, p, t.Pending.Token.open(), d)
	} else {
		given, err = b.respend(ctx, p, t, d)
	}
	if err != nil {
		return given, notNarrowed(t.hub, d, err)
	}
	t.Pending.Hubs = given.record()
	return given, nil
}

// respend spends the refresh token of the login t for the hub's own token.
func (b *Broker) respend(ctx context.Context, p Provider, t *ticket, d Decision) (cachedToken, error) {
	l, info := t.Pending, p.Info()
	if l.Refresh == "" {
		return cachedToken{}, Errorf(Unsatisfiable, "%s gave no refresh token at your login, and narrows with nothing else", d.Provider)
	}
	id, iss, err := send(ctx, p, time.Now(), NewSecret(l.Refresh), t.Sub, d.target(info).Scopes)
	if err != nil {
		var pe *ProviderError
		if !errors.As(err, &pe) {
			pe = &ProviderError{Class: Lost, Err: err}
		}
		return cachedToken{}, told(d.Provider, pe)
	}
	l.renewed(d.Provider, id, iss)
	own := newCachedToken(iss, 0, b.pulse.now())
	if own.IDToken.IsZero() {
		own.IDToken = NewSecret(l.Token.IDToken)
	}
	return own, d.holds(info, &own)
}

// renewed writes what a refresh brought into a login. At stays: a disconnect since
// then holds.
func (l *pendingLogin) renewed(p ProviderID, id Identity, iss Issued) {
	if !iss.RefreshToken.IsZero() {
		l.Refresh = iss.RefreshToken.Reveal()
	}
	if iss.RefreshExpiresIn > 0 {
		l.Expires = l.At.Add(iss.RefreshExpiresIn)
	}
	if id.Known {
		l.Roles = canonical(p, id.Roles)
	}
	l.Username, l.Session = cmp.Or(id.Username, l.Username), cmp.Or(id.Session, l.Session)
}

// adoptedFor is what a refresh token from before the broker is spent for. It is spent
// once, so where that is what narrows it is spent for the hub's own token; scopes are
// empty where it is not.
func (b *Broker) adoptedFor(p Provider, hub HubID) (d Decision, scopes []string) {
	info := p.Info()
	d, narrow := b.hubsDecision(hub, info)
	if narrow && info.Narrowing == ByScope {
		scopes = d.target(info).Scopes
	}
	return d, scopes
}

// pendingToken answers for a login that is not claimed yet: with its own token
// while that lives.
func (b *Broker) pendingToken(ctx context.Context, t *ticket, now time.Time) (HubToken, error) {
	token := t.Pending.Token.open()
	p, err := b.provider(t.provider)
	if err != nil {
		return HubToken{}, err
	}
	d, narrow := b.hubsDecision(t.hub, p.Info())
	if narrow {
		token, err = b.pendingHubs(ctx, p, t, d)
	}
	if err != nil {
		return HubToken{}, unfit(t.hub, d, err)
	}
	if !token.valid(now) || !t.Pending.Until.After(now) {
		return HubToken{}, Errorf(LoginRequired, "this login has not been claimed")
	}
	return b.handedOut(ctx, *t, token)
}

// pendingHubs is the hub's own token of a login that is not claimed yet. One that was
// adopted, or made when the hub had other scopes, may not have it.
func (b *Broker) pendingHubs(ctx context.Context, p Provider, t *ticket, d Decision) (cachedToken, error) {
	info := p.Info()
	own, whole := t.Pending.Hubs.open(), t.Pending.Token.open()
	err := d.holds(info, &own)
	if err == nil || info.Narrowing != ByExchange || !whole.valid(b.pulse.now()) {
		return own, err
	}
	if own, err = b.trade(ctx, p, whole, d); err != nil {
		return own, err
	}
	return own, b.changeTicket(ctx, t, func(h *handleRecord) error {
		if h.Pending == nil {
			return errKeep // claimed meanwhile
		}
		h.Pending.Hubs = own.record()
		return nil
	})
}

// keepLogin keeps the tokens of a login that has become the grant k, of epoch.
func (b *Broker) keepLogin(ctx context.Context, info ProviderInfo, k GrantKey, l *pendingLogin, epoch int64) error {
	whole, own := l.Token.open(), l.Hubs.open()
	whole.Epoch, own.Epoch = epoch, epoch
	if !whole.Access.IsZero() {
		if err := b.keep(ctx, wholeKey(k), whole); err != nil {
			return err
		}
	}
	if d, narrow := b.hubsDecision(k.Hub, info); narrow && d.holds(info, &own) == nil {
		return b.keep(ctx, d.key(k), own)
	}
	return nil
}

// hubsOwn returns the hub's own token. If the provider can't be asked, one that is
// still valid will do, and stale is true.
func (b *Broker) hubsOwn(ctx context.Context, tk *ticket, accept func(*cachedToken) bool) (t cachedToken, stale bool, err error) {
	for range 5 {
		t, stale, err = b.hubsOnce(ctx, tk, accept)
		if !errors.Is(err, errMoved) {
			return t, stale, err
		}
	}
	return t, false, Errorf(Unavailable, "your session is being changed at this moment")
}

func (b *Broker) hubsOnce(ctx context.Context, tk *ticket, accept func(*cachedToken) bool) (t cachedToken, stale bool, err error) {
	k := tk.grantKey()
	p, g, err := b.hubsGrant(ctx, tk)
	if err != nil {
		return t, false, err
	}
	d, narrow := b.hubsDecision(k.Hub, p.Info())
	key := wholeKey(k)
	if narrow {
		key = d.key(k)
	}
	now := b.pulse.now()
	good := func(c *cachedToken) bool { return c.Epoch == g.Epoch && c.lasts(k, now, 0) && accept(c) }
	t, ok := b.recall(ctx, key, good)
	switch {
	case ok:
	case narrow:
		t, err = b.fetch(ctx, p, g, d, good)
	default:
		t, err = b.renew(ctx, errand{key: key, good: good})
	}
	if errors.Is(err, ErrProviderDown) {
		old, ok := b.recall(context.WithoutCancel(ctx), key, func(c *cachedToken) bool {
			return c.Epoch == g.Epoch && c.valid(b.pulse.now()) && accept(c)
		})
		if !ok {
			return t, true, err
		}
		t, stale, err = old, true, nil
	}
	switch {
	case err != nil:
	case t.Epoch != g.Epoch, !accept(&t): // of another's refresh, or of one that brought other rights
		err = errMoved
	case narrow:
		err = d.holds(p.Info(), &t)
	}
	return t, stale, unfit(k.Hub, d, err)
}

// hubsGrant is the grant that tk stands for, if a token can be had from it.
func (b *Broker) hubsGrant(ctx context.Context, tk *ticket) (Provider, Grant, error) {
	g, err := b.loadGrant(ctx, tk.grantKey())
	switch {
	case errors.Is(err, ErrAbsent):
		return nil, g, unknownHandle()
	case err != nil:
		return nil, g, err
	}
	p, err := b.provider(tk.provider)
	if err != nil {
		return nil, g, err
	}
	return p, g, cmp.Or(g.usable(p.Info().Issuer), tk.fits(&g))
}
