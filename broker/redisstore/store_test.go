package redisstore_test

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
	"tokenbroker/broker/redisstore"
)

func TestMain(m *testing.M) { brokertest.Main(m) }

const password = "PASSW0RD"

func open(t testing.TB, cfg redisstore.Config) *redisstore.Store {
	t.Helper()
	if cfg.Deployment == "" {
		cfg.Deployment = rand.Text() // its own corner of a server that tests share
	}
	s, err := redisstore.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// mini is a miniredis as the demo uses it.
func mini(t testing.TB) (*miniredis.Miniredis, redisstore.Config) {
	t.Helper()
	m := miniredis.RunT(t)
	m.ClockTTL(true)
	m.RequireAuth(password)
	return m, redisstore.Config{Addr: m.Addr(), Password: broker.NewSecret(password), AllowNoPersistence: true}
}

// raw is a client for what lies in Redis, past the store.
func raw(t testing.TB, o *redis.Options) *redis.Client {
	t.Helper()
	o.DisableIdentity = true
	c := redis.NewClient(o)
	t.Cleanup(func() { c.Close() })
	return c
}

func TestMiniredisKeepsTheContract(t *testing.T) {
	_, cfg := mini(t)
	brokertest.TestStore(t, func(t *testing.T) broker.Store { return open(t, cfg) })
}

func TestRedisKeepsTheContract(t *testing.T) {
	server := brokertest.StartRedis(t)
	brokertest.TestStore(t, func(t *testing.T) broker.Store {
		return open(t, redisstore.Config{Socket: server.Socket})
	})
}

func TestRedisKeepsTheContractOverTLSWithTheRightsThatWeDocument(t *testing.T) {
	ca, config := certificates(t)
	port := freePort(t)
	brokertest.StartRedis(t, append(config,
		fmt.Sprint("tls-port ", port), "tls-auth-clients no",
		"user default off", fmt.Sprintf("user broker on >%s -@all %s", password, documentedRights(t)))...)
	brokertest.TestStore(t, func(t *testing.T) broker.Store {
		return open(t, redisstore.Config{
			Addr: fmt.Sprint("localhost:", port), TLS: ca, User: "broker", Password: broker.NewSecret(password),
		})
	})
}

// documentedRights reads the rights of an ACL user from the package comment, so
// that what administrators copy from it is what is tested.
func documentedRights(t *testing.T) string {
	t.Helper()
	source, err := os.ReadFile("store.go")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^//\t(~tokenbroker:\*.*)\n//\t(.*)$`).FindSubmatch(source)
	if m == nil {
		t.Fatal("the package comment names no rights")
	}
	return string(m[1]) + " " + string(m[2])
}

func freePort(t testing.TB) int { return brokertest.FreePort(t) }

// eventually waits until f has no error.
func eventually(t testing.TB, what string, f func() error) {
	t.Helper()
	deadline := time.After(30 * time.Second)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for err := f(); err != nil; err = f() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not so within 30 s: %s: %v", what, err)
		}
	}
}

func TestOpenSaysWhatIsWrongWithItsConfiguration(t *testing.T) {
	ca, _ := certificates(t)
	for _, tt := range []struct {
		why  string
		cfg  redisstore.Config
		want string
	}{
		{"no deployment", redisstore.Config{Addr: "localhost:6379"}, "deployment"},
		{"no place", redisstore.Config{Deployment: "lab"}, "neither socket nor address"},
		{"two places", redisstore.Config{Deployment: "lab", Addr: "localhost:6379", Socket: "/s"}, "leave one"},
		{"a socket and a cluster", redisstore.Config{Deployment: "lab", Socket: "/s", Cluster: []string{"a:1"}}, "leave one"},
		{"Sentinels without a name", redisstore.Config{Deployment: "lab", Sentinel: redisstore.Sentinel{Addrs: []string{"a:1"}}}, "names no master"},
		{"a name without Sentinels", redisstore.Config{Deployment: "lab", Sentinel: redisstore.Sentinel{Master: "lab"}}, "no addresses"},
		{"a Sentinel without a port", redisstore.Config{Deployment: "lab", Sentinel: redisstore.Sentinel{Master: "lab", Addrs: []string{"a:1", "b"}}}, `"b" is not host:port`},
		{"a user of the Sentinels without a password", redisstore.Config{Deployment: "lab", Sentinel: redisstore.Sentinel{Master: "lab", Addrs: []string{"a:1"}, User: "x"}}, "sentinel.password_file"},
		{"an empty node", redisstore.Config{Deployment: "lab", Cluster: []string{"a:1", ""}}, `"" is not host:port`},
		{"a database of a cluster", redisstore.Config{Deployment: "lab", Cluster: []string{"a:1"}, DB: 1}, "a cluster has no other than 0"},
		{"a long path", redisstore.Config{Deployment: "lab", Socket: "/" + strings.Repeat("x", 107)}, "longer than 107 bytes"},
		{"TLS on a socket", redisstore.Config{Deployment: "lab", Socket: "/s", TLS: ca}, "TLS"},
		{"no port", redisstore.Config{Deployment: "lab", Addr: "localhost"}, "host:port"},
		{"a user without a password", redisstore.Config{Deployment: "lab", Socket: "/s", User: "broker"}, "password_file"},
		{"a negative database", redisstore.Config{Deployment: "lab", Socket: "/s", DB: -1}, "db"},
	} {
		s, err := redisstore.Open(tt.cfg)
		if err == nil {
			s.Close()
			t.Errorf("%s: got no error", tt.why)
			continue
		}
		if !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %q, want it to say %q", tt.why, err, tt.want)
		}
	}
	if s, err := redisstore.Open(redisstore.Config{Deployment: "lab", Socket: "/" + strings.Repeat("x", 106)}); err != nil {
		t.Errorf("a path of 107 bytes: %v", err)
	} else {
		s.Close()
	}
}

func TestNamesInRedisCanBeReadAndHoldNoHashTag(t *testing.T) {
	m, cfg := mini(t)
	cfg.Deployment = "lab:1{x}"
	s := open(t, cfg)
	k := broker.Key{Kind: "grant", Parts: []string{"main", "keycloak", "alice@lab.example", "a b/{c}:é%", ""}}
	if err := s.Put(t.Context(), k, 0, []byte("x"), 0); err != nil {
		t.Fatal(err)
	}
	if err := s.Add(t.Context(), broker.Key{Kind: "hubs"}, "main"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Move(t.Context()); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"tokenbroker:lab%3A1%7Bx%7D:record:grant:main:keycloak:alice@lab.example:a%20b%2F%7Bc%7D%3A%C3%A9%25:",
		"tokenbroker:lab%3A1%7Bx%7D:revision",
		"tokenbroker:lab%3A1%7Bx%7D:set:hubs",
	}
	if got := m.Keys(); !slices.Equal(got, want) {
		t.Errorf("got keys\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestDeploymentsOnOneRedisDoNotMeet(t *testing.T) {
	ctx := t.Context()
	_, cfg := mini(t)
	names := []string{"lab", "lab:record", "lab%3Arecord", "Lab", "läb"}
	k := broker.Key{Kind: "record", Parts: []string{"a"}}
	for _, name := range names {
		cfg.Deployment = name
		s := open(t, cfg)
		if err := s.Put(ctx, k, 0, []byte(name), 0); err != nil {
			t.Errorf("%s: Put: %v", name, err)
		}
		if p, err := s.Pulse(ctx); err != nil || p.Revision != 0 {
			t.Errorf("%s: Pulse: got %+v, %v; want that nothing moved", name, p, err)
		}
		s.Move(ctx)
	}
}

func TestARevisionAboveTheClockStillRises(t *testing.T) {
	server := brokertest.StartRedis(t)
	s := open(t, redisstore.Config{Deployment: "lab", Socket: server.Socket})
	admin := raw(t, &redis.Options{Network: "unix", Addr: server.Socket})
	// Sixteen digits, which Lua's own tostring rounds.
	high := int64(8_007_199_254_740_991)
	admin.Set(t.Context(), "tokenbroker:lab:revision", high, 0)
	for want := high + 1; want < high+10; want++ {
		got, err := s.Move(t.Context())
		if err != nil || got != want {
			t.Fatalf("Move: got %d, %v; want %d", got, err, want)
		}
	}
}

func TestARevisionThatCannotRiseIsAnErrorInsteadOfStandingStill(t *testing.T) {
	server := brokertest.StartRedis(t)
	s := open(t, redisstore.Config{Deployment: "lab", Socket: server.Socket})
	admin := raw(t, &redis.Options{Network: "unix", Addr: server.Socket})
	for _, value := range []string{"9007199254740991", "9007199254740992", "1e300", "inf", "x", ""} {
		admin.Set(t.Context(), "tokenbroker:lab:revision", value, 0)
		if got, err := s.Move(t.Context()); err == nil {
			t.Errorf("Move over %q: got %d, want an error", value, got)
		}
	}
}

func TestSomethingForeignAtOurKeyIsAnErrorAndNotAnAbsentRecord(t *testing.T) {
	ctx := t.Context()
	m, cfg := mini(t)
	cfg.Deployment = "lab"
	s := open(t, cfg)
	name := "tokenbroker:lab:record:grant:"
	m.HSet(name+"a", "r", "S3CRET", "b", "x")
	m.HSet(name+"b", "b", "x")
	m.HSet(name+"c", "r", "1")
	m.Set(name+"d", "S3CRET")
	for _, part := range []string{"a", "b", "c", "d"} {
		_, err := s.Get(ctx, broker.Key{Kind: "grant", Parts: []string{part}})
		if err == nil || errors.Is(err, broker.ErrAbsent) || strings.Contains(err.Error(), "S3CRET") {
			t.Errorf("Get %s: got %v, want an error of its own that shows nothing", part, err)
		}
	}
}

func TestRedisMayGoAwayAndComeBack(t *testing.T) {
	ctx := t.Context()
	server := brokertest.StartRedis(t, "appendfsync always")
	s := open(t, redisstore.Config{Socket: server.Socket})
	k := broker.Key{Kind: "grant", Parts: []string{"a"}}
	if err := s.Put(ctx, k, 0, []byte("x"), 0); err != nil {
		t.Fatal(err)
	}
	revision, err := s.Move(ctx)
	if err != nil {
		t.Fatal(err)
	}

	server.Kill()
	_, get := s.Get(ctx, k)
	_, pulse := s.Pulse(ctx)
	for what, err := range map[string]error{
		"Get": get, "Pulse": pulse, "Check": s.Check(ctx), "Delete": s.Delete(ctx, k, 1), "Put": s.Put(ctx, k, 1, nil, 0), "Add": s.Add(ctx, k, "x"),
	} {
		if err == nil || errors.Is(err, broker.ErrAbsent) || errors.Is(err, broker.ErrStale) {
			t.Errorf("%s without Redis: got %v, want an error that is no answer", what, err)
		}
	}

	server.Start()
	if r, err := s.Get(ctx, k); err != nil || string(r.Box) != "x" {
		t.Errorf("after the restart: got %v, %v", r, err)
	}
	if p, err := s.Pulse(ctx); err != nil || p.Revision != revision {
		t.Errorf("after the restart: got %+v, %v; want revision %d", p, err, revision)
	}
}

func TestAWriteWhoseAnswerIsLostIsNotSentAgain(t *testing.T) {
	ctx := t.Context()
	m, cfg := mini(t)
	cfg.Deployment = "lab"
	direct := open(t, cfg)
	var lose atomic.Bool
	cfg.Addr = proxy(t, m.Addr(), &lose)
	s := open(t, cfg)

	k := broker.Key{Kind: "grant", Parts: []string{"a"}}
	if err := s.Put(ctx, k, 0, []byte("x"), 0); err != nil { // Redis knows the script now
		t.Fatal(err)
	}
	lose.Store(true)
	err := s.Put(ctx, k, 1, []byte("y"), 0)
	// Sent again it would find its own write, and say ErrStale.
	if err == nil || errors.Is(err, broker.ErrStale) {
		t.Errorf("got %v, want that the answer was lost", err)
	}
	if r, err := direct.Get(ctx, k); err != nil || r.Revision != 2 {
		t.Errorf("got %v, %v; want that the write had happened", r, err)
	}
}

// proxy passes on what is sent to addr. If lose is set it hangs up once instead
// of passing back an answer.
func proxy(t *testing.T, addr string, lose *atomic.Bool) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			down, err := l.Accept()
			if err != nil {
				return
			}
			up, err := net.Dial("tcp", addr)
			if err != nil {
				down.Close()
				continue
			}
			go func() { io.Copy(up, down); up.Close() }()
			go func() {
				defer down.Close()
				buf := make([]byte, 4096)
				for {
					n, err := up.Read(buf)
					if err != nil || lose.CompareAndSwap(true, false) {
						return
					}
					down.Write(buf[:n])
				}
			}()
		}
	}()
	return l.Addr().String()
}

func TestErrorsShowNeitherBoxesNorPasswords(t *testing.T) {
	ctx := t.Context()
	k := broker.Key{Kind: "grant", Parts: []string{"a"}}
	for _, letsIn := range []bool{false, true} {
		s := open(t, redisstore.Config{Addr: parrot(t, letsIn), Password: broker.NewSecret(password)})
		_, get := s.Get(ctx, k)
		_, move := s.Move(ctx)
		for what, err := range map[string]error{
			"Put": s.Put(ctx, k, 0, []byte("S3CRET"), 0), "Add": s.Add(ctx, k, "S3CRET"), "Get": get, "Move": move, "Check": s.Check(ctx),
		} {
			if err == nil {
				t.Errorf("%s: got no error", what)
				continue
			}
			if strings.Contains(err.Error(), "S3CRET") || strings.Contains(err.Error(), password) {
				t.Errorf("%s: the error shows a secret: %v", what, err)
			}
		}
	}
}

// parrot is a server that quotes each command in its refusal, as Redis does
// with those it doesn't know. It may take any password.
func parrot(t *testing.T, letsIn bool) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go refuse(conn, letsIn)
		}
	}()
	return l.Addr().String()
}

func refuse(conn net.Conn, letsIn bool) {
	defer conn.Close()
	r := bufio.NewReader(conn)
	for {
		args, err := command(r)
		if err != nil {
			return
		}
		switch auth := strings.EqualFold(args[0], "auth"); {
		case auth && letsIn:
			io.WriteString(conn, "+OK\r\n")
			continue
		case auth:
			fmt.Fprintf(conn, "-ERR %s is not the password\r\n", args[1])
			continue
		}
		fmt.Fprintf(conn, "-ERR unknown command '%s', with args beginning with: '%s'\r\n", args[0], strings.Join(args[1:], "' '"))
	}
}

// command reads one command of Redis' protocol.
func command(r *bufio.Reader) ([]string, error) {
	line, err := r.ReadString('\n')
	if err != nil {
		return nil, err
	}
	n, err := strconv.Atoi(strings.TrimSpace(line[1:]))
	if err != nil {
		return nil, err
	}
	args := make([]string, n)
	for i := range args {
		line, err := r.ReadString('\n')
		if err != nil {
			return nil, err
		}
		size, err := strconv.Atoi(strings.TrimSpace(line[1:]))
		if err != nil {
			return nil, err
		}
		arg := make([]byte, size+2)
		if _, err := io.ReadFull(r, arg); err != nil {
			return nil, err
		}
		args[i] = string(arg[:size])
	}
	return args, nil
}

func TestADeadlineIsKeptWhenRedisHangs(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0") // it never answers
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s := open(t, redisstore.Config{Addr: l.Addr().String()})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err = s.Get(ctx, broker.Key{Kind: "grant"})
	if err == nil || errors.Is(err, broker.ErrAbsent) {
		t.Errorf("got %v, want an error that is no answer", err)
	}
}

func TestAClosedStoreAnswersErrors(t *testing.T) {
	_, cfg := mini(t)
	s := open(t, cfg)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get(t.Context(), broker.Key{Kind: "grant"}); err == nil || errors.Is(err, broker.ErrAbsent) {
		t.Errorf("got %v, want an error that is no answer", err)
	}
}

func benchmark(b *testing.B, f func(s *redisstore.Store, i int64) error) {
	server := brokertest.StartRedis(b, "appendfsync everysec")
	s := open(b, redisstore.Config{Socket: server.Socket})
	i := int64(0)
	for b.Loop() {
		if err := f(s, i); err != nil {
			b.Fatal(err)
		}
		i++
	}
}

var (
	benchKey = broker.Key{Kind: "grant", Parts: []string{"main", "keycloak", "alice"}}
	benchBox = make([]byte, 2048)
)

func BenchmarkPut(b *testing.B) {
	benchmark(b, func(s *redisstore.Store, i int64) error {
		return s.Put(b.Context(), benchKey, i, benchBox, time.Hour)
	})
}

func BenchmarkGet(b *testing.B) {
	benchmark(b, func(s *redisstore.Store, i int64) error {
		if i == 0 {
			return s.Put(b.Context(), benchKey, 0, benchBox, 0)
		}
		_, err := s.Get(b.Context(), benchKey)
		return err
	})
}

func BenchmarkPulse(b *testing.B) {
	benchmark(b, func(s *redisstore.Store, _ int64) error {
		_, err := s.Pulse(b.Context())
		return err
	})
}

// BenchmarkTell is from telling a note until it is heard.
func BenchmarkTell(b *testing.B) {
	var notes <-chan string
	benchmark(b, func(s *redisstore.Store, i int64) error {
		if i == 0 {
			notes = listen(b, s)
			hears(b, notes, "")
		}
		err := s.Tell(b.Context(), "note")
		hears(b, notes, "note")
		return err
	})
}
