package broker

import "context"

// What a hub says of its users and servers while they run, for policy. Register
// says it first; saying again what is known already changes nothing and is not
// recorded.

// maxGroups is of how many groups a hub may say that somebody is in them.
const maxGroups = 1000

// SetGroups says which groups a user is in at his hub. No broker of the deployment
// answers by the old ones longer than confirmLease after it has returned. ref is
// empty if nothing has changed.
func (b *Broker) SetGroups(ctx context.Context, hub HubID, user UserID, groups []string) (ref string, err error) {
	k := userKey{hub, user}
	was, what, err := b.setGroups(ctx, k, groups)
	if err == nil && what == "" {
		return "", nil
	}
	e := b.entry("groups", nil)
	e.Hub, e.User, e.Reason = hub, user, what
	if err := b.record(ctx, e, err); err != nil {
		return "", err
	}
	if !b.closes() { // the hub need not wait for the provider
		b.work.Go(func() { b.afterChange(context.WithoutCancel(ctx), k, rights{groups: was}) })
	}
	return e.Ref, nil
}

// setGroups returns the groups from before, and what has changed.
func (b *Broker) setGroups(ctx context.Context, k userKey, groups []string) (was []string, what string, err error) {
	if err := checkUser(k.user); err != nil {
		return nil, "", err
	}
	if len(groups) > maxGroups {
		return nil, "", Errorf(Invalid, "groups holds more than %d groups", maxGroups)
	}
	for _, g := range groups {
		if err := checkName("groups", g); err != nil {
			return nil, "", err
		}
	}
	groups = sorted(groups)
	_, err = update(ctx, &b.vault, k.record(), forever[linkRecord], func(l *linkRecord, _ bool) error {
		if what = changes(l.Groups, groups); what == "" {
			return errKeep
		}
		was, l.Groups = l.Groups, groups
		return nil
	})
	if err != nil || what == "" {
		return nil, "", err
	}
	b.views.drop(k)
	return was, what, b.moveRevision(ctx)
}

// SetShared says whether somebody else may open a server by now. It holds for
// the next answer, and for those being made. An unknown server is no error. ref
// is empty if nothing has changed.
func (b *Broker) SetShared(ctx context.Context, hub HubID, user UserID, name ServerName, shared bool) (ref string, err error) {
	k := ServerKey{hub, user, name}
	leave, err := b.serverTurns.take(ctx, k)
	if err != nil {
		return "", err
	}
	defer leave()
	changed, err := b.setShared(ctx, k, shared)
	if err == nil && !changed {
		return "", nil
	}
	e := b.entry("shared", nil)
	e.Hub, e.User, e.Server, e.Reason = hub, user, name, "nobody else may open it any more"
	if shared {
		e.Reason = "somebody else may open it now"
	}
	if err := b.record(ctx, e, err); err != nil {
		return "", err
	}
	return e.Ref, nil
}

// setShared changes what this broker answers by before what it starts with.
func (b *Broker) setShared(ctx context.Context, k ServerKey, shared bool) (changed bool, err error) {
	_, changed = b.servers.change(k, func(s *server) bool {
		differs := s.Shared != shared
		s.Shared = shared
		return differs
	})
	_, err = b.changeRegistration(ctx, k, func(r *Registration, exists bool) error {
		if !exists || r.Shared == shared {
			return errKeep
		}
		r.Shared, changed = shared, true
		return nil
	})
	return changed, err
}
