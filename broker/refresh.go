package broker

import (
	"context"
	cryptorand "crypto/rand"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"
)

// The refresh is the one write that can't be lost: a provider that rotates has
// ended the old refresh token when it answers, and takes a second use of it for
// theft. So, for one grant:
//
//	begin    one write that takes the lease and leaves the mark. If the store
//	         and its replicas can't accept it, no refresh token is spent: a copy
//	         that a fail-over may bring back shows the lease, and other brokers
//	         leave the grant to us while we put it right (heal.go).
//	send     only while the lease outlasts the provider's time limit.
//	settle   one write that fits the answer: commit, or quarantine, or release.
//	share    after a commit: the new access token, for all brokers; only then
//	         is the lease given back.
//
// Version is the fence between refreshes and logins, Tombstone the one against
// storing over a disconnected grant, and Epoch says that decisions have to be
// taken again. Nobody's hanging up stops a refresh that has begun.
const (
	// leaseFor outlasts what the provider may take, so that no second attempt
	// starts while the first may still succeed.
	leaseFor = 45 * time.Second
	// answerWithin is how long a provider may take, whatever its adapter allows.
	answerWithin = 30 * time.Second
	// sendWithin is how old a lease may be when the token is sent; what is left
	// of it then covers answerWithin. A broker that was frozen between
	// begin and send finds itself too late here.
	sendWithin = 10 * time.Second
	// leasePoll is how soon a grant is looked at again that another broker
	// refreshes, if that one doesn't tell that it is done: twice as long each
	// time, up to leasePollMost.
	leasePoll     = 100 * time.Millisecond
	leasePollMost = time.Second
	// commitFor is for how long a commit is tried again while the store is away.
	commitFor = time.Minute
	// disabledFor is for how long a switched-off account is not asked for again,
	// unless somebody hints that it was switched on (LookNow).
	disabledFor = 30 * time.Second
	// retryLost is how long after a lost answer its one retry comes, and up to
	// as much again: late enough for a connection that broke, and well inside the
	// 30 s for which a provider with a grace forgives it.
	retryLost = time.Second
	// retryFor is how long after a lost answer its retry is still made if the
	// provider can't be asked before.
	retryFor = 20 * time.Second
	// lostRest is for how long a token rests whose retry was lost, too.
	lostRest = 10 * time.Second
)

// Answers of begin and settle that lead to another look at the record.
var (
	errBusy  = errors.New("another broker refreshes this grant")
	errMoved = errors.New("the grant moved meanwhile")
	errLost  = errors.New("the provider's answer was lost, for the first time")
)

// An errand is one wish for a token straight from the refresh token.
type errand struct {
	key    tokenKey                 // what the token is kept as
	scopes []string                 // what the provider is asked for; empty: all
	good   func(*cachedToken) bool  // whether a token that is there will do
	check  func(*cachedToken) error // whether the new token may be kept; nil: yes
}

// renew returns a token that satisfies e, and spends the grant's refresh token
// only if none is there.
func (b *Broker) renew(ctx context.Context, e errand) (cachedToken, error) {
	t, err := b.refreshes.do(ctx, e.key, func(ctx context.Context) (cachedToken, error) { return b.run(ctx, e) })
	return t, notYet(ctx, e.key.grant.Provider, err)
}

// notYet names what a caller whose patience is over was waiting for. What it
// waited for goes on.
func notYet(ctx context.Context, p ProviderID, err error) error {
	if err == nil || ctx.Err() == nil {
		return err
	}
	return Errorf(ProviderDown, "%s has not answered yet", p).Because(err)
}

// run does the errand when its grant's turn comes. One grant may have errands
// for several targets, and each would spend the same refresh token.
func (b *Broker) run(ctx context.Context, e errand) (cachedToken, error) {
	leave, err := b.turns.take(ctx, e.key.grant)
	if err != nil {
		return cachedToken{}, err
	}
	defer leave()
	bell, takeDown := b.bells.hang(e.key.grant.member())
	defer takeDown()
	var lost time.Time // a retry is due, also while the broker closes: what was begun is finished
	wait := leasePoll
	for deadline := time.Now().Add(2 * scaled(leaseFor)); ; wait = min(2*wait, leasePollMost) {
		if t, ok := b.recall(ctx, e.key, e.good); ok {
			return t, nil
		}
		if b.closes() && lost.IsZero() {
			return cachedToken{}, Errorf(Unavailable, "the token broker is being restarted")
		}
		t, err := b.attempt(ctx, e)
		switch {
		case errors.Is(err, errLost):
			lost = time.Now()
			if err := beforeRetry(ctx); err != nil {
				return t, err
			}
			continue
		case notSent(err) && !lost.IsZero() && time.Since(lost) < retryFor:
			if err := beforeRetry(ctx); err != nil {
				return t, err
			}
			continue
		case err == nil, !errors.Is(err, errBusy) && !errors.Is(err, errMoved):
			return t, err
		case time.Now().After(deadline):
			return t, Errorf(ProviderDown, "another broker has been refreshing this grant for too long").Because(err)
		}
		if err := b.await(ctx, bell, wait); err != nil {
			return t, err
		}
	}
}

// notSent says whether err is the provider's trouble, or our patience with it, and
// the token did not leave.
func notSent(err error) bool {
	var pe *ProviderError
	return errors.As(err, &pe) && pe.Class == TryLater
}

func beforeRetry(ctx context.Context) error { return pause(ctx, retryLost+rand.N(retryLost)) }

// attempt spends the refresh token once.
func (b *Broker) attempt(ctx context.Context, e errand) (cachedToken, error) {
	p, err := b.provider(e.key.grant.Provider)
	if err != nil {
		return cachedToken{}, err
	}
	if err := b.journal.ready(); err != nil {
		return cachedToken{}, Errorf(Unavailable, "the token broker's own disk is full").Because(err)
	}
	failpoint("before begin")
	began := time.Now()
	g, err := b.begin(ctx, e.key.grant, p.Info().Issuer)
	if err != nil {
		return cachedToken{}, err
	}
	failpoint("after begin")
	if t, ok := b.recall(ctx, e.key, e.good); ok { // of whoever had the lease before
		b.release(ctx, g, false)
		return t, nil
	}
	if time.Since(began) > scaled(sendWithin) {
		b.release(ctx, g, false)
		return cachedToken{}, Errorf(Unavailable, "the token broker's store is too slow")
	}
	failpoint("before send")
	id, iss, err := send(ctx, p, began, g.Refresh, g.Key.Sub, e.scopes)
	failpoint("answer read")
	if err != nil {
		return cachedToken{}, b.unsuccessful(ctx, g, iss, err)
	}
	t, err := b.commit(ctx, g, id, iss)
	if err != nil {
		return cachedToken{}, err
	}
	defer b.release(ctx, g, false) // and who then gets it finds the token
	return t, b.share(ctx, e, t)
}

// share keeps a new token for all brokers.
func (b *Broker) share(ctx context.Context, e errand, t cachedToken) error {
	if e.check != nil {
		if err := e.check(&t); err != nil {
			return err
		}
	}
	failpoint("before keep")
	err := b.keep(ctx, e.key, t)
	failpoint("after keep")
	return err
}

// send spends a refresh token at p, within the time that the lease allows for it.
// That is counted from when the lease began, too: a process that was frozen since
// the age of its lease was checked finds the time over, and sends nothing.
func send(ctx context.Context, p Provider, began time.Time, refresh Secret, sub string, scopes []string) (Identity, Issued, error) {
	ctx, end := context.WithDeadline(ctx, began.Add(scaled(sendWithin+answerWithin)))
	defer end()
	ctx, cancel := context.WithTimeout(ctx, scaled(answerWithin))
	defer cancel()
	return p.Refresh(ctx, refresh, sub, scopes)
}

// begin takes the lease on k. It is also the pre-flight write.
func (b *Broker) begin(ctx context.Context, k GrantKey, issuer string) (Grant, error) {
	g, err := b.changeGrant(ctx, k, func(g *Grant, exists bool) error {
		now := b.pulse.now()
		switch {
		case !exists:
			return Errorf(LoginRequired, "you have not logged in through %s yet", k.Provider)
		case g.spendable(issuer, now) != nil:
			return g.spendable(issuer, now)
		case b.held(g.Lease, now):
			return errBusy
		}
		g.begin(b.lease(now), now)
		return nil
	})
	if err == nil {
		if err = b.replicated(ctx); err != nil {
			b.release(ctx, g, false)
		}
	}
	return g, err
}

// replicated returns once no fail-over takes back what was written.
func (b *Broker) replicated(ctx context.Context) error {
	err := b.cfg.Store.Replicated(ctx)
	if err != nil {
		err = Errorf(Unavailable, "a replica of the token broker's store lags").Because(err)
	}
	return err
}

// lease is one of our own, held by nobody else.
func (b *Broker) lease(now time.Time) Lease {
	return Lease{Holder: cryptorand.Text(), Host: b.cfg.Host, Journal: b.journal.id, Until: now.Add(scaled(leaseFor))}
}

// held says whether l keeps others out. It does not keep us out if it was taken
// on our own journal: not by a process that lives, because the journal has one at
// a time, and not by another refresh of ours, because a grant has one at a time.
// To wait for its end would gain nothing, the answer to a process that is dead is
// lost, and with a provider that forgives a second use for 30 s it would cost the
// grant.
func (b *Broker) held(l Lease, now time.Time) bool {
	return l.Until.After(now) && l.Journal != b.journal.id
}

// fence returns nil if an answer to the token that began held still concerns g:
// no login or refresh moved its version, and nobody has disconnected it.
func fence(g *Grant, exists bool, began Grant) error {
	switch {
	case !exists || g.Version != began.Version:
		return errMoved
	case !g.Tombstone.IsZero():
		return g.usable(g.Issuer)
	}
	return nil
}

// commit stores a provider's answer: in the journal, then in the store, which is
// asked until it takes it, for the new refresh token exists nowhere else. The
// lease stays: whoever got it now would not find the new access token yet, and
// refresh again.
func (b *Broker) commit(ctx context.Context, began Grant, id Identity, iss Issued) (cachedToken, error) {
	now := b.pulse.now()
	t := newCachedToken(iss, began.Epoch, now)
	next := began
	moved := next.renewed(id, iss, now, b.cfg.Host)
	next.OutstandingUntil = latest(next.OutstandingUntil, t.outstandingUntil())
	failpoint("before journal")
	defer b.committing.add(began.Key)()
	free := next // a copy from the journal is nobody's
	free.Lease = Lease{}
	b.note(free)
	failpoint("after journal")
	var g Grant
	err := b.insist(ctx, began.Key.record(), func() (err error) {
		g, err = b.changeStored(ctx, began.Key, func(g *Grant, exists bool) error { return g.follow(exists, began, next) })
		return err
	})
	failpoint("after commit")
	switch {
	case err == nil && g.Epoch == next.Epoch:
		// If others moved the epoch since begin, the token stays one of the old
		// epoch, which is void; if its own roles did, it is the new one's.
		t.Epoch = g.Epoch
	case errors.Is(err, errMoved):
		// A login was faster. The provider's answer is dropped, not revoked: on
		// Keycloak that would end the newer login's session too.
		b.dismiss(began, next)
	case err != nil && !g.Tombstone.IsZero():
		b.dismiss(began, next)
		b.revokeLate(ctx, began.Key, iss.RefreshToken)
	}
	if err == nil && moved {
		err = b.rightsMoved(ctx, began, g, "refresh")
	}
	return t, err
}

// follow makes g, as the store has it, what next made of began. A copy older
// than began is one that the store fell back to; a newer one is a login's.
func (g *Grant) follow(exists bool, began, next Grant) error {
	switch {
	case exists && !g.Tombstone.IsZero():
		return g.usable(g.Issuer)
	case exists && g.Version == next.Version && g.Refresh.Equal(next.Refresh):
		return errKeep // another change has brought it from the journal
	case exists && g.Version > began.Version:
		return errMoved
	}
	epoch, roles, until := next.Epoch, next.Roles, latest(g.OutstandingUntil, next.OutstandingUntil)
	if g.Epoch > began.Epoch {
		// Others moved it too, and have perhaps answered for it. Theirs are the roles
		// that count: next's may be from before. The next look tells.
		epoch, roles = max(g.Epoch+1, next.Epoch), g.Roles
	}
	*g = next
	g.Epoch, g.Roles, g.OutstandingUntil = epoch, roles, until
	return nil
}

// renewed writes a provider's answer into g and reports whether the rights it
// brought differ from the old ones.
func (g *Grant) renewed(id Identity, iss Issued, now time.Time, host HostID) (moved bool) {
	if !iss.RefreshToken.IsZero() {
		g.Refresh = iss.RefreshToken
	}
	if iss.RefreshExpiresIn > 0 {
		g.Expires = now.Add(iss.RefreshExpiresIn)
	}
	g.End.see(iss.RefreshExpiresIn, now)
	if g.State != Live {
		g.State, g.Reason, g.Since = Live, "", now
		moved = true
	}
	if id.Username != "" {
		g.Username = id.Username
	}
	if id.Session != "" {
		g.Session = id.Session
	}
	if roles := canonical(g.Key.Provider, id.Roles); id.Known && !slices.Equal(roles, g.Roles) {
		g.Roles, moved = roles, true
	}
	if moved {
		g.Epoch = later(g.Epoch, now)
	}
	g.Version++
	g.Mark = Mark{}
	g.RefreshedAt, g.RefreshedBy = now, host
	return moved
}

// canonical puts the provider before each role, so that roles of two providers
// never mean the same.
func canonical(p ProviderID, roles []string) []string {
	full := make([]string, 0, len(roles))
	for _, r := range roles {
		full = append(full, string(p)+":"+r)
	}
	return sorted(full)
}

// insist writes k, and goes on while the store is away.
func (b *Broker) insist(ctx context.Context, k Key, write func() error) error {
	wait := 20 * time.Millisecond
	for deadline := time.Now().Add(commitFor); ; {
		err := write()
		if !errors.Is(err, ErrUnavailable) || time.Now().After(deadline) {
			return err
		}
		b.cfg.Log.Error("a new refresh token can't be stored; trying again", "record", k, "err", err)
		if pause(ctx, wait) != nil {
			return err
		}
		wait = min(2*wait, time.Second)
	}
}

// unsuccessful settles an attempt that brought no token and says what to answer.
func (b *Broker) unsuccessful(ctx context.Context, began Grant, iss Issued, err error) error {
	var pe *ProviderError
	if !errors.As(err, &pe) {
		pe = &ProviderError{Class: Lost, Err: err}
	}
	b.cfg.Log.Warn("a refresh failed", "grant", began.Key, "class", pe.Class, "reason", pe.Reason, "status", pe.Status, "err", pe.Err)
	switch pe.Class {
	case Dead:
		return b.quarantine(ctx, began, iss, pe.Reason)
	case Disabled:
		return b.disable(ctx, began)
	}
	b.release(ctx, began, pe.Class == Lost)
	if pe.Class == Lost && !began.Mark.Lost {
		return errLost
	}
	return told(began.Key.Provider, pe)
}

// quarantine ends a grant whose refresh token the provider called dead. It is
// never deleted: if somebody else had rotated it, theirs is used.
func (b *Broker) quarantine(ctx context.Context, began Grant, iss Issued, reason string) error {
	if began.Mark.Lost {
		reason = "lost_response"
	}
	if !iss.RefreshToken.IsZero() { // somebody else's: the subject changed
		defer b.revokeAtProvider(ctx, began.Key.Provider, iss.RefreshToken)
	}
	g, err := b.endGrant(ctx, began, NeedsLogin, reason)
	if err != nil {
		return err
	}
	return g.usable(g.Issuer)
}

func (b *Broker) disable(ctx context.Context, began Grant) error {
	if _, err := b.endGrant(ctx, began, GrantDisabled, "account disabled"); err != nil {
		return err
	}
	return disabled(began.Key.Provider)
}

// endGrant ends the grant that the attempt which began held was about.
func (b *Broker) endGrant(ctx context.Context, began Grant, state GrantState, reason string) (Grant, error) {
	g, err := b.changeGrant(ctx, began.Key, func(g *Grant, exists bool) error {
		if err := fence(g, exists, began); err != nil {
			return err
		}
		now := b.pulse.now()
		g.end(state, reason, now)
		g.Spending = Spending{}
		if state == GrantDisabled {
			g.Mark.Rest = now.Add(disabledFor)
		}
		return nil
	})
	if err == nil {
		err = b.move(ctx, began.Key)
	}
	return g, err
}

func disabled(p ProviderID) error {
	return Errorf(Denied, "your account is disabled at %s", p)
}

// release gives the lease back; see Spending. If the store can't take it the lease
// runs out by itself, and the mark stays, which says the same as lost.
func (b *Broker) release(ctx context.Context, began Grant, lost bool) {
	_, err := b.changeGrant(ctx, began.Key, func(g *Grant, exists bool) error {
		if !exists || g.Lease.Holder != began.Lease.Holder {
			return errKeep
		}
		g.Spending.release(lost, b.pulse.now())
		return nil
	})
	if err != nil {
		b.cfg.Log.Warn("a lease could not be given back; it runs out by itself", "grant", began.Key, "err", err)
		return
	}
	if !lost { // its retry is not for at once
		b.inform(ctx, grantNote(began.Key))
	}
}

// told turns a provider's unfavourable answer into what the caller is told. The
// grant lives in all of these.
func told(p ProviderID, pe *ProviderError) error {
	var e *Error
	switch pe.Class {
	case Dead:
		e = Errorf(LoginRequired, "%s did not accept it (%s)", p, pe.Reason)
	case Disabled:
		return disabled(p)
	case UserAction:
		e = Errorf(LoginRequired, "%s wants something of you (%s)", p, pe.Reason).Hint("log in at %s once and do what it asks", p)
	case Misconfigured:
		e = Errorf(ProviderDown, "%s does not accept this token broker's own credentials or settings", p).Hint("tell {contact}")
	case Refused:
		e = Errorf(Unsatisfiable, "%s does not give such a token (%s)", p, pe.Reason)
	default:
		e = Errorf(ProviderDown, "%s can't be asked at the moment", p)
		if d := time.Since(pe.Since).Round(time.Second); !pe.Since.IsZero() && d > 0 {
			e = Errorf(ProviderDown, "%s has been in trouble for %s; tokens that are valid are served to their end", p, d)
		}
		if pe.RetryAfter > 0 {
			e.RetryAfter = pe.RetryAfter
		}
	}
	return e.Because(pe)
}

// revokeAtProvider ends a refresh token that must not be kept.
func (b *Broker) revokeAtProvider(ctx context.Context, id ProviderID, refresh Secret) {
	p, err := b.provider(id)
	if err == nil && !refresh.IsZero() {
		err = p.Revoke(ctx, refresh, RefreshToken)
	}
	if err != nil {
		b.cfg.Log.Error("a refresh token that is not kept could not be revoked", "provider", id, "err", err)
	}
}

// move tells every broker that k's rights changed. It comes after the change:
// whoever reads the new revision then reads the new rights. Once it has returned
// without an error, no fail-over brings the old ones back.
func (b *Broker) move(ctx context.Context, k GrantKey) error {
	if err := b.announce(ctx, k); err != nil {
		return err
	}
	return b.replicated(ctx)
}

// announce is move for who waits himself until that is not taken back.
func (b *Broker) announce(ctx context.Context, k GrantKey) error {
	b.tokens.drop(k)
	err := b.moveRevision(ctx)
	b.inform(ctx, grantNote(k)) // a login and an end take the lease away
	return err
}

func (b *Broker) moveRevision(ctx context.Context) error {
	rev, err := b.cfg.Store.Move(ctx)
	b.pulse.moved(rev)
	if err != nil {
		return Errorf(Unavailable, "the token broker can't reach its store").Because(fmt.Errorf("move revision: %w", err))
	}
	b.inform(ctx, revisionNote(rev))
	return nil
}

// pause waits, unless ctx ends first.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
