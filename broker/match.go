package broker

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// A view is what the store says of one hub's user, as of one revision: his
// groups there, and the grants that are linked to him, without their refresh
// tokens. Immutable.
type view struct {
	user     UserID
	groups   []string
	revision int64
	read     time.Time // by our monotonic clock
	grants   map[ProviderID]Grant
	rebound  time.Time // see linkRecord
	servers  map[ServerName]seat
}

// viewFor is for how long a view is believed although the revision stands
// still. It bounds what a broker that died between changing rights and moving
// the revision can leave behind.
const viewFor = 30 * time.Second

type userKey struct {
	hub  HubID
	user UserID
}

// A lookKey says which look may be shared: one that began at an earlier revision
// may have read what is over.
type lookKey struct {
	userKey
	revision int64
}

// views keeps one view per user.
type views struct {
	mu  sync.Mutex // guards the map
	all map[userKey]*view
}

func (c *views) get(k userKey, revision int64) (*view, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	v, ok := c.all[k]
	return v, ok && v.revision == revision && time.Since(v.read) < viewFor
}

func (c *views) put(k userKey, v *view) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.all == nil {
		c.all = make(map[userKey]*view)
	}
	c.all[k] = v
}

func (c *views) drop(k userKey) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.all, k)
}

// match returns the user's grants as of a revision that is current.
func (b *Broker) match(ctx context.Context, hub HubID, user UserID) (*view, error) {
	// The revision is read before the records, so that a change between the
	// two reads makes the view look older than it is, never newer.
	rev, err := b.pulse.revision(ctx)
	if err != nil {
		return nil, err
	}
	k := userKey{hub, user}
	if v, ok := b.views.get(k, rev); ok {
		return v, nil
	}
	return b.looks.do(ctx, lookKey{k, rev}, func(ctx context.Context) (*view, error) {
		v, err := b.look(ctx, k, rev)
		if err == nil {
			b.views.put(k, v)
		}
		return v, err
	})
}

func (b *Broker) look(ctx context.Context, k userKey, revision int64) (*view, error) {
	v := &view{user: k.user, revision: revision, read: time.Now(), grants: make(map[ProviderID]Grant)}
	l, err := b.loadLink(ctx, k)
	if err != nil {
		return nil, err
	}
	v.rebound, v.groups, v.servers = l.ReboundAt, l.Groups, l.Servers
	for p, sub := range l.Subs {
		g, err := b.loadGrant(ctx, GrantKey{k.hub, p, sub})
		switch {
		case errors.Is(err, ErrAbsent):
			continue
		case err != nil:
			return nil, err
		case g.User != k.user:
			continue // a link alone makes nobody the owner
		}
		g.Refresh = Secret{}
		v.grants[p] = g
	}
	return v, b.pulse.anew(ctx)
}

// grant returns the user's grant at p.
func (v *view) grant(p ProviderID) (Grant, error) {
	g, ok := v.grants[p]
	if !ok {
		return g, Errorf(LoginRequired, "%s has not logged in through %s yet", v.user, p)
	}
	return g, nil
}

// admits refuses a server that was registered on another host since, and one from
// before the user's name was given to another person: whoever started it is not the
// one who has the grants now.
func (v *view) admits(r *Registration) error {
	if p := v.servers[r.Key.Server]; p.Host != r.Host && p.Generation > r.Generation {
		return Errorf(UnknownPeer, "this server was started anew in another place, and has ended here").
			Hint("use the server that the hub shows").
			Because(fmt.Errorf("it is registered on %s with generation %d, on %s with %d", p.Host, p.Generation, r.Host, r.Generation))
	}
	if r.Generation > v.rebound.UnixMicro() {
		return nil
	}
	return Errorf(Denied, "this server was started before the name %s was given to another account", v.user).
		Hint("stop the server in the hub and start it again")
}

func (v *view) state(p ProviderID) GrantState {
	if g, ok := v.grants[p]; ok {
		return g.State
	}
	return NoGrant
}

// facts is what policy decides on.
func (b *Broker) facts(v *view, s *server, wanted ProviderID) Facts {
	f := Facts{Server: s.Key, Roles: v.roles(wanted), Groups: v.groups, Shared: s.Shared}
	if s.workload != nil {
		f.Image = s.workload.Image
		f.Proved = s.workload.Level
		f.Level, f.Lowered = b.cfg.Attestor.Worth(f.Proved)
	}
	return f
}

// roles joins those of all of the user's grants: a rule may want a role of one
// provider for a token of another. Roles of a grant that has ended count only where
// the token would come from that grant, so that the answer is that it has ended.
func (v *view) roles(wanted ProviderID) (roles []string) {
	for p, g := range v.grants {
		if g.State == Live || p == wanted {
			roles = append(roles, g.Roles...)
		}
	}
	return sorted(roles)
}

// mayHave says whether any rule gives v's user want on some server of his.
func (v *view) mayHave(rules []Rule, hub HubID, want Want) bool {
	f := Facts{Server: ServerKey{Hub: hub, User: v.user}, Roles: v.roles(want.Provider), Groups: v.groups}
	return slices.ContainsFunc(rules, func(r Rule) bool { return r.couldGive(f, want) })
}

// A linkRecord says which subject a hub's user is at each provider. A subject
// that was linked once stays, also when its grant ends. It also keeps the groups
// that the hub has last said he is in, and where his servers are registered.
type linkRecord struct {
	Subs   map[ProviderID]string
	Groups []string `json:",omitempty"` // sorted
	// ReboundAt is when the name was last given to another person; zero: never.
	ReboundAt time.Time
	Servers   map[ServerName]seat `json:",omitempty"`
}

// A seat is where a server was registered last.
type seat struct {
	Host       HostID
	Generation int64
}

func (k userKey) record() Key {
	return Key{Kind: kindLink, Parts: []string{string(k.hub), string(k.user)}}
}

func (b *Broker) loadLink(ctx context.Context, k userKey) (linkRecord, error) {
	var l linkRecord
	_, err := b.vault.load(ctx, k.record(), &l)
	return l, unlessAbsent(err)
}
