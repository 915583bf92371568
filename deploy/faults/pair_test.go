//go:build failpoints && linux

package faults_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tokenbroker/broker/brokertest"
)

// A pair is a primary and a replica of it. The replica gets what the primary
// writes over a wire; brokers get to whichever is the primary over theirs.
type pair struct {
	t     *testing.T
	nodes [2]*brokertest.Redis
	links [2]*wire // to each of the nodes, for the other one to follow it
	first int      // which is the primary
}

func newPair(t *testing.T, settings ...string) *pair {
	t.Helper()
	p := &pair{t: t}
	for i := range p.nodes {
		addr := fmt.Sprint("127.0.0.1:", brokertest.FreePort(t))
		p.nodes[i] = brokertest.StartRedis(t, append([]string{
			"port " + addr[strings.LastIndex(addr, ":")+1:], "bind 127.0.0.1", "protected-mode no", "repl-diskless-sync-delay 0",
		}, settings...)...)
		p.links[i] = newWire(t, "127.0.0.1:0", addr)
	}
	p.follow()
	return p
}

func (p *pair) primary() *brokertest.Redis { return p.nodes[p.first] }
func (p *pair) replica() *brokertest.Redis { return p.nodes[1-p.first] }

// link is what the replica follows the primary over.
func (p *pair) link() *wire { return p.links[p.first] }

// follow has the replica follow the primary, and returns when it has all, also
// on its disk: one that is killed while it still writes down its first copy comes
// back with what it had before.
func (p *pair) follow() {
	p.t.Helper()
	host, port, _ := strings.Cut(p.link().at, ":")
	must(p.t, p.replica(), "REPLICAOF", host, port)
	p.settled()
}

func (p *pair) settled() {
	p.t.Helper()
	await(p.t, "the replica follows the primary", func() bool {
		return says(p.primary(), "state=online", "INFO", "replication") &&
			says(p.replica(), "master_link_status:up", "INFO", "replication") &&
			says(p.replica(), "aof_rewrite_in_progress:0\r\naof_rewrite_scheduled:0", "INFO", "persistence")
	})
	await(p.t, "the replica has all", func() bool {
		return offset(p.primary(), "master_repl_offset:") == offset(p.replica(), "slave_repl_offset:")
	})
}

// promote kills the primary and puts the replica in its place, with what has
// arrived there by now. Brokers' wires are led to it.
func (p *pair) promote(wires ...*wire) {
	p.t.Helper()
	p.primary().Kill()
	p.link().set(p.link().drop) // what is under way never arrives
	p.link().mend()
	must(p.t, p.replica(), "REPLICAOF", "NO", "ONE")
	p.first = 1 - p.first
	for _, w := range wires {
		w.lead(p.primary().Socket)
	}
}

// rejoin brings the old primary back, as a replica of the new one.
func (p *pair) rejoin() {
	p.t.Helper()
	p.replica().Start()
	p.follow()
}

// must runs a command that has to work.
func must(t *testing.T, r *brokertest.Redis, command ...string) string {
	t.Helper()
	answer, err := r.Ask("", command...)
	if err != nil {
		t.Fatalf("%q: %v", command[:2], err)
	}
	return answer
}

// says reports whether the answer to a command, or the error, contains want.
func says(r *brokertest.Redis, want string, command ...string) bool {
	answer, err := r.Ask("", command...)
	if err != nil {
		answer = err.Error()
	}
	return strings.Contains(answer, want)
}

func offset(r *brokertest.Redis, name string) string {
	answer, _ := r.Ask("", "INFO", "replication")
	_, rest, _ := strings.Cut(answer, name)
	number, _, _ := strings.Cut(rest, "\r")
	return number
}

// await waits until something is so.
func await(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(60 * time.Second); !is(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within a minute", what)
		}
	}
}

// logged counts the lines of a broker's log that contain text.
func (w *world) logged(host, text string) int {
	log, err := os.ReadFile(filepath.Join(w.setup.Dir, host+".log"))
	if err != nil {
		w.t.Error(err)
	}
	return strings.Count(string(log), text)
}
