//go:build linux && unit

package attacks_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"tokenbroker/broker"
)

func init() { unit = true }

// TestUnit is an administrator's first day: the README's commands, as they stand
// there, and what systemd, Docker and logrotate then do with the broker.
func TestUnit(t *testing.T) {
	w := siteWorld(t)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the broker's log:\n%s", w.log())
		}
	})
	// Twice: administrators ask before it runs, and after.
	for _, command := range []string{"tokenbroker doctor", "systemctl enable --now tokenbroker", "tokenbroker doctor", "tokenbroker status"} {
		t.Logf("$ %s\n%s", command, readme(t, command))
	}
	w.broker = &process{pid: mainPID(t)}
	alice := w.first(t, "alice")
	t.Run("it has one privilege", w.onePrivilege)
	t.Run("it knows containers of the systemd driver", func(t *testing.T) { w.knowsScopes(t, alice) })
	t.Run("it comes back", func(t *testing.T) { w.comesBack(t, alice) })
	t.Run("its audit is rotated", func(t *testing.T) { w.rotated(t, alice) })
	t.Run("its key is a credential", func(t *testing.T) { w.credential(t, alice) })
	t.Run("it is refused nothing that it needs", w.refusedNothing)
	t.Run("it leaves nothing", func(t *testing.T) { w.leavesNothing(t, alice) })
}

// siteWorld is a world in which the administrator has come to where the unit is to
// be started.
func siteWorld(t *testing.T) *world {
	t.Helper()
	w := emptyWorld(t, "tbunit")
	w.placeOfUnit(t)
	w.build(t)
	readme(t, "go build -o /usr/local/bin/ ./cmd/tokenbroker && CGO_ENABLED=0 go build -o /usr/local/lib/tokenbroker/ ./cmd/access-token")
	w.importImage(t, w.image)
	w.startProvider(t)
	text, err := os.ReadFile("../site/tokenbroker.yaml")
	if err != nil {
		t.Fatal(err)
	}
	ours := strings.NewReplacer("https://sso.example.org/realms/lab", w.issuer, "https://hub.example.org/hub/oauth_callback", callback)
	w.write(t, "tokenbroker.yaml", ours.Replace(string(text)))
	_, secret := w.idp.Client()
	w.write(t, "keycloak-secret", secret.Reveal())
	for _, command := range []string{"tokenbroker keys create", "tokenbroker config check", "chown -R tokenbroker: /etc/tokenbroker", "tokenbroker doctor --dry-run"} {
		readme(t, command)
	}
	return w
}

// first logs somebody in at the site's provider, and starts a server.
func (w *world) first(t *testing.T, user string) *server {
	t.Helper()
	handle := w.login(t, "main", "keycloak", user)
	if a := w.claim(t, "main", "keycloak", handle, user); a.Status != 200 {
		t.Fatalf("claim for %s: %+v", user, a)
	}
	s := w.register(t, "main", user, user, user)
	s.starts(t)
	s.served(t)
	return s
}

// onePrivilege reads what the kernel says of the broker's process.
func (w *world) onePrivilege(t *testing.T) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", w.broker.pid))
	if err != nil {
		t.Fatal(err)
	}
	const ptrace = "0000000000080000"
	for name, want := range map[string]string{
		"CapEff": ptrace, "CapPrm": ptrace, "CapBnd": ptrace, "CapAmb": ptrace, "NoNewPrivs": "1", "Seccomp": "2", "Uid": `[1-9]\d*\s.*`,
	} {
		if !regexp.MustCompile(`(?m)^` + name + `:\s*` + want + `$`).Match(text) {
			t.Errorf("%s is not %s:\n%s", name, want, text)
		}
	}
}

// knowsScopes looks at how containers of the systemd driver are told apart.
func (w *world) knowsScopes(t *testing.T, alice *server) {
	if group := cgroupOf(t, alice); group != "/system.slice/docker-"+alice.id+".scope" {
		t.Errorf("her container is in cgroup %s", group)
	}
	e := w.find(t, "a token of hers", func(e broker.Entry) bool { return e.Action == "token" && e.Outcome == "done" })
	if e.Level != "pidfd+ns" || e.Container != alice.id {
		t.Errorf("the audit says level %q, container %q", e.Level, e.Container)
	}
	at := attempt{"unit", "host process, root", "connects to alice's socket by its path", broker.UnknownPeer, otherCgroup}
	w.refused(t, at, w.onHost(t, "ask", alice.socket()))
	at.name, at.tried = "her directory, read-only", "-v <alice's>:/run/tokenbroker:ro"
	w.refused(t, at, w.once(t, alice.mount(), "ask", socket))
}

// comesBack restarts the broker in order and kills it: each socket is there again, in
// the directory that containers have mounted.
func (w *world) comesBack(t *testing.T, alice *server) {
	dirs := []string{alice.dir, w.sockets + "/hubs/main"}
	before := inodes(t, dirs)
	systemctl(t, "restart", service)
	alice.served(t)
	w.call(t, "main", "/v1/register", map[string]any{"user": "bob", "container_name": "none"})
	old := mainPID(t)
	if err := syscall.Kill(old, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "systemd to start it again", func() bool {
		pid := show(t, "MainPID", "SubState")
		return pid["SubState"] == "running" && pid["MainPID"] != strconv.Itoa(old)
	})
	alice.served(t)
	if after := inodes(t, dirs); after != before {
		t.Errorf("the directories were %s, and are %s", before, after)
	}
}

func inodes(t *testing.T, dirs []string) string {
	t.Helper()
	var all []string
	for _, dir := range dirs {
		i, err := os.Stat(dir)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, fmt.Sprint(dir, " ", i.Sys().(*syscall.Stat_t).Ino, " ", i.Mode()))
	}
	return strings.Join(all, ", ")
}

// rotated has logrotate do what it does each night.
func (w *world) rotated(t *testing.T, alice *server) {
	pid := mainPID(t)
	if out, err := exec.Command("logrotate", "-f", "/etc/logrotate.d/tokenbroker").CombinedOutput(); err != nil || len(out) > 0 {
		t.Fatalf("logrotate: %v: %s", err, out)
	}
	old, err := filepath.Glob(w.state + "/audit.jsonl-*")
	if err != nil || len(old) != 1 {
		t.Fatalf("there are %q, %v", old, err)
	}
	eventually(t, "a new audit", func() bool { _, err := os.Stat(w.state + "/audit.jsonl"); return err == nil })
	alice.served(t)
	if mainPID(t) != pid {
		t.Error("the broker was restarted")
	}
	out, err := exec.Command(w.program, "audit", "verify", old[0], w.state+"/audit.jsonl").CombinedOutput()
	if err != nil {
		t.Errorf("audit verify: %v: %s", err, out)
	}
	t.Logf("$ tokenbroker audit verify %s %s\n%s", old[0], w.state+"/audit.jsonl", out)
}

// credential has systemd hand over the key that opens all others, which only root
// can read.
func (w *world) credential(t *testing.T, alice *server) {
	const key = "/root/kek"
	systemctl(t, "stop", service)
	if err := os.Rename(w.path("kek"), key); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(key, 0, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(key) })
	dropIn(t, "LoadCredential=kek:"+key)
	systemctl(t, "start", service)
	alice.served(t)
}

// refusedNothing looks for what the unit's walls have kept from the broker.
func (w *world) refusedNothing(t *testing.T) {
	text := w.log()
	for line := range strings.Lines(text) {
		warned := strings.Contains(line, `"level":"WARN"`) && !strings.Contains(line, `"msg":"refused"`)
		if warned || regexp.MustCompile(`(?i)"level":"ERROR"|not permitted|permission denied|read-only file system`).MatchString(line) {
			t.Error(line)
		}
	}
}

// leavesNothing stops the broker.
func (w *world) leavesNothing(t *testing.T, alice *server) {
	systemctl(t, "stop", service)
	if p := show(t, "ActiveState", "Result", "ControlGroup"); p["ActiveState"] != "inactive" || p["Result"] != "success" {
		t.Errorf("the unit: %v", p)
	}
	out, _ := exec.Command("ps", "-o", "pid,args", "-U", "tokenbroker").Output()
	if lines := strings.Count(string(out), "\n"); lines > 1 {
		t.Errorf("it left processes:\n%s", out)
	}
	listening, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		t.Fatal(err)
	}
	if m := regexp.MustCompile(`(?m)^.*tokenbroker.*$`).FindAll(listening, -1); m != nil {
		t.Errorf("it left sockets: %s", m)
	}
	if a := execIn(t, alice.name, "ask", socket); a.Error == "" {
		t.Errorf("alice was answered %+v", a)
	}
}
