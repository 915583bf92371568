package httpserver_test

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/status"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
	"tokenbroker/broker/httpserver"
	pb "tokenbroker/proto/tokenbroker/v1"
)

// A teller is an open watch, over either protocol.
type teller interface {
	// next waits for what is told next; code is that of a refusal, or why the
	// watch ended.
	next() (event, token, code string)
}

type grpcTeller struct {
	t      testing.TB
	stream interface {
		Recv() (*pb.WatchResponse, error)
	}
}

func (g grpcTeller) next() (event, token, code string) {
	g.t.Helper()
	m, err := g.stream.Recv()
	if err != nil {
		if len(status.Convert(err).Details()) == 0 {
			return "", "", "the stream ended"
		}
		said, _ := saidBy(g.t, err)
		return "", "", said.Code
	}
	return m.Event, m.GetToken().GetAccessToken(), m.GetRefusal().GetCode()
}

type sseTeller struct {
	t    testing.TB
	body *bufio.Reader
}

func (s sseTeller) next() (event, token, code string) {
	s.t.Helper()
	var data struct {
		Token string `json:"access_token"`
		Code  string `json:"code"`
	}
	for {
		line, err := s.body.ReadString('\n')
		if err != nil {
			return "", "", "the stream ended"
		}
		if v, ok := strings.CutPrefix(line, "event: "); ok {
			event = strings.TrimSpace(v)
		}
		if v, ok := strings.CutPrefix(line, "data: "); ok {
			check(s.t, json.Unmarshal([]byte(v), &data))
		}
		if line == "\n" {
			return event, data.Token, data.Code
		}
	}
}

// watches opens alice's watch over both protocols.
func (s *stack) watches() map[string]teller {
	s.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	s.t.Cleanup(cancel)
	stream, err := pb.NewWorkloadClient(s.grpc(s.sock(alice))).Watch(ctx, &pb.WatchRequest{Audience: "storage"})
	check(s.t, err)
	r := newRequest(s.t, "GET", "/v1/watch/keycloak?audience=storage", "", "").WithContext(ctx)
	resp, err := s.http(s.sock(alice)).Do(r)
	check(s.t, err)
	s.t.Cleanup(func() { resp.Body.Close() })
	if resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != "text/event-stream" || resp.Header.Get("Cache-Control") != "no-store" {
		s.t.Fatalf("the answer is %s with %v", resp.Status, resp.Header)
	}
	return map[string]teller{"gRPC": grpcTeller{s.t, stream}, "JSON": sseTeller{s.t, bufio.NewReader(resp.Body)}}
}

func TestBothEdgesTellWhatChanges(t *testing.T) {
	s := newStack(t, setup{})
	s.ready()
	all := s.watches()
	expect := func(event, code string) {
		t.Helper()
		for name, w := range all {
			got, token, said := w.next()
			if got != event || said != code || (token != "") != (event == "token") {
				t.Errorf("%s: told %q (%s), want %q", name, got, said, event)
			}
		}
	}
	expect("token", "")
	s.disconnect()
	expect("revoked", "revoked")
	time.Sleep(time.Millisecond) // logins are told apart by their time
	s.login()
	expect("token", "")
	_, err := s.b.Unregister(context.Background(), "main", "alice", "", 0)
	check(t, err)
	for name, w := range all { // with the server its socket goes, and who was on it
		if event, _, _ := w.next(); event == "token" {
			t.Errorf("%s: a token is told after the server's end", name)
		}
	}
}

func TestWatchThatCannotBeginIsRefusedAsARequestIs(t *testing.T) {
	s := newStack(t, setup{})
	s.ready()
	stream, err := pb.NewWorkloadClient(s.grpc(s.sock(alice))).Watch(context.Background(), &pb.WatchRequest{Provider: "nowhere"})
	check(t, err)
	if _, _, code := (grpcTeller{t, stream}).next(); code != "invalid" {
		t.Errorf("gRPC: %q, want invalid", code)
	}
	resp, err := s.http(s.sock(alice)).Do(newRequest(t, "GET", "/v1/watch/nowhere", "", ""))
	check(t, err)
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusBadRequest || resp.Header.Get("Content-Type") != "application/problem+json" {
		t.Errorf("JSON: %s with %v", resp.Status, resp.Header)
	}
}

// A reader who takes nothing is dropped: the broker waits for nobody. The tokens
// are larger than what the socket holds.
func TestSlowReaderIsDropped(t *testing.T) {
	t.Cleanup(httpserver.ShortenReads(100 * time.Millisecond))
	s := newStack(t, setup{provider: func(p *brokertest.Provider) broker.Provider { return verbose{p} }})
	s.ready()
	c, err := net.Dial("unix", s.sock(alice))
	check(t, err)
	defer c.Close()
	_, err = io.WriteString(c, "GET /v1/watch HTTP/1.1\r\nHost: localhost\r\n\r\n")
	check(t, err)
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if e := s.audit.last(t); e.Action == "watch" && e.Code == broker.Limited {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("the reader was not dropped")
		}
	}
}

// verbose is a provider with very long tokens.
type verbose struct{ broker.Provider }

func (p verbose) Exchange(ctx context.Context, access broker.Secret, t broker.Target) (broker.Issued, error) {
	iss, err := p.Provider.Exchange(ctx, access, t)
	iss.AccessToken = broker.NewSecret(strings.Repeat("x", 3<<20))
	return iss, err
}
