package broker

import (
	"context"
	"fmt"
	"slices"
	"time"
)

// A hub calls no hook when it crashes, and none when an administrator deletes a
// user. So a broker that may ask the hub's API compares: a server that is
// registered here and that the hub does not have any more is unregistered, and the
// grants of a user whom the hub does not have any more are ended.
//
// One list is no proof: what is missing counts once it is missing in two lists in
// a row, and a list in which most of our users are missing is taken for the hub's
// mistake.
//
// It is not asked who else may open a server. Its API tells of shares and share codes
// one server at a time, for which the broker's token would need read:shares, too; of
// roles that open a server it tells nothing, so that it could never say that a server
// is not shared. The hub's half, which has the hub's database, says all of it at each
// start and refresh (SetShared).
const (
	// SweepEvery is how often a hub is asked.
	SweepEvery = time.Minute
	// deletedMost is of how many users it is not believed that a hub has deleted
	// them all, if they are most of those we know.
	deletedMost = 3
)

// A HubAPI is what a broker may ask of a hub itself. Its functions may be called
// from many goroutines at once.
type HubAPI struct {
	// Users returns all users of the hub, with their servers that run, start or
	// stop.
	Users func(context.Context) (map[UserID][]ServerName, error)
	// Stop stops a server. One that is gone is no error.
	Stop func(context.Context, UserID, ServerName) error
}

// A sweeper compares this host's registrations, and the deployment's users, with
// one hub.
type sweeper struct {
	*Broker
	hub HubID
	api *HubAPI
	// What the list before has missed.
	servers map[ServerKey]int64 // → generation
	users   map[UserID]bool
}

// sweep works until ctx ends.
func (b *Broker) sweep(ctx context.Context, hub HubID, api *HubAPI) {
	s := &sweeper{Broker: b, hub: hub, api: api}
	every(ctx, SweepEvery, s.once)
}

func (s *sweeper) once(ctx context.Context) {
	known := s.Registrations() // before the list, which then has what is older
	list, err := s.api.Users(ctx)
	if err != nil {
		s.cfg.Log.Warn("the hub can't be asked who is there; nothing changes", "hub", s.hub, "err", err)
		return
	}
	s.sweepServers(ctx, known, list)
	if err := s.sweepUsers(ctx, list); err != nil {
		s.cfg.Log.Warn("users that the hub has deleted can't be looked for; it is tried again", "hub", s.hub, "err", err)
	}
}

func (s *sweeper) sweepServers(ctx context.Context, known []Registration, list map[UserID][]ServerName) {
	missed := make(map[ServerKey]int64)
	for _, r := range known {
		k := r.Key
		if k.Hub != s.hub || slices.Contains(list[k.User], k.Server) {
			continue
		}
		if s.servers[k] != r.Generation {
			missed[k] = r.Generation
			continue
		}
		s.cfg.Log.Info("the hub has no such server any more", "server", k)
		if _, err := s.Unregister(ctx, s.hub, k.User, k.Server, r.Generation); err != nil {
			missed[k] = r.Generation
		}
	}
	s.servers = missed
}

func (s *sweeper) sweepUsers(ctx context.Context, list map[UserID][]ServerName) error {
	users, err := s.linked(ctx)
	if err != nil {
		return err
	}
	missed := make(map[UserID]bool)
	for u := range users {
		if _, ok := list[u]; !ok {
			missed[u] = true
		}
	}
	if len(missed) >= deletedMost && 2*len(missed) > len(users) {
		s.cfg.Log.Error("the hub says that most of its users are gone; that is not believed", "hub", s.hub, "gone", len(missed), "of", len(users))
		missed = nil
	}
	for u := range missed {
		if !s.users[u] {
			continue
		}
		_, _, err := s.Disconnect(ctx, fmt.Sprintf("hub %s: it has no such user any more", s.hub), s.hub, u, "")
		if err == nil {
			delete(missed, u)
		}
	}
	s.users = missed
	return nil
}

// linked are the users of the hub whose grants have not been ended.
func (s *sweeper) linked(ctx context.Context) (map[UserID]bool, error) {
	grants, err := s.Grants(ctx, s.hub, "")
	if err != nil {
		return nil, err
	}
	users := make(map[UserID]bool)
	for _, g := range grants {
		if g.User != "" && g.Tombstone.IsZero() {
			users[g.User] = true
		}
	}
	return users, nil
}
