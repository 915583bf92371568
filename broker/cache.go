package broker

import (
	"context"
	"strings"
	"sync"
	"time"
)

// A cachedToken is an access token as the broker holds it, in memory and, sealed,
// in the store, where the deployment's other brokers find it.
type cachedToken struct {
	Access        Secret
	IDToken       Secret // of a token that the hub may get
	Type          string
	Scopes        []string
	ScopesKnown   bool
	Audience      []string
	AudienceKnown bool
	Print         string        // fingerprint of Access
	Life          time.Duration // as issued; 0: the provider said none
	IssuedAt      time.Time
	ExpiresAt     time.Time
	Epoch         int64 // of the grant it was issued under; void under another
}

// tokenRecord is a cachedToken as it is sealed; compare grantRecord.
type tokenRecord struct {
	cachedToken
	Access, IDToken string
}

func (r tokenRecord) open() cachedToken {
	t := r.cachedToken
	t.Access, t.IDToken = NewSecret(r.Access), NewSecret(r.IDToken)
	return t
}

func (t cachedToken) record() tokenRecord {
	return tokenRecord{t, t.Access.Reveal(), t.IDToken.Reveal()}
}

const (
	// assumedLife is for how long a token without a stated end is cached.
	assumedLife = 5 * time.Minute
	// assumedOutstanding is for how long such a token may work after it left.
	assumedOutstanding = 24 * time.Hour
	// secondCut is by how much a token may end before what expires_in says: a
	// provider cuts the exp claim down to whole seconds (RFC 7519, section 2).
	secondCut = time.Second
	// spreadOver is how much of a long-lived token's life may go unused.
	spreadOver = 2 * time.Minute
	// freshFor is for how long a new token is not given up because a service
	// refused it, so that a confused client can't burn refreshes.
	freshFor = 30 * time.Second
)

// newCachedToken makes one of a provider's answer that came at now.
func newCachedToken(iss Issued, epoch int64, now time.Time) cachedToken {
	life := iss.ExpiresIn
	if life == 0 {
		life = assumedLife
	}
	return cachedToken{
		Access: iss.AccessToken, IDToken: iss.IDToken, Type: iss.TokenType,
		Scopes: iss.Scopes, ScopesKnown: iss.ScopesKnown,
		Audience: iss.Audience, AudienceKnown: iss.AudienceKnown,
		Print: iss.AccessToken.Fingerprint(), Life: iss.ExpiresIn,
		IssuedAt: now, ExpiresAt: now.Add(life - secondCut), Epoch: epoch,
	}
}

// outstandingUntil is when the token surely no longer works.
func (t *cachedToken) outstandingUntil() time.Time {
	if t.Life == 0 {
		return t.IssuedAt.Add(assumedOutstanding)
	}
	return t.IssuedAt.Add(t.Life)
}

// lasts says whether the token, one of k's, is good for minTTL from now. A token
// that has less than the margin left is replaced, and up to spreadOver before
// that, for each grant at another point, so that tokens that were issued at once
// are not replaced at once. For minTTL a token is replaced only when it is at
// least a margin old: else a caller that wants more than the provider gives would
// refresh with each request.
func (t *cachedToken) lasts(k GrantKey, now time.Time, minTTL time.Duration) bool {
	life := t.ExpiresAt.Sub(t.IssuedAt)
	margin, over := min(30*time.Second, life/3), min(spreadOver, life/4)
	left := t.ExpiresAt.Sub(now)
	if left < max(margin, min(minTTL, life-margin)) {
		return false
	}
	return left >= margin+over || left >= margin+k.spread(over)
}

func (t *cachedToken) valid(now time.Time) bool { return t.ExpiresAt.After(now) }

// refused says whether print, which a service has refused, is this token and
// may be given up.
func (t *cachedToken) refused(print string, now time.Time) bool {
	return print != "" && print == t.Print && now.Sub(t.IssuedAt) >= freshFor
}

// A tokenKey says what a token is kept as. The whole grant's is not that of an
// empty target, which is what a rule without audience and scopes comes to; and the
// hub's own is not that of a container which asks for the same.
type tokenKey struct {
	grant    GrantKey
	kind     string // kindToken, kindHub or kindWhole
	audience string
	scopes   string
}

func wholeKey(k GrantKey) tokenKey { return tokenKey{grant: k, kind: kindWhole} }

// key is what a token of k that was decided on is kept as.
func (d *Decision) key(k GrantKey) tokenKey {
	kind := kindToken
	if d.Rule == 0 {
		kind = kindHub
	}
	return tokenKey{grant: k, kind: kind, audience: d.Target.Audience, scopes: strings.Join(d.Target.Scopes, " ")}
}

func (k tokenKey) record() Key {
	parts := []string{string(k.grant.Hub), string(k.grant.Provider), k.grant.Sub}
	switch k.kind {
	case kindToken:
		parts = append(parts, k.audience, k.scopes)
	case kindHub:
		parts = append(parts, k.scopes)
	}
	return Key{Kind: k.kind, Parts: parts}
}

// tokens keeps decoded tokens in memory. What it returns may be void or over;
// the caller checks epoch and life against the grant as it stands now.
type tokens struct {
	mu    sync.Mutex // guards the two below
	all   map[tokenKey]cachedToken
	sweep int // size at which expired tokens are dropped
}

func (c *tokens) get(k tokenKey) (cachedToken, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	t, ok := c.all[k]
	return t, ok
}

func (c *tokens) put(k tokenKey, t cachedToken, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.all == nil {
		c.all, c.sweep = make(map[tokenKey]cachedToken), 1024
	}
	c.all[k] = t
	if len(c.all) < c.sweep {
		return
	}
	for k, t := range c.all {
		if !t.valid(now) {
			delete(c.all, k)
		}
	}
	c.sweep = max(1024, 2*len(c.all))
}

// drop forgets the tokens of one grant.
func (c *tokens) drop(g GrantKey) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for k := range c.all {
		if k.grant == g {
			delete(c.all, k)
		}
	}
}

// recall finds a token that good accepts, in memory or in the store.
func (b *Broker) recall(ctx context.Context, k tokenKey, good func(*cachedToken) bool) (cachedToken, bool) {
	if t, ok := b.tokens.get(k); ok && good(&t) {
		return t, true
	}
	t, err := b.loadToken(ctx, k)
	if err != nil || !good(&t) {
		return cachedToken{}, false
	}
	b.tokens.put(k, t, b.pulse.now())
	return t, true
}

func (b *Broker) loadToken(ctx context.Context, k tokenKey) (cachedToken, error) {
	var r tokenRecord
	_, err := b.vault.load(ctx, k.record(), &r)
	return r.open(), err
}

func (k tokenKey) target() Target { return Target{k.audience, strings.Fields(k.scopes)} }

// keep remembers a token, first as one that is handed out: without that it does
// not leave. If the store can't take the token itself, this broker's memory does;
// it is good all the same.
func (b *Broker) keep(ctx context.Context, k tokenKey, t cachedToken) error {
	if err := b.handOut(ctx, k, t); err != nil {
		return err
	}
	now := b.pulse.now()
	b.tokens.put(k, t, now)
	life := func(*tokenRecord) time.Duration { return max(t.ExpiresAt.Sub(now), time.Second) }
	_, err := update(ctx, &b.vault, k.record(), life, func(r *tokenRecord, _ bool) error {
		*r = t.record()
		return nil
	})
	if err != nil {
		b.cfg.Log.Warn("a token could not be shared through the store", "grant", k.grant, "err", err)
	}
	return nil
}
