package spawnerhook_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
	"tokenbroker/spawnerhook"
)

var alice = broker.Registration{
	Key:           broker.ServerKey{Hub: "main", User: "alice"},
	ContainerName: "jupyter-alice",
}

// A lab is an attestor on a fake engine. Its containers are real processes of
// this machine, about which a directory instead of /proc tells what the kernel
// would tell if they were containers.
type lab struct {
	engine *brokertest.Engine
	docker *spawnerhook.Docker
	dir    string // alice's, on this host
	proc   string
	log    *logBuffer
}

func newLab(t *testing.T, edit ...func(*spawnerhook.DockerConfig)) *lab {
	t.Helper()
	l := &lab{engine: brokertest.NewEngine(t), dir: t.TempDir(), proc: t.TempDir(), log: &logBuffer{}}
	cfg := spawnerhook.DockerConfig{
		Socket:    l.engine.Socket,
		Directory: l.directory,
		Log:       slog.New(slog.NewTextHandler(l.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		ProcRoot:  l.proc,
	}
	for _, e := range edit {
		e(&cfg)
	}
	var err error
	if l.docker, err = spawnerhook.NewDocker(cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.docker.Close() })
	if err := l.docker.LookAround(t.Context()); err != nil {
		t.Fatal(err)
	}
	return l
}

func (l *lab) directory(broker.ServerKey) (string, error) { return l.dir, nil }

// A process is one of this machine that plays in a container.
type process struct {
	pid  int
	kill func() // and wait for it
}

// process starts one in a container of that ID.
func (l *lab) process(t *testing.T, id string) process {
	t.Helper()
	p := sleeper(t)
	l.container(t, p.pid, id)
	return p
}

// container has /proc say that a process is in a container of that ID, which
// mounts alice's directory.
func (l *lab) container(t *testing.T, pid int, id string) {
	t.Helper()
	l.write(t, pid, "cgroup", fmt.Sprintf("2:pids:/docker/%s\n1:cpu:/docker/%s\n0::/docker/%s\n", id, id, id))
	l.write(t, pid, "mountinfo", l.mountinfo(t, "ro"))
	l.namespaces(t, pid, 4026540001, 4026540002)
}

// sleeper starts a process that does nothing.
func sleeper(t *testing.T) process {
	t.Helper()
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	kill := sync.OnceFunc(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	t.Cleanup(kill)
	return process{cmd.Process.Pid, kill}
}

// zombie starts a process that end makes a zombie.
func zombie(t *testing.T) (pid int, end func()) {
	t.Helper()
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return cmd.Process.Pid, func() {
		cmd.Process.Kill()
		// WNOWAIT: come back when it has ended, and leave it a zombie.
		if err := unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
			t.Fatal(err)
		}
	}
}

// mountinfo is that of a container that mounts alice's directory.
func (l *lab) mountinfo(t *testing.T, options string) string {
	t.Helper()
	dir, err := spawnerhook.Locate(l.dir)
	if err != nil {
		t.Fatal(err)
	}
	return "1 0 0:61 / / rw - overlay overlay rw\n" + dir.Mountinfo(spawnerhook.MountPoint, options)
}

// write sets what /proc tells of a process.
func (l *lab) write(t *testing.T, pid int, name, text string) {
	t.Helper()
	path := filepath.Join(l.proc, fmt.Sprint(pid), name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func (l *lab) namespaces(t *testing.T, pid int, pidNS, mntNS uint64) {
	t.Helper()
	dir := filepath.Join(l.proc, fmt.Sprint(pid), "ns")
	if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o755),
		os.Symlink(fmt.Sprintf("pid:[%d]", pidNS), dir+"/pid"),
		os.Symlink(fmt.Sprintf("mnt:[%d]", mntNS), dir+"/mnt")); err != nil {
		t.Fatal(err)
	}
}

// running makes alice's container and starts it.
func (l *lab) running(t *testing.T, inspect []byte) process {
	t.Helper()
	id := l.engine.Create(t, alice.ContainerName, inspect)
	p := l.process(t, id)
	l.engine.Start(alice.ContainerName, p.pid)
	return p
}

func (l *lab) bound(t *testing.T) *broker.Workload {
	t.Helper()
	w, err := l.docker.Bind(t.Context(), alice)
	if err != nil {
		t.Fatalf("Bind: %v", err)
	}
	return w
}

// peer is a process as a listener on a new kernel names it.
func peer(t *testing.T, pid int) *broker.Peer {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "peer")
	t.Cleanup(func() { f.Close() })
	return &broker.Peer{PID: int32(pid), Pidfd: f}
}

// within returns what arrives on c, or fails the test: after a minute nothing
// comes any more.
func within[T any](t *testing.T, what string, c <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(time.Minute):
		t.Fatalf("%s: nothing within a minute", what)
	}
	return v
}

// await waits until something is so.
func await(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within a minute", what)
		}
	}
}

// wantDenied fails the test unless err is a refusal whose sentence holds what.
func wantDenied(t *testing.T, err error, what string) {
	t.Helper()
	var e *broker.Error
	if !errors.As(err, &e) || e.Code != broker.Denied || !strings.Contains(e.Sentence, what) {
		t.Errorf("Bind: got %v, want denied: …%s…", err, what)
	}
}

// A logBuffer keeps what is logged, from any goroutine.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// watch runs Watch until the test ends, or stop is called. Commands that are run
// in containers are told to ran.
func watch(t *testing.T, d *spawnerhook.Docker, changed func(string), ran ...func(broker.Exec)) (stop func()) {
	t.Helper()
	return watchSince(t, d, time.Time{}, changed, ran...)
}

func watchSince(t *testing.T, d *spawnerhook.Docker, since time.Time, changed func(string), ran ...func(broker.Exec)) (stop func()) {
	t.Helper()
	tell := func(x broker.Exec) {
		for _, f := range ran {
			f(x)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Watch(ctx, since, changed, tell) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := within(t, "end of Watch", done); !errors.Is(err, context.Canceled) {
			t.Errorf("Watch: got %v, want context canceled", err)
		}
	})
	t.Cleanup(stop)
	return stop
}
