package broker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"
	"time"

	"tokenbroker/broker/seal"
)

// Config is what a Broker is made of. All fields but Helper, Mounts and Version are
// needed; New says which is missing.
type Config struct {
	Deployment string // names the Redis and the brokers on it
	Host       HostID // this machine; brokers of one deployment have different ones
	Contact    string // whom users are told to ask
	Version    string // of the program, for Status

	Hubs      map[HubID]Hub
	Providers []Provider
	Rules     []Rule

	Store    Store
	Keys     *seal.Keyset
	Attestor Attestor
	Sockets  Sockets

	Audit io.Writer // one JSON line per decision
	// AuditHead is where Audit's chain stands; zero: a new one begins.
	AuditHead AuditHead
	Log       *slog.Logger
	Helper    string // path of the helper's binary on this host; empty: none
	// Journal is the file of this broker alone in which a provider's answer is
	// safe before the store has it. Start makes it.
	Journal string
	// Mounts returns which running containers mount a server's directory; nil: there
	// are no containers.
	Mounts func(context.Context) ([]Mount, error)
}

// A Hub is what the broker knows of one JupyterHub.
type Hub struct {
	Login ProviderID // the provider its users log in with
	// Scopes are what the hub's own token is narrowed to, where the provider can;
	// empty: it is that of the whole grant.
	Scopes []string
	// OnLogout is what a logout at the hub does; empty: Keep.
	OnLogout OnLogout
	// API asks the hub itself; nil: it is not asked.
	API *HubAPI
}

// A Broker joins the parts; its methods are the flows. All of them may be
// called from many goroutines at once.
type Broker struct {
	cfg       Config
	providers map[ProviderID]Provider
	vault     vault
	audit     *audit
	journal   *journal
	pulse     pulse
	settler   settler
	started   time.Time

	// What is kept in memory; doc.go has the table.
	servers servers
	views   views
	tokens  tokens

	// Who waits for whom.
	looks       flights[lookKey, *view]
	refreshes   flights[tokenKey, cachedToken]
	exchanges   flights[tokenKey, cachedToken]
	adoptions   flights[string, ticket]
	revocations flights[GrantKey, struct{}]
	stops       flights[toStop, struct{}]
	counts      counts
	hints       sequels[subject]
	watchers    visitors[ServerKey]
	binds       flights[ServerKey, *server]
	turns       turns[GrantKey]  // one refresh per grant at a time
	serverTurns turns[ServerKey] // one Register or Unregister per server
	uidTurns    turns[uint32]    // one Register per uid
	bindTurns   turns[ServerKey] // one bind per server
	slots       chan struct{}    // bounds the binds that Docker's hints start
	committing  marked[GrantKey] // answers between the journal and the store
	bells       bells[string]    // at grants that another broker refreshes

	leave   sync.Once     // closes left
	left    chan struct{} // closed by EndWatches
	closing chan struct{} // closed by Close
	work    crew
	stop    context.CancelFunc // ends the recheck and what listens
	unwatch func()             // ends the Attestor's Watch
}

// known is a provider with what is known of it without asking, which no request
// needs to be told again.
type known struct {
	Provider
	info ProviderInfo
}

// Info returns what the provider said when the broker was made.
func (k known) Info() ProviderInfo { return k.info }

// New checks cfg and joins the parts. It asks none of them anything.
func New(cfg Config) (*Broker, error) {
	b := &Broker{
		cfg:       cfg,
		providers: make(map[ProviderID]Provider),
		vault:     vault{store: cfg.Store, keys: cfg.Keys, deployment: cfg.Deployment},
		pulse:     pulse{store: cfg.Store, hints: make(chan struct{}, 1)},
		settler:   settler{store: cfg.Store},
		slots:     make(chan struct{}, 8),
		left:      make(chan struct{}),
		closing:   make(chan struct{}),
		stop:      func() {},
		unwatch:   func() {},
	}
	for _, p := range cfg.Providers {
		info := p.Info()
		b.providers[info.Name] = known{p, info}
	}
	if err := b.check(); err != nil {
		return nil, err
	}
	b.audit = newAudit(cfg.Audit, cfg.Keys.AuditMAC(), cfg.AuditHead)
	return b, nil
}

func (b *Broker) check() error {
	c := &b.cfg
	var errs []error
	for _, f := range []struct {
		name string
		ok   bool
	}{
		{"Deployment", c.Deployment != ""}, {"Host", c.Host != ""}, {"Contact", c.Contact != ""},
		{"Hubs", len(c.Hubs) > 0}, {"Providers", len(c.Providers) > 0},
		{"Store", c.Store != nil}, {"Keys", c.Keys != nil}, {"Attestor", c.Attestor != nil},
		{"Sockets", c.Sockets != nil}, {"Journal", c.Journal != ""}, {"Audit", c.Audit != nil}, {"Log", c.Log != nil},
	} {
		if !f.ok {
			errs = append(errs, fmt.Errorf("broker: %s is missing", f.name))
		}
	}
	for name, h := range c.Hubs {
		if err := b.checkHub(h); err != nil {
			errs = append(errs, fmt.Errorf("broker: hub %s: %w", name, err))
		}
	}
	for i, r := range c.Rules {
		if _, err := b.provider(r.Provider); err != nil {
			errs = append(errs, fmt.Errorf("broker: rule %d: %w", i+1, err))
		}
		for name, h := range c.Hubs {
			if r.OnRoleLost == StopServer && oneOf(r.Hubs, name) && h.API == nil {
				errs = append(errs, fmt.Errorf("broker: rule %d: on_role_lost: stop_server needs the API of hub %s", i+1, name))
			}
		}
		if need := r.RequireAttestation; need != "" && !slices.Contains(levels, need) {
			errs = append(errs, fmt.Errorf("broker: rule %d: there is no level of attestation %q; there are %s", i+1, need, list(levels)))
		}
	}
	return errors.Join(errs...)
}

func (b *Broker) checkHub(h Hub) error {
	p, err := b.provider(h.Login)
	if err != nil {
		return fmt.Errorf("login: %w", err)
	}
	for _, s := range h.Scopes {
		if !IsScope(s) {
			return fmt.Errorf("scopes: %q is not a scope", s)
		}
	}
	if len(h.Scopes) > 0 && !p.Info().Narrowing.Narrows() {
		return fmt.Errorf("scopes: %s can't narrow the hub's token to them", h.Login)
	}
	return nil
}

// Start puts right what the store has lost of this broker's writes, restores this
// host's registrations, opens their sockets and begins to
// watch their containers. Close ends what it began.
func (b *Broker) Start(ctx context.Context) error {
	if err := b.pulse.sync(ctx); err != nil {
		return err
	}
	b.started = b.pulse.now()
	var err error
	if b.journal, err = openJournal(b.cfg.Journal); err != nil {
		return err
	}
	brokenOff, err := b.reconcile(ctx, true)
	if err != nil {
		return err
	}
	b.pulse.fellBack = b.fellBack
	if err := b.restore(ctx); err != nil {
		return err
	}
	lastLine := b.unrecorded()
	b.life("start")
	keys := b.cfg.Keys.Keys()
	b.say(ctx, keys, primaries(keys)) // before anything is sealed for somebody
	watch, stop := context.WithCancel(context.WithoutCancel(ctx))
	b.stop = stop
	b.hear(context.WithoutCancel(ctx), lastLine)
	b.work.Go(func() { _ = b.cfg.Store.Listen(watch, b.heard) })
	b.work.Go(func() { b.pulse.follow(watch) })
	b.work.Go(func() { every(watch, scaled(settleEvery), b.settle) })
	b.work.Go(func() { every(watch, beatEvery, func(ctx context.Context) { _ = b.pulse.sync(ctx) }) })
	b.work.Go(func() { every(watch, keepAliveEvery, b.keepAll) })
	b.work.Go(func() { every(watch, revokeEvery, b.revokeAll) })
	b.work.Go(func() { every(watch, stopEvery, b.stopAll) })
	b.work.Go(func() { every(watch, tallyEvery, b.tally) })
	for name, h := range b.cfg.Hubs {
		if h.API != nil {
			b.work.Go(func() { b.sweep(watch, name, h.API) })
		}
	}
	if b.cfg.Mounts != nil {
		b.work.Go(func() { b.strays(watch) })
	}
	b.work.Go(func() { b.attend(keys) })
	b.work.Go(func() { b.recheck(watch) })
	b.work.Go(func() { b.finish(watch, brokenOff) })
	b.hint("")
	return nil
}

// unrecorded is since when nothing was recorded of commands in containers, by this
// host's clock, which Docker's is; zero: nothing ever was. A broker that runs records
// what it hears of, and whatever it records is later.
func (b *Broker) unrecorded() time.Time {
	last := b.cfg.AuditHead.Time
	if last.IsZero() {
		return last
	}
	return time.Now().Add(-b.pulse.now().Sub(last))
}

// hear follows what happens to containers, until unwatch is called.
func (b *Broker) hear(ctx context.Context, since time.Time) {
	ctx, stop := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := b.cfg.Attestor.Watch(ctx, since, b.hint, b.ran); err != nil && ctx.Err() == nil {
			b.cfg.Log.Error("containers are no longer watched", "err", err)
		}
	}()
	b.unwatch = func() {
		stop()
		<-ended
	}
}

// EndWatches ends the open Watches, and those that begin later. Whoever waits for
// requests under way calls it first: a Watch has no end of its own.
func (b *Broker) EndWatches() { b.leave.Do(func() { close(b.left) }) }

// Close stops watching and returns when the refreshes under way have ended, so
// that no answer of a provider is lost. Sockets and Store stay open; whoever
// made them closes them afterwards. It is called once.
func (b *Broker) Close() {
	b.EndWatches()
	close(b.closing)
	b.stop()
	b.work.wait()
	b.exchanges.wait()
	b.refreshes.wait()
	b.adoptions.wait()
	b.revocations.wait()
	b.stops.wait()
	b.hints.wait()
	b.binds.wait()
	b.looks.wait()
	b.pulse.reads.wait()
	b.settler.calls.wait()
	b.unwatch()   // as late as can be: what is run in containers meanwhile is recorded
	b.work.wait() // for what its last hint began
	if err := b.audit.tally(b.pulse.now(), true); err != nil {
		b.cfg.Log.Error("the audit can't be written; what was refused repeatedly of late is not counted in it", "err", err)
	}
	b.life("stop")
	if b.journal != nil {
		b.journal.close()
	}
}

// closes reports whether Close was called: nothing new is begun then.
func (b *Broker) closes() bool {
	select {
	case <-b.closing:
		return true
	default:
		return false
	}
}

// PartStatus is the state of one part of a broker.
type PartStatus struct {
	Name   string
	OK     bool
	Detail string
}

// Status is one broker's state.
type Status struct {
	Deployment    string
	Host          HostID
	StartedAt     time.Time
	Version       string
	Revision      int64
	Store         PartStatus
	Attestation   PartStatus
	Level         string // one of Levels, as proofs are worth it on this host; empty: not known
	Providers     []PartStatus
	Registrations map[RegistrationState]int
}

// statusWithin bounds what one part may take to say how it does.
const statusWithin = 5 * time.Second

// Status asks each part how it does, all at once.
func (b *Broker) Status(ctx context.Context) Status {
	ctx, cancel := context.WithTimeout(ctx, statusWithin)
	defer cancel()
	s := Status{
		Deployment: b.cfg.Deployment, Host: b.cfg.Host, StartedAt: b.started, Version: b.cfg.Version,
		Providers: make([]PartStatus, len(b.cfg.Providers)), Registrations: make(map[RegistrationState]int),
	}
	s.Revision, _ = b.pulse.revision(ctx) // Store says why, if it can't be read
	var asked sync.WaitGroup
	asked.Go(func() { s.Store = partStatus("store", "ok", b.cfg.Store.Check(ctx)) })
	asked.Go(func() {
		level, err := b.cfg.Attestor.Check(ctx)
		s.Attestation = partStatus("attestation", b.worth(level), err)
		if err == nil {
			s.Level, _ = b.cfg.Attestor.Worth(level)
		}
	})
	for i, id := range b.providerNames() {
		asked.Go(func() { s.Providers[i] = partStatus(string(id), "ok", b.providers[id].Check(ctx)) })
	}
	asked.Wait()
	for _, r := range b.Registrations() {
		s.Registrations[r.State]++
	}
	return s
}

// worth says in words what proofs of a level are worth here.
func (b *Broker) worth(level string) string {
	now, why := b.cfg.Attestor.Worth(level)
	if why == "" {
		return now
	}
	return fmt.Sprintf("%s, not %s: %s", now, level, why)
}

func partStatus(name, fine string, err error) PartStatus {
	if err != nil {
		return PartStatus{Name: name, Detail: err.Error()}
	}
	return PartStatus{Name: name, OK: true, Detail: fine}
}

// Grants lists the deployment's grants, sorted, without their refresh tokens.
// Empty arguments narrow nothing.
func (b *Broker) Grants(ctx context.Context, hub HubID, user UserID) ([]Grant, error) {
	all, err := b.grants(ctx, func(k GrantKey, u UserID) bool { return (hub == "" || hub == k.Hub) && (user == "" || user == u) })
	if err != nil {
		return nil, public(err, b.cfg.Contact, "")
	}
	for i := range all {
		all[i].Refresh = Secret{}
	}
	return all, nil
}

// grants is Grants with the refresh tokens.
func (b *Broker) grants(ctx context.Context, wanted func(GrantKey, UserID) bool) ([]Grant, error) {
	members, err := b.cfg.Store.Members(ctx, grantsKey)
	if err != nil {
		return nil, storeError(err, grantsKey)
	}
	var all []Grant
	for _, m := range members {
		g, err := b.loadGrant(ctx, parseGrantKey(m))
		if errors.Is(err, ErrAbsent) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if wanted(g.Key, g.User) {
			all = append(all, g)
		}
	}
	slices.SortFunc(all, func(a, b Grant) int {
		return cmp.Or(cmp.Compare(a.Key.Hub, b.Key.Hub), cmp.Compare(a.User, b.User), cmp.Compare(a.Key.Provider, b.Key.Provider))
	})
	return all, nil
}

// provider finds a provider by the name that somebody asked for.
func (b *Broker) provider(id ProviderID) (Provider, error) {
	p, ok := b.providers[id]
	if !ok {
		var names []string
		for _, n := range b.providerNames() {
			names = append(names, string(n))
		}
		return nil, Errorf(Invalid, "provider: there is no provider %q; there are %s", id, list(names))
	}
	return p, nil
}

func (b *Broker) providerNames() []ProviderID {
	names := make([]ProviderID, 0, len(b.providers))
	for n := range b.providers {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}
