package peersocket

import (
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
	first []byte // read to learn the protocol, still to be given out
	once  sync.Once
}

// Peer is who made the connection. It is good until the connection is closed.
func (c *Conn) Peer() *broker.Peer { return c.peer }

// Read gives out the first bytes, then reads on.
func (c *Conn) Read(b []byte) (int, error) {
	if len(c.first) == 0 {
		return c.UnixConn.Read(b)
	}
	n := copy(b, c.first)
	if c.first = c.first[n:]; len(c.first) == 0 {
		c.first = nil // a connection lives for long, the buffer needn't
	}
	return n, nil
}

// Close ends the connection and, with it, its Peer.
func (c *Conn) Close() error {
	err := net.ErrClosed
	c.once.Do(func() {
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
		m, err := c.UnixConn.Read(buf[n:])
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
