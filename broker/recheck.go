package broker

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"
)

// A role that is taken away at the provider shows at the next refresh. Until
// then, and for a user who asks for nothing new, the broker looks: at each grant
// whose user has a running server here, in the course of each round, where the
// provider shows the roles of now without a refresh (Provider.Look).
//
// A look is a hint. Roles that are others are believed at once. What may as well
// be the provider's way of telling is confirmed by a refresh, which decides: a
// token that is called inactive (the account may only be switched off), and a
// role claim that comes or goes as a whole (a provider may put it into tokens and
// not into what it tells about them). No answer, and no role for anybody any
// more, mean that nothing is known, and change nothing.
//
// A provider that shows nothing without a refresh is not looked at: such a grant is
// refreshed once it has not been for a while, so that there is a worst case for it,
// too. Its userinfo endpoint is not asked in place of that, though it would spend
// nothing either: where the tokens have the roles that is another source, which may
// name others, so that looks and refreshes would give and take the same right in
// turn; and it may tell what the access token says (Dex does) or the login said, so
// that a look would put off the refresh that shows the change. Nothing in the answer
// tells which it is.
const (
	// RecheckWithin is how long a change of roles may go unseen at the worst: a
	// role is taken away right after a look, the next look comes one round later,
	// and what it says counts when that round is over.
	RecheckWithin = 2 * recheckEvery
	recheckEvery  = 30 * time.Second
	// SpendingWithin is the same where only a refresh shows the roles: each grant
	// is refreshed so long before it that one more round fits in, and not all at
	// once. Tokens of five minutes that are in use are renewed as often anyway.
	SpendingWithin = 5 * time.Minute
	spendLatest    = SpendingWithin - recheckEvery
	spendSpread    = spendLatest / 4
	// recheckSpread is the part of a round over which its looks are spread, each
	// grant at its own point. The rest is for the answers.
	recheckSpread = recheckEvery - 2*lookWithin
	// lookWithin bounds one look, and with it how long a refresh waits for one.
	lookWithin = 3 * time.Second
	// looksAtOnce bounds what one broker asks at the same time.
	looksAtOnce = 4
	// confirmWithin is how long a round waits for a refresh, which goes on.
	confirmWithin = 10 * time.Second
	// looksFailed is after how many looks in a row without an answer a provider
	// is left alone until the next round.
	looksFailed = 3
	// stormFrom is of how many subjects it is not believed that all of them have
	// lost their last role in one round.
	stormFrom = 3
)

// recheck works until ctx ends.
func (b *Broker) recheck(ctx context.Context) {
	told := make(map[ProviderID]bool) // that it can't be looked at
	every(ctx, recheckEvery, func(ctx context.Context) { b.recheckAll(ctx, told) })
}

// recheckAll is one round.
func (b *Broker) recheckAll(ctx context.Context, told map[ProviderID]bool) {
	due, err := b.grantsHere(ctx)
	if err != nil {
		b.cfg.Log.Warn("roles can't be rechecked at the moment", "err", err)
		return
	}
	slices.SortFunc(due, func(a, b Grant) int { return cmp.Compare(a.Key.recheckAt(), b.Key.recheckAt()) })
	r := round{seen: make(map[ProviderID]*sight)}
	began, few := time.Now(), newCrowd(looksAtOnce)
	for _, g := range due {
		if r.givenUp(g.Key.Provider) {
			continue
		}
		if pause(ctx, time.Until(began.Add(g.Key.recheckAt()))) != nil {
			break
		}
		few.Go(func() { b.recheckOne(ctx, &r, g.Key) })
	}
	few.Wait()
	if ctx.Err() != nil {
		return
	}
	for p, s := range r.seen {
		b.tell(p, s, told)
		b.settleEmpty(ctx, p, s)
	}
}

// recheckAt is when in a round k has its turn.
func (k GrantKey) recheckAt() time.Duration { return k.spread(recheckSpread) }

// A round is what one round has shown. Its looks share it.
type round struct {
	mu   sync.Mutex // guards what seen points to
	seen map[ProviderID]*sight
}

// A sight is what a round has shown of one provider.
type sight struct {
	failed int             // looks in a row
	err    error           // of the last look that failed
	had    map[string]bool // subjects that were seen and had roles → they have none now
	empty  []looked        // theirs; what becomes of them is decided at the end
}

// A looked is a grant as it was when its provider was asked, and when that was.
type looked struct {
	Grant
	at time.Time
}

// note changes what r knows of p.
func (r *round) note(p ProviderID, f func(s *sight)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.seen[p]
	if s == nil {
		s = &sight{had: make(map[string]bool)}
		r.seen[p] = s
	}
	f(s)
}

func (r *round) givenUp(p ProviderID) (yes bool) {
	r.note(p, func(s *sight) { yes = s.failed >= looksFailed })
	return yes
}

func unsupported(err error) bool {
	var pe *ProviderError
	return errors.As(err, &pe) && pe.Class == Misconfigured && pe.Reason == "unsupported"
}

// recheckOne looks at k and does what follows at once.
func (b *Broker) recheckOne(ctx context.Context, r *round, k GrantKey) {
	l, id, err := b.lookAt(ctx, k)
	var pe *ProviderError
	switch {
	case errors.Is(err, errMoved), errors.Is(err, errBusy):
		return // to be seen at a refresh, or no longer ours to see
	case errors.As(err, &pe) && (pe.Class == Dead || pe.Class == Disabled):
		b.confirm(ctx, l, pe.Reason)
		return
	case unsupported(err):
		spent, failed := b.spend(ctx, l)
		r.note(k.Provider, func(s *sight) { s.instead(spent, failed, err) })
		return
	case err != nil || !id.Known:
		r.note(k.Provider, func(s *sight) { s.failed, s.err = s.failed+1, err })
		return
	}
	roles := canonical(k.Provider, id.Roles)
	r.note(k.Provider, func(s *sight) { s.add(l, roles) })
	if len(roles) > 0 {
		b.believe(ctx, l, roles, "recheck")
	}
}

// believe acts on the roles that a look at l has shown.
func (b *Broker) believe(ctx context.Context, l looked, roles []string, cause string) {
	p := l.Key.Provider
	switch {
	case slices.Equal(roles, l.Roles):
	case !slices.Equal(b.claimsOf(p, roles), b.claimsOf(p, l.Roles)):
		b.confirm(ctx, l, "a role claim came or went")
	default:
		b.setRoles(ctx, l, roles, cause)
	}
}

// LookNow looks at a subject of p because cause says that something of his may
// have changed. It is a hint and no more: what follows is what the provider says
// when asked. LookNow returns when a look that began after the call is over; an
// error says that nothing is known and that the recheck will see to it. However
// many ask for one subject, one look is under way and one waits.
func (b *Broker) LookNow(ctx context.Context, p ProviderID, sub, cause string) error {
	if _, err := b.provider(p); err != nil {
		return err
	}
	return b.hints.do(ctx, subject{p, sub}, func(ctx context.Context) error {
		keys, err := b.grantsAt(ctx, p, sub)
		errs := []error{err}
		for _, k := range keys {
			errs = append(errs, b.lookOnce(ctx, k, cause))
		}
		return errors.Join(errs...)
	})
}

// LookAtAll is LookNow for every subject of p whose user has a server here, running
// or not: right after Start no container is bound again yet. Something has changed
// that many share, or may have changed while nobody looked. It is a round of the
// recheck of its own, with all of its caution.
func (b *Broker) LookAtAll(ctx context.Context, p ProviderID, cause string) error {
	if _, err := b.provider(p); err != nil {
		return err
	}
	grants, err := b.grantsOf(ctx, func(*server) bool { return true })
	if err != nil {
		return err
	}
	b.cfg.Log.Info("looking at all subjects of a provider", "provider", p, "cause", cause)
	r := round{seen: make(map[ProviderID]*sight)}
	few := newCrowd(looksAtOnce)
	for _, g := range grants {
		if g.Key.Provider == p && !r.givenUp(p) {
			few.Go(func() { b.recheckOne(ctx, &r, g.Key) })
		}
	}
	few.Wait()
	if s := r.seen[p]; s != nil {
		b.settleEmpty(ctx, p, s)
		return s.err
	}
	return nil
}

// grantsAt are the grants that a subject of p may have: at the hubs of this broker,
// and at those that only others of the deployment are configured for, since who hints
// tells one broker. For these the names of all grants are read, and no grant.
func (b *Broker) grantsAt(ctx context.Context, p ProviderID, sub string) (keys []GrantKey, err error) {
	for hub := range b.cfg.Hubs {
		keys = append(keys, GrantKey{hub, p, sub})
	}
	members, err := b.cfg.Store.Members(ctx, grantsKey)
	if err != nil {
		return keys, storeError(err, grantsKey)
	}
	_, end, _ := strings.Cut(GrantKey{Provider: p, Sub: sub}.member(), `""`)
	for _, m := range members {
		if !strings.HasSuffix(m, end) { // to parse each would take a hundred times as long
			continue
		}
		if k := parseGrantKey(m); k.Provider == p && k.Sub == sub && !slices.Contains(keys, k) {
			keys = append(keys, k)
		}
	}
	slices.SortFunc(keys, func(a, b GrantKey) int { return cmp.Compare(a.Hub, b.Hub) })
	return keys, nil
}

// A subject is somebody at a provider.
type subject struct {
	provider ProviderID
	sub      string
}

// lookOnce looks at k. What a look can't show a refresh does.
func (b *Broker) lookOnce(ctx context.Context, k GrantKey, cause string) error {
	l, id, err := b.lookAt(ctx, k)
	var pe *ProviderError
	switch {
	case errors.Is(err, errMoved) && l.State == GrantDisabled:
		return b.askAgain(ctx, l, cause)
	case errors.Is(err, ErrAbsent), errors.Is(err, errMoved):
		return nil
	case errors.Is(err, errBusy), unsupported(err), err == nil && (!id.Known || len(id.Roles) == 0),
		errors.As(err, &pe) && (pe.Class == Dead || pe.Class == Disabled):
		b.confirm(ctx, l, cause)
		return nil
	case err != nil:
		return err
	}
	b.believe(ctx, l, canonical(k.Provider, id.Roles), cause)
	return nil
}

// askAgain asks by a refresh, which spends nothing while the account is off, whether
// it still is, without the rest that requests keep to: whoever hints may know that it
// was switched on.
func (b *Broker) askAgain(ctx context.Context, l looked, cause string) error {
	_, err := b.changeGrant(ctx, l.Key, func(g *Grant, exists bool) error {
		if !exists || !g.offRests() {
			return errKeep
		}
		g.Mark = Mark{}
		return nil
	})
	if err == nil {
		b.confirm(ctx, l, cause)
	}
	return err
}

// spend refreshes l if it has not been refreshed for long, for then a role that was
// taken away would go unseen. What comes of it is in the grant; an error says that
// nothing is known.
func (b *Broker) spend(ctx context.Context, l looked) (spent bool, err error) {
	due := l.RefreshedAt.Add(spendLatest - l.Key.spread(spendSpread))
	if due.After(l.at) || b.providers[l.Key.Provider].Info().RefreshEndsAccess {
		return false, nil
	}
	ctx, cancel := context.WithTimeout(ctx, confirmWithin)
	defer cancel()
	_, err = b.whole(ctx, l.Key, func(t *cachedToken) bool { return !t.IssuedAt.Before(due) })
	if settled(err) {
		err = nil
	}
	return true, err
}

// settled says whether a refresh for the sake of the roles has shown how things
// are. It has logged what is not as it was.
func settled(err error) bool {
	return err == nil || errors.Is(err, ErrLoginRequired) || errors.Is(err, ErrDenied) || errors.Is(err, ErrRevoked)
}

// instead notes what came of a refresh, if there was one, in the place of a look
// that can't be had.
func (s *sight) instead(spent bool, failed, look error) {
	switch {
	case failed != nil:
		s.failed, s.err = s.failed+1, failed
	case spent:
		s.failed = 0
	}
	s.err = cmp.Or(s.err, look)
}

// add notes that l has roles now.
func (s *sight) add(l looked, roles []string) {
	s.failed = 0
	if len(l.Roles) == 0 {
		return
	}
	s.had[l.Key.Sub] = len(roles) == 0
	if len(roles) == 0 {
		s.empty = append(s.empty, l)
	}
}

// lookAt asks the provider who k's subject is now, in k's turn, so that the
// token it asks with is not being spent here. errMoved: there is nothing to ask;
// errBusy: it is being spent all the time.
func (b *Broker) lookAt(ctx context.Context, k GrantKey) (l looked, id Identity, err error) {
	p, err := b.provider(k.Provider)
	if err != nil {
		return l, id, err
	}
	ctx, cancel := context.WithTimeout(ctx, lookWithin)
	defer cancel()
	if err := b.pulse.sync(ctx); err != nil {
		return l, id, err
	}
	l.Key, l.at = k, b.pulse.now()
	leave, err := b.turns.take(ctx, k)
	if err != nil {
		return l, id, errBusy // a refresh takes its time, and sees the roles itself
	}
	defer leave()
	l.at = b.pulse.now()
	if l.Grant, err = b.loadGrant(ctx, k); err != nil {
		return l, id, err
	}
	if l.State != Live || l.usable(p.Info().Issuer) != nil || l.Refresh.IsZero() {
		return l, id, errMoved
	}
	id, err = p.Look(ctx, l.Refresh, k.Sub)
	return l, id, err
}

// claimsOf are p's role claims that have a value in roles.
func (b *Broker) claimsOf(p ProviderID, roles []string) (names []string) {
	for _, c := range b.providers[p].Info().RoleClaims {
		prefix := string(p) + ":" + c + "/"
		if slices.ContainsFunc(roles, func(r string) bool { return strings.HasPrefix(r, prefix) }) {
			names = append(names, c)
		}
	}
	return names
}

// setRoles gives l other roles, unless the grant is no longer what was looked at
// or a refresh is under way, which sees the roles itself. Then the next round
// looks again.
func (b *Broker) setRoles(ctx context.Context, l looked, roles []string, cause string) {
	ctx = context.WithoutCancel(ctx) // what is changed is also told
	g, err := b.changeGrant(ctx, l.Key, func(g *Grant, exists bool) error {
		now := b.pulse.now()
		if !exists || g.Version != l.Version || g.Epoch != l.Epoch || g.Lease.Until.After(now) {
			return errMoved
		}
		g.Roles, g.Epoch = roles, later(g.Epoch, now)
		return nil
	})
	if err == nil {
		err = b.rightsMoved(ctx, l.Grant, g, cause)
	}
	if err != nil && !errors.Is(err, errMoved) {
		b.cfg.Log.Warn("roles that changed could not be stored; they are looked at again", "grant", l.Key, "err", err)
	}
}

// confirm refreshes l unless somebody has done so since it was looked at. What
// comes of it is in the grant.
func (b *Broker) confirm(ctx context.Context, l looked, why string) {
	ctx, cancel := context.WithTimeout(ctx, confirmWithin)
	defer cancel()
	_, err := b.whole(ctx, l.Key, func(t *cachedToken) bool { return !t.IssuedAt.Before(l.at) })
	switch {
	case !settled(err):
		b.cfg.Log.Warn("what the provider told about a session could not be confirmed; nothing changes", "grant", l.Key, "why", why, "err", err)
		return
	case err != nil:
		return
	}
	if g, err := b.loadGrant(ctx, l.Key); err == nil && g.State == l.State && slices.Equal(g.Roles, l.Roles) {
		b.cfg.Log.Warn("a refresh does not bear out what the provider told about a session; each recheck costs one while that is so",
			"grant", l.Key, "why", why)
	}
}

// tell says what of a provider could not be seen; that it never can be, once.
func (b *Broker) tell(p ProviderID, s *sight, told map[ProviderID]bool) {
	switch {
	case s.err == nil, unsupported(s.err) && told[p]:
	case unsupported(s.err):
		told[p] = true
		b.cfg.Log.Info("the provider does not show roles between refreshes; they are seen at refreshes only",
			"provider", p, "refreshed_for_them", !b.providers[p].Info().RefreshEndsAccess)
	default:
		b.cfg.Log.Warn("roles could not be rechecked; nothing changes", "provider", p, "err", s.err)
	}
}

// settleEmpty decides about p's subjects that have no roles any more.
func (b *Broker) settleEmpty(ctx context.Context, p ProviderID, s *sight) {
	if s.stormy() {
		b.cfg.Log.Error("every subject of a provider has lost its last role at once; that is not believed before a refresh says so",
			"provider", p, "subjects", len(s.had))
		return
	}
	few := newCrowd(looksAtOnce)
	for _, l := range s.empty {
		few.Go(func() { b.confirm(ctx, l, "no roles") })
	}
	few.Wait()
}

// stormy says whether everybody who had roles has none.
func (s *sight) stormy() bool {
	for _, none := range s.had {
		if !none {
			return false
		}
	}
	return len(s.had) >= stormFrom
}

// recordRoles writes down which roles a grant lost and gained, and what showed it.
func (b *Broker) recordRoles(ctx context.Context, was, is Grant, cause string) {
	what := changes(was.Roles, is.Roles)
	if what == "" {
		return
	}
	e := b.entry("roles", nil)
	e.Hub, e.User, e.Provider, e.Sub, e.Epoch = is.Key.Hub, is.User, is.Key.Provider, is.Key.Sub, is.Epoch
	e.Reason = what + "; seen by: " + cause
	// The rights have changed all the same; record logs that it can't be written.
	_ = b.record(ctx, e, nil)
}

// changes says which names came and went; nothing if none did.
func changes(was, is []string) string {
	without := func(some, others []string) []string {
		return slices.DeleteFunc(slices.Clone(some), func(s string) bool { return slices.Contains(others, s) })
	}
	gone, gained := without(was, is), without(is, was)
	if len(gone)+len(gained) == 0 {
		return ""
	}
	return "gone: " + strings.Join(gone, " ") + "; gained: " + strings.Join(gained, " ")
}
