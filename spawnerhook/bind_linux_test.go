package spawnerhook_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"tokenbroker/broker"
	"tokenbroker/spawnerhook"
)

func TestARunningContainerThatMountsItsDirectoryIsBound(t *testing.T) {
	l := newLab(t)
	p := l.running(t, nil)
	w := l.bound(t)
	if w.Name != alice.ContainerName || w.Image != "lab:1" || w.PID != int32(p.pid) || len(w.Container) != 64 || w.StartedAt.IsZero() {
		t.Errorf("Bind: got %+v", w)
	}
	path := "/docker/" + w.Container
	if diff := cmp.Diff(map[string]string{"pids": path, "cpu": path, "": path}, w.Cgroups); diff != "" {
		t.Error(diff)
	}
	if w.PIDNamespace != 4026540001 || w.MountNamespace != 4026540002 {
		t.Errorf("namespaces: got %d and %d", w.PIDNamespace, w.MountNamespace)
	}
	if err := l.docker.Attest(peer(t, p.pid), w); err != nil {
		t.Errorf("Attest of the container's own process: %v", err)
	}
}

func TestWhatIsNotThereYetIsPending(t *testing.T) {
	paused, exited := []byte(readTestdata(t, "e2010-inspect-paused.json")), []byte(readTestdata(t, "e2010-inspect-exited.json"))
	for _, tt := range []struct {
		why     string
		arrange func(*lab)
	}{
		{"no container", func(*lab) {}},
		{"created, not started", func(l *lab) { l.engine.Create(t, alice.ContainerName, nil) }},
		{"exited", func(l *lab) { l.engine.Create(t, alice.ContainerName, exited) }},
		{"paused", func(l *lab) {
			l.engine.Create(t, alice.ContainerName, paused)
			l.engine.Start(alice.ContainerName, os.Getpid())
			l.engine.Pause(alice.ContainerName)
		}},
	} {
		t.Run(tt.why, func(t *testing.T) {
			l := newLab(t)
			tt.arrange(l)
			if w, err := l.docker.Bind(t.Context(), alice); !errors.Is(err, broker.ErrPending) {
				t.Errorf("Bind: got %v, %v, want pending", w, err)
			}
		})
	}
}

func TestOnlyTheExactNameIsBound(t *testing.T) {
	l := newLab(t)
	id := l.engine.Create(t, "jupyter-bob", nil)
	l.engine.Start("jupyter-bob", l.process(t, id).pid)
	for _, name := range []string{id, id[:12], "jupyter-bo"} {
		r := alice
		r.ContainerName = name
		if w, err := l.docker.Bind(t.Context(), r); !errors.Is(err, broker.ErrPending) {
			t.Errorf("Bind of %q: got %v, %v, want pending", name, w, err)
		}
	}
}

func TestANameThatDockerTakesNotIsInvalid(t *testing.T) {
	l := newLab(t)
	for _, name := range []string{"", "a", "../images", "a/b", "x?all=1", "jupyter alice", "-x", "a\n"} {
		r := alice
		r.ContainerName = name
		if w, err := l.docker.Bind(t.Context(), r); !errors.Is(err, broker.ErrInvalid) {
			t.Errorf("Bind of %q: got %v, %v, want invalid", name, w, err)
		}
	}
}

func TestMountsAreJudgedByWhatTheKernelShows(t *testing.T) {
	l := newLab(t)
	p := l.running(t, nil)
	socket, err := spawnerhook.Locate(l.engine.Socket)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ why, mountinfo, want string }{
		{"writable cgroups", l.mountinfo(t, "ro") + "9 1 0:29 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup rw\n", "cgroups"},
		{"the socket of the engine", l.mountinfo(t, "ro") + socket.Mountinfo("/tmp/d.sock", "ro"), "Docker socket"},
		{"no directory", "1 0 0:61 / / rw - overlay overlay rw\n", "does not mount"},
		{"its directory, writable", l.mountinfo(t, "rw"), "read-only"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			l.write(t, p.pid, "mountinfo", tt.mountinfo)
			_, err := l.docker.Bind(t.Context(), alice)
			wantDenied(t, err, tt.want)
		})
	}
}

func TestAContainerThatIsRestartedWhileItIsLookedAtIsSeenWhole(t *testing.T) {
	l := newLab(t)
	id := l.engine.Create(t, alice.ContainerName, nil)
	first, second := l.process(t, id), l.process(t, id)
	l.namespaces(t, second.pid, 4026540003, 4026540004)
	l.engine.Start(alice.ContainerName, first.pid)
	looks := 0
	l.engine.OnInspect(func(string) {
		if looks++; looks == 2 {
			l.engine.Restart(alice.ContainerName, second.pid)
		}
	})
	w := l.bound(t)
	if w.PID != int32(second.pid) || w.MountNamespace != 4026540004 {
		t.Errorf("Bind: got process %d in %d, want all of the second", w.PID, w.MountNamespace)
	}
}

func TestADyingContainersCgroupsAreNotRecorded(t *testing.T) {
	l := newLab(t)
	p := l.running(t, nil)
	good, err := os.ReadFile(l.proc + "/" + itoa(p.pid) + "/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	l.write(t, p.pid, "cgroup", "2:pids:/\n1:cpu:/\n0::/\n")
	looks := 0
	l.engine.OnInspect(func(string) {
		if looks++; looks == 3 {
			l.write(t, p.pid, "cgroup", string(good))
		}
	})
	w := l.bound(t)
	for hierarchy, path := range w.Cgroups {
		if !strings.HasSuffix(path, "/"+w.Container) {
			t.Errorf("recorded %q: %q", hierarchy, path)
		}
	}
	if looks != 4 {
		t.Errorf("Bind asked Docker %d times, want twice two", looks)
	}
}

func TestAContainerThatDiesWhileItIsLookedAtIsPending(t *testing.T) {
	l := newLab(t)
	p := l.running(t, nil)
	looks := 0
	l.engine.OnInspect(func(string) {
		if looks++; looks == 2 {
			p.kill()
			l.engine.Die(alice.ContainerName)
		}
	})
	if w, err := l.docker.Bind(t.Context(), alice); !errors.Is(err, broker.ErrPending) {
		t.Errorf("Bind: got %v, %v, want pending", w, err)
	}
}

func TestAProcessThatHasEndedIsNotBoundWhateverDockerSays(t *testing.T) {
	l := newLab(t)
	p := l.running(t, nil)
	p.kill()
	if w, err := l.docker.Bind(t.Context(), alice); !errors.Is(err, broker.ErrPending) {
		t.Errorf("Bind: got %v, %v, want pending", w, err)
	}
}

// Where the file of the first process names a cgroup, that directory's number must
// be the one that the kernel has the process in.
func TestAPathThatIsNotTheKernelsIsNotRecorded(t *testing.T) {
	cgroups := t.TempDir()
	l := newLab(t, func(c *spawnerhook.DockerConfig) {
		dir := filepath.Join(c.ProcRoot, itoa(os.Getpid()))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(dir+"/mountinfo", []byte("1 0 0:1 / "+cgroups+" rw - cgroup2 none rw\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	})
	p := l.running(t, nil)
	w := l.bound(t) // there is no such directory yet: nothing to compare
	if w.CgroupID == 0 {
		t.Skip("this kernel tells no cgroup's number")
	}
	if err := os.MkdirAll(cgroups+w.Cgroups[""], 0o755); err != nil {
		t.Fatal(err)
	}
	if w, err := l.docker.Bind(t.Context(), alice); !errors.Is(err, broker.ErrPending) || !strings.Contains(err.Error(), "has number") {
		t.Errorf("Bind: got %v, %v, want pending because of the number", w, err)
	}
	// A container without a cgroup of version 2 has no number to compare.
	l.write(t, p.pid, "cgroup", "1:pids:/docker/"+w.Container+"\n0::/\n")
	if w := l.bound(t); w.CgroupID != 0 {
		t.Errorf("Bind: got number %d, want none", w.CgroupID)
	}
}

func TestALivingContainerElsewhereIsRefused(t *testing.T) {
	l := newLab(t)
	p := l.running(t, nil)
	l.write(t, p.pid, "cgroup", "0::/docker/"+victim20+"\n")
	_, err := l.docker.Bind(t.Context(), alice)
	wantDenied(t, err, "names it")
}

func TestAHubWaitsOnlyAsLongAsItWants(t *testing.T) {
	l := newLab(t)
	l.running(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	l.engine.OnInspect(func(string) { cancel() })
	if w, err := l.docker.Bind(ctx, alice); !errors.Is(err, context.Canceled) {
		t.Errorf("Bind: got %v, %v, want canceled", w, err)
	}
}

func TestWithoutDockerBindingIsUnavailable(t *testing.T) {
	l := newLab(t)
	l.running(t, nil)
	l.bound(t)
	l.engine.Down()
	if w, err := l.docker.Bind(t.Context(), alice); !errors.Is(err, broker.ErrUnavailable) {
		t.Errorf("Bind: got %v, %v, want unavailable", w, err)
	}
	if err := l.engine.Up(); err != nil {
		t.Fatal(err)
	}
	l.bound(t)
}

func TestDoneIsClosedWhenTheContainerHasEnded(t *testing.T) {
	l := newLab(t)
	p := l.running(t, nil)
	w := l.bound(t)
	select {
	case <-w.Done:
		t.Fatal("Done is closed while the container lives")
	default:
	}
	p.kill()
	within(t, "Done", w.Done)
	if err := l.docker.Attest(peer(t, os.Getpid()), w); !errors.Is(err, broker.ErrUnknownPeer) {
		t.Errorf("Attest: got %v, want unknown peer", err)
	}
}

func TestBindingAgainHoldsNoSecondPidfd(t *testing.T) {
	l := newLab(t)
	p := l.running(t, nil)
	first := l.bound(t)
	for range 10 {
		if w := l.bound(t); w.Init != first.Init || w.Done != first.Done {
			t.Fatal("Bind: got another pidfd for the same run of the container")
		}
	}
	l.engine.Restart(alice.ContainerName, l.process(t, first.Container).pid)
	p.kill()
	within(t, "Done", first.Done)
	if w := l.bound(t); w.Init == first.Init || w.Done == first.Done {
		t.Error("Bind after a restart: got the pidfd of the run before")
	}
}

func TestCloseLeavesNothingBehindAndSaysNothingEnded(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	var w *broker.Workload
	t.Run("lab", func(t *testing.T) {
		l := newLab(t)
		p := l.running(t, nil)
		w = l.bound(t)
		stop := watch(t, l.docker, func(string) {})
		stop()
		l.docker.Close()
		if err := l.docker.Attest(peer(t, p.pid), w); !errors.Is(err, broker.ErrUnknownPeer) {
			t.Errorf("Attest after Close: got %v, want unknown peer", err)
		}
		if _, err := l.docker.Bind(t.Context(), alice); err == nil {
			t.Error("Bind after Close: got nil, want an error")
		}
	})
	select {
	case <-w.Done:
		t.Error("Close said that a living container has ended")
	default:
	}
}

// A zombie can be opened, has its files in /proc, and Docker learns of its end
// last.
func TestAZombieIsNotBound(t *testing.T) {
	l := newLab(t)
	id := l.engine.Create(t, alice.ContainerName, nil)
	pid, end := zombie(t)
	l.container(t, pid, id)
	l.engine.Start(alice.ContainerName, pid)
	l.bound(t)
	end()
	if w, err := l.docker.Bind(t.Context(), alice); !errors.Is(err, broker.ErrPending) {
		t.Errorf("Bind: got %v, %v, want pending", w, err)
	}
}
