package broker

import (
	"context"
	"errors"
	"slices"
	"time"
)

// What was handed out works until it ends, unless the provider is told (RFC
// 7009). So what a grant has handed out is kept, sealed, until it is over; a
// disconnect has all of it revoked, the refresh token first, and a role that is
// lost has revoked what no rule allows any more.
//
// Nothing is lost on the way: what has to be revoked is in the records themselves,
// a grant's Revocation and an issuedToken's Revoke. The set of revocations only
// says where to look, so it is added to before the records say so, and again
// after. Any broker of the deployment does the work, and it may be done twice: to
// revoke a token again is no error.
const (
	// revokeEvery is how often the queue is looked at. Whoever adds to it works
	// on it at once.
	revokeEvery = 5 * time.Second
	// revokeAgain is how long after a try the next one comes: longer each time, up
	// to revokeRarely.
	revokeAgain  = 10 * time.Second
	revokeRarely = 5 * time.Minute
	// revokeFor is for how long it is tried to revoke a refresh token. Access
	// tokens are tried until they end.
	revokeFor = 24 * time.Hour
	// revokePatience is how long a disconnect waits for the provider before it
	// answers that the revocation is pending.
	revokePatience = 3 * time.Second
)

// Revocation says how far the provider has been told of what ended.
type Revocation string

const (
	RevocationDone        Revocation = "done"
	RevocationPending     Revocation = "pending"     // it is tried until it is done
	RevocationFailed      Revocation = "failed"      // the provider refuses; see the audit
	RevocationUnsupported Revocation = "unsupported" // the provider can't be told
)

// A TokenKind is a token_type_hint (RFC 7009, section 2.1).
type TokenKind string

const (
	AccessToken  TokenKind = "access_token"
	RefreshToken TokenKind = "refresh_token"
)

// issuedRecord is what was handed out of one grant and is not over. Like
// grantRecord it is sealed whole, and the one form in which the tokens are
// written out.
type issuedRecord struct {
	Tokens []issuedToken
	Tries  int       // to revoke what is marked, in a row
	Next   time.Time // when the next try is due
}

type issuedToken struct {
	Access string
	Whole  bool   // of the whole grant, or the hub's own: no rule gives it
	Target Target // what it is for
	Until  time.Time
	Revoke bool
}

func (k GrantKey) issued() Key {
	return Key{Kind: kindIssued, Parts: []string{string(k.Hub), string(k.Provider), k.Sub}}
}

var revocationsKey = Key{Kind: setRevocations}

// changeIssued is update for issuedRecord. It forgets what is over.
func (b *Broker) changeIssued(ctx context.Context, k GrantKey, change func(r *issuedRecord) error) (issuedRecord, error) {
	now := b.pulse.now()
	life := func(r *issuedRecord) time.Duration {
		last := now
		for _, t := range r.Tokens {
			last = latest(last, t.Until)
		}
		return latest(last, r.Next).Sub(now) + time.Minute
	}
	return update(ctx, &b.vault, k.issued(), life, func(r *issuedRecord, _ bool) error {
		r.Tokens = slices.DeleteFunc(r.Tokens, func(t issuedToken) bool { return !t.Until.After(now) })
		return change(r)
	})
}

// handOut notes a token before it leaves.
func (b *Broker) handOut(ctx context.Context, k tokenKey, t cachedToken) error {
	_, err := b.changeIssued(ctx, k.grant, func(r *issuedRecord) error {
		r.Tokens = append(r.Tokens, issuedToken{
			Access: t.Access.Reveal(), Whole: k.kind != kindToken, Target: k.target(), Until: t.outstandingUntil(),
		})
		return nil
	})
	return err
}

// revokeSoon says in the queue that there is something to revoke at k; mark
// writes what, and wakes nobody: revokeOne is for whoever is in a hurry.
func (b *Broker) revokeSoon(ctx context.Context, k GrantKey, mark func() error) error {
	for _, step := range []func() error{
		func() error { return storeError(b.cfg.Store.Add(ctx, revocationsKey, k.member()), revocationsKey) },
		mark,
		func() error {
			_, err := b.changeIssued(ctx, k, func(r *issuedRecord) error { r.Tries, r.Next = 0, time.Time{}; return nil })
			return err
		},
		// A broker that looked between the two has taken k out again.
		func() error { return storeError(b.cfg.Store.Add(ctx, revocationsKey, k.member()), revocationsKey) },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// revokeAll works on the whole queue.
func (b *Broker) revokeAll(ctx context.Context) {
	members, err := b.cfg.Store.Members(ctx, revocationsKey)
	if err != nil {
		b.cfg.Log.Warn("the queue of revocations can't be read", "err", err)
		return
	}
	few := newCrowd(keepAliveAtOnce)
	for _, m := range members {
		few.Go(func() { b.revokeOne(context.WithoutCancel(ctx), parseGrantKey(m)) })
	}
	few.Wait()
}

// revokeOne tells the provider what has ended of k, if a try is due.
func (b *Broker) revokeOne(ctx context.Context, k GrantKey) {
	_, err := b.revocations.do(ctx, k, func(ctx context.Context) (none struct{}, err error) {
		return none, b.revoke(ctx, k)
	})
	if err != nil {
		b.cfg.Log.Warn("tokens can't be revoked at the moment; it is tried again", "grant", k, "err", err)
	}
}

func (b *Broker) revoke(ctx context.Context, k GrantKey) error {
	if err := b.pulse.sync(ctx); err != nil {
		return err
	}
	g, err := b.loadGrant(ctx, k)
	if err != nil && !errors.Is(err, ErrAbsent) {
		return err
	}
	now := b.pulse.now()
	ends := !g.Tombstone.IsZero() && g.Revocation == RevocationPending
	r, err := b.changeIssued(ctx, k, func(r *issuedRecord) error {
		switch {
		case r.Next.After(now):
			return errNotDue
		case !ends && !slices.ContainsFunc(r.Tokens, func(t issuedToken) bool { return t.Revoke }):
			return errNothing
		}
		r.Tries++
		r.Next = now.Add(min(time.Duration(r.Tries)*revokeAgain, revokeRarely))
		return nil
	})
	switch {
	case errors.Is(err, errNothing):
		return storeError(b.cfg.Store.Remove(ctx, revocationsKey, k.member()), revocationsKey)
	case errors.Is(err, errNotDue):
		return nil
	case err != nil:
		return err
	}
	return b.tellProvider(ctx, g, r, ends)
}

var (
	errNotDue  = errors.New("the next try is not due")
	errNothing = errors.New("nothing is to be revoked")
)

// tellProvider revokes what is marked in r and, if all of g ends, the rest. What
// becomes of each token is settled in the records.
func (b *Broker) tellProvider(ctx context.Context, g Grant, r issuedRecord, ends bool) error {
	p, err := b.provider(g.Key.Provider)
	if err != nil {
		return err
	}
	ended := RevocationDone
	if ends && !g.Refresh.IsZero() {
		ended = b.revokeToken(ctx, p, g, g.Refresh, RefreshToken)
		if ended == RevocationPending && b.pulse.now().Sub(g.Tombstone) > revokeFor {
			ended = RevocationFailed
		}
	}
	settled := make(map[string]bool)
	for _, t := range r.Tokens {
		if !ends && !t.Revoke {
			continue
		}
		access := NewSecret(t.Access)
		result := b.revokeToken(ctx, p, g, access, AccessToken)
		settled[access.Fingerprint()] = result != RevocationPending
		ended = worse(ended, result)
	}
	_, err = b.changeIssued(ctx, g.Key, func(r *issuedRecord) error {
		r.Tokens = slices.DeleteFunc(r.Tokens, func(t issuedToken) bool { return settled[NewSecret(t.Access).Fingerprint()] })
		return nil
	})
	if err != nil || !ends {
		return err
	}
	_, err = b.changeGrant(ctx, g.Key, func(now *Grant, exists bool) error {
		switch {
		case !exists || !now.Tombstone.Equal(g.Tombstone):
			return errKeep // a login came
		case !now.Refresh.Equal(g.Refresh):
			return errKeep // an answer came late, and its token is pending, too
		}
		now.Revocation = ended
		if ended != RevocationPending {
			now.Refresh = Secret{}
		}
		return nil
	})
	return err
}

// worse is the answer for two tokens of which one came to a and one to b.
func worse(a, b Revocation) Revocation {
	for _, r := range []Revocation{RevocationPending, RevocationFailed, RevocationUnsupported} {
		if a == r || b == r {
			return r
		}
	}
	return RevocationDone
}

// revokeToken tells the provider of one token, and the audit what came of it.
func (b *Broker) revokeToken(ctx context.Context, p Provider, g Grant, t Secret, kind TokenKind) Revocation {
	err := p.Revoke(ctx, t, kind)
	var pe *ProviderError
	result := RevocationPending
	switch {
	case err == nil:
		result = RevocationDone
	case unsupported(err):
		result = RevocationUnsupported
	case errors.As(err, &pe) && pe.Class != TryLater && pe.Class != Lost:
		result = RevocationFailed
	}
	if result == RevocationPending {
		b.cfg.Log.Warn("a token could not be revoked; it is tried again", "grant", g.Key, "kind", kind, "err", err)
		return result
	}
	e := b.entry("revoke", nil)
	e.Hub, e.User, e.Provider, e.Sub, e.Token = g.Key.Hub, g.User, g.Key.Provider, g.Key.Sub, t.Fingerprint()
	e.Reason = string(kind) + ": " + string(result)
	_ = b.record(ctx, e, nil) // it is done all the same, and record logs its own trouble
	return result
}

// revokeUnallowed marks what user has been handed out and no rule gives any more.
// It is not done where a provider may end the session with one access token
// (RFC 7009, section 2.1): to lose a role must not log anybody out.
func (b *Broker) revokeUnallowed(ctx context.Context, hub HubID, user UserID) error {
	v, err := b.match(ctx, hub, user)
	if err != nil {
		return err
	}
	for p, g := range v.grants {
		if b.providers[p] == nil || !b.providers[p].Info().RevokesAccessAlone {
			continue
		}
		if err := b.revokeOf(ctx, v, g); err != nil {
			return err
		}
	}
	return nil
}

// revokeOf is revokeUnallowed for one grant.
func (b *Broker) revokeOf(ctx context.Context, v *view, g Grant) error {
	var r issuedRecord
	if _, err := b.vault.load(ctx, g.Key.issued(), &r); err != nil {
		if errors.Is(err, ErrAbsent) {
			return nil
		}
		return err
	}
	unallowed := func(t issuedToken) bool {
		want := Want{Provider: g.Key.Provider, Audience: t.Target.Audience, Scopes: t.Target.Scopes}
		return !t.Whole && !t.Revoke && !v.mayHave(b.cfg.Rules, g.Key.Hub, want)
	}
	if !slices.ContainsFunc(r.Tokens, unallowed) {
		return nil
	}
	err := b.revokeSoon(ctx, g.Key, func() error {
		_, err := b.changeIssued(ctx, g.Key, func(r *issuedRecord) error {
			for i := range r.Tokens {
				r.Tokens[i].Revoke = r.Tokens[i].Revoke || unallowed(r.Tokens[i])
			}
			return nil
		})
		return err
	})
	if err == nil {
		b.revokeOne(ctx, g.Key)
	}
	return err
}
