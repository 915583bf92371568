package broker

import (
	"context"
	"encoding/json"
	"errors"
	"time"
)

// GrantState is what can be done with a grant.
type GrantState string

const (
	NoGrant       GrantState = "none"
	Live          GrantState = "live"
	NeedsLogin    GrantState = "login_required" // quarantined: the provider refused the refresh token
	Disconnected  GrantState = "revoked"        // an administrator ended it; see Grant.Tombstone
	GrantDisabled GrantState = "disabled"       // the account is switched off at the provider
)

// A Grant is a subject's refresh token for one hub and all that decides about
// it, one record, sealed whole.
type Grant struct {
	Key    GrantKey
	Issuer string
	User   UserID // the hub's user it is linked to; empty if none

	Refresh Secret
	// Version moves with every new refresh token: commit and login, nothing else.
	Version int64
	// Epoch moves with every change of rights; what was decided under an older
	// one is void. It never falls.
	Epoch int64
	// Tombstone is when the grant was ended from our side, by an administrator or a
	// logout; zero if it wasn't. Nothing but a new login is stored over it.
	Tombstone time.Time
	// EndedAt is when the grant was last disconnected. It outlives the
	// tombstone: the handles from before are void for ever.
	EndedAt time.Time

	Spending // of Refresh

	State  GrantState
	Reason string    // why State is not live
	Since  time.Time // when State began

	Username string
	Roles    []string // canonical, provider:claim/value, sorted
	Session  string   // Identity.Session of the login or of a refresh since

	// LoginAt is when the login was made that the grant rests on; one that was
	// made earlier is not stored over it, however late it is claimed.
	LoginAt     time.Time
	RefreshedAt time.Time
	RefreshedBy HostID
	// Expires is when the refresh token ends; zero: no end known.
	Expires time.Time
	End     Ending // what is known of it
	// Revocation says how far the provider was told of Tombstone.
	Revocation Revocation
	// OutstandingUntil is until when an access token that was issued for the
	// grant may live. It is raised before a token leaves.
	OutstandingUntil time.Time
}

// A Lease is a bounded right to refresh one grant.
type Lease struct {
	Holder  string
	Host    HostID
	Journal string // of the broker that has it
	Until   time.Time
}

// A Mark says that a refresh token was about to be sent.
type Mark struct {
	Attempt string // who, unique
	Lost    bool   // an earlier attempt with the same token got no answer
	// Rest is until when the token is not sent again: its retry was lost, too,
	// unless it is under way, or the account is disabled. Zero: at once.
	Rest time.Time
}

// Spending is what a record holds of the use of its refresh token.
type Spending struct {
	// Lease is the right to send the token, held by Holder until Until.
	Lease Lease
	// Mark is written before the token is sent, so that a crash or a lost answer
	// can be told from a provider's own decision.
	Mark Mark
}

// begin takes the lease l and leaves the mark. That the token rests after its
// retry is written ahead, too: a broker that the answer kills, time after time,
// would send it with each start.
func (s *Spending) begin(l Lease, now time.Time) {
	lost := s.Mark.Attempt != "" // whoever left it never learned the answer
	s.Lease, s.Mark = l, Mark{Attempt: l.Holder, Lost: lost}
	if lost {
		s.Mark.Rest = now.Add(lostRest)
	}
}

// release gives the lease back. lost keeps the mark, so that the next attempt
// knows that the provider may have spent the token already. That attempt is the
// one retry; if it is lost as well, the token rests.
func (s *Spending) release(lost bool, now time.Time) {
	s.Lease = Lease{}
	s.Mark.Rest = time.Time{}
	switch {
	case !lost && !s.Mark.Lost:
		s.Mark = Mark{}
	case lost && s.Mark.Lost:
		s.Mark.Rest = now.Add(lostRest)
	}
}

// resting says why the token is not sent at the moment; nil: it may be.
func (s *Spending) resting(p ProviderID, now time.Time) error {
	rest := s.Mark.Rest.Sub(now)
	if rest <= 0 || s.Lease.Until.After(now) { // the retry is under way
		return nil
	}
	e := Errorf(ProviderDown, "%s has twice given no answer that can be read", p)
	e.RetryAfter = rest
	return e
}

// grantRecord is a Grant as it is sealed: the one form in which the refresh
// token is written out. Its own Refresh hides the Grant's from encoding/json.
type grantRecord struct {
	Grant
	Refresh string
}

func (r grantRecord) open() Grant {
	g := r.Grant
	g.Refresh = NewSecret(r.Refresh)
	return g
}

func (g Grant) record() grantRecord { return grantRecord{Grant: g, Refresh: g.Refresh.Reveal()} }

// loadGrant returns the grant at k as this broker knows it, which is newer than
// the store's if the store fell back. It returns ErrAbsent if there is none. What
// others have changed is noted, so that a store that forgets it hears it again
// from everybody who has seen it.
func (b *Broker) loadGrant(ctx context.Context, k GrantKey) (Grant, error) {
	known := b.known(k)
	var r grantRecord
	_, err := b.vault.load(ctx, k.record(), &r)
	if err != nil && !errors.Is(err, ErrAbsent) {
		return Grant{}, err
	}
	g, exists, _ := b.healed(known, r.open(), err == nil)
	if !exists {
		return Grant{}, ErrAbsent
	}
	b.witness(g)
	return g, nil
}

// changeGrant is update for grants. What the store has forgotten is put right
// before change sees it, and with it.
func (b *Broker) changeGrant(ctx context.Context, k GrantKey, change func(g *Grant, exists bool) error) (Grant, error) {
	known := b.known(k)
	return b.changeStored(ctx, k, func(g *Grant, exists bool) error {
		right, exists, healed := b.healed(known, *g, exists)
		*g = right
		err := change(g, exists)
		if healed && errors.Is(err, errKeep) {
			return nil
		}
		return err
	})
}

// changeStored is changeGrant on what the store says, right or not. What it
// writes it also notes in the journal.
func (b *Broker) changeStored(ctx context.Context, k GrantKey, change func(g *Grant, exists bool) error) (Grant, error) {
	r, err := update(ctx, &b.vault, k.record(), forever[grantRecord], func(r *grantRecord, exists bool) error {
		g := r.open()
		if err := change(&g, exists); err != nil {
			return err
		}
		*r = g.record()
		return nil
	})
	g := r.open()
	if err == nil && g.Key == k {
		b.note(g)
	}
	return g, err
}

// usable says why no token can be had from g; nil: one can.
func (g *Grant) usable(issuer string) error {
	p := g.Key.Provider
	switch {
	case g.State == NeedsLogin:
		return Errorf(LoginRequired, "your session at %s ended on %s (%s)", p, day(g.Since), g.Reason)
	case !g.Tombstone.IsZero():
		return Errorf(Revoked, "your access to %s was ended by an administrator on %s", p, day(g.Tombstone))
	case g.Issuer != issuer:
		// The token belongs to the old issuer and must not be sent to the new one.
		return Errorf(LoginRequired, "%s has another issuer since you logged in", p)
	}
	return nil
}

// spendable says why g's refresh token is not to be sent now; nil: it may be.
func (g *Grant) spendable(issuer string, now time.Time) error {
	p := g.Key.Provider
	switch {
	case g.usable(issuer) != nil:
		return g.usable(issuer)
	case g.Refresh.IsZero():
		return Errorf(LoginRequired, "%s gave no refresh token at your login", p)
	case g.offRests() && g.Mark.Rest.After(now):
		return disabled(p)
	}
	return g.resting(p, now)
}

// offRests says whether Mark.Rest is that of a disabled account, and not of a retry.
func (g *Grant) offRests() bool { return g.State == GrantDisabled && g.Mark.Attempt == "" }

// end takes g's rights away with a reason. What was decided before is void. An
// answer may still be on its way, so lease and mark stay.
func (g *Grant) end(state GrantState, reason string, now time.Time) {
	g.State, g.Reason, g.Since = state, reason, now
	g.Epoch = later(g.Epoch, now)
}

func day(t time.Time) string { return t.UTC().Format("2006-01-02 15:04 MST") }

// grantsKey is the set of all grants of the deployment.
var grantsKey = Key{Kind: setGrants}

// member is k in that set.
func (k GrantKey) member() string {
	m, _ := json.Marshal(k) // a struct of strings always marshals
	return string(m)
}

// parseGrantKey is the inverse of member. What is no key names no record.
func parseGrantKey(m string) GrantKey {
	var k GrantKey
	_ = json.Unmarshal([]byte(m), &k)
	return k
}
