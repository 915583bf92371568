package spawnerhook

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"tokenbroker/broker"
)

// Docker attests processes in containers of the Docker engine on this host.
//
// It owns the pidfds of the containers' inits that its workloads carry: one for
// each running container that was bound, however often, closed when the container
// has ended or by Close. A workload outlives its pidfd; it then attests nobody.
type Docker struct {
	cfg        DockerConfig
	log        *slog.Logger
	engine     *engine
	proc       procfs
	locator    locator
	peerPidfds bool // the kernel names peers by pidfd

	hostPlaces func() host   // the host's own mounts, read once
	cgroup2    func() string // where the broker sees cgroup v2, found once

	watchers sync.WaitGroup // one goroutine for each of inits
	around   neighbours
	execs    execs

	mu     sync.Mutex // guards the two below
	inits  map[instance]*initProcess
	closed bool
}

// An instance is one run of a container.
type instance struct {
	container string
	pid       int32
	startedAt int64 // UnixNano
}

// An initProcess is the first process of an instance while somebody may ask
// whether it lives.
type initProcess struct {
	pidfd *os.File
	done  chan struct{} // closed when the process has ended
}

var _ broker.Attestor = (*Docker)(nil)

// NewDocker makes an attestor. It asks neither Docker nor the kernel for anything
// that may be missing; Check does.
func NewDocker(cfg DockerConfig) (*Docker, error) {
	if cfg.Directory == nil {
		return nil, errors.New("docker attestation needs to know the servers' directories")
	}
	if cfg.Socket == "" {
		cfg.Socket = DefaultSocket
	}
	if cfg.ProcRoot == "" {
		cfg.ProcRoot = "/proc"
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	d := &Docker{
		cfg:        cfg,
		log:        cfg.Log,
		engine:     &engine{socket: cfg.Socket},
		proc:       procfs(cfg.ProcRoot),
		peerPidfds: hasPeerPidfd(),
		inits:      map[instance]*initProcess{},
	}
	d.hostPlaces, d.cgroup2 = sync.OnceValue(d.readHost), sync.OnceValue(d.findCgroup2)
	return d, nil
}

// Close stops waiting for the ends of containers and closes their pidfds. It
// closes no Workload's Done: the containers live on.
func (d *Docker) Close() error {
	d.mu.Lock()
	d.closed = true
	for _, p := range d.inits {
		p.pidfd.Close()
	}
	d.mu.Unlock()
	d.watchers.Wait()
	d.engine.close()
	return nil
}

// Check implements broker.Attestor. Besides an engine that doesn't answer it
// refuses, by name, what this attestor knows no proof for.
func (d *Docker) Check(ctx context.Context) (string, error) {
	info, podman, err := d.engine.info(ctx)
	switch {
	case errors.Is(err, errTooOld):
		return "", broker.Errorf(broker.Denied, "%s", err)
	case err != nil:
		return "", unavailable(err)
	case podman:
		return "", broker.Errorf(broker.Denied, "this is Podman, which is not supported: use Docker 20.10 or newer")
	case info.rootless:
		return "", broker.Errorf(broker.Denied, "this Docker runs rootless, which is not supported: use a rootful one")
	case info.userns:
		return "", broker.Errorf(broker.Denied, "this Docker remaps users (userns-remap), which is not supported")
	}
	return d.checkKernel(ctx)
}

// checkKernel asks for what binding needs, and returns the level of attestation
// it allows. Docker's own process stands for the containers': all are root's.
func (d *Docker) checkKernel(ctx context.Context) (string, error) {
	self, err := openPidfd(int32(os.Getpid()))
	if err != nil {
		return "", broker.Errorf(broker.Denied, "this kernel has no pidfds: Linux 5.3 or newer is needed").Because(err)
	}
	self.Close()
	pid, err := listenerOf(ctx, d.cfg.Socket)
	if err != nil {
		return "", unavailable(err)
	}
	// It has no number here if we are in a PID namespace beside its one; then no
	// container's process has.
	if pid == 0 {
		return "", broker.Errorf(broker.Denied, "the broker can't see the host's processes: its container needs pid: host")
	}
	_, err = d.proc.namespace(pid, "mnt")
	return d.level(err == nil), nil
}

// Worth implements broker.Attestor.
func (d *Docker) Worth(level string) (now, why string) {
	if why := d.around.why.Load(); why != nil {
		return broker.Lowered(level), *why
	}
	return level, ""
}

// level names the proofs that are to be had.
func (d *Docker) level(namespaces bool) string {
	switch {
	case !d.peerPidfds:
		return "proc"
	case !namespaces:
		return "pidfd"
	}
	return "pidfd+ns"
}

// listenerOf returns the number of the process that listens at a socket.
func listenerOf(ctx context.Context, socket string) (int32, error) {
	ctx, cancel := context.WithTimeout(ctx, engineTimeout)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "unix", socket)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var sockErr error
	err = raw.Control(func(fd uintptr) {
		cred, sockErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err = errors.Join(err, sockErr); err != nil {
		return 0, fmt.Errorf("peer of %s: %w", socket, err)
	}
	return cred.Pid, nil
}

// hold makes the attestor the owner of an init's pidfd, or closes it and gives
// the one it holds already.
func (d *Docker) hold(i instance, pidfd *os.File) (*initProcess, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		pidfd.Close()
		return nil, errors.New("the attestor is closed")
	}
	if p, ok := d.inits[i]; ok {
		pidfd.Close()
		return p, nil
	}
	p := &initProcess{pidfd: pidfd, done: make(chan struct{})}
	d.inits[i] = p
	d.watchers.Go(func() { d.await(i, p) })
	return p, nil
}

// await waits for the end of an init.
func (d *Docker) await(i instance, p *initProcess) {
	err := waitEnd(p.pidfd)
	d.mu.Lock()
	delete(d.inits, i)
	closed := d.closed
	d.mu.Unlock()
	p.pidfd.Close()
	switch {
	case err == nil:
		close(p.done)
	case !closed:
		d.log.Error("can't wait for the end of a container", "container", i.container, "err", err)
	}
}

// instance names this run of the container.
func (c containerState) instance() instance {
	return instance{c.ID, c.PID, c.StartedAt.UnixNano()}
}

// unavailable is the error for a Docker that doesn't answer.
func unavailable(err error) error {
	return broker.Errorf(broker.Unavailable, "the broker can't ask Docker").Because(err)
}

// pause waits, or returns why not to.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
