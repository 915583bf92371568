package broker

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// A Registration is a hub's statement that a server runs on this host for a
// user. It is made before the container starts (reserved), is then bound to
// the one container that Docker and the kernel confirm, and is stopped while
// that container is down. The hub's Unregister removes it.
type Registration struct {
	Key        ServerKey
	Host       HostID
	Generation int64 // grows with every Register; late words of an older one are void
	State      RegistrationState
	// ContainerName is the name the container will have; for Docker attestation.
	ContainerName string
	// UID is who the server runs as; for process attestation. Nil: not said.
	UID       *uint32
	Shared    bool   // the hub says that somebody else may open the server
	Directory string // on this host, stable for the server
	Container string // full ID of the container last bound
	Level     string // of attestation, once bound
	Reason    string // why it is not bound, if something said so
	Changed   time.Time
}

// RegistrationState says how far a registration is.
type RegistrationState string

const (
	Reserved RegistrationState = "reserved" // the hub has announced it
	Bound    RegistrationState = "bound"    // its container is known and lives
	Stopped  RegistrationState = "stopped"  // its container has ended; it may start again
)

// RegisterRequest is what a hub says of a server that is about to start.
type RegisterRequest struct {
	User          UserID
	Server        ServerName
	ContainerName string
	Provider      ProviderID // with Handle; empty: the hub's login provider
	Handle        Secret     // may be empty
	Groups        []string   // the user's at the hub
	Shared        bool       // somebody else may open the server
	RequireGrant  bool
	UID           *uint32
}

// Registered is what the hub needs to start the server.
type Registered struct {
	Directory  string
	Helper     string // empty: there is none to mount
	Grant      GrantState
	Generation int64
	Ref        string
}

// A server is a registration with what it is bound to, as of one moment. It is
// immutable; the registry replaces it as a whole.
type server struct {
	Registration
	workload *Workload // nil unless State is Bound
	refused  error     // Docker's or the kernel's no; asked again after a hint only

	over chan struct{} // closed when another takes its place; the registry's
}

// servers are this host's registrations.
type servers struct {
	mu  sync.Mutex // guards the map
	all map[ServerKey]*server
}

func (r *servers) get(k ServerKey) *server {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.all[k]
}

func (r *servers) current(s *server) bool { return s != nil && r.get(s.Key) == s }

// changes returns a channel that is closed when the server at k is another; nil if
// there is none. Whoever keeps something open asks for it before he looks.
func (r *servers) changes(k ServerKey) <-chan struct{} {
	if s := r.get(k); s != nil {
		return s.over
	}
	return nil
}

// set puts s in the place of what is at k; nil: nothing. The caller holds the lock.
func (r *servers) set(k ServerKey, s *server) {
	if old := r.all[k]; old != nil {
		close(old.over)
	}
	if s == nil {
		delete(r.all, k)
		return
	}
	if r.all == nil {
		r.all = make(map[ServerKey]*server)
	}
	s.over = make(chan struct{})
	r.all[k] = s
}

// replace puts s in old's place. It reports false, and does nothing, if old is
// not there any more.
func (r *servers) replace(old, s *server) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.all[s.Key] != old {
		return false
	}
	r.set(s.Key, s)
	return true
}

// change puts an edited copy in the place of the server at k, and returns it. It
// reports false, and does nothing, if there is none or edit says so.
func (r *servers) change(k ServerKey, edit func(*server) bool) (*server, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.all[k]
	if now == nil {
		return nil, false
	}
	next := *now
	if !edit(&next) {
		return nil, false
	}
	r.set(k, &next)
	return &next, true
}

func (r *servers) put(s *server) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.set(s.Key, s)
}

func (r *servers) remove(k ServerKey) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.set(k, nil)
}

func (r *servers) list() []*server {
	r.mu.Lock()
	defer r.mu.Unlock()
	list := make([]*server, 0, len(r.all))
	for _, s := range r.all {
		list = append(list, s)
	}
	slices.SortFunc(list, func(a, b *server) int {
		return cmp.Or(cmp.Compare(a.Key.Hub, b.Key.Hub), cmp.Compare(a.Key.User, b.Key.User), cmp.Compare(a.Key.Server, b.Key.Server))
	})
	return list
}

// find returns a server for which is holds, or nil.
func (r *servers) find(is func(*server) bool) *server {
	list := r.list()
	if i := slices.IndexFunc(list, is); i >= 0 {
		return list[i]
	}
	return nil
}

// Registrations lists this host's registrations, sorted.
func (b *Broker) Registrations() []Registration {
	var list []Registration
	for _, s := range b.servers.list() {
		list = append(list, s.Registration)
	}
	return list
}

// Register reserves a place for a server: its directory and socket are there
// when it returns.
func (b *Broker) Register(ctx context.Context, hub HubID, r RegisterRequest) (Registered, error) {
	e := b.entry("register", nil)
	e.Hub, e.User, e.Server = hub, r.User, r.Server
	got, err := b.register(ctx, hub, r)
	if err := b.record(ctx, e, err); err != nil {
		return Registered{}, err
	}
	got.Ref = e.Ref
	return got, nil
}

func (b *Broker) register(ctx context.Context, hub HubID, r RegisterRequest) (Registered, error) {
	k := ServerKey{hub, r.User, r.Server}
	directory, err := b.checkRegister(k, &r)
	if err != nil {
		return Registered{}, err
	}
	leave, err := b.serverTurns.take(ctx, k)
	if err != nil {
		return Registered{}, err
	}
	defer leave()
	if r.UID != nil {
		leave, err := b.uidTurns.take(ctx, *r.UID)
		if err != nil {
			return Registered{}, err
		}
		defer leave()
	}
	if err := b.sameUID(k, r.UID); err != nil {
		return Registered{}, err
	}
	state, err := b.grantFor(ctx, hub, r)
	if err != nil {
		return Registered{}, err
	}
	if _, err := b.SetGroups(ctx, hub, r.User, r.Groups); err != nil {
		return Registered{}, err
	}
	s, err := b.reserve(ctx, k, r, directory)
	if err != nil {
		return Registered{}, err
	}
	return Registered{Directory: directory, Helper: b.cfg.Helper, Grant: state, Generation: s.Generation}, nil
}

func (b *Broker) checkRegister(k ServerKey, r *RegisterRequest) (directory string, err error) {
	if r.Provider == "" {
		r.Provider = b.cfg.Hubs[k.Hub].Login
	}
	_, err = b.provider(r.Provider)
	err = cmp.Or(checkUser(k.User), checkName("server", string(k.Server)), checkName("container_name", r.ContainerName), err)
	if err != nil {
		return "", err
	}
	if directory, err = b.cfg.Sockets.Directory(k); err != nil {
		return "", Errorf(Invalid, "the server's socket can't be made: %s", err).Hint("tell {contact}")
	}
	return directory, nil
}

func checkUser(u UserID) error {
	if u == "" {
		return Errorf(Invalid, "user is empty")
	}
	return checkName("user", string(u))
}

// sameUID refuses a uid that another live server runs as: with process
// attestation the uid is all that tells two servers apart.
func (b *Broker) sameUID(k ServerKey, uid *uint32) error {
	if uid == nil {
		return nil
	}
	other := b.servers.find(func(s *server) bool { return s.Key != k && s.UID != nil && *s.UID == *uid })
	if other == nil {
		return nil
	}
	return Errorf(Invalid, "uid %d already runs the %s", *uid, other.Key).Hint("stop that server first; process attestation tells servers apart by their uid")
}

// grantFor says what the user has at the provider, after linking what the handle
// stands for.
func (b *Broker) grantFor(ctx context.Context, hub HubID, r RegisterRequest) (GrantState, error) {
	if !r.Handle.IsZero() {
		_, err := b.claim(ctx, hub, r.Provider, r.Handle, r.User)
		if err != nil && !errors.Is(err, ErrLoginRequired) && !errors.Is(err, ErrProviderDown) {
			return NoGrant, err
		}
	}
	v, err := b.match(ctx, hub, r.User)
	if err != nil {
		return NoGrant, err
	}
	g, err := v.grant(r.Provider)
	if err == nil && !g.Tombstone.IsZero() {
		return Disconnected, g.usable(g.Issuer)
	}
	if err == nil {
		err = g.usable(g.Issuer)
	}
	if err != nil && r.RequireGrant {
		return NoGrant, err
	}
	return v.state(r.Provider), nil
}

// reserve writes the registration, opens its socket and makes it known, in that
// order: what is known has a socket, and what has a socket is in the store.
func (b *Broker) reserve(ctx context.Context, k ServerKey, r RegisterRequest, directory string) (*server, error) {
	generation, err := b.takeSeat(ctx, k)
	if err != nil {
		return nil, err
	}
	reg, err := b.changeRegistration(ctx, k, func(reg *Registration, _ bool) error {
		*reg = Registration{
			Key: k, Host: b.cfg.Host, Generation: generation, State: Reserved,
			ContainerName: r.ContainerName, UID: r.UID, Shared: r.Shared, Directory: directory,
			Container: reg.Container, Changed: b.pulse.now(),
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if err := b.cfg.Store.Add(ctx, b.registrationsKey(), k.member()); err != nil {
		return nil, storeError(err, b.registrationsKey())
	}
	if err := b.cfg.Sockets.Open(k); err != nil {
		return nil, fmt.Errorf("open socket of %s: %w", k, err)
	}
	s := &server{Registration: reg}
	b.servers.put(s)
	return s, nil
}

// takeSeat makes this host the one that the server at k is registered on, and
// returns the generation. The hub has started it here last, so what another broker
// knows of it is void: no broker answers by it longer than confirmLease, and its
// socket refuses all who come.
func (b *Broker) takeSeat(ctx context.Context, k ServerKey) (generation int64, err error) {
	old, err := b.registered(ctx, k)
	if err != nil {
		return 0, err
	}
	user, elsewhere := userKey{k.Hub, k.User}, false
	l, err := update(ctx, &b.vault, user.record(), forever[linkRecord], func(l *linkRecord, _ bool) error {
		was := l.Servers[k.Server]
		elsewhere = was.Host != "" && was.Host != b.cfg.Host
		if old != nil {
			was.Generation = max(was.Generation, old.Generation)
		}
		if l.Servers == nil {
			l.Servers = make(map[ServerName]seat)
		}
		l.Servers[k.Server] = seat{b.cfg.Host, later(was.Generation, b.pulse.now())}
		return nil
	})
	if err == nil && elsewhere {
		b.views.drop(user)
		err = b.moveRevision(ctx)
	}
	return l.Servers[k.Server].Generation, err
}

// leaveSeat forgets that the server at k is registered on this host. If another
// has it by now, that stays.
func (b *Broker) leaveSeat(ctx context.Context, k ServerKey) error {
	_, err := update(ctx, &b.vault, userKey{k.Hub, k.User}.record(), forever[linkRecord], func(l *linkRecord, _ bool) error {
		if l.Servers[k.Server].Host != b.cfg.Host {
			return errKeep
		}
		delete(l.Servers, k.Server)
		return nil
	})
	return err
}

// Unregister ends a server's registration; see hub.proto. ref is empty if there
// was nothing to do.
func (b *Broker) Unregister(ctx context.Context, hub HubID, user UserID, name ServerName, generation int64) (ref string, err error) {
	k := ServerKey{hub, user, name}
	leave, err := b.serverTurns.take(ctx, k)
	if err != nil {
		return "", err
	}
	defer leave()
	s, err := b.registered(ctx, k)
	if err == nil && (s == nil || generation != 0 && generation != s.Generation) {
		return "", nil
	}
	e := b.entry("unregister", nil)
	e.Hub, e.User, e.Server = hub, user, name
	if err == nil {
		e = b.serverEntry("unregister", s)
		err = b.unregister(ctx, s)
	}
	if err := b.record(ctx, e, err); err != nil {
		return "", err
	}
	return e.Ref, nil
}

// registered returns the server at k, or nil. The store is asked, too, for what
// a Register or Unregister that failed half-way has left there.
func (b *Broker) registered(ctx context.Context, k ServerKey) (*server, error) {
	if s := b.servers.get(k); s != nil {
		return s, nil
	}
	var r Registration
	_, err := b.vault.load(ctx, b.registrationKey(k), &r)
	if errors.Is(err, ErrAbsent) {
		return nil, nil
	}
	return &server{Registration: r}, err
}

// unregister stops serving first and forgets afterwards; if it fails half-way
// the hub's next word finishes it.
func (b *Broker) unregister(ctx context.Context, s *server) error {
	b.servers.remove(s.Key)
	if err := b.cfg.Sockets.Close(s.Key); err != nil {
		return fmt.Errorf("close socket of %s: %w", s.Key, err)
	}
	if err := b.leaveSeat(ctx, s.Key); err != nil {
		return err
	}
	if err := b.deleteRegistration(ctx, s.Key); err != nil {
		return err
	}
	k := userKey{s.Key.Hub, s.Key.User}
	if b.servers.find(func(o *server) bool { return o.Key.Hub == k.hub && o.Key.User == k.user }) == nil {
		b.views.drop(k)
	}
	return nil
}

// deleteRegistration forgets k, whatever its generation in the store: only a
// Register that failed half-way leaves a newer one there than the hub knows.
func (b *Broker) deleteRegistration(ctx context.Context, k ServerKey) error {
	rk := b.registrationKey(k)
	var stored Registration
	was, err := b.vault.load(ctx, rk, &stored)
	switch {
	case errors.Is(err, ErrAbsent):
	case err != nil:
		return err
	default:
		err := b.cfg.Store.Delete(ctx, rk, was)
		if errors.Is(err, ErrStale) { // it changed, or was only sealed anew
			return b.deleteRegistration(ctx, k)
		}
		if err != nil {
			return storeError(err, rk)
		}
	}
	return storeError(b.cfg.Store.Remove(ctx, b.registrationsKey(), k.member()), rk)
}

func (b *Broker) registrationKey(k ServerKey) Key { return registrationOn(b.cfg.Host, k) }

func registrationOn(h HostID, k ServerKey) Key {
	return Key{Kind: kindRegistration, Parts: []string{string(k.Hub), string(h), string(k.User), string(k.Server)}}
}

func (b *Broker) registrationsKey() Key { return registrationsOn(b.cfg.Host) }

func registrationsOn(h HostID) Key { return Key{Kind: setRegistrations, Parts: []string{string(h)}} }

// member is k in the set of registrations.
func (k ServerKey) member() string {
	m, _ := json.Marshal(k) // a struct of strings always marshals
	return string(m)
}

func (b *Broker) changeRegistration(ctx context.Context, k ServerKey, change func(*Registration, bool) error) (Registration, error) {
	return update(ctx, &b.vault, b.registrationKey(k), forever[Registration], change)
}
