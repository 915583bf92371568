package httpserver_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
	"tokenbroker/broker/redisstore"
	"tokenbroker/broker/seal"
	pb "tokenbroker/proto/tokenbroker/v1"
)

// The benchmarks print ratios. Beside each request to the broker, over its real
// sockets with a real Redis, the real audit file and what attestation asks the
// kernel, the same client sends one to a bare server on a Unix socket that
// answers as many bytes. The two take turns in small blocks, so that whatever
// else the machine does hits both, and what counts is the tenth of the blocks
// that was disturbed least.

// A side is one way to ask once; before, if there is one, is not timed.
type side struct {
	before func()
	ask    func() error
}

// race lets the two sides take turns and reports how they compare.
func race(b *testing.B, block int, ours, bare side) {
	b.Helper()
	var o, p []float64
	for b.Loop() {
		o = append(o, timed(b, block, ours))
		p = append(p, timed(b, block, bare))
	}
	b.ReportMetric(undisturbed(o)/undisturbed(p), "x/bare")
	b.ReportMetric(undisturbed(o), "µs")
	b.ReportMetric(undisturbed(p), "µs-bare")
	b.ReportMetric(0, "ns/op") // of both sides and all blocks; says nothing
}

// timed returns the microseconds of one request.
func timed(b *testing.B, block int, s side) float64 {
	b.Helper()
	if s.before != nil {
		s.before()
	}
	began := time.Now()
	for range block {
		if err := s.ask(); err != nil {
			b.Fatal(err)
		}
	}
	return time.Since(began).Seconds() * 1e6 / float64(block)
}

func undisturbed(all []float64) float64 {
	slices.Sort(all)
	return all[len(all)/10]
}

// BenchmarkCachedToken is what a notebook pays for each token: a connection that
// is kept, a token that is there.
func BenchmarkCachedToken(b *testing.B) {
	ours, bare := newBench(b)
	for _, p := range protocols {
		b.Run(p.name, func(b *testing.B) { race(b, 20, p.kept(b, ours), p.kept(b, bare)) })
	}
}

// BenchmarkNewConnection is what a command-line helper pays: connect, be
// attested, ask, hang up.
func BenchmarkNewConnection(b *testing.B) {
	ours, bare := newBench(b)
	for _, p := range protocols {
		b.Run(p.name, func(b *testing.B) { race(b, 5, p.fresh(b, ours), p.fresh(b, bare)) })
	}
}

// BenchmarkAfterTheLease is the one request per 250 ms that asks Redis whether
// anybody's rights have moved. Both sides rest before each request, since a
// machine that has rested answers more slowly.
func BenchmarkAfterTheLease(b *testing.B) {
	ours, bare := newBench(b)
	for _, p := range protocols {
		b.Run(p.name, func(b *testing.B) { race(b, 1, rested(p.kept(b, ours)), rested(p.kept(b, bare))) })
	}
}

// A protocol is one way to ask for a token.
type protocol struct {
	name string
	// dial makes a side with a connection of its own, and what ends it.
	dial func(t testing.TB, at sockets) (side, func())
}

var protocols = []protocol{{"grpc", dialGRPC}, {"json", dialJSON}}

// kept asks over one connection.
func (p protocol) kept(b *testing.B, at sockets) side {
	ask, hangUp := p.dial(b, at)
	b.Cleanup(hangUp)
	return side{ask: ask.ask}
}

// fresh connects each time.
func (p protocol) fresh(b *testing.B, at sockets) side {
	return side{ask: func() error {
		ask, hangUp := p.dial(b, at)
		defer hangUp()
		return ask.ask()
	}}
}

// rested lets the lease run out before each block.
func rested(s side) side {
	s.before = func() { time.Sleep(300 * time.Millisecond) }
	return s
}

// sockets is where the two protocols are spoken.
type sockets struct{ grpc, json string }

func dialGRPC(t testing.TB, at sockets) (side, func()) {
	cc, err := grpc.NewClient("unix:"+at.grpc, grpc.WithTransportCredentials(insecure.NewCredentials()))
	check(t, err)
	c := pb.NewWorkloadClient(cc)
	return side{ask: func() error {
		_, err := c.GetToken(context.Background(), &pb.GetTokenRequest{Provider: "keycloak"})
		return err
	}}, func() { cc.Close() }
}

func dialJSON(t testing.TB, at sockets) (side, func()) {
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", at.json)
	}}
	c := &http.Client{Transport: tr}
	return side{ask: func() error {
		resp, err := c.Get("http://localhost/v1/token/keycloak")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("status %s", resp.Status)
		}
		_, err = io.Copy(io.Discard, resp.Body)
		return err
	}}, tr.CloseIdleConnections
}

// newBench makes a broker with all that costs time in earnest, and bare servers
// whose answers are as long as the broker's.
func newBench(b *testing.B) (ours, bare sockets) {
	b.Helper()
	s := newEarnest(b, 1e6) // requests are counted, and never too many
	s.ready()
	path := s.sock(alice)
	return sockets{path, path}, s.bareLike(path)
}

// newEarnest makes a broker with all that costs time in earnest.
func newEarnest(b *testing.B, rate int) *stack {
	b.Helper()
	redis := brokertest.StartRedis(b)
	store, err := redisstore.Open(redisstore.Config{Deployment: "bench", Socket: redis.Socket})
	check(b, err)
	b.Cleanup(func() { store.Close() })
	keys, err := seal.New()
	check(b, err)
	dir := b.TempDir()
	audit, err := broker.OpenAudit(dir+"/audit.jsonl", nil, dir+"/head", keys.AuditMAC(), quietLog())
	check(b, err)
	b.Cleanup(func() { audit.Close() })
	s := newStack(b, setup{
		store: store, audit: audit, attestor: func(a *brokertest.Attestor) broker.Attestor { return kernel{a} }, rate: rate,
	})
	s.provider.SetLife(time.Hour)
	return s
}

// bareLike starts bare servers that answer as the one at path does.
func (s *stack) bareLike(path string) sockets {
	b := s.t
	b.Helper()
	answer := new(pb.GetTokenResponse)
	check(b, s.grpc(path).Invoke(context.Background(), pb.Workload_GetToken_FullMethodName, &pb.GetTokenRequest{Provider: "keycloak"}, answer))
	resp, err := s.http(path).Get("http://localhost/v1/token/keycloak")
	check(b, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	check(b, err)
	return serveBare(b, answer, body)
}

// bareWorkload answers without a thought.
type bareWorkload struct {
	pb.UnimplementedWorkloadServer
	answer *pb.GetTokenResponse
}

func (w bareWorkload) GetToken(context.Context, *pb.GetTokenRequest) (*pb.GetTokenResponse, error) {
	return w.answer, nil
}

// serveBare serves the two answers with grpc-go and net/http as they are, each on
// a Unix socket.
func serveBare(b testing.TB, answer *pb.GetTokenResponse, body []byte) sockets {
	b.Helper()
	dir, err := os.MkdirTemp("", "bare")
	check(b, err)
	at := sockets{dir + "/grpc", dir + "/json"}
	lg, err := net.Listen("unix", at.grpc)
	check(b, err)
	lj, err := net.Listen("unix", at.json)
	check(b, err)

	g := grpc.NewServer()
	pb.RegisterWorkloadServer(g, bareWorkload{answer: answer})
	j := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		w.Write(body)
	})}
	var served sync.WaitGroup
	served.Go(func() { g.Serve(lg) })
	served.Go(func() { j.Serve(lj) })
	b.Cleanup(func() {
		g.Stop()
		j.Close()
		served.Wait()
		os.RemoveAll(dir)
	})
	return at
}

// kernel is an Attestor that asks the kernel what the one for Docker asks: once
// per connection cgroups and namespaces, with each request whether the peer
// lives.
type kernel struct{ *brokertest.Attestor }

func (k kernel) Attest(p *broker.Peer, w *broker.Workload) error {
	if _, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", p.PID)); err != nil {
		return err
	}
	for _, ns := range []string{"pid", "mnt"} {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d/ns/%s", p.PID, ns)); err != nil {
			return err
		}
	}
	if err := k.Alive(p); err != nil {
		return err
	}
	return k.Attestor.Attest(p, w)
}

func (kernel) Alive(p *broker.Peer) error {
	raw, err := p.Pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var n int
	cerr := raw.Control(func(fd uintptr) {
		for { // the runtime's own signals interrupt it
			if n, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0); err != unix.EINTR {
				return
			}
		}
	})
	if cerr != nil || err != nil || n != 0 {
		return fmt.Errorf("peer: %v, %v, %d", cerr, err, n)
	}
	return nil
}

// BenchmarkMemory is what 2,000 registered containers cost that keep a connection
// each, half of them over gRPC: heap and stacks of the process. The clients are
// bare file descriptors.
func BenchmarkMemory(b *testing.B) {
	for b.Loop() {
		s := newStack(b, setup{})
		before := inUse()
		for i := range 2000 {
			user := broker.UserID(fmt.Sprint("user", i))
			_, err := s.b.Register(context.Background(), "main", broker.RegisterRequest{User: user, ContainerName: "c"})
			check(b, err)
			path := s.sock(broker.ServerKey{Hub: "main", User: user})
			hang(b, path, i%2 == 0)
		}
		b.ReportMetric(float64(inUse()-before)/1e6, "MB/2000")
		b.ReportMetric(0, "ns/op")
	}
}

// hang opens a connection that is served and then stays.
func hang(b *testing.B, path string, speaksGRPC bool) {
	b.Helper()
	hello, answer := "GET /v1/nothing HTTP/1.1\r\nHost: localhost\r\n\r\n", len("HTTP/1.1 404")
	if speaksGRPC { // the preface and empty settings, answered with settings
		hello, answer = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00", 9
	}
	c, err := net.Dial("unix", path)
	check(b, err)
	b.Cleanup(func() { c.Close() })
	_, err = io.WriteString(c, hello)
	check(b, err)
	_, err = io.ReadFull(c, make([]byte, answer))
	check(b, err)
}

// BenchmarkFloodMemory is what the connections of ten servers hold that misbehave,
// all that each may have: heap and stacks at the most, for each connection, and how
// many times as much as at a bare server in the same process.
func BenchmarkFloodMemory(b *testing.B) {
	const servers, each = 10, 64
	for kind, begin := range holds {
		b.Run(kind, func(b *testing.B) {
			for b.Loop() {
				s := newStack(b, setup{audit: io.Discard}) // which this process needn't keep
				paths := make([]string, servers)
				for i := range paths {
					user := broker.UserID(fmt.Sprint("user", i))
					s.loginAs(user)
					s.attestor.Run("c-"+string(user), int32(1000+i), int32(os.Getpid()))
					_, err := s.b.Register(context.Background(), "main", broker.RegisterRequest{User: user, ContainerName: "c-" + string(user)})
					check(b, err)
					paths[i] = s.sock(broker.ServerKey{Hub: "main", User: user})
				}
				ours := held(b, paths, each, begin)
				bare := held(b, []string{servePlain(b)}, servers*each, begin)
				b.ReportMetric(ours/1e3, "kB/conn")
				b.ReportMetric(ours/bare, "x/bare")
				b.ReportMetric(0, "ns/op")
			}
		})
	}
}

// holds are what is done on one connection that then stays.
var holds = map[string]func(net.Conn){
	"answers never read": again(strings.Repeat(plainRequest, 20)),
	"half a request":     func(c net.Conn) { io.WriteString(c, plainRequest[:20]) },
	"open streams": func(c net.Conn) {
		w := newWire(c, c)
		err := w.begin()
		for range 32 {
			if err == nil {
				_, err = w.open(w.headers, true)
			}
		}
	},
}

// servePlain is net/http's server at a socket, until the benchmark ends.
func servePlain(b *testing.B) (path string) {
	path = b.TempDir() + "/s"
	l, err := net.Listen("unix", path)
	check(b, err)
	s := bareServer()
	go s.Serve(l)
	b.Cleanup(func() { s.Close() })
	return path
}

// held is the most that one of the connections to these sockets holds: a second is
// for what is done on them, and after four a server begins to end them.
func held(b *testing.B, paths []string, each int, begin func(net.Conn)) float64 {
	b.Helper()
	before := inUse()
	var conns []net.Conn
	for _, path := range paths {
		for range each {
			c, err := net.Dial("unix", path)
			check(b, err)
			conns = append(conns, c)
		}
	}
	began := time.Now()
	var saying sync.WaitGroup
	for _, c := range conns {
		c.SetWriteDeadline(began.Add(time.Second))
		saying.Go(func() { begin(c) })
	}
	saying.Wait() // the clients are bare file descriptors then
	var most uint64
	for time.Since(began) < 4*time.Second {
		most = max(most, inUse())
		time.Sleep(100 * time.Millisecond)
	}
	for _, c := range conns {
		c.Close()
	}
	return float64(most-min(most, before)) / float64(len(conns))
}

func inUse() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapInuse + m.StackInuse
}
