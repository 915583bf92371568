package httpserver_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
	"tokenbroker/broker/grpcserver"
	"tokenbroker/broker/httpserver"
	"tokenbroker/broker/peersocket"
	"tokenbroker/broker/seal"
)

// TestMain lets the test binary be a second process, one that misbehaves.
func TestMain(m *testing.M) {
	if kind := os.Getenv("HTTPSERVER_MISBEHAVE"); kind != "" {
		misbehave(kind, os.Args[1], os.Args[2])
	}
	// net/http leaves a connection half open for a moment after a refused body.
	brokertest.Main(m, goleak.IgnoreAnyFunction("net/http.(*conn).closeWriteAndWait"))
}

var alice = broker.ServerKey{Hub: "main", User: "alice"}

// A stack is a broker behind its real sockets: real peers, both protocols. What
// lies behind it, provider, Docker and store, is brokertest's.
type stack struct {
	t        testing.TB
	b        *broker.Broker
	store    *brokertest.MemStore
	provider *brokertest.Provider
	attestor *brokertest.Attestor
	audit    *lines
	log      *lines
	servers  *peersocket.Servers
	hub      string                       // path of the hub's socket
	limit    atomic.Pointer[broker.Error] // what each request meets, if not nil
}

// A setup changes what lies behind the broker; what is not set is brokertest's.
type setup struct {
	store    broker.Store
	audit    io.Writer
	attestor func(*brokertest.Attestor) broker.Attestor
	provider func(*brokertest.Provider) broker.Provider
	rate     int // of each server
}

// newStack starts a broker with one hub, two providers and one rule. Nobody has
// logged in and nothing is registered.
func newStack(t testing.TB, set setup) *stack {
	t.Helper()
	dir, err := os.MkdirTemp("", "edges")
	check(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	s := &stack{
		t: t, attestor: brokertest.NewAttestor(), audit: newLines(), log: newLines(), hub: dir + "/hub/hub.sock",
		provider: brokertest.NewProvider("keycloak"),
	}
	if set.store == nil {
		s.store = brokertest.NewMemStore()
		set.store = s.store
	}
	if set.audit == nil {
		set.audit = s.audit
	}
	var attestor broker.Attestor = s.attestor
	if set.attestor != nil {
		attestor = set.attestor(s.attestor)
	}
	var provider broker.Provider = s.provider
	if set.provider != nil {
		provider = set.provider(s.provider)
	}
	log := slog.New(slog.NewTextHandler(s.log, nil))
	s.servers, err = peersocket.NewServers(dir+"/servers", log)
	check(t, err)
	if set.rate != 0 {
		s.servers.SetRate(set.rate)
	}
	keys, err := seal.New()
	check(t, err)
	s.b, err = broker.New(broker.Config{
		Deployment: "test", Host: "here", Contact: "it-help@lab.example",
		Hubs:      map[broker.HubID]broker.Hub{"main": {Login: "keycloak"}},
		Providers: []broker.Provider{provider, brokertest.NewProvider("gitlab")},
		Rules: []broker.Rule{
			{Roles: []string{"researcher"}, Provider: "keycloak", Audiences: []string{"storage"}, Scopes: []string{"read", "write"}},
		},
		Store: set.store, Keys: keys, Attestor: attestor, Sockets: s.servers, Audit: set.audit, Log: log,
		Journal: dir + "/journal",
	})
	check(t, err)
	check(t, s.b.Start(context.Background()))
	s.audit.forget() // that it has started
	hub, err := peersocket.ListenHub(s.hub, "main", uint32(os.Getuid()), func(*broker.Peer, string, error) {}, log)
	check(t, err)
	s.serve(s.servers, grpcserver.NewWorkload(s.b, log), httpserver.NewWorkload(s.b, log))
	s.serve(hub, grpcserver.NewHub(s.b, log), httpserver.NewHub(s.b, log))
	t.Cleanup(func() {
		s.b.Close()
		check(t, hub.Close())
		check(t, s.servers.Shutdown())
	})
	return s
}

// serve answers on both protocols until the test ends.
func (s *stack) serve(on interface {
	GRPC() net.Listener
	HTTP() net.Listener
}, g *grpc.Server, h *http.Server) {
	var served sync.WaitGroup
	served.Go(func() { g.Serve(limiting{on.GRPC(), s}) })
	served.Go(func() { h.Serve(limiting{on.HTTP(), s}) })
	s.t.Cleanup(func() {
		g.Stop()
		h.Close()
		served.Wait()
	})
}

// limiting accepts connections whose requests meet the stack's limit.
type limiting struct {
	net.Listener
	s *stack
}

type limited struct {
	*peersocket.Conn
	s *stack
}

func (l limiting) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return limited{c.(*peersocket.Conn), l.s}, nil
}

func (l limited) Begin() (end func(), err error) {
	if limit := l.s.limit.Load(); limit != nil {
		return nil, limit
	}
	return l.Conn.Begin()
}

// login logs alice in with the role that the rule wants, and claims the login.
func (s *stack) login() (handle broker.Secret) { return s.loginAs("alice") }

func (s *stack) loginAs(user broker.UserID) (handle broker.Secret) {
	s.t.Helper()
	s.provider.SetRoles(string(user), "researcher")
	token, err := s.b.Login(context.Background(), "main", "keycloak", broker.CodeGrant{
		Code: broker.NewSecret(string(user)), Verifier: broker.NewSecret("v"), RedirectURI: "https://hub/cb",
	})
	check(s.t, err)
	_, err = s.b.Claim(context.Background(), "main", "keycloak", token.Handle, user)
	check(s.t, err)
	return token.Handle
}

// register registers alice's server; run starts its container, which is this
// very process.
func (s *stack) register() {
	s.t.Helper()
	_, err := s.b.Register(context.Background(), "main", broker.RegisterRequest{User: "alice", ContainerName: "jupyter-alice"})
	check(s.t, err)
}

func (s *stack) run() { s.attestor.Run("jupyter-alice", int32(os.Getpid())) }

// ready is all three.
func (s *stack) ready() (handle broker.Secret) {
	handle = s.login()
	s.run()
	s.register()
	return handle
}

// sock is the path of a server's socket, which is open.
func (s *stack) sock(k broker.ServerKey) string {
	s.t.Helper()
	check(s.t, s.servers.Open(k))
	dir, err := s.servers.Directory(k)
	check(s.t, err)
	return dir + "/broker.sock"
}

// grpc connects a gRPC client to a socket.
func (s *stack) grpc(path string) *grpc.ClientConn {
	s.t.Helper()
	cc, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	check(s.t, err)
	s.t.Cleanup(func() { cc.Close() })
	return cc
}

// http makes an HTTP client for a socket.
func (s *stack) http(path string) *http.Client {
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}}
	s.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

// raw sends bytes to a socket and returns all that comes back until the end.
func (s *stack) raw(path, request string) string {
	s.t.Helper()
	c, err := net.Dial("unix", path)
	check(s.t, err)
	defer c.Close()
	_, err = io.WriteString(c, request)
	check(s.t, err)
	answer, _ := io.ReadAll(c)
	return string(answer)
}

// lines is a writer that remembers.
type lines struct {
	mu    sync.Mutex // guards buf
	buf   bytes.Buffer
	begun chan struct{} // closed by the first Write
}

func newLines() *lines { return &lines{begun: make(chan struct{})} }

// forget is for what came before anybody looks.
func (l *lines) forget() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.buf.Len() > 0 {
		l.buf.Reset()
		l.begun = make(chan struct{})
	}
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.buf.Len() == 0 {
		close(l.begun)
	}
	return l.buf.Write(b)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// last is the newest line of the audit, once there is one.
func (l *lines) last(t testing.TB) (e broker.Entry) {
	t.Helper()
	select {
	case <-l.begun:
	case <-time.After(10 * time.Second):
		t.Fatal("nothing was written")
	}
	all := strings.Split(strings.TrimSpace(l.String()), "\n")
	check(t, json.Unmarshal([]byte(all[len(all)-1]), &e))
	return e
}

func quietLog() *slog.Logger { return slog.New(slog.DiscardHandler) }

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
