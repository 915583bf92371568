package httpserver

import (
	"context"
	"crypto/x509"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Hosts are the names under which a TCP listener may be asked. A page in a browser
// can have its own name resolve to our address, so that we are of its origin; but
// the browser still says by which name it came.
type Hosts struct {
	Certificate *x509.Certificate // whose names they are; nil: those of the loopback interface
	Further     []string
}

// has wants a name as hostname returns it.
func (h Hosts) has(host string) bool {
	if slices.ContainsFunc(h.Further, func(f string) bool { return hostname(f) == host }) {
		return true
	}
	if h.Certificate != nil {
		return h.Certificate.VerifyHostname(host) == nil
	}
	ip, _ := netip.ParseAddr(host)
	return host == "localhost" || ip.IsLoopback() && ip.Zone() == ""
}

// String lists them.
func (h Hosts) String() string {
	names := []string{"localhost", "its addresses"}
	if c := h.Certificate; c != nil {
		names = slices.Clone(c.DNSNames)
		for _, ip := range c.IPAddresses {
			names = append(names, ip.String())
		}
	}
	return strings.Join(append(names, h.Further...), ", ")
}

// tcp is a server for a listener of Bound's. HTTP/1.1 is all that hubs, providers and
// Prometheus need, and whoever floods has fewer ways.
func (e edge) tcp(h http.Handler) *http.Server {
	s := e.server(h)
	s.ReadTimeout = 15 * time.Second // readBody lifts it, so no request that waits for a provider ends by it
	s.Protocols = new(http.Protocols)
	s.Protocols.SetHTTP1(true)
	s.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		if over, ok := c.(interface{ NetConn() net.Conn }); ok { // TLS
			c = over.NetConn()
		}
		return context.WithValue(ctx, connKey{}, c)
	}
	return s
}

type connKey struct{}

// trust keeps the connection of a request that has proved whose it is.
func trust(ctx context.Context) {
	if c, ok := ctx.Value(connKey{}).(*tcpConn); ok {
		c.bound.trust(c)
	}
}

// maxConns is far above what a hub or a provider opens at a time, and costs less
// than 30 MB if each of them holds what it may.
const maxConns = 256

// Bound lets a TCP listener have a number of connections open. To turn others away
// would let whoever holds them lock the hub out. So there is room for everybody who
// comes: a stranger makes it, who is a connection over which nobody has shown the
// secret yet; of the address that has most of them, the one who waits longest. Who
// has the secret shows it with his first bytes.
func Bound(l net.Listener, log *slog.Logger) net.Listener {
	return &bound{Listener: l, log: log, tell: rate.Sometimes{Interval: time.Minute}, from: make(map[netip.Prefix]int)}
}

type bound struct {
	net.Listener
	log  *slog.Logger
	tell rate.Sometimes

	mu        sync.Mutex // guards the rest
	open      int
	strangers []*tcpConn // in the order in which they came
	from      map[netip.Prefix]int
}

// A tcpConn is a connection that is counted.
type tcpConn struct {
	*net.TCPConn
	bound *bound
	from  netip.Prefix
	once  sync.Once // of Close
}

// Accept implements net.Listener.
func (b *bound) Accept() (net.Conn, error) {
	raw, err := b.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &tcpConn{TCPConn: raw.(*net.TCPConn), bound: b, from: network(raw.RemoteAddr())}
	if last := b.enter(c); last != nil {
		b.tell.Do(func() {
			b.log.Warn("a listener has as many connections as it may; those that show no secret make room",
				"address", b.Addr().String(), "most_from", last.from.Addr().String())
		})
		last.SetLinger(0) // what it was sent and has not read is not kept either
		last.Close()
	}
	return c, nil
}

// network is whom an address belongs to: one machine has a whole /64 of IPv6.
func network(a net.Addr) netip.Prefix {
	to, _ := netip.ParseAddrPort(a.String())
	ip := to.Addr().Unmap().WithZone("")
	p, _ := ip.Prefix(min(ip.BitLen(), 64))
	return p
}

// enter counts c in and returns who has to make room, which is c itself if all others
// have shown the secret.
func (b *bound) enter(c *tcpConn) (last *tcpConn) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.open++
	b.from[c.from]++
	b.strangers = append(b.strangers, c)
	if b.open <= maxConns {
		return nil
	}
	for _, s := range b.strangers {
		if last == nil || b.from[s.from] > b.from[last.from] {
			last = s
		}
	}
	return last
}

// trust makes c no stranger.
func (b *bound) trust(c *tcpConn) {
	b.mu.Lock()
	defer b.mu.Unlock()
	i := slices.Index(b.strangers, c)
	if i < 0 {
		return
	}
	b.strangers = slices.Delete(b.strangers, i, i+1)
	if b.from[c.from]--; b.from[c.from] == 0 {
		delete(b.from, c.from)
	}
}

// Close implements net.Conn.
func (c *tcpConn) Close() error {
	c.once.Do(func() {
		c.bound.trust(c)
		c.bound.mu.Lock()
		defer c.bound.mu.Unlock()
		c.bound.open--
	})
	return c.TCPConn.Close()
}
