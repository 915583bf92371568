package peersocket

import (
	"errors"
	"net"
	"sync"
	"time"

	"tokenbroker/broker"
)

// A Conn is a connection that knows its peer.
type Conn struct {
	*net.UnixConn
	peer  *broker.Peer
	door  *door
	first []byte        // read to learn the protocol, still to be given out
	done  chan struct{} // closed by Close
	once  sync.Once

	mu    sync.Mutex // guards until, and the order of what is set
	until time.Time  // the user's write deadline
}

// readWithin is how long the other end may take to read what is written at once:
// whoever takes nothing can't make us keep it, or wait.
const readWithin = 10 * time.Second

// Peer is who made the connection. It is good until the connection is closed.
func (c *Conn) Peer() *broker.Peer { return c.peer }

// Begin counts a request in that came over c, or says which limit of its server
// it would exceed. end counts it out.
func (c *Conn) Begin() (end func(), err error) { return c.door.meter.begin() }

// Read gives out the first bytes, then reads on, no faster than its server may
// be read.
func (c *Conn) Read(b []byte) (int, error) {
	if len(c.first) == 0 {
		return c.readOn(b)
	}
	n := copy(b, c.first)
	if c.first = c.first[n:]; len(c.first) == 0 {
		c.first = nil // a connection lives for long, the buffer needn't
	}
	return n, nil
}

// readOn reads a little and has it wait until it is its turn.
func (c *Conn) readOn(b []byte) (int, error) {
	if c.door.meter != nil {
		b = b[:min(len(b), atATime)]
	}
	n, err := c.UnixConn.Read(b)
	if !wait(c.door.meter.read(n), c.done) {
		return 0, net.ErrClosed
	}
	return n, err
}

// Write gives up on a reader who takes nothing, whatever later deadline is set.
func (c *Conn) Write(b []byte) (int, error) {
	if err := c.hurry(); err != nil {
		return 0, err
	}
	return c.UnixConn.Write(b)
}

func (c *Conn) hurry() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := time.Now().Add(c.door.limits.read)
	if !c.until.IsZero() && c.until.Before(t) {
		t = c.until
	}
	return c.UnixConn.SetWriteDeadline(t)
}

// SetWriteDeadline is for what is being written and what will be.
func (c *Conn) SetWriteDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.until = t
	return c.UnixConn.SetWriteDeadline(t)
}

// SetDeadline is both deadlines.
func (c *Conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// Close ends the connection and, with it, its Peer.
func (c *Conn) Close() error {
	err := net.ErrClosed
	c.once.Do(func() {
		close(c.done)
		err = c.UnixConn.Close()
		if c.peer.Pidfd != nil {
			c.peer.Pidfd.Close()
		}
		c.door.forget(c)
	})
	return err
}

// firstRead is about a request of HTTP/1.1, so that one read gets it whole.
const firstRead = 1024

// listenFirst reads until it is clear which protocol is spoken.
func (c *Conn) listenFirst(patience time.Duration) (speaksGRPC bool, err error) {
	if err := c.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return false, err
	}
	buf := make([]byte, firstRead)
	n := 0
	for {
		m, err := c.readOn(buf[n:])
		n += m
		if speaksGRPC, clear := protocol(buf[:n]); clear {
			c.first = buf[:n]
			return speaksGRPC, c.SetReadDeadline(time.Time{})
		}
		if err != nil {
			return false, err
		}
	}
}

// preface is how every HTTP/2 connection begins (RFC 9113, section 3.4); no
// method of HTTP/1.1 does.
const preface = "PRI "

// protocol says what the first bytes of a connection speak, once that is clear.
func protocol(first []byte) (grpc, clear bool) {
	n := min(len(first), len(preface))
	if string(first[:n]) != preface[:n] {
		return false, true
	}
	return n == len(preface), n == len(preface)
}

// A queue is a net.Listener whose connections come from doors.
type queue struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
	addr  net.Addr
}

func newQueue(path string) *queue {
	return &queue{
		conns: make(chan net.Conn),
		done:  make(chan struct{}),
		addr:  &net.UnixAddr{Name: path, Net: "unix"},
	}
}

// put hands c over and reports whether somebody took it before the queue or
// stop was closed.
func (q *queue) put(c net.Conn, stop <-chan struct{}) bool {
	select {
	case q.conns <- c:
		return true
	case <-q.done:
	case <-stop:
	}
	return false
}

// Accept waits for the next connection.
func (q *queue) Accept() (net.Conn, error) {
	select {
	case c := <-q.conns:
		return c, nil
	case <-q.done:
		return nil, net.ErrClosed
	}
}

// Close ends Accept. Connections that were accepted stay.
func (q *queue) Close() error {
	q.once.Do(func() { close(q.done) })
	return nil
}

// Addr is the directory or socket the connections come from.
func (q *queue) Addr() net.Addr { return q.addr }
