//go:build linux

package attacks_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"tokenbroker/broker"
)

// What the audit says of who is somewhere else.
const (
	otherCgroup    = `not in the server's container: the process is in cgroup`
	otherNamespace = `in a sandbox of its own.*the process is in (pid|mnt) namespace`
)

// cgroupOf is the path of a container's cgroup, the same in all hierarchies.
func cgroupOf(t *testing.T, s *server) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("/proc", s.pid(t), "cgroup"))
	if err != nil {
		t.Fatal(err)
	}
	path := regexp.MustCompile(`:(/\S*` + s.id + `\S*)\n`).FindStringSubmatch(string(text))
	if path == nil {
		t.Fatalf("cgroups of %s: %s", s.name, text)
	}
	return path[1]
}

// pid is the number of a container's first process on this host.
func (s *server) pid(t *testing.T) string {
	t.Helper()
	return docker(t, "inspect", "-f", "{{.State.Pid}}", s.name)
}

func (w *world) processes(t *testing.T, alice *server) {
	at := func(name, tried, reason string) attempt {
		return attempt{"processes", name, tried, broker.UnknownPeer, reason}
	}
	group, dir := cgroupOf(t, alice), alice.mount()
	writable := []string{"-v", "/sys/fs/cgroup:/cg", "--cap-drop=ALL", "--cgroupns=host"}
	// The audit counts refusals that are alike, so those that get further have a
	// victim of their own.
	anna := w.up(t, "main", "anna", "anna")
	hers := cgroupOf(t, anna)
	root := "/proc/1/root" + socket

	w.refused(t, at("host process, root", "connects to alice's socket by its path", otherCgroup), w.onHost(t, "ask", alice.socket()))
	w.hostAsUser(t, alice, at)

	for _, a := range []struct {
		name, tried, reason string
		options             []string
		command             []string
	}{
		{"her PID namespace", "--pid=container:alice, through /proc/1/root", otherCgroup,
			[]string{"--pid=container:" + alice.name}, []string{"ask", root}},
		{"the host's PID namespace", "--pid=host, through /proc/PID/root", otherCgroup,
			[]string{"--pid=host"}, []string{"ask", "/proc/" + alice.pid(t) + "/root" + socket}},
		{"cgroups below hers", "--cgroup-parent=/docker/<alice>", otherCgroup,
			slices.Concat(dir, []string{"--cgroup-parent=" + group}), []string{"ask", socket}},
		{"into her cgroups", "a writable /sys/fs/cgroup, no capability, every hierarchy", otherNamespace,
			slices.Concat(anna.mount(), writable), []string{"forge", socket, hers, "0"}},
		{"into one of her cgroups", "the same, one hierarchy", otherCgroup + "|" + otherNamespace, // where there is only one, it is all
			slices.Concat(dir, writable), []string{"forge", socket, group, "1"}},
		{"into her cgroups, from her PID namespace", "the same with --pid=container:alice", otherNamespace,
			slices.Concat(anna.mount(), writable, []string{"--pid=container:" + anna.name}), []string{"forge", socket, hers, "0"}},
		{"into her cgroups, with SYS_ADMIN", "mounts every hierarchy itself", otherNamespace,
			slices.Concat(anna.mount(), []string{"--cap-add=SYS_ADMIN", "--cgroupns=host"}), []string{"mount", socket, hers}},
		{"a child cgroup named after hers", "seccomp=unconfined, user namespace, mount cgroup2, mkdir <alice>", otherCgroup,
			slices.Concat(dir, []string{"--security-opt", "seccomp=unconfined"}), []string{"child", socket, alice.id}},
		{"nested cgroups named after hers", "a writable /sys/fs/cgroup, /docker/<own>/<alice> on every hierarchy", otherCgroup,
			slices.Concat(dir, writable), []string{"nest", socket, alice.id}},
	} {
		if parent := a.options[len(a.options)-1]; strings.HasPrefix(parent, "--cgroup-parent=") {
			if why := w.cannot(t, parent); why != "" { // systemd's driver puts containers into slices only
				theTable.add(line{"not run here", a.name, a.tried, "-", why})
				continue
			}
		}
		w.refused(t, at(a.name, a.tried, a.reason), w.once(t, a.options, a.command...))
	}
	w.postures(t, alice)
}

// hostAsUser asks as the uid that a container's processes have.
func (w *world) hostAsUser(t *testing.T, alice *server, at func(name, tried, reason string) attempt) {
	victim := w.up(t, "main", "erin", "erin", "--user", "1000:1000")
	dir, err := os.Open(victim.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	as := func(socket string) answer {
		cmd := exec.Command(w.attack, "ask", socket)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1000, Gid: 1000}}
		cmd.ExtraFiles, cmd.Dir = []*os.File{dir}, "/"
		out, err := cmd.CombinedOutput()
		return read(t, out, err)
	}
	by := at("host process, the container's uid", "connects to the socket of a container of that uid", "permission denied")
	if err := os.Chmod(w.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	w.kernel(t, by, as(victim.socket()))
	w.refused(t, at("the same, inside the directory", "is given a descriptor of the directory", otherCgroup), as("/proc/self/fd/3/broker.sock"))
	w.kernel(t, attempt{kind: "hub", name: "somebody else on the hub's socket", tried: "connects as uid 1000", reason: "permission denied"},
		as(w.sockets+"/hubs/main/hub.sock"))
	w.kernel(t, attempt{kind: "hub", name: "somebody else on the administrator's socket", tried: "connects as uid 1000", reason: "permission denied"},
		as(w.sockets+"/admin.sock"))
}

// postures are what an attacker's own server is refused for.
func (w *world) postures(t *testing.T, alice *server) {
	for i, p := range []struct{ name, option, reason string }{
		{"own server sees the host's processes", "--pid=host", "--pid=host"},
		{"own server sees alice's processes", "--pid=container:" + alice.name, "--pid=container"},
		{"own server has SYS_ADMIN", "--cap-add=SYS_ADMIN", "SYS_ADMIN"},
		{"own server has the Docker socket", "-v=" + *engine + ":/d.sock:ro", "Docker socket"},
		{"own server can write to cgroups", "-v=/sys/fs/cgroup:/cg", "cgroups"},
		{"own server can write to its cgroups", "--security-opt=writable-cgroups=true", "cgroups"},
		{"own server is privileged", "--privileged", "--privileged"},
	} {
		s := w.register(t, "main", p.name, "", fmt.Sprintf("posture-%d", i))
		at := attempt{kind: "processes", name: p.name, tried: strings.Replace(p.option, alice.name, "alice", 1), reason: p.reason}
		if why := w.cannot(t, p.option); why != "" {
			theTable.add(line{"not run here", at.name, at.tried, "-", why})
			continue
		}
		s.starts(t, p.option)
		w.notBound(t, at, s)
	}
}

// cannot says why this engine starts no container with an option; empty: it does.
func (w *world) cannot(t *testing.T, option string) string {
	t.Helper()
	out, _ := dockerCommand(w.runArgs([]string{"--rm", option}, "ask", "/none")...).CombinedOutput()
	if strings.Contains(string(out), "no such file") { // the attacker has run
		return ""
	}
	return "this engine does not start it: " + string(out) + " (spawnerhook's tests have it on captured answers)"
}
