package httpserver_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
	"tokenbroker/broker/httpserver"
	pb "tokenbroker/proto/tokenbroker/v1"
)

var bob = broker.ServerKey{Hub: "main", User: "bob"}

// neighbour makes bob ready, too, and returns what asks for his token, over a
// connection that is kept. This very process is in his container, too.
func (s *stack) neighbour() (ask func() error) {
	s.t.Helper()
	s.loginAs("bob")
	s.attestor.Run("jupyter-bob", 1, int32(os.Getpid()))
	_, err := s.b.Register(context.Background(), "main", broker.RegisterRequest{User: "bob", ContainerName: "jupyter-bob"})
	check(s.t, err)
	path := s.sock(bob)
	b, end := dialJSON(s.t, sockets{json: path})
	s.t.Cleanup(end)
	check(s.t, b.ask())
	return b.ask
}

// asks are the ways to ask for alice's token, each over one connection.
func (s *stack) asks() map[string]func() said {
	s.t.Helper()
	path := s.sock(alice)
	c := pb.NewWorkloadClient(s.grpc(path))
	client := s.http(path)
	open := func(url string) said {
		resp, err := client.Get("http://localhost" + url)
		check(s.t, err)
		defer resp.Body.Close()
		if resp.StatusCode == http.StatusOK {
			if !strings.Contains(url, "watch") { // which goes on for ever
				io.Copy(io.Discard, resp.Body) // so that the connection is kept
			}
			return said{}
		}
		var p struct {
			Code, Detail, Next string
			After              int64 `json:"retry_after"`
		}
		check(s.t, json.NewDecoder(resp.Body).Decode(&p))
		if got := resp.Header.Get("Retry-After"); p.Code == "limited" && got != fmt.Sprint(p.After) {
			s.t.Errorf("Retry-After: %s, and %d in the body", got, p.After)
		}
		return said{Code: p.Code, Sentence: p.Detail, Next: p.Next, RetryAfter: p.After}
	}
	told := func(err error) said {
		if err == nil {
			return said{}
		}
		got, _ := saidBy(s.t, err)
		return got
	}
	return map[string]func() said{
		"gRPC": func() said {
			_, err := c.GetToken(context.Background(), &pb.GetTokenRequest{})
			return told(err)
		},
		"gRPC, the list": func() said {
			_, err := c.ListProviders(context.Background(), &pb.ListProvidersRequest{})
			return told(err)
		},
		"gRPC, a watch": func() said {
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			w, err := c.Watch(ctx, &pb.WatchRequest{})
			if err == nil {
				_, err = w.Recv()
			}
			return told(err)
		},
		"JSON":          func() said { return open("/v1/token") },
		"JSON, nothing": func() said { return open("/v1/nothing") },
		"JSON, a watch": func() said { return open("/v1/watch") },
	}
}

func TestAServerThatAsksTooOftenIsToldSo(t *testing.T) {
	s := newStack(t, setup{rate: 10})
	s.ready()
	neighbour := s.neighbour()
	ask := s.asks()["JSON"]
	var got said
	for i := 0; got.Code != "limited"; i++ {
		if got = ask(); i == 10_000 {
			t.Fatal("10,000 requests were answered, at 10 a second")
		}
	}
	if want := "this server asks the token broker more than 10 times a second"; got.Sentence != want {
		t.Errorf("told %q, want %q", got.Sentence, want)
	}
	check(t, neighbour())
}

// Whatever is asked, a limit is told in the same way and is in the audit.
func TestALimitIsToldWhateverIsAsked(t *testing.T) {
	s := newStack(t, setup{})
	s.ready()
	asks := s.asks()
	for name, ask := range asks {
		if got := ask(); got.Code == "limited" {
			t.Errorf("%s: %+v, before the limit", name, got)
		}
	}
	s.limit.Store(broker.Errorf(broker.Limited, "that is enough"))
	for name, ask := range asks {
		got := ask()
		if got.Code != "limited" || got.Sentence != "that is enough" || got.Next != "slow down" || got.RetryAfter != 1 {
			t.Errorf("%s: told %+v", name, got)
		}
		if e := s.audit.last(t); e.Code != broker.Limited || e.User != "alice" || e.Outcome != "refused" {
			t.Errorf("%s: the audit has %+v", name, e)
		}
	}
}

func TestAServerHasSoManyRequestsAnsweredAtOnce(t *testing.T) {
	const atOnce = 128
	s := newStack(t, setup{rate: 1000})
	s.ready()
	neighbour := s.neighbour()
	s.expire()
	check(t, neighbour()) // gets a new token, before the provider hangs
	goOn := make(chan struct{})
	s.provider.Next(brokertest.Answer{Before: func() { <-goOn }})
	told := make(chan string, atOnce+1)
	clients := make([]pb.WorkloadClient, 5)
	for i := range clients {
		clients[i] = pb.NewWorkloadClient(s.grpc(s.sock(alice)))
	}
	for i := range atOnce + 1 {
		go func() {
			_, err := clients[i%len(clients)].GetToken(context.Background(), &pb.GetTokenRequest{})
			if err == nil {
				told <- ""
				return
			}
			got, _ := saidBy(t, err)
			told <- got.Sentence
		}()
	}
	if got, want := <-told, "128 requests of this server are being answered already"; got != want {
		t.Errorf("the first to be told: %q, want %q", got, want)
	}
	check(t, neighbour())
	close(goOn)
	for range atOnce {
		if got := <-told; got != "" {
			t.Errorf("another one: %q, want an answer", got)
		}
	}
	for name, ask := range s.asks() { // all were counted out
		if got := ask(); got.Code == "limited" {
			t.Errorf("%s, later: %+v", name, got)
		}
	}
}

// wire is an HTTP/2 connection that is made by hand.
type wire struct {
	net.Conn
	*http2.Framer
	out     io.Writer
	buf     bytes.Buffer
	enc     *hpack.Encoder
	headers []byte // of a request for a token
	stream  uint32
}

// dialWire shakes hands and reads, to the end, what comes.
func dialWire(t testing.TB, path string, settings ...http2.Setting) *wire {
	t.Helper()
	c, err := net.Dial("unix", path)
	check(t, err)
	t.Cleanup(func() { c.Close() })
	w := newWire(c, c)
	check(t, w.begin(settings...))
	go io.Copy(io.Discard, c)
	return w
}

// newWire writes to out what is to be sent over c.
func newWire(c net.Conn, out io.Writer) *wire {
	w := &wire{Conn: c, Framer: http2.NewFramer(out, nil), out: out, stream: 1}
	w.enc = hpack.NewEncoder(&w.buf)
	w.headers = w.encode(hpack.HeaderField{})
	return w
}

// begin shakes hands.
func (w *wire) begin(settings ...http2.Setting) error {
	if _, err := io.WriteString(w.out, http2.ClientPreface); err != nil {
		return err
	}
	return w.WriteSettings(settings...)
}

func (w *wire) encode(more hpack.HeaderField) []byte {
	w.buf.Reset()
	for _, f := range []hpack.HeaderField{
		{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: pb.Workload_GetToken_FullMethodName},
		{Name: ":authority", Value: "localhost"}, {Name: "content-type", Value: "application/grpc"}, {Name: "te", Value: "trailers"}, more,
	} {
		if f.Name != "" {
			f.Sensitive = true // not kept in the table, so that each block stands for itself
			w.enc.WriteField(f)
		}
	}
	return bytes.Clone(w.buf.Bytes())
}

// open begins a request.
func (w *wire) open(headers []byte, whole bool) (stream uint32, err error) {
	stream = w.stream
	w.stream += 2
	return stream, w.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: headers, EndHeaders: whole})
}

// ask is a whole request.
func (w *wire) ask() error {
	stream, err := w.open(w.headers, true)
	if err == nil {
		err = w.WriteData(stream, true, make([]byte, 5)) // an empty message
	}
	return err
}

// floods are what a client can do on one connection, each a piece of a flood.
var floods = []struct {
	why      string
	settings []http2.Setting
	piece    func(*wire) error
	ends     bool // the connection, soon
}{
	{why: "requests", piece: (*wire).ask},
	{why: "requests whose answers may not be sent", settings: []http2.Setting{{ID: http2.SettingInitialWindowSize, Val: 0}}, piece: (*wire).ask},
	{why: "requests that never get a message", piece: func(w *wire) error { _, err := w.open(w.headers, true); return err }},
	{why: "rapid resets (CVE-2023-44487)", piece: func(w *wire) error {
		stream, err := w.open(w.headers, true)
		if err == nil {
			err = w.WriteRSTStream(stream, http2.ErrCodeCancel)
		}
		return err
	}},
	{why: "requests and resets", piece: func(w *wire) error {
		err := w.ask()
		if err == nil {
			err = w.WriteRSTStream(w.stream-2, http2.ErrCodeCancel)
		}
		return err
	}},
	{why: "pings", ends: true, piece: func(w *wire) error { return w.WritePing(false, [8]byte{}) }},
	{why: "settings", piece: func(w *wire) error {
		return w.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 20}, http2.Setting{ID: http2.SettingHeaderTableSize, Val: 0})
	}},
	{why: "window updates", piece: func(w *wire) error { return w.WriteWindowUpdate(0, 1) }},
	{why: "priorities", piece: func(w *wire) error { return w.WritePriority(1, http2.PriorityParam{Weight: 1}) }},
	{why: "frames of no known type", piece: func(w *wire) error { return w.WriteRawFrame(0xbe, 0, 0, make([]byte, 8)) }},
	{why: "empty continuations of one header", piece: continuation(nil)},
	{why: "continuations without end", ends: true, piece: continuation([]byte(strings.Repeat("\x00\x01a\x01b", 200)))},
	{why: "headers of 8 KiB", piece: func(w *wire) error {
		_, err := w.open(w.encode(hpack.HeaderField{Name: "x", Value: strings.Repeat("x", 8<<10)}), true)
		return err
	}},
	{why: "a header that unfolds to megabytes", piece: func(w *wire) error {
		_, err := w.open(append(append([]byte("\x40\x01x\x7f\xa1\x1e"), bytes.Repeat([]byte("x"), 4000)...), bytes.Repeat([]byte{0xbe}, 4000)...), true)
		return err
	}},
	{why: "data of no stream", piece: func(w *wire) error { return w.WriteData(1, false, make([]byte, 1<<10)) }},
}

// continuation begins a header and goes on with it.
func continuation(block []byte) func(*wire) error {
	return func(w *wire) error {
		if w.stream == 1 {
			_, err := w.open(w.headers, false)
			return err
		}
		return w.WriteContinuation(1, false, block)
	}
}

// TestAFloodIsReadNoFasterThanItsServerMayAsk: whatever it is made of, the broker
// takes in what the rate allows and no more; the rest waits where it is. A
// neighbour is served, and when it is over nothing is left.
func TestAFloodIsReadNoFasterThanItsServerMayAsk(t *testing.T) {
	const (
		rate = 10
		most = rate * 1024 // bytes at once, and again each second
		held = 256 << 10   // by the kernel, for one connection, and a little more
	)
	for _, tt := range floods {
		t.Run(tt.why, func(t *testing.T) {
			s := newStack(t, setup{rate: rate})
			s.ready()
			neighbour := s.neighbour()
			w := dialWire(t, s.sock(alice), tt.settings...)
			counted := &counter{Conn: w.Conn}
			w.Framer = http2.NewFramer(counted, nil)
			before := runtime.NumGoroutine()
			began := time.Now()
			patience := 200 * time.Millisecond
			if tt.ends {
				patience = time.Minute
			}
			w.SetWriteDeadline(began.Add(patience))
			var err error
			for i := 0; err == nil && counted.n < 64<<20; i++ {
				err = tt.piece(w)
				if i%2000 == 0 {
					check(t, neighbour())
				}
			}
			took := time.Since(began)
			if over := counted.n - held - most - int(took.Seconds()*most); over > 0 {
				t.Errorf("%d bytes were taken within %s, %d too many", counted.n, took, over)
			}
			if held := errors.Is(err, os.ErrDeadlineExceeded); held == tt.ends {
				t.Errorf("after %d bytes and %s: %v", counted.n, took, err)
			}
			// A stream has a goroutine, and there are at most 32.
			if more := runtime.NumGoroutine() - before; more > 100 {
				t.Errorf("%d goroutines more than before", more)
			}
			check(t, neighbour())
		})
	}
}

// counter counts what is written.
type counter struct {
	net.Conn
	n int
}

func (c *counter) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.n += n
	return n, err
}

// An HTTP/1.1 client has the same limits. The requests come in one go, and
// nobody reads the answers.
func TestAFloodOfHTTPIsReadNoFasterThanItsServerMayAsk(t *testing.T) {
	const (
		rate = 10
		most = rate * 1024
		held = 256 << 10
	)
	for why, request := range map[string]string{
		"requests":       "GET /v1/token HTTP/1.1\r\nHost: localhost\r\n\r\n",
		"rubbish":        "GET /v1/nothing HTTP/1.1\r\nHost: evil.example\r\nOrigin: x\r\n\r\n",
		"large headers":  "GET /v1/token HTTP/1.1\r\nHost: localhost\r\nX: " + strings.Repeat("x", 15<<10) + "\r\n\r\n",
		"bodies":         "POST /v1/token HTTP/1.1\r\nHost: localhost\r\nContent-Length: 60000\r\n\r\n" + strings.Repeat("x", 60_000),
		"unfolding body": "POST /v1/token HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" + strings.Repeat("1\r\nx\r\n", 10_000) + "0\r\n\r\n",
	} {
		t.Run(why, func(t *testing.T) {
			s := newStack(t, setup{rate: rate})
			s.ready()
			neighbour := s.neighbour()
			conn, err := net.Dial("unix", s.sock(alice))
			check(t, err)
			defer conn.Close()
			c := &counter{Conn: conn}
			began := time.Now()
			c.SetWriteDeadline(began.Add(200 * time.Millisecond))
			for err == nil {
				_, err = io.WriteString(c, request)
			}
			took := time.Since(began)
			if over := c.n - held - most - int(took.Seconds()*most); over > 0 {
				t.Errorf("%d bytes were taken within %s, %d too many", c.n, took, over)
			}
			check(t, neighbour())
		})
	}
}

// A server's connections are its own affair: however many it holds and opens, of
// whatever kind, its neighbour gets in.
func TestConnectionsThatDoNothingHoldUpNobody(t *testing.T) {
	for _, say := range []string{"", "GET /v1/token HTTP/1.1\r\n", http2.ClientPreface[:10], http2.ClientPreface,
		"POST /v1/token HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n"} {
		s := newStack(t, setup{rate: 10})
		s.ready()
		neighbour := s.neighbour()
		path := s.sock(alice)
		var tried sync.WaitGroup
		for range 300 { // 64 get in, some wait in the kernel, the rest is turned away
			c, err := net.Dial("unix", path)
			check(t, err)
			t.Cleanup(func() { c.Close() })
			tried.Go(func() {
				c.SetWriteDeadline(time.Now().Add(time.Second))
				io.WriteString(c, say)
			})
		}
		tried.Wait()
		check(t, neighbour())
		b, end := dialGRPC(t, sockets{grpc: s.sock(bob)})
		check(t, b.ask())
		end()
	}
}

func TestAConnectionIsNotForEver(t *testing.T) {
	for age, closes := range map[time.Duration]bool{time.Hour: false, 0: true} {
		undo := httpserver.ShortenAge(age)
		s := newStack(t, setup{})
		undo()
		s.ready()
		resp, err := s.http(s.sock(alice)).Get("http://localhost/v1/token")
		check(t, err)
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK || resp.Close != closes {
			t.Errorf("after %s: %s, and the end is %v, want 200 and %v", age, resp.Status, resp.Close, closes)
		}
	}
}

// TestNoHubCallAnswersAContainersToken goes through all that a hub can call. Two
// answers have room for an access token, and that is the hub's own.
func TestNoHubCallAnswersAContainersToken(t *testing.T) {
	has := map[string]bool{"CheckSession": true}
	methods := pb.File_tokenbroker_v1_hub_proto.Services().ByName("Hub").Methods()
	for i := range methods.Len() {
		m := methods.Get(i)
		out := string(m.Output().Name())
		room := false
		for j := range m.Output().Fields().Len() {
			f := m.Output().Fields().Get(j)
			room = room || f.Message() != nil && f.Message().Name() == "HubToken" || strings.Contains(string(f.Name()), "token")
		}
		if room != has[string(m.Name())] {
			t.Errorf("%s: whether %s has room for a token is %v", m.Name(), out, room)
		}
	}

	s := newStack(t, setup{})
	handle := s.ready()
	c := pb.NewWorkloadClient(s.grpc(s.sock(alice)))
	containers, err := c.GetToken(context.Background(), &pb.GetTokenRequest{Audience: "storage"})
	check(t, err)
	hub := pb.NewHubClient(s.grpc(s.hub))
	session, err := hub.CheckSession(context.Background(), &pb.CheckSessionRequest{Provider: "keycloak", Handle: handle.Reveal(), User: "alice"})
	check(t, err)
	refreshed := s.post(endpoint, refreshForm(handle.Reveal()))
	for why, got := range map[string]string{"CheckSession": session.GetToken().GetAccessToken(), "the token endpoint": refreshed.str("access_token")} {
		if got == "" || got == containers.AccessToken {
			t.Errorf("%s answers %q, and the container's is %q", why, got, containers.AccessToken)
		}
	}
	// Nor anybody's else: a handle and a user that don't belong together are nothing.
	session, err = hub.CheckSession(context.Background(), &pb.CheckSessionRequest{Provider: "keycloak", Handle: handle.Reveal(), User: "bob"})
	check(t, err)
	if session.Active || session.Token != nil {
		t.Errorf("alice's handle for bob: %v", session)
	}
	// Nor is a container's service on the hub's socket.
	err = s.grpc(s.hub).Invoke(context.Background(), pb.Workload_GetToken_FullMethodName, &pb.GetTokenRequest{}, new(pb.GetTokenResponse))
	if err == nil || !strings.Contains(err.Error(), "unknown service") {
		t.Errorf("GetToken on the hub's socket: %v", err)
	}
}
