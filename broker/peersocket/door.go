package peersocket

import (
	"errors"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"tokenbroker/broker"
)

// helloTimeout is how long a connection may stay silent.
const helloTimeout = 5 * time.Second

// limits bounds what one socket's callers can hold.
type limits struct {
	conns int           // open connections
	hello time.Duration // until the first bytes
	read  time.Duration // until what is written was read
	rate  int           // requests a second; 0: any
}

// A door is one listening socket. It admits connections, learns who is at
// their other end and which protocol they speak, and hands them on.
type door struct {
	ln         *net.UnixListener
	path       string
	file       os.FileInfo // what path was when it was ours; of a server's door
	limits     limits
	meter      *meter // nil: what is asked is not limited
	log        *slog.Logger
	quiet      quiet
	grpc, http *queue

	stamp   func(*broker.Peer)       // says whose socket it is
	admit   func(*broker.Peer) error // says why a peer may not come in
	refused Refused                  // is told of it; nil where all may

	done chan struct{}  // closed by close
	wg   sync.WaitGroup // the accept loop and the connections that haven't spoken

	mu     sync.Mutex // guards the two
	conns  map[*Conn]struct{}
	closed bool
}

// newDoor makes a door of an open socket; start opens it.
func newDoor(ln *net.UnixListener, path string, lim limits, log *slog.Logger, grpc, http *queue) *door {
	d := &door{
		ln: ln, path: path, limits: lim, log: log, grpc: grpc, http: http,
		stamp: func(*broker.Peer) {},
		admit: func(*broker.Peer) error { return nil },
		done:  make(chan struct{}),
		conns: make(map[*Conn]struct{}),
	}
	if lim.rate > 0 {
		d.meter = newMeter(lim.rate)
	}
	return d
}

func (d *door) start() {
	d.wg.Add(1)
	go d.serve()
}

// close stops listening, ends the connections and waits for the goroutines.
func (d *door) close() error {
	d.mu.Lock()
	d.closed = true
	conns := d.conns
	d.conns = nil
	d.mu.Unlock()

	close(d.done)
	err := os.Remove(d.path)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	err = errors.Join(err, d.ln.Close())
	for c := range conns {
		c.Close()
	}
	d.wg.Wait()
	return err
}

// hangup ends the connections whose peer is meant.
func (d *door) hangup(meant func(*broker.Peer) bool) {
	d.mu.Lock()
	conns := slices.Collect(maps.Keys(d.conns))
	d.mu.Unlock()
	for _, c := range conns { // outside of the lock, which Close takes
		if meant(c.peer) {
			c.Close()
		}
	}
}

func (d *door) serve() {
	defer d.wg.Done()
	for {
		wait(d.meter.debt(), d.done) // connections, too, are taken no faster
		c, err := d.ln.AcceptUnix()
		switch {
		case err == nil:
			d.meter.spend(connectionCosts)
			d.enter(c)
		case errors.Is(err, net.ErrClosed):
			return
		default: // out of descriptors, most likely
			d.warn("accept", err)
			wait(50*time.Millisecond, d.done)
		}
	}
}

// enter admits a connection or ends it. It may not take long: nobody else gets
// in meanwhile.
func (d *door) enter(raw *net.UnixConn) {
	p, err := peerOf(raw)
	if err != nil {
		d.warn("peer of a connection", err)
		raw.Close()
		return
	}
	c := &Conn{UnixConn: raw, peer: p, door: d, done: make(chan struct{})}
	d.stamp(p)
	if err := d.admit(p); err != nil {
		d.refused(p, d.path, err)
		c.Close()
		return
	}
	if err := d.hold(c); err != nil {
		if err == errTooMany {
			d.warn("connection refused", err)
			turnAway(raw)
		}
		c.Close()
		return
	}
	d.wg.Add(1)
	go d.introduce(c)
}

// hold counts c in, if there is room.
func (d *door) hold(c *Conn) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return net.ErrClosed
	}
	if len(d.conns) >= d.limits.conns {
		return errTooMany
	}
	d.conns[c] = struct{}{}
	return nil
}

// forget counts c out.
func (d *door) forget(c *Conn) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.conns, c)
}

// introduce waits for the first bytes and hands c to those who speak its
// protocol.
func (d *door) introduce(c *Conn) {
	defer d.wg.Done()
	speaksGRPC, err := c.listenFirst(d.limits.hello)
	if err != nil {
		c.Close() // silent, or gone
		return
	}
	q := d.http
	if speaksGRPC {
		q = d.grpc
	}
	if !q.put(c, d.done) {
		c.Close()
	}
}

// wait reports whether d went by before done was closed.
func wait(d time.Duration, done <-chan struct{}) bool {
	if d <= 0 {
		return true
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-done:
		return false
	}
}

// warn logs what callers can cause, so not each time.
func (d *door) warn(msg string, err error) {
	if held, ok := d.quiet.next(time.Now()); ok {
		d.log.Warn(msg, "socket", d.path, "err", err, "held_back", held)
	}
}

// quiet lets one message a minute through and counts the others.
type quiet struct {
	mu   sync.Mutex // guards both
	at   time.Time
	held int
}

func (q *quiet) next(now time.Time) (held int, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if now.Before(q.at) {
		q.held++
		return 0, false
	}
	held, q.held, q.at = q.held, 0, now.Add(time.Minute)
	return held, true
}
