package broker

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"time"
)

const (
	// handlePrefix tells a handle from a refresh token of before the broker,
	// so that a handle is never sent to a provider.
	handlePrefix = "tbh_"
	// handleLife is for how long a handle is kept: longer than any provider keeps
	// a session, and not for ever.
	handleLife = 400 * 24 * time.Hour
	// pendingLife is for how long a login waits to be claimed, and maxPending
	// how many may wait per hub.
	pendingLife = 10 * time.Minute
	maxPending  = 1000
	// hubPatience is how long a hub waits for a provider. OAuthenticator has ten
	// HTTP slots for all of its users; one user's hanging refresh must not hold
	// them. The refresh goes on without the hub.
	hubPatience = 3 * time.Second
	// sameAnswer is for how long the askers of one handle get the same token.
	sameAnswer = 5 * time.Second
	// loginWithin bounds a code exchange; OAuthenticator gives up at 20 s.
	loginWithin = 15 * time.Second
)

// HubToken is what a hub gets in the place of a provider's token response.
type HubToken struct {
	Access    Secret
	Type      string
	ExpiresIn time.Duration
	Scopes    []string
	IDToken   Secret // may be empty
	Handle    Secret // in the place of the refresh token
	Ref       string
}

// Session is what CheckSession says; see hub.proto.
type Session struct {
	Active bool
	Stale  bool
	Token  *HubToken // nil: the hub has the current one
	Reason string
	Ref    string
}

// A handleRecord is what a handle, or a refresh token from before the broker,
// stands for. It is found by its fingerprint; nobody but the hub has the handle.
type handleRecord struct {
	Sub      string
	Pending  *pendingLogin // not claimed yet
	Made     time.Time
	Given    string    // fingerprint of the token last given for it, and
	GivenAt  time.Time // when
	Dead     string    // the provider called it dead: why
	Spending           // of a refresh token from before the broker
}

// A pendingLogin lies beside the grant, not in it: a login that the hub then
// refuses must not touch what lives.
type pendingLogin struct {
	At, Until time.Time
	Adopted   bool // not a login, but a refresh token from before the broker
	Refresh   string
	Expires   time.Time // of the refresh token; zero: no end known
	Username  string
	Roles     []string
	Session   string
	Token     tokenRecord // of the whole grant; zero: the refresh token was spent for Hubs alone
	// Hubs is the hub's own, if that is another. The hub's scopes may be others since,
	// and a provider that was asked late may have given more: who takes it checks it.
	Hubs tokenRecord
}

// A ticket is a handle that was looked up.
type ticket struct {
	handleRecord
	handle   Secret
	hub      HubID
	provider ProviderID
}

func (t *ticket) grantKey() GrantKey { return GrantKey{t.hub, t.provider, t.Sub} }

func (t *ticket) record() Key {
	return Key{Kind: kindHandle, Parts: []string{string(t.hub), string(t.provider), t.handle.Fingerprint()}}
}

// fits says whether t may still be used for g. A disconnect ends every handle
// there was, also if a new login revives the grant.
func (t *ticket) fits(g *Grant) error {
	if t.Made.After(g.EndedAt) {
		return nil
	}
	return Errorf(LoginRequired, "this session was ended on %s", day(g.EndedAt))
}

func (t *ticket) isHandle() bool { return strings.HasPrefix(t.handle.Reveal(), handlePrefix) }

// life is for how long the record h of t is kept. That of a refresh token from
// before the broker stays, claimed or not: it was spent, and must not be again.
func (t *ticket) life(h *handleRecord) time.Duration {
	if h.Pending != nil && t.isHandle() {
		return pendingLife
	}
	return handleLife
}

// Login trades an authorization code at the provider for a pending grant.
func (b *Broker) Login(ctx context.Context, hub HubID, provider ProviderID, c CodeGrant) (HubToken, error) {
	e := b.entry("login", nil)
	e.Hub, e.Provider = hub, provider
	t, err := b.login(ctx, hub, provider, c, e)
	return b.recorded(ctx, e, t, err)
}

// recorded is record for answers with a HubToken.
func (b *Broker) recorded(ctx context.Context, e *Entry, t HubToken, err error) (HubToken, error) {
	e.Token, e.Scopes = t.Access.Fingerprint(), t.Scopes
	if err := b.record(ctx, e, err); err != nil {
		return HubToken{}, err
	}
	t.Ref = e.Ref
	return t, nil
}

func (b *Broker) login(ctx context.Context, hub HubID, provider ProviderID, c CodeGrant, e *Entry) (HubToken, error) {
	p, err := b.checkLogin(ctx, hub, provider, c)
	if err != nil {
		return HubToken{}, err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), loginWithin)
	defer cancel()
	id, iss, err := p.Login(ctx, c)
	if err != nil {
		return HubToken{}, loginError(provider, err)
	}
	e.Sub = id.Sub
	t := ticket{hub: hub, provider: provider, handle: NewSecret(handlePrefix + rand.Text())}
	t.Sub, t.Pending = id.Sub, b.newPending(provider, id, iss)
	given, err := b.narrowLogin(ctx, p, &t)
	if err != nil {
		return HubToken{}, err
	}
	t.Given, t.GivenAt = given.Print, t.Pending.At
	if err := b.saveTicket(ctx, &t); err != nil {
		return HubToken{}, err
	}
	return b.hubToken(&t, given), nil
}

func loginError(p ProviderID, err error) error {
	var pe *ProviderError
	switch {
	case !errors.As(err, &pe):
		return err
	case pe.Class == Dead:
		return Errorf(LoginRequired, "%s did not accept the login; it may have taken too long", p).Hint("log in again").Because(err)
	}
	return told(p, pe)
}

func (b *Broker) checkLogin(ctx context.Context, hub HubID, provider ProviderID, c CodeGrant) (Provider, error) {
	p, err := b.provider(provider)
	if err != nil {
		return nil, err
	}
	pinned := p.Info().RedirectURI
	switch {
	case c.Code.IsZero():
		return nil, Errorf(Invalid, "code is empty")
	case c.Verifier.IsZero():
		return nil, Errorf(Invalid, "code_verifier is empty").Hint("switch PKCE on in the hub: enable_pkce = True")
	case pinned != "" && c.RedirectURI != pinned:
		return nil, Errorf(Invalid, "redirect_uri is not the one in the token broker's configuration").
			Hint("make oauth_callback_url of the hub and redirect_uri of the provider equal")
	}
	if err := b.pulse.sync(ctx); err != nil {
		return nil, err
	}
	return p, b.roomForPending(ctx, hub)
}

func (b *Broker) newPending(p ProviderID, id Identity, iss Issued) *pendingLogin {
	now := b.pulse.now()
	l := &pendingLogin{
		At: now, Until: now.Add(pendingLife), Refresh: iss.RefreshToken.Reveal(),
		Username: id.Username, Roles: canonical(p, id.Roles), Session: id.Session, Token: newCachedToken(iss, 0, now).record(),
	}
	if iss.RefreshExpiresIn > 0 {
		l.Expires = now.Add(iss.RefreshExpiresIn)
	}
	return l
}

// saveTicket writes a new handle, pending ones also into the hub's list.
func (b *Broker) saveTicket(ctx context.Context, t *ticket) error {
	if t.Pending != nil {
		if err := b.cfg.Store.Add(ctx, pendingKey(t.hub), t.member()); err != nil {
			return storeError(err, pendingKey(t.hub))
		}
	}
	return b.changeTicket(ctx, t, func(h *handleRecord) error {
		made := h.Made
		*h = t.handleRecord
		h.Made = made
		return nil
	})
}

// changeTicket lets change alter the record and brings t up to date.
func (b *Broker) changeTicket(ctx context.Context, t *ticket, change func(*handleRecord) error) error {
	var err error
	t.handleRecord, err = update(ctx, &b.vault, t.record(), t.life, func(h *handleRecord, _ bool) error {
		if h.Made.IsZero() {
			h.Made = b.pulse.now()
		}
		return change(h)
	})
	return err
}

func pendingKey(hub HubID) Key { return Key{Kind: setPending, Parts: []string{string(hub)}} }

// member is t in its hub's list of pending logins.
func (t *ticket) member() string { return string(t.provider) + " " + t.handle.Fingerprint() }

// roomForPending refuses a login while too many wait, which only a hub that
// never claims, or a flood of logins, brings about.
func (b *Broker) roomForPending(ctx context.Context, hub HubID) error {
	list, err := b.cfg.Store.Members(ctx, pendingKey(hub))
	if err != nil {
		return storeError(err, pendingKey(hub))
	}
	if len(list) < maxPending {
		return nil
	}
	left := len(list)
	for _, m := range list {
		provider, print, _ := strings.Cut(m, " ")
		var h handleRecord
		_, err := b.vault.load(ctx, Key{Kind: kindHandle, Parts: []string{string(hub), provider, print}}, &h)
		if err == nil && h.Pending != nil && h.Pending.Until.After(b.pulse.now()) {
			continue
		}
		if err := b.cfg.Store.Remove(ctx, pendingKey(hub), m); err != nil {
			return storeError(err, pendingKey(hub))
		}
		left--
	}
	if left >= maxPending {
		return Errorf(Limited, "%d logins of this hub wait to be claimed", left).Hint("tell {contact}: the hub does not claim its logins")
	}
	return nil
}

// Claim links the grant behind handle to user; see hub.proto.
func (b *Broker) Claim(ctx context.Context, hub HubID, provider ProviderID, handle Secret, user UserID) (ref string, err error) {
	e := b.entry("claim", nil)
	e.Hub, e.Provider, e.User = hub, provider, user
	t, err := b.claim(ctx, hub, provider, handle, user)
	e.Sub = t.Sub
	if err := b.record(ctx, e, err); err != nil {
		return "", err
	}
	return e.Ref, nil
}

// claim makes sure that handle's grant is user's. Its steps may be repeated at
// any point, because a Claim that got lost is made good by the next
// CheckSession or Register.
func (b *Broker) claim(ctx context.Context, hub HubID, provider ProviderID, handle Secret, user UserID) (ticket, error) {
	t, err := b.lookUp(ctx, hub, provider, handle)
	if err == nil {
		err = checkUser(user)
	}
	if err != nil {
		return t, err
	}
	g, err := b.loadGrant(ctx, t.grantKey())
	switch {
	case err != nil && (!errors.Is(err, ErrAbsent) || t.Pending == nil):
		if errors.Is(err, ErrAbsent) {
			err = unknownHandle()
		}
		return t, err
	case g.User != "" && g.User != user:
		return t, t.anothers(g.User)
	case t.Pending == nil:
		return t, t.fits(&g)
	case g.outlives(t.Pending):
		return t, g.usable(g.Issuer) // before the link, which must not become this account's
	case !t.Pending.Until.After(b.pulse.now()) && t.Pending.At.After(g.LoginAt):
		return t, Errorf(LoginRequired, "this login was not claimed within %s", pendingLife)
	}
	err = b.link(ctx, &t, user)
	return t, err
}

// link makes t's pending login user's grant.
func (b *Broker) link(ctx context.Context, t *ticket, user UserID) error {
	k := userKey{t.hub, user}
	_, err := update(ctx, &b.vault, k.record(), forever[linkRecord], func(l *linkRecord, _ bool) error {
		if sub, ok := l.Subs[t.provider]; ok && sub != t.Sub {
			return t.reassigned(user, sub)
		} else if ok {
			return errKeep
		}
		if l.Subs == nil {
			l.Subs = make(map[ProviderID]string)
		}
		l.Subs[t.provider] = t.Sub
		return nil
	})
	if err != nil {
		return err
	}
	return b.deposit(ctx, t, user)
}

// deposit writes the pending login into its grant.
func (b *Broker) deposit(ctx context.Context, t *ticket, user UserID) error {
	p, err := b.provider(t.provider)
	if err != nil {
		return err
	}
	k := t.grantKey()
	if err := b.cfg.Store.Add(ctx, grantsKey, k.member()); err != nil {
		return storeError(err, grantsKey)
	}
	login := t.Pending
	var was Grant
	g, err := b.changeGrant(ctx, k, func(g *Grant, _ bool) error {
		was = *g
		switch {
		case g.User != "" && g.User != user:
			return t.anothers(g.User)
		case g.outlives(login):
			return g.usable(g.Issuer)
		case !login.At.After(g.LoginAt):
			return errKeep // this login, or a later one, is in the grant already
		}
		g.Key, g.User, g.Issuer = k, user, p.Info().Issuer
		g.loggedIn(login, b.pulse.now(), b.cfg.Host)
		return nil
	})
	if err != nil {
		return err
	}
	if err := b.move(ctx, k); err != nil {
		return err
	}
	if was.Tombstone.IsZero() && !subset(was.Roles, g.Roles) && !b.closes() { // the hub need not wait for the provider
		b.work.Go(func() {
			b.afterChange(context.WithoutCancel(ctx), userKey{k.Hub, user}, rights{roles: was.Roles, before: true})
		})
	}
	if g.State == Live && g.LoginAt.Equal(login.At) && g.RefreshedAt.Equal(login.At) {
		if err := b.keepLogin(ctx, p.Info(), k, login, g.Epoch); err != nil {
			return err
		}
	}
	if err := b.changeTicket(ctx, t, func(h *handleRecord) error { h.Pending = nil; return nil }); err != nil {
		return err
	}
	return storeError(b.cfg.Store.Remove(ctx, pendingKey(t.hub), t.member()), pendingKey(t.hub))
}

// outlives says whether g was disconnected and l is no new login.
func (g *Grant) outlives(l *pendingLogin) bool {
	return g.Tombstone.After(l.At) || !g.Tombstone.IsZero() && l.Adopted
}

// loggedIn writes a login into g. It ends a tombstone and whatever refresh is
// under way: that one's answer has an older version.
func (g *Grant) loggedIn(l *pendingLogin, now time.Time, host HostID) {
	g.Refresh, g.Expires, g.End = NewSecret(l.Refresh), l.Expires, Ending{}
	if !l.Expires.IsZero() {
		g.End.see(l.Expires.Sub(l.At), l.At)
	}
	g.Username, g.Roles, g.Session = l.Username, l.Roles, l.Session
	g.State, g.Reason, g.Since, g.Tombstone, g.Revocation = Live, "", now, time.Time{}, ""
	// A login's version exceeds any that a store which lost its data once had, so
	// that no journal takes what came before for the newer.
	g.Version = later(g.Version, now)
	g.Epoch = later(g.Epoch, now)
	g.Spending = Spending{}
	g.LoginAt, g.RefreshedAt, g.RefreshedBy = l.At, l.At, host
	for _, r := range []tokenRecord{l.Token, l.Hubs} {
		g.OutstandingUntil = latest(g.OutstandingUntil, r.outstandingUntil())
	}
}

// lookUp finds what handle stands for, and adopts a refresh token from before
// the broker.
func (b *Broker) lookUp(ctx context.Context, hub HubID, provider ProviderID, handle Secret) (ticket, error) {
	t := ticket{hub: hub, provider: provider, handle: handle}
	p, err := b.provider(provider)
	if err == nil {
		err = b.pulse.sync(ctx)
	}
	switch {
	case err != nil:
		return t, err
	case handle.IsZero():
		return t, Errorf(Invalid, "handle is empty")
	}
	_, err = b.vault.load(ctx, t.record(), &t.handleRecord)
	switch {
	case err == nil && t.Dead != "":
		return t, Errorf(LoginRequired, "%s ended this session (%s)", provider, t.Dead)
	case err == nil && t.Sub != "":
		return t, nil
	case err != nil && !errors.Is(err, ErrAbsent):
		return t, err
	case t.isHandle() || !p.Info().Adopt:
		return t, unknownHandle()
	}
	adopted, err := b.adoptions.do(ctx, t.record().String(), func(ctx context.Context) (ticket, error) {
		adopted, err := b.adopt(ctx, p, t)
		if errors.Is(err, errLost) && beforeRetry(ctx) == nil {
			return b.adopt(ctx, p, t)
		}
		return adopted, err
	})
	if err != nil {
		return t, notYet(ctx, provider, err)
	}
	return adopted, nil
}

// anothers refuses an account that is linked to owner. The cause is for the
// administrator.
func (t *ticket) anothers(owner UserID) error {
	return Errorf(Denied, "this %s account is linked to another user of the hub", t.provider).Because(fmt.Errorf(
		"sub %q is linked to %q; if that is not his name any more: tokenbroker users rebind %s --hub %s --provider %s",
		t.Sub, owner, quote(owner), t.hub, t.provider))
}

// reassigned refuses an account under the name of a user who was another one at
// the provider until now.
func (t *ticket) reassigned(user UserID, sub string) error {
	return Errorf(Denied, "%s is linked to another %s account", user, t.provider).
		Hint("ask {contact}: if the name was given to you, they must give it to your account").
		Because(fmt.Errorf("linked to sub %q, and this is sub %q; if the name was given to this person: tokenbroker users rebind %s --hub %s --provider %s --sub %s",
			sub, t.Sub, quote(user), t.hub, t.provider, quote(t.Sub)))
}

// quote writes s as one word for a shell.
func quote[T ~string](s T) string {
	return "'" + strings.ReplaceAll(string(s), "'", `'\''`) + "'"
}

func unknownHandle() error {
	return Errorf(LoginRequired, "the token broker does not know this session")
}

// adopt spends a refresh token from before the broker and keeps what it brings
// as a pending login. It is a refresh in small: the lease and the mark are
// written first, and if the store can't take them nothing is spent; what comes
// back exists nowhere else, so it is stored whatever it takes.
func (b *Broker) adopt(ctx context.Context, p Provider, t ticket) (ticket, error) {
	began := time.Now()
	if err := b.beginAdoption(ctx, &t); err != nil {
		return t, err
	}
	if t.Sub != "" || t.Dead != "" { // meanwhile
		return b.lookUp(ctx, t.hub, t.provider, t.handle)
	}
	if time.Since(began) > sendWithin {
		err := b.notAdopted(ctx, &t, &ProviderError{Class: TryLater, Err: errors.New("the token broker's store is too slow")})
		return t, err
	}
	d, scopes := b.adoptedFor(p, t.hub)
	id, iss, err := send(ctx, p, began, t.handle, "", scopes)
	if err == nil && id.Sub == "" {
		err = &ProviderError{Class: Dead, Reason: "the provider does not say whose it is"}
	}
	if err != nil {
		err = unfit(t.hub, d, b.notAdopted(ctx, &t, err))
		return t, err
	}
	if iss.RefreshToken.IsZero() {
		iss.RefreshToken = t.handle // the provider does not rotate
	}
	login := b.newPending(t.provider, id, iss)
	login.Adopted = true
	if len(scopes) > 0 {
		login.Token, login.Hubs = tokenRecord{}, login.Token
	}
	adopted := t
	adopted.Sub, adopted.Pending, adopted.Spending = id.Sub, login, Spending{}
	err = b.insist(ctx, t.record(), func() error {
		t = adopted
		return b.saveTicket(ctx, &t)
	})
	return t, err
}

// beginAdoption takes the lease on t, unless it was adopted meanwhile.
func (b *Broker) beginAdoption(ctx context.Context, t *ticket) error {
	return b.changeTicket(ctx, t, func(h *handleRecord) error {
		now := b.pulse.now()
		switch {
		case h.Sub != "" || h.Dead != "":
			return errKeep
		case b.held(h.Lease, now):
			return Errorf(ProviderDown, "%s is being asked about this session already", t.provider)
		case h.resting(t.provider, now) != nil:
			return h.resting(t.provider, now)
		}
		h.begin(b.lease(now), now)
		return nil
	})
}

// notAdopted settles an adoption that brought nothing, if it is still ours.
func (b *Broker) notAdopted(ctx context.Context, t *ticket, err error) error {
	var pe *ProviderError
	if !errors.As(err, &pe) {
		pe = &ProviderError{Class: Lost, Err: err}
	}
	holder, first := t.Lease.Holder, !t.Mark.Lost
	cerr := b.changeTicket(ctx, t, func(h *handleRecord) error {
		switch {
		case h.Lease.Holder != holder:
			return errKeep
		case pe.Class == Dead && h.Mark.Lost:
			h.Dead = "lost_response"
		case pe.Class == Dead:
			h.Dead = cmp.Or(pe.Reason, "refused")
		}
		h.release(pe.Class == Lost, b.pulse.now())
		return nil
	})
	if pe.Class == Lost && first {
		return cmp.Or(cerr, errLost)
	}
	return cmp.Or(cerr, told(t.provider, pe))
}

// RefreshHub answers a hub's refresh_token request. A hub without our Python
// asks only after its token was refused, so it never gets back the token that
// the handle was last given; those who ask within seconds get the same new one.
func (b *Broker) RefreshHub(ctx context.Context, hub HubID, provider ProviderID, handle Secret) (HubToken, error) {
	e := b.entry("refresh", nil)
	e.Hub, e.Provider = hub, provider
	ctx, cancel := context.WithTimeout(ctx, hubPatience)
	defer cancel()
	t, err := b.refreshHub(ctx, hub, provider, handle, e)
	if t, err = b.recorded(ctx, e, t, err); err == nil {
		err = b.hubConfirm(ctx, e)
	}
	if err != nil {
		return HubToken{}, err
	}
	return t, nil
}

// hubConfirm stops a recorded answer whose grant was disconnected while it was
// made. It reads the grant itself, which is newer than any revision.
func (b *Broker) hubConfirm(ctx context.Context, e *Entry) error {
	if e.Epoch == 0 {
		return nil // no grant's token: a login that waits to be claimed
	}
	ctx = context.WithoutCancel(ctx)
	err := b.pulse.anew(ctx) // if the store fell back, that is found out first
	var g Grant
	if err == nil {
		g, err = b.loadGrant(ctx, GrantKey{e.Hub, e.Provider, e.Sub})
	}
	if err == nil {
		err = g.usable(g.Issuer)
	}
	if err == nil {
		return nil
	}
	return b.record(ctx, e, err)
}

func (b *Broker) refreshHub(ctx context.Context, hub HubID, provider ProviderID, handle Secret, e *Entry) (HubToken, error) {
	t, err := b.lookUp(ctx, hub, provider, handle)
	if err != nil {
		return HubToken{}, err
	}
	e.Sub = t.Sub
	now := b.pulse.now()
	if t.Pending != nil {
		return b.pendingToken(ctx, &t, now)
	}
	again := now.Sub(t.GivenAt) > sameAnswer
	token, _, err := b.hubsOwn(ctx, &t, func(c *cachedToken) bool { return !again || c.Print != t.Given })
	if err != nil {
		return HubToken{}, err
	}
	e.Epoch = token.Epoch
	ctx = context.WithoutCancel(ctx) // the patience was for the provider
	if token.Print != t.Given {
		err = b.changeTicket(ctx, &t, func(h *handleRecord) error {
			h.Given, h.GivenAt = token.Print, now
			return nil
		})
		if err != nil {
			return HubToken{}, err
		}
	}
	return b.handedOut(ctx, t, token)
}

// handedOut is token as the hub gets it. A hub that came with a refresh token
// from before the broker leaves with a handle: with a provider that does not
// rotate, the old one would stay usable in the hub's database.
func (b *Broker) handedOut(ctx context.Context, t ticket, token cachedToken) (HubToken, error) {
	if !t.isHandle() {
		t.handle = NewSecret(handlePrefix + rand.Text())
		t.Given, t.GivenAt = token.Print, b.pulse.now()
		if err := b.saveTicket(ctx, &t); err != nil {
			return HubToken{}, err
		}
	}
	return b.hubToken(&t, token), nil
}

func (b *Broker) hubToken(t *ticket, token cachedToken) HubToken {
	return HubToken{
		Access: token.Access, Type: token.Type, ExpiresIn: token.ExpiresAt.Sub(b.pulse.now()),
		Scopes: token.Scopes, IDToken: token.IDToken, Handle: t.handle,
	}
}

// CheckSession says whether a session lives; have is the fingerprint of the
// hub's access token.
func (b *Broker) CheckSession(ctx context.Context, hub HubID, provider ProviderID, handle Secret, user UserID, have string) (Session, error) {
	e := b.entry("session", nil)
	e.Hub, e.Provider, e.User = hub, provider, user
	ctx, cancel := context.WithTimeout(ctx, hubPatience)
	defer cancel()
	s, err := b.checkSession(ctx, hub, provider, handle, user, have, e)
	if err := b.record(ctx, e, err); err != nil {
		return Session{}, err
	}
	if err := b.hubConfirm(ctx, e); err != nil {
		return Session{}, err
	}
	s.Ref = e.Ref
	return s, nil
}

func (b *Broker) checkSession(ctx context.Context, hub HubID, provider ProviderID, handle Secret, user UserID, have string, e *Entry) (Session, error) {
	t, err := b.claim(ctx, hub, provider, handle, user)
	e.Sub = t.Sub
	if err != nil {
		return b.noToken(err, e)
	}
	token, stale, err := b.hubsOwn(ctx, &t, func(*cachedToken) bool { return true })
	if err != nil {
		return b.noToken(err, e)
	}
	s := Session{Active: true, Stale: stale}
	if token.Print == have && t.isHandle() {
		return s, nil
	}
	given, err := b.handedOut(context.WithoutCancel(ctx), t, token)
	s.Token, e.Token, e.Epoch, e.Scopes = &given, token.Print, token.Epoch, token.Scopes
	return s, err
}

// noToken sorts what kept a session from a token: that it has ended, or that
// somebody can't be asked, which ends nothing.
func (b *Broker) noToken(err error, e *Entry) (Session, error) {
	var said *Error
	if !errors.As(err, &said) {
		return Session{}, err
	}
	switch said.Code {
	case LoginRequired, Revoked, Denied:
		e.Reason = err.Error()
		return Session{Active: false, Reason: said.Sentence}, nil
	case ProviderDown, Unsatisfiable: // a token that can't be narrowed is no reason to log in again
		e.Reason = err.Error()
		return Session{Active: true, Stale: true, Reason: said.Sentence}, nil
	}
	return Session{}, err
}
