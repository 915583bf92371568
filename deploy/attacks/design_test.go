//go:build linux

package attacks_test

import (
	"bufio"
	"testing"
)

// design is what is allowed, and what is not protected: README and
// deploy/README.md say so.
func (w *world) design(t *testing.T, _ *server) {
	quentin := w.up(t, "main", "quentin", "quentin", "-v", w.shared+":/chan")
	allowed := func(name, tried string, a answer) {
		t.Helper()
		quentin.got(a)
		quentin.isOwn(t, a)
		theTable.add(line{"by design", name, tried, "200: a token of the owner", w.issued(t, a)})
	}
	allowed("docker exec", "as root, by somebody with the Docker socket", quentin.asks(t))
	allowed("the owner's own processes", "passes a connection to her child", execIn(t, quentin.name, "own", socket))

	relay := dockerCommand("exec", quentin.name, "/attacker", "relay", socket, "/chan/relay.sock")
	out, err := relay.StdoutPipe()
	if err == nil {
		err = relay.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() { relay.Process.Kill(); relay.Wait() }()
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	allowed("the owner relays her socket", "a friend's container asks on her relay", w.once(t, []string{"-v", w.shared + ":/chan"}, "ask", "/chan/relay.sock"))

	a := w.once(t, []string{"--pid=host", "--cgroupns=host", "--cap-add=SYS_ADMIN", "--cap-add=SYS_PTRACE"}, "become", socket, cgroupOf(t, quentin), quentin.pid(t))
	quentin.got(a)
	quentin.isOwn(t, a)
	if v := docker(t, "info", "-f", "{{.CgroupVersion}}"); v != "2" {
		theTable.add(line{"not run here", "the list in cgroup v2 mode", "this engine has version " + v, "-", "deploy/attacks/engine runs it; spawnerhook's tests have v2 on captured files"})
	}
	theTable.add(line{"not protected", "a neighbour who is root on the host", "--pid=host, SYS_ADMIN, SYS_PTRACE: enters her cgroups and namespaces",
		"200: a token of the victim", w.issued(t, a) + ": nothing tells it from docker exec"})
}
