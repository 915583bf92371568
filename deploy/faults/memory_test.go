//go:build failpoints && linux

package faults_test

import (
	"bytes"
	"crypto/tls"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"time"

	"tokenbroker/broker/oauthprovider"
)

// A broker's memory after twenty refreshes of one grant: how many copies of the
// refresh tokens that are spent does a thief find who can read it? A build with
// GOEXPERIMENT=runtimesecret erases what it no longer needs, and is held to that; in
// any other build some are left, or the search finds nothing.
func TestMemoryOfSpentRefreshTokens(t *testing.T) {
	t.Run("http", func(t *testing.T) { memoryOfSpent(t) })
	t.Run("https", func(t *testing.T) { memoryOfSpent(t, encrypted) })
}

func memoryOfSpent(t *testing.T, edit ...func(*world)) {
	t.Helper()
	w := newWorld(t, strict, 1, edit...)
	w.login("user0")
	before := w.brokers[0].levels()
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
	// Asking collects the garbage. The last connection's goroutines hold its buffers.
	for deadline := time.Now().Add(10 * time.Second); w.brokers[0].levels().Goroutines > before.Goroutines; {
		if time.Now().After(deadline) {
			t.Fatalf("more goroutines than before, %d", before.Goroutines)
		}
	}
	w.brokers[0].levels()
	copies := countIn(t, w.brokers[0].cmd.Process.Pid, spent)
	t.Logf("%d copies of %d spent refresh tokens in the broker's memory", copies, len(spent))
	if erases() && copies > 0 {
		t.Errorf("%d copies, and this build erases them", copies)
	}
	if !erases() && copies == 0 {
		t.Error("none is found in a build that leaves some: the search finds nothing")
	}
	report.add(row{proof: "memory", cell: fmt.Sprintf("%d spent refresh tokens, 1 broker, %s", len(spent), filepath.Base(t.Name())), runs: 1,
		note: fmt.Sprintf("%d copies left", copies)})
}

// encrypted has the broker send its refreshes by TLS, and makes refresh tokens 6 KB
// long: they go into buffers on the heap, and the answers, one record each, into
// others than the handshake's.
func encrypted(w *world) {
	long := []byte(strings.Repeat(".", 6<<10))
	given := regexp.MustCompile(`"refresh_token":"\w+`)
	front := httptest.NewUnstartedServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		body = bytes.ReplaceAll(body, long, nil)
		r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
		answer := httptest.NewRecorder()
		w.idp.ServeHTTP(answer, r)
		answer.Body = bytes.NewBuffer(given.ReplaceAll(answer.Body.Bytes(), append([]byte("$0"), long...)))
		pass(rw, answer)
	}))
	front.TLS = &tls.Config{DynamicRecordSizingDisabled: true}
	front.StartTLS()
	w.t.Cleanup(front.Close)
	w.setup.CAFile = filepath.Join(w.setup.Dir, "ca.pem")
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: front.Certificate().Raw})
	if err := os.WriteFile(w.setup.CAFile, ca, 0o644); err != nil {
		w.t.Fatal(err)
	}
	w.setup.By = oauthprovider.Endpoints{Token: front.URL + "/oauth/token", JWKS: w.idp.url + "/keys"}
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
