//go:build linux

package attacks_test

import (
	"bufio"
	"context"
	"fmt"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"tokenbroker/broker"
	pb "tokenbroker/proto/tokenbroker/v1"
)

func (w *world) protocol(t *testing.T, alice *server) {
	trudy := w.up(t, "main", "trent", "trent")
	trudy.unread = true
	w.browser(t, trudy)
	w.smuggled(t, trudy)
	w.otherServices(t, trudy)
	w.flood(t, alice, trudy, "1,000 connections that never read", "hold", 1000)
	w.flood(t, alice, trudy, "10,000 half requests", "half", 10000)
}

// browser is a web page in the user's browser, through a proxy that somebody put
// before the socket.
func (w *world) browser(t *testing.T, s *server) {
	for _, a := range []struct{ name, header, reason string }{
		{"a web page asks", "Origin: https://evil.example", "header Origin"},
		{"a page without an origin asks", "Origin: null", "header Origin"},
		{"a foreign Host", "Host: evil.example", "header Host"},
		{"a Host that begins well", "Host: localhost.evil.example", "header Host"},
	} {
		w.refused(t, attempt{"protocol", a.name, a.header, broker.Invalid, a.reason}, execIn(t, s.name, "ask", socket, "", a.header))
	}
}

// smuggled are bytes in which a request hides behind another, from a proxy that
// has looked only at the first.
func (w *world) smuggled(t *testing.T, s *server) {
	const hidden = "GET /v1/token?audience=storage HTTP/1.1\r\nHost: localhost\r\n\r\n"
	for _, a := range []struct{ name, tried, bytes string }{
		{"HTTP behind a gRPC preface", "PRI * HTTP/2.0, then GET", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + hidden},
		{"PRI as a method", "PRI /v1/token HTTP/1.1, then GET", "PRI /v1/token HTTP/1.1\r\nHost: localhost\r\n\r\n" + hidden},
		{"HTTP/2 by upgrade", "Upgrade: h2c with Origin, then GET", "GET /v1/token HTTP/1.1\r\nHost: localhost\r\nOrigin: https://evil.example\r\nConnection: close, Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n\r\n" + hidden},
		{"two lengths", "Content-Length and Transfer-Encoding, GET inside", fmt.Sprintf(
			"POST /v1/token HTTP/1.1\r\nHost: localhost\r\nOrigin: https://evil.example\r\nContent-Length: %d\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n0\r\n\r\n%s", 5+len(hidden), hidden)},
		{"GET with a body", "Origin, Content-Length, GET inside", fmt.Sprintf(
			"GET /v1/token HTTP/1.1\r\nHost: localhost\r\nOrigin: https://evil.example\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", len(hidden), hidden)},
	} {
		cmd := dockerCommand("exec", "-i", s.name, "/attacker", "raw", socket)
		cmd.Stdin = strings.NewReader(a.bytes)
		out, err := cmd.CombinedOutput()
		got := read(t, out, err)
		if strings.Contains(got.Raw, "access_token") {
			t.Errorf("%s: GOT A TOKEN: %q", a.name, got.Raw)
		}
		said, _, _ := strings.Cut(got.Raw, "\r\n")
		if !strings.HasPrefix(said, "HTTP/1.1 ") {
			said = fmt.Sprintf("%d bytes, then closed", len(got.Raw))
		}
		_, ref, refused := strings.Cut(got.Raw, `"ref":"`)
		audit := "- (no request was read)"
		if refused {
			ref, _, _ = strings.Cut(ref, `"`)
			e := w.find(t, "audit line "+ref, func(e broker.Entry) bool { return e.Ref == ref })
			audit = e.Action + " refused: " + e.Reason
		}
		theTable.add(line{"protocol", a.name, a.tried, said, audit})
	}
}

// otherServices asks on a server's socket for what is not its.
func (w *world) otherServices(t *testing.T, s *server) {
	w.refused(t, attempt{"protocol", "a container speaks as a hub", "POST /v1/register on its own socket", broker.Invalid, "nothing at this path"},
		execIn(t, s.name, "ask", socket, "POST /v1/register"))
	w.refused(t, attempt{"protocol", "a container trades a handle", "POST /oauth2/token/idp on its own socket", broker.Invalid, "nothing at this path"},
		execIn(t, s.name, "ask", socket, "POST /oauth2/token/idp"))
	conn, err := grpc.NewClient("unix:"+s.socket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for name, call := range map[string]func(context.Context) error{
		"the hub's service over gRPC": func(ctx context.Context) error {
			_, err := pb.NewHubClient(conn).Register(ctx, &pb.RegisterRequest{User: "alice"})
			return err
		},
		"the administrator's service over gRPC": func(ctx context.Context) error {
			_, err := pb.NewAdminClient(conn).Disconnect(ctx, &pb.DisconnectRequest{User: "alice"})
			return err
		},
	} {
		err := call(t.Context())
		if status.Code(err) != codes.Unimplemented {
			t.Errorf("%s on a server's socket: %v", name, err)
		}
		theTable.add(line{"protocol", name, "on a server's socket", fmt.Sprint(err), "- (there is no such service)"})
	}
}

// flood fills a server's socket; others are served meanwhile.
func (w *world) flood(t *testing.T, alice, s *server, name, command string, n int) {
	cmd := dockerCommand("exec", "-i", s.name, "/attacker", command, socket, fmt.Sprint(n))
	stop, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	said, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	alice.served(t)
	meanwhile := execIn(t, s.name, "ask", socket)
	s.got(meanwhile)
	stop.Close()
	cmd.Wait()
	eventually(t, "its own next answer", func() bool {
		a := execIn(t, s.name, "ask", socket)
		s.got(a)
		return a.Status == 200
	})
	theTable.add(line{"protocol", name, "in one container: " + strings.TrimSpace(said),
		fmt.Sprintf("alice: 200; the container itself meanwhile: %d %s%s, afterwards 200", meanwhile.Status, meanwhile.said.Code, meanwhile.Error),
		"- (the log counts connections that were turned away)"})
}
