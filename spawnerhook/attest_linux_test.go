package spawnerhook_test

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"tokenbroker/broker"
	"tokenbroker/spawnerhook"
)

func itoa(n int) string { return strconv.Itoa(n) }

func TestOnlyALiveProcessOfTheContainerIsAttested(t *testing.T) {
	l := newLab(t)
	l.running(t, nil)
	w := l.bound(t)
	other := strings.Repeat("ef", 32)
	for _, tt := range []struct {
		why     string
		arrange func(t *testing.T, p process)
		cause   string // empty: attested
	}{
		{"like docker exec", func(*testing.T, process) {}, ""},
		{"a sibling", func(t *testing.T, p process) {
			l.write(t, p.pid, "cgroup", "2:pids:/docker/"+other+"\n1:cpu:/docker/"+other+"\n0::/docker/"+other+"\n")
		}, "cgroup"},
		{"a sibling below the container", func(t *testing.T, p process) {
			path := "/docker/" + w.Container + "/" + other
			l.write(t, p.pid, "cgroup", "2:pids:"+path+"\n1:cpu:"+path+"\n0::"+path+"\n")
		}, "cgroup"},
		{"moved in all hierarchies but one", func(t *testing.T, p process) {
			path := "/docker/" + w.Container
			l.write(t, p.pid, "cgroup", "2:pids:"+path+"\n1:cpu:/docker/"+other+"\n0::"+path+"\n")
		}, "cgroup"},
		{"in fewer hierarchies", func(t *testing.T, p process) { l.write(t, p.pid, "cgroup", "0::/docker/"+w.Container+"\n") }, "no cgroup"},
		{"a host process", func(t *testing.T, p process) { l.write(t, p.pid, "cgroup", "2:pids:/\n1:cpu:/\n0::/user.slice\n") }, "cgroup"},
		{"a forger with the right cgroups in another mount namespace", func(t *testing.T, p process) { l.namespaces(t, p.pid, w.PIDNamespace, 4026540009) }, "mnt namespace"},
		{"a forger with the right cgroups in another PID namespace", func(t *testing.T, p process) { l.namespaces(t, p.pid, 4026540009, w.MountNamespace) }, "pid namespace"},
		{"namespaces that can't be read", func(t *testing.T, p process) { os.RemoveAll(filepath.Join(l.proc, itoa(p.pid), "ns")) }, "no such file"},
		{"ended", func(_ *testing.T, p process) { p.kill() }, "has ended"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			p := l.process(t, w.Container)
			caller := peer(t, p.pid)
			tt.arrange(t, p)
			wantAttested(t, l.docker.Attest(caller, w), tt.cause)
		})
	}
}

// wantAttested fails the test unless err is an unknown peer with that cause, or
// nil if there is none.
func wantAttested(t *testing.T, err error, cause string) {
	t.Helper()
	if cause == "" && err != nil {
		t.Errorf("Attest: got %v, want nil", err)
	}
	if cause != "" && (!errors.Is(err, broker.ErrUnknownPeer) || !strings.Contains(err.Error(), cause)) {
		t.Errorf("Attest: got %v, want unknown peer because of %s", err, cause)
	}
}

// A process that has ended but was not waited for still has its files in /proc,
// and a signal still reaches it.
func TestAZombieIsNotAttested(t *testing.T) {
	l := newLab(t)
	l.running(t, nil)
	w := l.bound(t)
	pid, end := zombie(t)
	l.container(t, pid, w.Container)
	caller := peer(t, pid)
	wantAttested(t, l.docker.Attest(caller, w), "")
	wantAttested(t, l.docker.Alive(caller), "")
	end()
	if err := unix.Kill(pid, 0); err != nil {
		t.Fatalf("signal 0 to a zombie: %v", err)
	}
	wantAttested(t, l.docker.Attest(caller, w), "has ended")
	wantAttested(t, l.docker.Alive(caller), "has ended")
}

// The kernel says it of the process itself, whatever a file under its number says.
func TestThePeersCgroupIsAskedByNumberToo(t *testing.T) {
	l := newLab(t)
	p := l.running(t, nil)
	w := l.bound(t)
	if w.CgroupID == 0 {
		t.Skip("this kernel tells no cgroup's number")
	}
	elsewhere := *w
	elsewhere.CgroupID++
	wantAttested(t, l.docker.Attest(peer(t, p.pid), w), "")
	wantAttested(t, l.docker.Attest(peer(t, p.pid), &elsewhere), "cgroup with number")
	unknown := *w
	unknown.CgroupID = 0
	wantAttested(t, l.docker.Attest(peer(t, p.pid), &unknown), "")
}

func TestWithoutPidfdTheStartTimeTellsProcessesApart(t *testing.T) {
	l := newLab(t)
	l.running(t, nil)
	w := l.bound(t)
	p := l.process(t, w.Container)
	stat, err := os.ReadFile("/proc/" + itoa(p.pid) + "/stat")
	if err != nil {
		t.Fatal(err)
	}
	l.write(t, p.pid, "stat", string(stat))
	started, err := spawnerhook.ParseStart(stat)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		why   string
		peer  *broker.Peer
		cause string
	}{
		{"the process that connected", &broker.Peer{PID: int32(p.pid), Start: started}, ""},
		{"another with its number", &broker.Peer{PID: int32(p.pid), Start: started - 1}, "another one"},
		{"nothing known", &broker.Peer{PID: int32(p.pid)}, "neither"},
		{"no number", &broker.Peer{Start: started}, "pid: host"},
	} {
		t.Run(tt.why, func(t *testing.T) { wantAttested(t, l.docker.Attest(tt.peer, w), tt.cause) })
	}
}

func TestAServerThatIsNotBoundAttestsNobody(t *testing.T) {
	l := newLab(t)
	for _, w := range []*broker.Workload{nil, {}, {UID: 0, Level: "uid"}} {
		wantAttested(t, l.docker.Attest(peer(t, os.Getpid()), w), "not bound")
	}
}

// A closed peer must not be judged by whatever has its descriptor's number now.
func TestAClosedPidfdAttestsNobody(t *testing.T) {
	l := newLab(t)
	p := l.running(t, nil)
	w := l.bound(t)
	caller := peer(t, p.pid)
	caller.Pidfd.Close()
	wantAttested(t, l.docker.Attest(caller, w), "closed")
}

func BenchmarkAttest(b *testing.B) {
	self := os.Getpid()
	lines, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		b.Fatal(err)
	}
	parsed, err := spawnerhook.ParseCgroups(lines)
	if err != nil {
		b.Fatal(err)
	}
	d, err := spawnerhook.NewDocker(spawnerhook.DockerConfig{Directory: func(broker.ServerKey) (string, error) { return "", nil }})
	if err != nil {
		b.Fatal(err)
	}
	fd, err := unix.PidfdOpen(self, 0)
	if err != nil {
		b.Fatal(err)
	}
	pidfd := os.NewFile(uintptr(fd), "self")
	defer pidfd.Close()
	w := &broker.Workload{Init: pidfd, Cgroups: spawnerhook.AllCgroups(parsed), PIDNamespace: namespaceOf(b, "pid"), MountNamespace: namespaceOf(b, "mnt")}
	p := &broker.Peer{PID: int32(self), Pidfd: pidfd}
	b.ReportAllocs()
	for b.Loop() {
		if err := d.Attest(p, w); err != nil {
			b.Fatal(err)
		}
	}
}

func namespaceOf(b *testing.B, kind string) uint64 {
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/ns/"+kind, &st); err != nil {
		b.Fatal(err)
	}
	return st.Ino
}
