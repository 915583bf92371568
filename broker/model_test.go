package broker_test

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
	"tokenbroker/broker/seal"
)

// The refresh, driven at random against a model of the provider: two real
// brokers on one store, one user, and everything that can go wrong between them.
// Above all of it stand the rules that TestModelOfTheRefresh checks:
//
//	a refresh token is sent again only while nobody knows what came of it, and
//	  no more often than mayBeSent says (modelIDP.arrive)
//	one refresh of a session is under way at a time (modelIDP.arrive)
//	a token that is handed out is of the session that was claimed last, under the
//	  epoch of now, and not under a tombstone (model.check)
//	what lives at the provider lives at the brokers, or they say why not, and the
//	  epoch never goes back (model.Check)
//	a hub gets its own scopes and no more (model.AskHub)
//	when all trouble is over, tokens flow again (model.calm)

// mayBeSent says whether a refresh token may be sent once more of which so many
// uses were without an answer, the last one at a time.
func mayBeSent(unanswered int, last time.Time) bool {
	return unanswered < 2 || time.Since(last) >= 10*time.Second
}

// How the provider takes a second use of a refresh token.
const (
	modelKeeps  = "no rotation"
	modelGrace  = "rotation with a grace of 30 s"
	modelStrict = "strict single use"
)

// With -rapid.checks=N each kind of provider is tried N times; it is 100, and 12
// under the race detector.
func TestModelOfTheRefresh(t *testing.T) {
	if checks := flag.Lookup("rapid.checks"); raced() && checks.Value.String() == checks.DefValue {
		flag.Set("rapid.checks", "12")
	}
	for _, kind := range []string{modelKeeps, modelGrace, modelStrict} {
		t.Run(kind, func(t *testing.T) {
			dir := filepath.Dir(inMemory(t)) // outside of the bubbles
			rapid.Check(t, func(t *rapid.T) {
				rapid.SyncTest(t, func(t *rapid.T) {
					m := newModel(t, kind, dir)
					defer m.end()
					t.Repeat(rapid.StateMachineActions(m))
					m.calm()
				})
			})
		})
	}
}

// A model is one deployment, and what must be true of it.
type model struct {
	t     rapid.TB
	dir   string
	store *brokertest.MemStore
	keys  *seal.Keyset
	idp   *modelIDP
	hosts []*modelHost
	asked sync.WaitGroup

	mu      sync.Mutex          // guards all below
	wrong   []string            // what broke a rule
	lagging *brokertest.MemCopy // the replica, which stopped following; nil: it follows
	since   time.Time           // when it stopped
	claimed int                 // number of the session that was claimed last
	handle  broker.Secret       // the hub's, of that login
	said    bool                // that an answer of it was lost
	fell    bool                // since that login the store has gone back
	killed  bool                // a broker has been
	changed time.Time           // when what may be handed out changed last
	ended   time.Time           // when the grant was disconnected; zero: it isn't
	highest broker.Grant        // its counters are the highest that were seen
}

func newModel(t rapid.TB, kind, dir string) *model {
	dir, err := os.MkdirTemp(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	m := &model{t: t, dir: dir, store: brokertest.NewMemStore()}
	m.idp = &modelIDP{m: m, kind: kind, roles: []string{"roles/researcher"}, uses: map[string]*modelUse{}, of: map[string]int{}}
	if m.keys, err = seal.New(); err != nil {
		t.Fatal(err)
	}
	for i := range 2 {
		h := &modelHost{m: m, name: fmt.Sprintf("host%d", i+1), attestor: brokertest.NewAttestor()}
		m.hosts = append(m.hosts, h)
		h.start(nil)
	}
	m.login(m.hosts[0])
	for _, h := range m.hosts {
		if _, err := h.life.Register(context.Background(), "main", broker.RegisterRequest{User: "alice", Server: broker.ServerName(h.name), ContainerName: "jupyter-alice"}); err != nil {
			t.Fatalf("Register: %v", err)
		}
		h.attestor.Run("jupyter-alice", 100)
	}
	synctest.Wait()
	return m
}

func (m *model) end() {
	for _, h := range m.hosts {
		if h.life == nil {
			continue
		}
		if h.life.disarm(); h.life.lives() {
			h.life.Close()
		}
	}
	m.asked.Wait()
	time.Sleep(2 * time.Minute) // what the dead ones were at
	os.RemoveAll(m.dir)
}

// broken notes that a rule was broken. It may be called from any goroutine.
func (m *model) broken(format string, args ...any) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.wrong = append(m.wrong, fmt.Sprintf(format, args...))
}

// was reads one of m's flags from any goroutine.
func (m *model) was(flag *bool) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return *flag
}

// one draws a host of whose broker is holds.
func (m *model) one(t *rapid.T, is func(*modelLife) bool) *modelHost {
	fit := slices.DeleteFunc(slices.Clone(m.hosts), func(h *modelHost) bool { return !is(h.life) })
	if len(fit) == 0 {
		t.Skip("no broker is like that")
	}
	return rapid.SampledFrom(fit).Draw(t, "broker")
}

// The actions.

// Ask has a container ask for a token, and goes on while it waits.
func (m *model) Ask(t *rapid.T) {
	l := m.one(t, (*modelLife).lives).life
	want := broker.Want{Scopes: rapid.SampledFrom([][]string{{"a"}, {"b"}, {"a", "b"}}).Draw(t, "scopes")}
	patience := rapid.SampledFrom([]time.Duration{time.Hour, time.Second, 0}).Draw(t, "patience")
	m.asked.Go(func() { m.ask(l, want, patience) })
	synctest.Wait()
}

func (m *model) ask(l *modelLife, want broker.Want, patience time.Duration) error {
	ctx, hangUp := context.WithTimeout(context.Background(), patience)
	defer hangUp()
	peer := &broker.Peer{Server: broker.ServerKey{Hub: "main", User: "alice", Server: broker.ServerName(l.host.name)}, PID: 100}
	tok, err := l.Token(ctx, peer, want)
	if err == nil && l.lives() {
		m.check(l, tok)
	}
	return err
}

// check looks at a token that is handed out.
func (m *model) check(l *modelLife, tok broker.Token) {
	session, epoch, now := m.idp.sessionOf(tok), l.audit.epoch(tok.Ref), m.grant(l).Epoch
	m.mu.Lock()
	lease := 250 * time.Millisecond
	if m.killed {
		lease = 30 * time.Second // the revision may not have been moved
	}
	claimed, ended, changed := m.claimed, m.ended, m.changed
	m.mu.Unlock()
	switch {
	case time.Since(changed) <= lease:
	case !ended.IsZero():
		m.broken("a token is handed out %s after the disconnect", time.Since(ended))
	case session != claimed:
		m.broken("a token of session %d is handed out %s after the login of session %d", session, time.Since(changed), claimed)
	case epoch != now && time.Since(time.UnixMicro(now)) > lease: // an epoch is the time when it began
		m.broken("a token of epoch %d is handed out %s after epoch %d began", epoch, time.Since(time.UnixMicro(now)), now)
	}
}

// AskHub has the hub ask whether the session lives, and goes on while it waits. Half
// of the time its token was refused.
func (m *model) AskHub(t *rapid.T) {
	l := m.one(t, (*modelLife).lives).life
	refused := rapid.Bool().Draw(t, "refused")
	m.mu.Lock()
	handle := m.handle
	m.mu.Unlock()
	m.asked.Go(func() {
		var got *broker.HubToken
		if refused {
			if tok, err := l.RefreshHub(context.Background(), "main", "idp", handle); err == nil {
				got = &tok
			}
		} else if s, err := l.CheckSession(context.Background(), "main", "idp", handle, "alice", ""); err == nil {
			got = s.Token
		}
		if got != nil && l.lives() && !slices.Equal(got.Scopes, []string{"a"}) {
			m.broken("the hub gets a token with the scopes %v", got.Scopes)
		}
	})
	synctest.Wait()
}

// Wait lets time pass.
func (m *model) Wait(t *rapid.T) {
	time.Sleep(rapid.SampledFrom([]time.Duration{time.Second, 12 * time.Second, 50 * time.Second, 6 * time.Minute}).Draw(t, "time"))
	synctest.Wait()
}

// Trouble says how the provider answers next.
func (m *model) Trouble(t *rapid.T) {
	m.idp.next(rapid.SampledFrom([]modelAnswer{
		{latency: 2 * time.Second}, {latency: 20 * time.Second}, {latency: 40 * time.Second},
		{lost: true}, {lost: true}, {lost: true, latency: 2 * time.Second}, {cut: true},
		{refusal: broker.TryLater}, {refusal: broker.Misconfigured}, {refusal: broker.UserAction}, {refusal: broker.Refused},
	}).Draw(t, "answer"))
}

// Login logs the user in again. If the hub's own token can't be narrowed the login
// fails, and all is as it was.
func (m *model) Login(t *rapid.T) { m.login(m.one(t, (*modelLife).well)) }

func (m *model) login(h *modelHost) {
	troubled := m.idp.troubled()
	got, err := h.life.Login(context.Background(), "main", "idp", codeOf("alice"))
	if err != nil && troubled {
		return
	}
	if err == nil {
		_, err = h.life.Claim(context.Background(), "main", "idp", got.Handle, "alice")
	}
	if err != nil {
		m.t.Fatalf("login: %v", err)
	}
	session := m.idp.newest()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.handle = got.Handle
	m.claimed, m.said, m.fell, m.ended, m.changed = session, false, false, time.Time{}, time.Now()
}

// Disconnect ends the grant.
func (m *model) Disconnect(t *rapid.T) {
	if rapid.IntRange(0, 2).Draw(t, "seldom") > 0 {
		t.Skip("not this time")
	}
	if _, _, err := m.one(t, (*modelLife).well).life.Disconnect(context.Background(), "root", "main", "alice", ""); err != nil {
		t.Fatalf("Disconnect: %v", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ended.IsZero() {
		m.ended, m.changed = time.Now(), time.Now()
	}
}

// Roles gives and takes roles at the provider.
func (m *model) Roles(t *rapid.T) {
	m.idp.setRoles(rapid.SampledFrom([][]string{nil, {"roles/researcher"}, {"roles/admin", "roles/researcher"}}).Draw(t, "roles"))
}

// EndSession ends the session at the provider.
func (m *model) EndSession(t *rapid.T) {
	if rapid.IntRange(0, 3).Draw(t, "seldom") == 0 {
		m.idp.endSession()
	}
}

// Kill kills a broker, now or some steps later.
func (m *model) Kill(t *rapid.T) {
	l := m.one(t, (*modelLife).well).life
	l.arm(rapid.IntRange(0, 8).Draw(t, "steps"))
	synctest.Wait()
}

// Restart starts a broker that was killed.
func (m *model) Restart(t *rapid.T) {
	h := m.one(t, (*modelLife).isDead)
	h.start(h.life.left)
}

// Lag has the replica stop to follow, or follow again.
func (m *model) Lag(*rapid.T) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.lagging != nil {
		m.lagging = nil
		return
	}
	m.lagging, m.since = m.store.Copy(), time.Now()
}

// toNotice is what brokers get to notice that the store fell back.
const toNotice = 6 * time.Second

// FallBack promotes the replica. A lease that it has not got is lost (a store that
// waits for its replicas has none such), so this is not done while a refresh is
// under way that began since; and whoever knows more is there to notice.
func (m *model) FallBack(t *rapid.T) {
	m.mu.Lock()
	replica := m.lagging
	m.mu.Unlock()
	if replica == nil || m.idp.busySince(m.since) || !m.hosts[0].life.well() || !m.hosts[1].life.well() {
		t.Skip("nothing to fall back to, or nobody to notice")
	}
	m.store.Fallback(replica)
	m.mu.Lock()
	m.lagging, m.fell, m.changed = nil, true, time.Now().Add(toNotice)
	m.mu.Unlock()
	time.Sleep(toNotice)
}

// Check is done after each action.
func (m *model) Check(*rapid.T) { m.rules() }

// rules says which rules were broken.
func (m *model) rules() {
	time.Sleep(time.Millisecond) // nothing takes no time at all
	synctest.Wait()
	for _, h := range m.hosts {
		if h.life.lives() {
			m.look(m.grant(h.life))
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, w := range m.wrong {
		m.t.Error(w)
	}
	m.wrong = nil
}

// look compares a grant, as a broker sees it, with what is so.
func (m *model) look(g broker.Grant) {
	session := m.idp.state(m.claimed)
	switch high := m.highest; {
	case g.Epoch < high.Epoch || g.Version < high.Version:
		m.broken("the grant went back from epoch %d and version %d to %d and %d", high.Epoch, high.Version, g.Epoch, g.Version)
	case (g.State == broker.Disconnected) != !m.ended.IsZero(), g.Tombstone.IsZero() != m.ended.IsZero():
		m.broken("the grant is %s; it was disconnected: %t", g.State, !m.ended.IsZero())
	case g.State == broker.NeedsLogin && session == modelLives:
		m.broken("the grant needs a login (%s) and its session lives", g.Reason)
	case g.State == broker.NeedsLogin && session == modelReused && g.Reason != "lost_response" && !m.said && !m.fell:
		m.broken("the grant was lost and the reason is %q", g.Reason)
	case g.State != broker.Live && g.Reason == "":
		m.broken("the grant is %s and nobody says why", g.State)
	}
	m.said = m.said || g.Reason == "lost_response"
	m.highest.Epoch, m.highest.Version = max(m.highest.Epoch, g.Epoch), max(m.highest.Version, g.Version)
}

func (m *model) grant(l *modelLife) broker.Grant {
	all, err := l.Grants(context.Background(), "main", "alice")
	if err != nil || len(all) != 1 {
		m.broken("%d grants, %v", len(all), err)
		return broker.Grant{}
	}
	return all[0]
}

// calm ends all trouble and asks each broker for a token.
func (m *model) calm() {
	m.idp.calm()
	for _, h := range m.hosts {
		if h.life.isDead() {
			h.start(h.life.left)
		}
		h.life.disarm()
	}
	time.Sleep(3 * time.Minute)
	m.idp.calm() // what was asked meanwhile was answered
	for i, scope := range []string{"a", "b"} {
		err := m.ask(m.hosts[i].life, broker.Want{Scopes: []string{scope}}, time.Hour)
		session := m.idp.state(m.claimed)
		switch {
		case !m.ended.IsZero() && (errors.Is(err, broker.ErrRevoked) || errors.Is(err, broker.ErrDenied)):
		case m.ended.IsZero() && err == nil:
		case m.ended.IsZero() && session != modelLives && (errors.Is(err, broker.ErrLoginRequired) || errors.Is(err, broker.ErrDenied)):
		default:
			m.broken("at the end %s says %v; disconnected: %t, the session: %s", m.hosts[i].name, err, !m.ended.IsZero(), session)
		}
		m.rules()
		time.Sleep(6 * time.Minute)
	}
}

// A modelHost is a place where one broker after the other lives.
type modelHost struct {
	m        *model
	name     string
	attestor *brokertest.Attestor
	lives    int
	life     *modelLife
}

func (h *modelHost) String() string { return h.name }

// start starts a broker on what a journal held.
func (h *modelHost) start(journal []byte) {
	h.lives++
	l := &modelLife{host: h, audit: &audit{}, died: make(chan struct{}), path: filepath.Join(h.m.dir, fmt.Sprintf("%s.%d", h.name, h.lives))}
	if err := os.WriteFile(l.path, journal, 0o600); err != nil {
		h.m.t.Fatal(err)
	}
	b, err := broker.New(broker.Config{
		Deployment: "lab", Host: broker.HostID(h.name), Contact: "nobody",
		Hubs: map[broker.HubID]broker.Hub{"main": {Login: "idp", Scopes: []string{"a"}}}, Providers: []broker.Provider{modelDoor{h.m.idp, l}},
		Rules: []broker.Rule{{Provider: "idp", Roles: []string{"researcher"}, Scopes: []string{"a", "b"}}},
		Store: modelStore{h.m.store, l}, Keys: h.m.keys, Attestor: h.attestor, Sockets: brokertest.NewSockets(),
		Audit: l.audit, Log: slog.New(slog.DiscardHandler), Journal: l.path,
	})
	if err == nil {
		err = b.Start(context.Background())
	}
	if err != nil {
		h.m.t.Fatalf("start %s: %v", h.name, err)
	}
	l.Broker, h.life = b, l
	synctest.Wait()
}

// A modelLife is a broker from its start until it is killed. What it does after
// that reaches nobody.
type modelLife struct {
	*broker.Broker
	host  *modelHost
	audit *audit
	path  string
	died  chan struct{} // closed when it does

	mu    sync.Mutex // guards all below
	steps int        // until it dies; 0: it doesn't
	dead  bool
	left  []byte // of its journal
}

var errKilled = errors.New("killed")

// step does f, unless the broker is dead before, and says so if it is after.
func (l *modelLife) step(f func() error) error {
	if l.dies() {
		return errKilled
	}
	err := f()
	if l.dies() {
		return errKilled
	}
	return err
}

func (l *modelLife) dies() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.steps > 0 {
		if l.steps--; l.steps == 0 {
			l.kill()
		}
	}
	return l.dead
}

// kill is called under the lock.
func (l *modelLife) kill() {
	l.steps, l.dead = 0, true
	var err error
	if l.left, err = os.ReadFile(l.path); err != nil {
		l.host.m.broken("%v", err)
	}
	m := l.host.m
	m.mu.Lock()
	m.killed, m.lagging = true, nil // one fault at a time: the replica has all that the dead one wrote
	m.mu.Unlock()
	close(l.died)
	go l.Close()
}

func (l *modelLife) arm(steps int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.steps = steps; steps == 0 {
		l.kill()
	}
}

func (l *modelLife) disarm() { l.locked(func() { l.steps = 0 }) }

func (l *modelLife) isDead() (yes bool) { l.locked(func() { yes = l.dead }); return yes }
func (l *modelLife) lives() bool        { return !l.isDead() }

// well says that the broker lives and is not about to die.
func (l *modelLife) well() (yes bool) { l.locked(func() { yes = !l.dead && l.steps == 0 }); return yes }

func (l *modelLife) locked(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f()
}

// A modelStore is the store as one broker reaches it. It can die at each write.
type modelStore struct {
	*brokertest.MemStore
	life *modelLife
}

func (s modelStore) Put(ctx context.Context, k broker.Key, was int64, box []byte, life time.Duration) error {
	return s.life.step(func() error {
		err := s.MemStore.Put(ctx, k, was, box, life)
		if err == nil && k.Kind == "grant" {
			s.life.host.m.idp.stored(s.life.host)
		}
		return err
	})
}

func (s modelStore) Add(ctx context.Context, k broker.Key, member string) error {
	return s.life.step(func() error { return s.MemStore.Add(ctx, k, member) })
}

func (s modelStore) Remove(ctx context.Context, k broker.Key, member string) error {
	return s.life.step(func() error { return s.MemStore.Remove(ctx, k, member) })
}

func (s modelStore) Move(ctx context.Context) (rev int64, err error) {
	err = s.life.step(func() error { rev, err = s.MemStore.Move(ctx); return err })
	return rev, err
}

func (s modelStore) Settle(context.Context) error {
	m := s.life.host.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.lagging != nil {
		return errors.New("the replica lags")
	}
	return nil
}

// epoch is what the audit says of a token.
func (a *audit) epoch(ref string) int64 {
	for line := range strings.Lines(a.String()) {
		var e broker.Entry
		if json.Unmarshal([]byte(line), &e) == nil && e.Ref == ref {
			return e.Epoch
		}
	}
	return 0
}
