//go:build failpoints && linux

package faults_test

import (
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// A wire leads from a broker to Redis, or from a replica to its primary, and can
// be in trouble. It takes connections at a Unix socket or a port of the loopback,
// and goes to one.
type wire struct {
	at string

	mu     sync.Mutex // guards all below
	turn   *sync.Cond // told when one of them changes
	to     string
	down   bool          // nobody is let through, and who is under way is cut off
	silent bool          // nothing arrives; what was sent does once that is over
	delay  time.Duration // of what comes back
	under  map[net.Conn]bool
}

func network(addr string) string {
	if strings.HasPrefix(addr, "/") {
		return "unix"
	}
	return "tcp"
}

// newWire begins to listen; at may be a host with the port 0.
func newWire(t *testing.T, at, to string) *wire {
	t.Helper()
	l, err := net.Listen(network(at), at)
	if err != nil {
		t.Fatal(err)
	}
	w := &wire{at: l.Addr().String(), to: to, under: map[net.Conn]bool{}}
	w.turn = sync.NewCond(&w.mu)
	t.Cleanup(func() {
		l.Close()
		w.cut()
	})
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go w.carry(c)
		}
	}()
	return w
}

// wired gives each of n brokers a wire of its own to the Redis at socket.
func (w *world) wired(n int, socket string) {
	for i := range n {
		w.wires = append(w.wires, newWire(w.t, filepath.Join(w.setup.Dir, "wire"+string(rune('1'+i))), socket))
	}
}

func (w *wire) carry(from net.Conn) {
	defer from.Close()
	w.mu.Lock()
	addr, down := w.to, w.down
	w.mu.Unlock()
	if down {
		return
	}
	to, err := net.Dial(network(addr), addr)
	if err != nil {
		return
	}
	defer to.Close()
	w.mu.Lock()
	ok := !w.down && w.to == addr
	if ok {
		w.under[from], w.under[to] = true, true
	}
	w.mu.Unlock()
	if !ok {
		return
	}
	go w.pass(from, to, false)
	w.pass(to, from, true)
}

// pass hands on what comes until either end is gone.
func (w *wire) pass(from, to net.Conn, back bool) {
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if err != nil || !w.may(to, back) {
			break
		}
		if _, err := to.Write(buf[:n]); err != nil {
			break
		}
	}
	from.Close()
	to.Close()
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.under, from)
	delete(w.under, to)
	w.turn.Broadcast()
}

// may waits until something may arrive at to, and says whether it still may.
func (w *wire) may(to net.Conn, back bool) bool {
	w.mu.Lock()
	delay := w.delay
	w.mu.Unlock()
	if back {
		time.Sleep(delay)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.silent && w.under[to] {
		w.turn.Wait()
	}
	return w.under[to]
}

// set changes the wire under its lock.
func (w *wire) set(change func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	change()
	w.turn.Broadcast()
}

// cut ends all connections, what is under way is lost, and takes no new ones.
func (w *wire) cut() {
	w.set(func() { w.down = true; w.drop() })
}

// drop ends all connections. The caller is within set.
func (w *wire) drop() {
	for c := range w.under {
		c.Close()
		delete(w.under, c)
	}
}

// hold lets nothing arrive any more, and tells nobody.
func (w *wire) hold() { w.set(func() { w.silent = true }) }

// slow makes each answer late.
func (w *wire) slow(d time.Duration) { w.set(func() { w.delay = d }) }

// mend ends all trouble.
func (w *wire) mend() { w.set(func() { w.down, w.silent, w.delay = false, false, 0 }) }

// lead makes the wire end elsewhere. Who was connected has to connect anew.
func (w *wire) lead(to string) { w.set(func() { w.to = to; w.drop() }) }
