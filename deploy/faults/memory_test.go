//go:build failpoints && linux

package faults_test

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
)

// A broker's memory after twenty refreshes of one grant: how many copies of the
// refresh tokens that are spent does a thief find who can read it? A build with
// GOEXPERIMENT=runtimesecret erases what it no longer needs, and is held to that;
// of any other build the test only says the number.
func TestMemoryOfSpentRefreshTokens(t *testing.T) {
	w := newWorld(t, strict, 1)
	w.login("user0")
	const refreshes = 20
	for n := range refreshes {
		if r, err := w.brokers[0].call("Token", Call{User: "user0", Scopes: subset(n)}); err != nil || r.Code != "" {
			t.Fatalf("refresh %d: %+v, %v", n, r, err)
		}
	}
	spent := w.idp.spentTokens()
	if len(spent) < refreshes {
		t.Fatalf("%d refresh tokens were spent, want %d", len(spent), refreshes)
	}
	w.brokers[0].levels() // which collects the garbage
	copies := countIn(t, w.brokers[0].cmd.Process.Pid, spent)
	t.Logf("%d copies of %d spent refresh tokens in the broker's memory", copies, len(spent))
	// What the connection's own goroutines read and wrote lies in their buffers.
	if erases() && copies > refreshes/2 {
		t.Errorf("%d copies, and this build erases them", copies)
	}
	if !erases() && copies == 0 {
		t.Error("none is found in a build that leaves some: the search finds nothing")
	}
	report.add(row{proof: "memory", cell: fmt.Sprintf("%d spent refresh tokens, 1 broker", len(spent)), runs: 1,
		note: fmt.Sprintf("%d copies left", copies)})
}

// erases says whether the build is one that erases secrets.
func erases() bool {
	info, _ := debug.ReadBuildInfo()
	return slices.ContainsFunc(info.Settings, func(s debug.BuildSetting) bool {
		return s.Key == "GOEXPERIMENT" && strings.Contains(s.Value, "runtimesecret")
	})
}

// spentTokens are the refresh tokens that were sent since count.
func (p *idp) spentTokens() (all []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for token := range p.uses {
		all = append(all, token)
	}
	return all
}

// countIn counts the copies of texts in a process' writable memory.
func countIn(t *testing.T, pid int, texts []string) (n int) {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	for line := range strings.Lines(string(maps)) {
		var from, to int64
		var mode string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &mode); err != nil || !strings.HasPrefix(mode, "rw") {
			continue
		}
		part, _ := io.ReadAll(io.NewSectionReader(mem, from, to-from)) // what can't be read ends it
		for _, s := range texts {
			n += bytes.Count(part, []byte(s))
		}
	}
	return n
}
