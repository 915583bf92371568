//go:build !release

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"tokenbroker/broker"
)

// The kernel keeps others from a socket by its mode; were that ever wrong, who has
// tried is in the audit, as often as he likes.
func TestAStrangerAtASocketIsInTheAudit(t *testing.T) {
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("this test must run as root, to connect as somebody else")
		}
		t.Skip("only root can connect as somebody else")
	}
	const stranger, knocks = 65532, 100
	w := newTestWorld(t, func(*Config) {})
	if err := os.Chmod(w.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	sockets := map[string]broker.HubID{w.cfg.Hubs["main"].Socket: "main", w.cfg.Admin.Socket: ""}
	for path := range sockets {
		if err := os.Chmod(path, 0o666); err != nil {
			t.Fatal(err)
		}
		for range knocks {
			if err := knock(path, stranger); err != nil {
				t.Fatalf("%s: %v, want the end and nothing before", path, err)
			}
		}
	}
	w.stop()
	if err := <-w.ended; err != nil {
		t.Errorf("serve: %v", err)
	}
	w.ended <- nil // for close
	text, err := os.ReadFile(w.cfg.Audit.File)
	if err != nil {
		t.Fatal(err)
	}
	tried := make(map[string]int)
	lines := 0
	for line := range strings.Lines(string(text)) {
		var e broker.Entry
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatal(err)
		}
		if e.Action != "connect" {
			continue
		}
		lines++
		tried[e.Socket] += max(1, e.Count)
		want := fmt.Sprintf("uid %d may not use %s", stranger, e.Socket)
		if e.Outcome != "refused" || e.Code != broker.UnknownPeer || e.Hub != sockets[e.Socket] || e.By != "" || !strings.Contains(e.Reason, want) {
			t.Errorf("got %+v, want %s", e, want)
		}
		if e.Count == 0 && (e.UID == nil || *e.UID != stranger || int(e.PID) != os.Getpid()) {
			t.Errorf("the first line has not who it was: %+v", e)
		}
	}
	for path := range sockets {
		if tried[path] != knocks {
			t.Errorf("%s: %d attempts are in the audit, want %d", path, tried[path], knocks)
		}
	}
	if lines != 4 {
		t.Errorf("%d attempts are %d lines, want 4", 2*knocks, lines)
	}
}

// knock connects as another uid, and returns nil if that is all.
func knock(path string, uid uintptr) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with its uid
		if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, ^uintptr(0), uid, ^uintptr(0)); errno != 0 {
			done <- errno
			return
		}
		c, err := net.Dial("unix", path)
		if err == nil {
			defer c.Close()
			var got []byte
			if got, err = io.ReadAll(c); err == nil && len(got) > 0 {
				err = fmt.Errorf("answered %q", got)
			}
		}
		done <- err
	}()
	return <-done
}
