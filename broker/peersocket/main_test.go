package peersocket_test

import (
	"bufio"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
	"tokenbroker/broker/peersocket"
)

// TestMain lets the test binary be a second process: one that dials, or a
// broker that can be killed.
func TestMain(m *testing.M) {
	switch os.Getenv("PEERSOCKET_ACT") {
	case "dial":
		actDial()
	case "broker":
		actBroker()
	case "hub":
		actHub()
	case "flood":
		actFlood()
	default:
		brokertest.Main(m)
	}
}

// actDial connects, sends a request line, prints what comes back and waits to
// be killed or for the end of its input.
func actDial() {
	c, err := net.Dial("unix", os.Args[1])
	if err != nil {
		fmt.Println("dial:", err)
		os.Exit(0)
	}
	fmt.Fprint(c, "GET / HTTP/1.1\r\n\r\n")
	answer, _ := bufio.NewReader(c).ReadString('\n')
	fmt.Printf("answer: %q\n", answer)
	io.Copy(io.Discard, os.Stdin)
	os.Exit(0)
}

// actFlood knocks a thousand times, says how that was and goes on until the end
// of its input.
func actFlood() {
	answered := 0
	knock := func() {
		c, err := net.Dial("unix", os.Args[1])
		if err != nil {
			fmt.Println("dial:", err)
			os.Exit(0)
		}
		fmt.Fprint(c, "GET / HTTP/1.1\r\n\r\n")
		if n, _ := c.Read(make([]byte, 1)); n > 0 {
			answered++
		}
		c.Close()
	}
	for range 1000 {
		knock()
	}
	if answered == 0 {
		fmt.Println("1000 connections, none was let in")
	}
	go func() {
		io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	for {
		knock()
	}
}

// actBroker opens a server's socket and a hub's, and waits to be killed.
func actBroker() {
	s, err := peersocket.NewServers(os.Args[1], quiet)
	if err == nil {
		err = s.Open(alice)
	}
	if err == nil {
		_, err = peersocket.ListenHub(os.Args[2], "main", uint32(os.Getuid()), untold, quiet)
	}
	fmt.Printf("open: %v\n", err)
	io.Copy(io.Discard, os.Stdin)
	os.Exit(0)
}

// actHub opens the socket of a hub that runs as another uid, which we may not
// give a file to.
func actHub() {
	_, err := peersocket.ListenHub(os.Args[1], "main", uint32(os.Getuid())+1, untold, quiet)
	fmt.Printf("open: %v\n", err)
	io.Copy(io.Discard, os.Stdin)
	os.Exit(0)
}

// A second is another process of ours.
type second struct {
	*exec.Cmd
	pid int
	out *bufio.Reader
	end func() // lets it end by itself and waits
}

// start runs the test binary as a second process; uid 0 means as we are.
func start(t *testing.T, act string, uid uint32, args ...string) second {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, args...)
	cmd.Env = append(os.Environ(), "PEERSOCKET_ACT="+act)
	if uid != 0 {
		cmd.Path = readable(t, exe)
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	end := func() {
		in.Close()
		cmd.Wait()
	}
	t.Cleanup(end)
	return second{cmd, cmd.Process.Pid, bufio.NewReader(out), end}
}

// readable copies the test binary to where another uid can run it.
func readable(t *testing.T, exe string) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "peersocket")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	path := dir + "/peersocket.test"
	if err := os.WriteFile(path, b, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// says reads a line of a second process.
func (s second) says(t *testing.T) string {
	t.Helper()
	line, err := s.out.ReadString('\n')
	if err != nil {
		t.Fatalf("second process: %v", err)
	}
	return strings.TrimSpace(line)
}

var (
	quiet = slog.New(slog.DiscardHandler)
	// untold is told of strangers, who are not what a test is about.
	untold = func(*broker.Peer, string, error) {}
	alice  = broker.ServerKey{Hub: "main", User: "alice"}
	bob    = broker.ServerKey{Hub: "main", User: "bob", Server: "gpu"}
)

// newServers makes Servers in a directory with a short path.
func newServers(t *testing.T) (*peersocket.Servers, string) {
	t.Helper()
	dir := shortDir(t) + "/servers"
	s, err := peersocket.NewServers(dir, quiet)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Shutdown() })
	return s, dir
}

// shortDir is t.TempDir without the name of the test, which can be too long
// for a socket.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ps")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// open opens k and returns the path of its socket.
func open(t *testing.T, s *peersocket.Servers, k broker.ServerKey) string {
	t.Helper()
	if err := s.Open(k); err != nil {
		t.Fatal(err)
	}
	dir, err := s.Directory(k)
	if err != nil {
		t.Fatal(err)
	}
	return dir + "/broker.sock"
}

// dial connects and sends hello.
func dial(t *testing.T, path, hello string) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if _, err := io.WriteString(c, hello); err != nil {
		t.Fatal(err)
	}
	return c
}

// knowsPeer is what the edges see of a connection.
type knowsPeer interface {
	net.Conn
	Peer() *broker.Peer
}

// accept takes one connection from l.
func accept(t *testing.T, l net.Listener) knowsPeer {
	t.Helper()
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(knowsPeer)
}

// needRoot ends a test that must become another user.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() == 0 {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("this test must run as root, to connect as somebody else")
	}
	t.Skip("only root can connect as somebody else")
}
