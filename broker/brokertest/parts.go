package brokertest

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"tokenbroker/broker"
)

var (
	_ broker.Attestor = (*Attestor)(nil)
	_ broker.Sockets  = (*Sockets)(nil)
)

// An Attestor knows the containers that a test starts by their names. A peer is
// in a container if its PID is one of the container's.
type Attestor struct {
	mu      sync.Mutex // guards all below
	running map[string]*container
	gone    map[int32]bool
	refuse  map[string]error
	since   time.Time
	changed func(string)
	ran     func(broker.Exec)
	binds   int
	forger  string
}

type container struct {
	workload *broker.Workload
	pids     []int32
	done     chan struct{}
}

// NewAttestor returns one that knows no container.
func NewAttestor() *Attestor {
	return &Attestor{running: make(map[string]*container), gone: make(map[int32]bool), refuse: make(map[string]error)}
}

// Hint says that something has happened to the container called name.
func (a *Attestor) Hint(name string) {
	a.mu.Lock()
	changed := a.changed
	a.mu.Unlock()
	if changed != nil {
		changed(name)
	}
}

// Run starts the container called name, with processes of these PIDs.
func (a *Attestor) Run(name string, pids ...int32) {
	a.mu.Lock()
	done := make(chan struct{})
	a.running[name] = &container{
		workload: &broker.Workload{Container: fmt.Sprintf("%064x", pids[0]), Name: name, Image: "lab:1", PID: pids[0], Level: "pidfd+ns", Done: done},
		pids:     pids, done: done,
	}
	a.mu.Unlock()
	a.Hint(name)
}

// Exec tells of a command that somebody runs in a container.
func (a *Attestor) Exec(x broker.Exec) {
	a.mu.Lock()
	ran := a.ran
	a.mu.Unlock()
	ran(x)
}

// Stop ends the container called name and all of its processes.
func (a *Attestor) Stop(name string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	c := a.running[name]
	for _, pid := range c.pids {
		a.gone[pid] = true
	}
	delete(a.running, name)
	close(c.done)
}

// End ends one process.
func (a *Attestor) End(pid int32) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.gone[pid] = true
}

// Refuse makes Bind answer err for name; nil ends that.
func (a *Attestor) Refuse(name string, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.refuse[name] = err
}

// Binds returns how often Bind was called.
func (a *Attestor) Binds() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.binds
}

// Bind implements broker.Attestor.
func (a *Attestor) Bind(_ context.Context, r broker.Registration) (*broker.Workload, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.binds++
	if err := a.refuse[r.ContainerName]; err != nil {
		return nil, err
	}
	c, ok := a.running[r.ContainerName]
	if !ok {
		return nil, broker.Errorf(broker.Pending, "the container %s is not running yet", r.ContainerName)
	}
	return c.workload, nil
}

// Attest implements broker.Attestor.
func (a *Attestor) Attest(p *broker.Peer, w *broker.Workload) error {
	a.mu.Lock()
	c := a.running[w.Name]
	inside := c != nil && c.workload == w && slices.Contains(c.pids, p.PID)
	a.mu.Unlock()
	if !inside {
		return broker.Errorf(broker.UnknownPeer, "this process is not in the server's container").
			Because(fmt.Errorf("process %d is not one of %s", p.PID, w.Name))
	}
	return a.Alive(p)
}

// Alive implements broker.Attestor.
func (a *Attestor) Alive(p *broker.Peer) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.gone[p.PID] {
		return broker.Errorf(broker.UnknownPeer, "the process that opened this connection has ended")
	}
	return nil
}

// Watch implements broker.Attestor.
func (a *Attestor) Watch(ctx context.Context, since time.Time, changed func(string), ran func(broker.Exec)) error {
	a.mu.Lock()
	a.since, a.changed, a.ran = since, changed, ran
	a.mu.Unlock()
	<-ctx.Done()
	return ctx.Err()
}

// Since is from when on the last Watch was to tell of commands.
func (a *Attestor) Since() time.Time {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.since
}

// Forge has a neighbour on the host that could forge proofs; empty: none.
func (a *Attestor) Forge(why string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.forger = why
}

// Edit changes the workload that Bind returns for name from now on.
func (a *Attestor) Edit(name string, edit func(*broker.Workload)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	edit(a.running[name].workload)
}

// Worth implements broker.Attestor.
func (a *Attestor) Worth(level string) (now, why string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.forger == "" {
		return level, ""
	}
	return broker.Lowered(level), a.forger
}

// Check implements broker.Attestor.
func (a *Attestor) Check(context.Context) (string, error) { return "pidfd+ns", nil }

// Sockets remembers which servers' sockets are open, and who is connected.
type Sockets struct {
	mu    sync.Mutex // guards the two
	open  map[broker.ServerKey]bool
	conns map[*broker.Peer]bool
}

// NewSockets returns none open.
func NewSockets() *Sockets {
	return &Sockets{open: make(map[broker.ServerKey]bool), conns: make(map[*broker.Peer]bool)}
}

// Opened lists the servers whose sockets are open, in no order.
func (s *Sockets) Opened() []broker.ServerKey {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Keys(s.open))
}

// Directory implements broker.Sockets.
func (s *Sockets) Directory(k broker.ServerKey) (string, error) {
	return fmt.Sprintf("/servers/%x", k.String()), nil
}

// Open implements broker.Sockets.
func (s *Sockets) Open(k broker.ServerKey) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open[k] = true
	return nil
}

// Connect has p's connection open.
func (s *Sockets) Connect(p *broker.Peer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conns[p] = true
}

// Connected says whether p's connection is still open.
func (s *Sockets) Connected(p *broker.Peer) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.conns[p]
}

// Hangup implements broker.Sockets.
func (s *Sockets) Hangup(k broker.ServerKey, meant func(*broker.Peer) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	maps.DeleteFunc(s.conns, func(p *broker.Peer, _ bool) bool { return p.Server == k && meant(p) })
}

// Close implements broker.Sockets.
func (s *Sockets) Close(k broker.ServerKey) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.open, k)
	return nil
}
