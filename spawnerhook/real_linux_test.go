package spawnerhook_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tokenbroker/broker"
	"tokenbroker/spawnerhook"
)

const socketInside = spawnerhook.MountPoint + "/broker.sock"

// A realLab is an attestor on this machine's Docker, and an image with one
// program in it.
type realLab struct {
	docker *spawnerhook.Docker
	prefix string // of the names of its containers, and its image's name
	level  string
	root   string // of its servers' directories

	mu   sync.Mutex // guards dirs
	dirs map[broker.ServerKey]string
}

// newRealLab fails where CI is set and there is no Docker; elsewhere it skips.
func newRealLab(t *testing.T) *realLab {
	t.Helper()
	if out, err := exec.Command("docker", "version", "-f", "{{.Server.Version}}").CombinedOutput(); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatalf("Docker is needed here: %v: %s", err, out)
		}
		t.Skipf("there is no Docker to test on: %v", err)
	}
	r := &realLab{prefix: "tbhook-" + strings.ToLower(rand.Text()[:8]), dirs: map[broker.ServerKey]string{}}
	var err error
	if r.root, err = os.MkdirTemp("", "tbhook"); err != nil { // short enough for sockets in it
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(r.root) })
	r.docker, err = spawnerhook.NewDocker(spawnerhook.DockerConfig{Directory: r.directory, Private: []string{r.root}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.docker.Close() })
	if r.level, err = r.docker.Check(t.Context()); err != nil {
		t.Fatalf("Check: %v", err)
	}
	importImage(t, r.prefix)
	return r
}

// importImage makes an image that holds the program inside and nothing else.
func importImage(t *testing.T, name string) {
	t.Helper()
	program := filepath.Join(t.TempDir(), "inside")
	build := exec.Command("go", "build", "-o", program, "./testdata/inside")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v: %s", err, out)
	}
	binary, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	var image bytes.Buffer
	w := tar.NewWriter(&image)
	if err := w.WriteHeader(&tar.Header{Name: "inside", Mode: 0o755, Size: int64(len(binary))}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(binary); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	load := exec.Command("docker", "import", "-", name)
	load.Stdin = &image
	if out, err := load.CombinedOutput(); err != nil {
		t.Fatalf("import: %v: %s", err, out)
	}
	t.Cleanup(func() { exec.Command("docker", "rmi", name).Run() })
}

func (r *realLab) directory(k broker.ServerKey) (string, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.dirs[k], nil
}

// docker runs a command of Docker's.
func docker(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("docker", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("docker %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// A server is a directory with a listener that tells each caller what the
// attestor says of it.
type server struct {
	lab          *realLab
	registration broker.Registration
	dir          string
	workload     atomic.Pointer[broker.Workload]
	verdicts     chan error
}

func (r *realLab) server(t *testing.T, user string) *server {
	t.Helper()
	dir, err := os.MkdirTemp(r.root, "server")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	s := &server{lab: r, dir: dir, verdicts: make(chan error, 100)}
	s.registration = broker.Registration{
		Key:           broker.ServerKey{Hub: "main", User: broker.UserID(user)},
		ContainerName: r.prefix + "-" + user,
	}
	r.mu.Lock()
	r.dirs[s.registration.Key] = dir
	r.mu.Unlock()
	s.listen(t)
	return s
}

// listen answers callers until the test ends.
func (s *server) listen(t *testing.T) {
	t.Helper()
	socket := filepath.Join(s.dir, "broker.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(socket, 0o666); err != nil {
		t.Fatal(err)
	}
	var accepting sync.WaitGroup
	accepting.Go(func() {
		for {
			conn, err := l.AcceptUnix()
			if err != nil {
				return
			}
			s.answer(conn)
		}
	})
	t.Cleanup(func() {
		l.Close()
		accepting.Wait()
	})
}

func (s *server) answer(conn *net.UnixConn) {
	defer conn.Close()
	p, err := peerOf(conn)
	if err == nil {
		defer p.Pidfd.Close()
		err = s.lab.docker.Attest(p, s.workload.Load())
	}
	s.verdicts <- err
	fmt.Fprintln(conn, err)
}

// peerOf names the process at the other end, as a listener has to.
func peerOf(conn *net.UnixConn) (*broker.Peer, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	p := &broker.Peer{}
	var cred *unix.Ucred
	var pidfd int
	var credErr, pidfdErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		pidfd, pidfdErr = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	}); err != nil {
		return nil, err
	}
	if credErr != nil {
		return nil, credErr
	}
	p.PID, p.UID, p.GID = cred.Pid, cred.Uid, cred.Gid
	if pidfdErr == nil {
		p.Pidfd = os.NewFile(uintptr(pidfd), "peer")
		return p, nil
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.PID))
	if err != nil {
		return nil, err
	}
	p.Start, err = spawnerhook.ParseStart(stat)
	return p, err
}

// run starts a container of that name that waits. It needs no network.
func (r *realLab) run(t *testing.T, name string, options ...string) {
	t.Helper()
	t.Cleanup(func() { exec.Command("docker", "rm", "-f", "-v", name).Run() })
	args := append([]string{"run", "-d", "--name", name}, options...)
	if !strings.Contains(strings.Join(options, " "), "--network") {
		args = append(args, "--network", "none")
	}
	docker(t, append(args, r.prefix, "/inside", "sleep", socketInside)...)
}

// mount is the option that a hub's hook adds.
func (s *server) mount() string { return s.dir + ":" + spawnerhook.MountPoint + ":ro" }

func (s *server) name() string { return s.registration.ContainerName }

// bind binds the server's container.
func (s *server) bind(t *testing.T) *broker.Workload {
	t.Helper()
	w, err := s.lab.docker.Bind(t.Context(), s.registration)
	if err != nil {
		t.Fatalf("Bind of %s: %v", s.name(), err)
	}
	s.workload.Store(w)
	return w
}

// started runs the server's container as it should be, and binds it.
func (s *server) started(t *testing.T) *broker.Workload {
	t.Helper()
	s.lab.run(t, s.name(), "-v", s.mount())
	return s.bind(t)
}

// asks runs a command that asks the server's socket, and returns what the
// attestor says of it.
func (s *server) asks(t *testing.T, command ...string) error {
	t.Helper()
	out, err := exec.Command(command[0], command[1:]...).CombinedOutput()
	select {
	case verdict := <-s.verdicts:
		return verdict
	default:
		t.Fatalf("%s: nobody asked: %v: %s", strings.Join(command, " "), err, out)
		return nil
	}
}

// other is a container of somebody else that asks this server's socket once.
func (s *server) other(t *testing.T, arguments ...string) error {
	t.Helper()
	return s.asks(t, append([]string{"docker", "run", "--rm", "--network", "none"}, arguments...)...)
}

func wantUnknown(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, broker.ErrUnknownPeer) {
		t.Errorf("Attest: got %v, want unknown peer", err)
	}
}

func TestOnRealDocker(t *testing.T) {
	r := newRealLab(t)
	t.Logf("level of attestation: %s", r.level)
	t.Run("processes of the container are attested", r.attested)
	t.Run("everybody else is an unknown peer", r.strangers)
	t.Run("a container in the victim's cgroups is told apart by its namespaces", r.forged)
	t.Run("weak postures are refused by name", r.postures)
	t.Run("what is allowed is bound, and seen", r.allowed)
	t.Run("the directory must be mounted itself and read-only", r.directories)
	t.Run("a restart is another workload", r.restarted)
	t.Run("a restart loop never makes a wrong binding", r.restartLoop)
	t.Run("Watch names containers", r.watched)
	t.Run("docker exec is told", r.execs)
	t.Run("docker exec that nobody saw begin is told", r.unseenExecs)
}

func (r *realLab) attested(t *testing.T) {
	s := r.server(t, "alice")
	w := s.started(t)
	if inode := cgroup2Inode(t, w); spawnerhook.TellsCgroups() && w.CgroupID != inode {
		t.Errorf("Bind: got cgroup number %d, want %d", w.CgroupID, inode)
	}
	// It is bound, so Docker says that it closes system calls: does the kernel?
	if status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", w.PID)); err != nil || !strings.Contains(string(status), "\nSeccomp:\t2\n") {
		t.Errorf("Docker says %s, the kernel %s, %v", docker(t, "info", "-f", "{{json .SecurityOptions}}"), status, err)
	}
	if w.Level != r.level || w.Image != r.prefix || len(w.Cgroups) == 0 {
		t.Errorf("Bind: got %+v", w)
	}
	for _, tt := range []struct {
		why     string
		command []string
	}{
		{"docker exec as root", []string{"docker", "exec", s.name(), "/inside", "ask", socketInside}},
		{"docker exec as uid 1000", []string{"docker", "exec", "--user", "1000", s.name(), "/inside", "ask", socketInside}},
	} {
		if err := s.asks(t, tt.command...); err != nil {
			t.Errorf("%s: %v", tt.why, err)
		}
	}
	docker(t, "kill", "--signal", "USR1", s.name())
	if err := within(t, "the first process's question", s.verdicts); err != nil {
		t.Errorf("the container's first process: %v", err)
	}
	docker(t, "kill", s.name())
	within(t, "Done", w.Done)
	if _, err := r.docker.Bind(t.Context(), s.registration); !errors.Is(err, broker.ErrPending) {
		t.Errorf("Bind of a killed container: got %v, want pending", err)
	}
}

// cgroup2Inode is the inode of the container's directory in cgroup v2; 0: there is
// none.
func cgroup2Inode(t *testing.T, w *broker.Workload) uint64 {
	t.Helper()
	for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var st unix.Stat_t
		if path, ok := w.Cgroups[""]; ok && unix.Stat(root+path, &st) == nil {
			return st.Ino
		}
	}
	return 0
}

func (r *realLab) strangers(t *testing.T) {
	s := r.server(t, "victim")
	w := s.started(t)
	ask := []string{r.prefix, "/inside", "ask", socketInside}
	inside := filepath.Join(t.TempDir(), "inside")
	docker(t, "cp", s.name()+":/inside", inside)

	t.Run("a container that mounts the victim's directory", func(t *testing.T) {
		wantUnknown(t, s.other(t, append([]string{"-v", s.mount()}, ask...)...))
	})
	t.Run("one that mounts its parent", func(t *testing.T) {
		wantUnknown(t, s.other(t, "-v", filepath.Dir(s.dir)+":/all", r.prefix, "/inside", "ask", "/all/"+filepath.Base(s.dir)+"/broker.sock"))
	})
	t.Run("one whose cgroups lie below the victim's", func(t *testing.T) {
		parent := w.Cgroups["pids"] + w.Cgroups[""] // the one there is, on v1 and v2
		if w.Cgroups["pids"] != "" {
			parent = w.Cgroups["pids"]
		}
		wantUnknown(t, s.other(t, append([]string{"-v", s.mount(), "--cgroup-parent=" + parent}, ask...)...))
	})
	t.Run("one in the victim's PID namespace", func(t *testing.T) {
		wantUnknown(t, s.other(t, "--pid=container:"+s.name(), r.prefix, "/inside", "ask", "/proc/1/root"+socketInside))
	})
	t.Run("a process of the host", func(t *testing.T) {
		wantUnknown(t, s.asks(t, inside, "ask", s.dir+"/broker.sock"))
	})
	if err := s.asks(t, "docker", "exec", s.name(), "/inside", "ask", socketInside); err != nil {
		t.Errorf("the victim itself: %v", err)
	}
}

func (r *realLab) forged(t *testing.T) {
	if r.level != "pidfd+ns" {
		t.Skip("this broker may not read namespaces, and says so in its level")
	}
	s := r.server(t, "forgotten")
	w := s.started(t)
	path := w.Cgroups["pids"]
	if path == "" {
		path = w.Cgroups[""]
	}
	err := s.other(t, "-v", s.mount(), "-v", "/sys/fs/cgroup:/cg", "--cap-drop=ALL", r.prefix, "/inside", "forge", path, socketInside)
	wantUnknown(t, err)
	if !strings.Contains(fmt.Sprint(err), "namespace") {
		t.Errorf("Attest: got %v, want a refusal by namespace: did the forger move at all?", err)
	}
}

func (r *realLab) postures(t *testing.T) {
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink("/var/run/docker.sock", link); err != nil {
		t.Fatal(err)
	}
	for i, tt := range []struct {
		why, want string
		options   []string
	}{
		{"host PID", "--pid=host", []string{"--pid=host"}},
		{"host network", "host network", []string{"--network=host"}},
		{"SYS_ADMIN", "SYS_ADMIN", []string{"--cap-add=SYS_ADMIN"}},
		{"Docker socket", "Docker socket", []string{"-v", "/var/run/docker.sock:/var/run/docker.sock"}},
		{"Docker socket by a symlink, read-only", "Docker socket", []string{"-v", link + ":/mnt/s:ro"}},
		{"Docker socket by its parent", "Docker socket", []string{"-v", "/run:/mnt/run:ro"}},
		{"writable cgroups", "cgroups", []string{"-v", "/sys/fs/cgroup:/cg"}},
		{"no seccomp", "seccomp=unconfined", []string{"--security-opt", "seccomp=unconfined"}},
		{"open system paths", "systempaths=unconfined", []string{"--security-opt", "systempaths=unconfined"}},
		{"the host's files", "all of the host's files", []string{"-v", "/:/mnt:ro"}},
		{"the host's /proc", "host's /proc", []string{"-v", "/proc:/mnt:ro"}},
		{"the host's /sys", "host's /sys", []string{"-v", "/sys:/mnt:ro"}},
		{"the host's /run", "host's /run", []string{"-v", "/run:/mnt:ro"}},
		{"a rule for all devices", "--device-cgroup-rule", []string{"--device-cgroup-rule", "c *:* rwm"}},
		{"another server's directory", "of another server", []string{"-v", r.server(t, "other").dir + ":/mnt:ro"}},
	} {
		t.Run(tt.why, func(t *testing.T) {
			s := r.server(t, fmt.Sprintf("weak%d", i))
			r.run(t, s.name(), append([]string{"-v", s.mount()}, tt.options...)...)
			_, err := r.docker.Bind(t.Context(), s.registration)
			wantDenied(t, err, tt.want)
		})
	}
}

// What a site allows is seen, and lowers what proofs on this host are worth.
func (r *realLab) allowed(t *testing.T) {
	lax, err := spawnerhook.NewDocker(spawnerhook.DockerConfig{Directory: r.directory, Posture: spawnerhook.Posture{"sys_admin": spawnerhook.Allow}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer lax.Close()
	s := r.server(t, "fuse")
	r.run(t, s.name(), "-v", s.mount(), "--cap-add=SYS_ADMIN", "--device=/dev/null", "--ipc=host")
	w, err := lax.Bind(t.Context(), s.registration)
	if err != nil || fmt.Sprint(w.Posture) != "[sys_admin ipc_host devices]" {
		t.Errorf("Bind: got %+v, %v", w, err)
	}
	if level, why := lax.Worth(r.level); level == r.level || !strings.Contains(why, s.name()) {
		t.Errorf("Worth: got %q, %q, want the level below because of %s", level, why, s.name())
	}
	all, err := lax.Containers(t.Context())
	i := slices.IndexFunc(all, func(c spawnerhook.Container) bool { return c.Name == s.name() })
	if err != nil || i < 0 || !all[i].Server || all[i].Refused() || len(all[i].Findings) != 3 {
		t.Errorf("Containers: got %+v, %v", all, err)
	}
}

func (r *realLab) directories(t *testing.T) {
	for i, tt := range []struct {
		why, want string
		options   func(s *server) []string
	}{
		{"not mounted", "does not mount", func(*server) []string { return nil }},
		{"mounted writable", "writable", func(s *server) []string { return []string{"-v", s.dir + ":" + spawnerhook.MountPoint} }},
		{"another one mounted", "another one", func(s *server) []string { return []string{"-v", t.TempDir() + ":" + spawnerhook.MountPoint + ":ro"} }},
		{"and its parent, writable", "can write", func(s *server) []string {
			return []string{"-v", s.mount(), "-v", filepath.Dir(s.dir) + ":/mnt"}
		}},
		{"and a volume made of it, which Docker's list does not show", "can write", func(s *server) []string {
			docker(t, "volume", "create", "-o", "type=none", "-o", "o=bind", "-o", "device="+s.dir, s.name())
			t.Cleanup(func() { exec.Command("docker", "volume", "rm", s.name()).Run() })
			return []string{"-v", s.mount(), "-v", s.name() + ":/mnt"}
		}},
	} {
		t.Run(tt.why, func(t *testing.T) {
			s := r.server(t, fmt.Sprintf("dir%d", i))
			r.run(t, s.name(), tt.options(s)...)
			_, err := r.docker.Bind(t.Context(), s.registration)
			wantDenied(t, err, tt.want)
		})
	}
}

func (r *realLab) restarted(t *testing.T) {
	s := r.server(t, "again")
	first := s.started(t)
	docker(t, "restart", "-t", "0", s.name())
	within(t, "Done of the first run", first.Done)
	if err := s.asks(t, "docker", "exec", s.name(), "/inside", "ask", socketInside); !errors.Is(err, broker.ErrUnknownPeer) {
		t.Errorf("Attest against the first run: got %v, want unknown peer", err)
	}
	second := s.bind(t)
	if second.Container != first.Container || second.PID == first.PID || !second.StartedAt.After(first.StartedAt) {
		t.Errorf("Bind: got %+v after %+v", second, first)
	}
	if err := s.asks(t, "docker", "exec", s.name(), "/inside", "ask", socketInside); err != nil {
		t.Errorf("Attest against the second run: %v", err)
	}
}

func (r *realLab) restartLoop(t *testing.T) {
	s := r.server(t, "loop")
	want := s.started(t).Cgroups
	ctx, cancel := context.WithCancel(t.Context())
	var binders sync.WaitGroup
	var bound, notYet atomic.Int64
	for range 2 {
		binders.Go(func() {
			for ctx.Err() == nil {
				w, err := r.docker.Bind(t.Context(), s.registration)
				switch {
				case err == nil:
					bound.Add(1)
					if fmt.Sprint(w.Cgroups) != fmt.Sprint(want) || w.MountNamespace == 0 && r.level == "pidfd+ns" {
						t.Errorf("Bind: got %+v, want cgroups %v", w, want)
					}
				case errors.Is(err, broker.ErrPending):
					notYet.Add(1)
				default:
					t.Errorf("Bind: %v", err)
				}
			}
		})
	}
	for range 15 {
		docker(t, "restart", "-t", "0", s.name())
	}
	cancel()
	binders.Wait()
	t.Logf("%d bindings, %d times pending, in 15 restarts", bound.Load(), notYet.Load())
	if bound.Load() == 0 || notYet.Load() == 0 {
		t.Error("the loop did not meet both a running and a stopped container")
	}
	if fmt.Sprint(s.bind(t).Cgroups) != fmt.Sprint(want) {
		t.Error("the container is not itself after the restarts")
	}
}

func (r *realLab) watched(t *testing.T) {
	names := make(chan string, 1000)
	watch(t, r.docker, func(name string) { names <- name })
	if got := within(t, "first hint", names); got != "" {
		t.Fatalf("Watch: got %q first, want a hint to look at all", got)
	}
	s := r.server(t, "watched")
	r.run(t, s.name(), "-v", s.mount())
	for within(t, "hint of the start", names) != s.name() {
	}
	s.bind(t)
	docker(t, "kill", s.name())
	for within(t, "hint of the end", names) != s.name() {
	}
}

func (r *realLab) execs(t *testing.T) {
	names, execs := make(chan string, 1000), make(chan broker.Exec, 1000)
	watch(t, r.docker, func(name string) { names <- name }, func(x broker.Exec) { execs <- x })
	within(t, "first hint", names)
	s := r.server(t, "visited")
	w := s.started(t)
	// That the program can do nothing with it is no matter.
	exec.Command("docker", "exec", s.name(), "/inside", "hunter2").Run()
	for {
		x := within(t, "command", execs)
		if x.Container != w.Container {
			continue // others use this Docker, too
		}
		if x.Name != s.name() || x.Command != "inside" || strings.Contains(x.Alike, "hunter2") {
			t.Errorf("Watch tells %+v", x)
		}
		return
	}
}

// Docker is not restarted here, since others use it: it remembers its events, and what
// has ended is told of, too.
func (r *realLab) unseenExecs(t *testing.T) {
	w := r.server(t, "haunted").started(t)
	told := func(d *spawnerhook.Docker, since time.Time, do func(), afterwards ...string) {
		t.Helper()
		names, execs := make(chan string, 1000), make(chan broker.Exec, 1000)
		stop := watchSince(t, d, since, func(name string) { names <- name }, func(x broker.Exec) {
			if x.Container == w.Container { // others use this Docker, too
				execs <- x
			}
		})
		defer stop()
		for within(t, "first hint", names) != "" {
		}
		do()
		var got []string
		for range afterwards {
			x := within(t, "command", execs)
			if x.Name != w.Name || x.Command != "inside" || strings.Contains(x.Alike+x.Afterwards, "hunter2") {
				t.Errorf("Watch tells %+v", x)
			}
			got = append(got, strings.Join(strings.Fields(x.Afterwards + " at once")[:2], " "))
		}
		if slices.Sort(got); !slices.Equal(got, afterwards) {
			t.Errorf("told of commands: %q, want %q", got, afterwards)
		}
	}
	run := func(option string, command ...string) {
		exec.Command("docker", append([]string{"exec", option, w.Name, "/inside"}, command...)...).Run()
	}
	stays := func() { run("-d", "sleep", "hunter2") }
	told(r.docker, time.Now(), stays, "at once")
	down := time.Now()
	run("-i", "hunter2") // ends at once
	run("-i", "hunter2")
	told(r.docker, down, func() {}, "it began", "it began")
	// As after a restart of the broker, which has forgotten what it told.
	again, err := spawnerhook.NewDocker(spawnerhook.DockerConfig{Directory: r.directory})
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	told(again, time.Now(), func() {}, "it was")
}
