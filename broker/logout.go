package broker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// A provider says by a logout token that somebody has logged out (OpenID Connect
// Back-Channel Logout 1.0). A token names a user, a session of his, or both, and
// Keycloak's are to be read with care:
//
//   - It sends one token with one session for all the sessions that an
//     administrator ends. So a token that names another session than the one that
//     a grant rests on ends nothing by itself, but that grant is looked at: the
//     provider says what is left.
//   - It sends one for an offline session that lives on. The token is then still
//     the user's word that he is off, and a site chooses by OnLogout what that is
//     worth.
//   - It sends the token before the session is gone, and waits for the answer; until
//     then it calls the session active (measured on 26.5.5). So nothing is asked of
//     it before the answer has left.
//   - It sends it once. One that gets lost is made good by the recheck.
//
// A token is remembered once it has been followed, not before: a broker that
// dies in between follows it again when it is sent again, which does no harm.

// logoutWithin bounds what a provider waits for an answer.
const logoutWithin = 10 * time.Second

// looksAfterLogout is how long after a logout token the subject is looked at: at a
// provider that has ended its sessions by then, and at one whose other clients
// answer late.
var looksAfterLogout = []time.Duration{500 * time.Millisecond, 5 * time.Second}

// ProviderLogout follows a logout token of a provider. What it does to the grants
// that rest on the session that ended the provider's OnLogout says; each other
// grant of the subject is looked at.
func (b *Broker) ProviderLogout(ctx context.Context, id ProviderID, token Secret) (ref string, err error) {
	e := b.entry("provider_logout", nil)
	e.Provider = id
	// A provider that hangs up has said it all the same.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), logoutWithin)
	defer cancel()
	if err := b.record(ctx, e, b.providerLogout(ctx, id, token, e)); err != nil {
		return "", err
	}
	return e.Ref, nil
}

func (b *Broker) providerLogout(ctx context.Context, id ProviderID, token Secret, e *Entry) error {
	p, err := b.provider(id)
	if err == nil {
		err = b.pulse.sync(ctx)
	}
	if err != nil {
		return err
	}
	l, err := p.LogoutToken(ctx, token, b.pulse.now())
	var pe *ProviderError
	switch {
	case errors.As(err, &pe):
		return told(id, pe)
	case err != nil:
		return err
	}
	e.Sub = l.Sub
	heard := Key{Kind: kindLogout, Parts: []string{string(id), l.ID}}
	switch _, err := b.vault.load(ctx, heard, &logoutRecord{}); {
	case err == nil:
		e.Reason = "it has been followed before; nothing is done"
		return nil
	case !errors.Is(err, ErrAbsent):
		return err
	}
	if err := b.followLogout(ctx, p.Info(), l, e); err != nil {
		return err
	}
	err = b.vault.save(ctx, heard, 0, &logoutRecord{l.Until}, l.Until.Sub(b.pulse.now())+time.Second)
	if errors.Is(err, ErrStale) { // the same token came twice at once
		return nil
	}
	return err
}

// A logoutRecord says that a logout token was followed.
type logoutRecord struct{ Until time.Time }

// followLogout ends what l ends, and has the rest looked at.
func (b *Broker) followLogout(ctx context.Context, p ProviderInfo, l Logout, e *Entry) error {
	grants, err := b.concerned(ctx, p.Name, l)
	if err != nil {
		return err
	}
	on := cmp.Or(p.OnLogout, StopIssuing)
	how, ends := on.ending()
	how.session = l.Session
	var came []string
	var errs []error // one grant that can't be ended does not save the others
	for _, g := range grants {
		what := "looked at"
		if ends {
			err := b.endSession(ctx, g, how)
			switch {
			case err == nil:
				what = "ended"
			case !errors.Is(err, errOtherSession) && !errors.Is(err, ErrAbsent):
				errs = append(errs, err)
				continue
			}
		}
		came = append(came, fmt.Sprintf("%s/%s: %s", g.Key.Hub, g.User, what))
	}
	if len(grants) == 1 {
		e.Hub, e.User, e.Sub = grants[0].Key.Hub, grants[0].User, grants[0].Key.Sub
	}
	e.Reason = string(on) + ": " + cmp.Or(strings.Join(came, ", "), "no grant rests on it")
	b.afterLogout(p.Name, grants)
	return errors.Join(errs...)
}

// concerned are the subject's grants that have not been ended. A token without a
// subject is rare, so nothing is kept to find grants by their session: all are read.
func (b *Broker) concerned(ctx context.Context, id ProviderID, l Logout) (found []Grant, err error) {
	if l.Sub == "" {
		all, err := b.Grants(ctx, "", "")
		return slices.DeleteFunc(all, func(g Grant) bool {
			return g.Key.Provider != id || g.Session != l.Session || !g.Tombstone.IsZero()
		}), err
	}
	keys, err := b.grantsAt(ctx, id, l.Sub)
	if err != nil {
		return nil, err
	}
	for _, k := range keys {
		g, err := b.loadGrant(ctx, k)
		switch {
		case errors.Is(err, ErrAbsent):
		case err != nil:
			return nil, err
		case g.Tombstone.IsZero():
			found = append(found, g)
		}
	}
	return found, nil
}

// endSession ends g on all brokers, unless it rests on another session.
func (b *Broker) endSession(ctx context.Context, g Grant, how ending) error {
	if _, err := b.tombstone(ctx, g.Key, g.User, how); err != nil {
		return err
	}
	return b.stopIssuing(ctx, g.Key.Hub, g.User, []Disconnection{{Provider: g.Key.Provider, Sub: g.Key.Sub}})
}

// afterLogout asks p what is left of grants, which were found for a logout token,
// when it has ended what it spoke of.
func (b *Broker) afterLogout(p ProviderID, grants []Grant) {
	subs := make(map[string]bool)
	for _, g := range grants {
		subs[g.Key.Sub] = true
	}
	if len(subs) == 0 || b.closes() {
		return
	}
	b.work.Go(func() {
		ctx := context.Background()
		for _, wait := range looksAfterLogout {
			select {
			case <-time.After(wait):
			case <-b.closing:
				return // the recheck sees to it, here or elsewhere
			}
			for sub := range subs {
				if err := b.LookNow(ctx, p, sub, "logout at the provider"); err != nil {
					b.cfg.Log.Warn("who has logged out at a provider can't be looked at; the recheck sees to it", "provider", p, "sub", sub, "err", err)
				}
			}
		}
	})
}
