//go:build linux

package attacks_test

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// service is the broker's unit.
const service = "tokenbroker.service"

var install sync.Once

// placeOfUnit installs the unit, and leaves it as on its first day.
func (w *world) placeOfUnit(t *testing.T) (redis string) {
	t.Helper()
	w.dir, w.state, w.sockets = "/etc/tokenbroker", "/var/lib/tokenbroker", "/run/tokenbroker"
	w.program = "/usr/local/bin/tokenbroker"
	now := time.Now()
	w.since = fmt.Sprintf("@%d.%06d", now.Unix(), now.Nanosecond()/1000)
	install.Do(func() {
		for _, command := range []string{
			"cat deploy/site/redis.conf >> /etc/redis/redis.conf && systemctl restart redis-server",
			"adduser --system --group --no-create-home tokenbroker",
			"cp deploy/site/tokenbroker.service /etc/systemd/system/",
			"cp deploy/site/logrotate /etc/logrotate.d/tokenbroker",
		} {
			readme(t, command)
		}
	})
	if err := os.Mkdir(w.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		systemctl(t, "stop", service)
		for _, dir := range []string{w.dir, w.state, w.sockets} {
			if err := os.RemoveAll(dir); err != nil {
				t.Error(err)
			}
		}
		if out, err := exec.Command("redis-cli", "-s", redis, "flushall").CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	return "/run/redis/redis-server.sock"
}

// dropIn adds lines to the unit until the test ends.
func dropIn(t *testing.T, text string) {
	t.Helper()
	dir := "/run/systemd/system/" + service + ".d"
	err := os.MkdirAll(dir, 0o755)
	if err == nil {
		err = os.WriteFile(dir+"/try.conf", []byte("[Service]\n"+text+"\n"), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	systemctl(t, "daemon-reload")
	t.Cleanup(func() {
		os.RemoveAll(dir)
		systemctl(t, "daemon-reload")
	})
}

// refusalsKill has the kernel end the broker at a system call that the unit's filter
// refuses, instead of an error that it may pass over. It may not give files away, and
// knows it.
func (w *world) refusalsKill(t *testing.T) {
	t.Helper()
	dropIn(t, "SystemCallErrorNumber=kill\nSystemCallFilter=~@chown:EPERM")
	if out, err := exec.Command("chown", "-R", "tokenbroker:", w.dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// startUnit starts the broker, and returns when it has told systemd that it is ready.
func (w *world) startUnit(t *testing.T) {
	t.Helper()
	systemctl(t, "start", service)
	w.broker = &process{pid: mainPID(t)}
}

// neverEnded says that systemd has not had to start the broker again.
func (w *world) neverEnded(t *testing.T) {
	t.Helper()
	if p := show(t, "NRestarts", "Result"); p["NRestarts"] != "0" || p["Result"] != "success" {
		t.Errorf("the unit: %v\n%s", p, w.log())
	}
}

// log is what the broker has written there.
func (w *world) log() string {
	if unit {
		text, _ := exec.Command("journalctl", "--no-pager", "-o", "cat", "-u", service, "--since", w.since).Output()
		return string(text)
	}
	text, _ := os.ReadFile(w.path("log"))
	return string(text)
}

func systemctl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("systemctl", args...).CombinedOutput()
	if err != nil {
		journal, _ := exec.Command("journalctl", "--no-pager", "-n", "30").Output()
		t.Fatalf("systemctl %s: %v: %s\n%s", strings.Join(args, " "), err, out, journal)
	}
	return string(out)
}

// show are properties of the unit.
func show(t *testing.T, names ...string) map[string]string {
	t.Helper()
	p := map[string]string{}
	for line := range strings.Lines(systemctl(t, "show", "-p", strings.Join(names, ","), service)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		p[name] = value
	}
	return p
}

// readme runs a command that the README tells an administrator.
func readme(t *testing.T, command string) string {
	t.Helper()
	text, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(text), "`"+command+"`") {
		t.Fatalf("the README does not say `%s`", command)
	}
	cmd := exec.Command("bash", "-c", command)
	cmd.Dir = "../.."
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", command, err, out)
	}
	return string(out)
}

func mainPID(t *testing.T) int {
	t.Helper()
	p := show(t, "MainPID", "ActiveState", "SubState")
	pid, _ := strconv.Atoi(p["MainPID"])
	if pid == 0 || p["ActiveState"] != "active" || p["SubState"] != "running" {
		t.Fatalf("the unit does not run: %v", p)
	}
	return pid
}
