package peersocket_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tokenbroker/broker"
	"tokenbroker/broker/peersocket"
)

const (
	sayHTTP = "GET /v1/providers HTTP/1.1\r\nHost: localhost\r\n\r\n"
	sayGRPC = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
)

var _ broker.Sockets = (*peersocket.Servers)(nil)

func TestAConnectionKnowsItsPeer(t *testing.T) {
	s, _ := newServers(t)
	dial(t, open(t, s, bob), sayHTTP)
	p := accept(t, s.HTTP()).Peer()
	if p.Server != bob || p.Hub != "" {
		t.Errorf("Peer: server %v, hub %q, want %v and no hub", p.Server, p.Hub, bob)
	}
	if int(p.PID) != os.Getpid() || int(p.UID) != os.Getuid() || int(p.GID) != os.Getgid() {
		t.Errorf("Peer: pid %d uid %d gid %d, want our own", p.PID, p.UID, p.GID)
	}
	if p.Pidfd == nil && p.Start == 0 {
		t.Error("Peer: neither pidfd nor start time")
	}
}

func TestThePidfdTellsWhenThePeerHasDied(t *testing.T) {
	s, _ := newServers(t)
	child := start(t, "dial", 0, open(t, s, alice))
	p := accept(t, s.HTTP()).Peer()
	if int(p.PID) != child.pid {
		t.Fatalf("Peer: pid %d, want %d", p.PID, child.pid)
	}
	if p.Pidfd == nil {
		t.Skip("this kernel has no pidfds")
	}
	if dead(t, p) {
		t.Error("the peer is said to be dead while it lives")
	}
	child.Process.Kill()
	child.Wait()
	if !dead(t, p) {
		t.Error("the peer is said to live after it was killed")
	}
}

func dead(t *testing.T, p *broker.Peer) bool {
	t.Helper()
	raw, err := p.Pidfd.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var n int
	raw.Control(func(fd uintptr) { n, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0) })
	if err != nil {
		t.Fatal(err)
	}
	return n == 1
}

func TestThePidfdIsClosedWithItsConnection(t *testing.T) {
	s, _ := newServers(t)
	dial(t, open(t, s, alice), sayHTTP)
	c := accept(t, s.HTTP())
	if c.Peer().Pidfd == nil {
		t.Skip("this kernel has no pidfds")
	}
	c.Close()
	if _, err := c.Peer().Pidfd.Stat(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("pidfd after Close: %v, want %v", err, os.ErrClosed)
	}
	if err := c.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("second Close: %v, want %v", err, net.ErrClosed)
	}
}

func TestTheFirstBytesDecide(t *testing.T) {
	for _, tt := range []struct {
		why, say string
		grpc     bool
	}{
		{"a request of HTTP/1.1", sayHTTP, false},
		{"the preface of HTTP/2", sayGRPC, true},
		{"a method that begins alike", "PRIVATE / HTTP/1.1\r\n\r\n", false},
		{"another one", "PROPFIND / HTTP/1.1\r\n\r\n", false},
		{"a single wrong byte", "\x16", false},
		{"more than one read takes", "POST / HTTP/1.1\r\n\r\n" + strings.Repeat("x", 5000), false},
	} {
		for _, by := range []int{len(tt.say), 1} {
			t.Run(fmt.Sprintf("%s, %d at a time", tt.why, by), func(t *testing.T) {
				s, _ := newServers(t)
				c := dial(t, open(t, s, alice), "")
				go func() {
					for rest := tt.say; rest != ""; rest = rest[min(by, len(rest)):] {
						io.WriteString(c, rest[:min(by, len(rest))])
					}
				}()
				l := s.HTTP()
				if tt.grpc {
					l = s.GRPC()
				}
				got := make([]byte, len(tt.say))
				if _, err := io.ReadFull(accept(t, l), got); err != nil {
					t.Fatal(err)
				}
				if string(got) != tt.say {
					t.Errorf("Read: got %.40q…, want %.40q…", got, tt.say)
				}
			})
		}
	}
}

func TestASilentConnectionIsEnded(t *testing.T) {
	for _, say := range []string{"", "PR"} {
		s, _ := newServers(t)
		s.Limit(1, time.Millisecond)
		c, err := net.Dial("unix", open(t, s, alice))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		io.WriteString(c, say) // it may be ended already
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Errorf("after %q: Read got a byte, want the end", say)
		}
	}
}

func TestAFullSocketTurnsTheNextOneAway(t *testing.T) {
	s, _ := newServers(t)
	s.Limit(2, time.Minute)
	path := open(t, s, alice)
	dial(t, path, sayHTTP)
	first := accept(t, s.HTTP())
	dial(t, path, sayGRPC)
	accept(t, s.GRPC())

	resp, err := http.ReadResponse(bufio.NewReader(dial(t, path, sayHTTP)), nil)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Fatal(err)
	}
	if resp.StatusCode != 429 || !strings.Contains(string(body), `"code":"limited"`) {
		t.Errorf("third connection: %s %s, want 429 limited", resp.Status, body)
	}
	frames, _ := io.ReadAll(dial(t, path, sayGRPC))
	if len(frames) < 13 || frames[3] != 4 || frames[12] != 7 {
		t.Errorf("third connection: frames %x, want SETTINGS and GOAWAY", frames)
	}

	dial(t, open(t, s, bob), sayHTTP) // another server's is not full
	accept(t, s.HTTP())

	first.Close()
	dial(t, path, sayHTTP)
	accept(t, s.HTTP())
}

func TestHangupEndsOnlyWhoIsMeant(t *testing.T) {
	s, _ := newServers(t)
	path := open(t, s, alice)
	child := start(t, "dial", 0, path)
	left := accept(t, s.HTTP())
	dial(t, path, sayHTTP)
	own := accept(t, s.HTTP())
	s.Hangup(bob, func(*broker.Peer) bool { return true }) // who has no socket here
	s.Hangup(alice, func(p *broker.Peer) bool { return int(p.PID) == child.pid })
	if err := left.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Close of who was meant: %v, want closed already", err)
	}
	if err := own.Close(); err != nil {
		t.Errorf("Close of who was not meant: %v, want nil", err)
	}
	dial(t, path, sayHTTP) // it listens on
	accept(t, s.HTTP())
}

func TestCloseEndsTheConnectionsOfOneServer(t *testing.T) {
	s, _ := newServers(t)
	path := open(t, s, alice)
	a := dial(t, path, sayHTTP)
	accept(t, s.HTTP())
	silent := dial(t, path, "")
	b := dial(t, open(t, s, bob), sayHTTP)
	atBob := accept(t, s.HTTP())

	if err := s.Close(alice); err != nil {
		t.Fatal(err)
	}
	for _, c := range []net.Conn{a, silent} {
		if _, err := io.ReadAll(c); err != nil && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("connection after Close: %v", err)
		}
	}
	if _, err := net.Dial("unix", path); err == nil {
		t.Error("the socket still answers after Close")
	}
	io.WriteString(atBob, "x")
	if _, err := io.ReadFull(b, make([]byte, 1)); err != nil {
		t.Errorf("another server's connection: %v", err)
	}
	if err := s.Close(alice); err != nil {
		t.Errorf("second Close: %v", err)
	}
}

func TestAContainerSeesTheNewSocketAfterARestart(t *testing.T) {
	dir := shortDir(t)
	child := start(t, "broker", 0, dir+"/servers", dir+"/hub/hub.sock")
	if got := child.says(t); got != "open: <nil>" {
		t.Fatal(got)
	}
	sock, err := filepath.Glob(dir + "/servers/*/broker.sock")
	if err != nil || len(sock) != 1 {
		t.Fatalf("sockets: %v, %v", sock, err)
	}
	mount, err := os.Open(filepath.Dir(sock[0])) // what a mount holds on to
	if err != nil {
		t.Fatal(err)
	}
	defer mount.Close()

	if _, err := peersocket.NewServers(dir+"/servers", quiet); err == nil || !strings.Contains(err.Error(), "another broker") {
		t.Errorf("NewServers beside a living broker: %v, want a refusal", err)
	}
	if _, err := peersocket.ListenHub(dir+"/hub/hub.sock", "main", 0, untold, quiet); err == nil || !strings.Contains(err.Error(), "another process answers") {
		t.Errorf("ListenHub beside a living broker: %v, want a refusal", err)
	}

	child.Process.Kill() // so it can't clean up
	child.Wait()
	s, err := peersocket.NewServers(dir+"/servers", quiet)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Shutdown()
	open(t, s, alice)
	dial(t, fmt.Sprintf("/proc/self/fd/%d/broker.sock", mount.Fd()), sayHTTP)
	if got := accept(t, s.HTTP()).Peer().Server; got != alice {
		t.Errorf("connection through the old mount: server %v, want %v", got, alice)
	}
	h, err := peersocket.ListenHub(dir+"/hub/hub.sock", "main", 0, untold, quiet)
	if err != nil {
		t.Fatal(err)
	}
	h.Close()
}

func TestOpenAgain(t *testing.T) {
	s, _ := newServers(t)
	path := open(t, s, alice)
	c := dial(t, path, sayHTTP)
	at := accept(t, s.HTTP())
	open(t, s, alice)
	io.WriteString(at, "x")
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Errorf("a connection after opening again: %v", err)
	}

	if err := os.Remove(path); err != nil { // as a cleaner of /run does
		t.Fatal(err)
	}
	open(t, s, alice)
	dial(t, path, sayHTTP)
	accept(t, s.HTTP())
}

// A container that could write to the directory has put something in the socket's
// place.
func TestOpenAgainPutsTheSocketBack(t *testing.T) {
	for name, plant := range map[string]func(path, target string) error{
		"a link": func(path, target string) error { return os.Symlink(target, path) },
		"a file": func(path, _ string) error { return os.WriteFile(path, nil, 0o600) },
		"a socket": func(path, _ string) error {
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
			if err == nil {
				t.Cleanup(func() { l.Close() })
				l.SetUnlinkOnClose(false)
			}
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			s, dir := newServers(t)
			path, target := open(t, s, alice), filepath.Join(dir, "target")
			if err := os.WriteFile(target, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(os.Remove(path), plant(path, target)); err != nil {
				t.Fatal(err)
			}
			open(t, s, alice)
			dial(t, path, sayHTTP)
			accept(t, s.HTTP())
			if info, err := os.Stat(target); err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("the link's target: %v, %v", info, err)
			}
		})
	}
}

func TestModesDoNotDependOnTheUmask(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0o077))
	s, dir := newServers(t)
	path := open(t, s, alice)
	for _, tt := range []struct {
		path string
		want os.FileMode
	}{{dir, 0o700}, {filepath.Dir(path), 0o755}, {path, 0o666}} {
		info, err := os.Stat(tt.path)
		if err != nil {
			t.Fatal(err)
		}
		if got := info.Mode().Perm(); got != tt.want {
			t.Errorf("mode of %s: %04o, want %04o", tt.path, got, tt.want)
		}
	}
}

func TestNewServersSaysWhatIsWrongWithTheDirectory(t *testing.T) {
	dir := shortDir(t)
	long := dir + "/" + strings.Repeat("d", 107-len(dir)-len("/")-len("/")-32-len("/broker.sock")+1)
	shared := dir + "/shared"
	file := dir + "/file"
	for _, err := range []error{os.Mkdir(shared, 0o755), os.WriteFile(shared+"/x", nil, 0o600), os.WriteFile(file, nil, 0o600)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		why, dir string
		want     []string
	}{
		{"one byte too long", long, []string{"servers.directory", long, "108 bytes", "107"}},
		{"a directory that others use", shared, []string{"servers.directory", shared, "0755", `"x"`, "0700"}},
		{"a file", file, []string{"servers.directory", file, "not a directory"}},
	} {
		_, err := peersocket.NewServers(tt.dir, quiet)
		if err == nil {
			t.Errorf("%s: no error", tt.why)
			continue
		}
		for _, want := range tt.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %q does not say %q", tt.why, err, want)
			}
		}
	}
	s, err := peersocket.NewServers(long[:len(long)-1], quiet)
	if err != nil {
		t.Fatalf("the longest path there is: %v", err)
	}
	defer s.Shutdown()
	open(t, s, alice)
}

func TestWhatIsNoSocketStays(t *testing.T) {
	s, _ := newServers(t)
	dir, _ := s.Directory(alice)
	if err := os.MkdirAll(dir+"/broker.sock", 0o755); err != nil { // as Docker makes of a missing file
		t.Fatal(err)
	}
	if err := s.Open(alice); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("Open over a directory: %v, want a refusal", err)
	}
	dir, _ = s.Directory(bob)
	if err := os.Symlink("/", dir); err != nil {
		t.Fatal(err)
	}
	if err := s.Open(bob); err == nil || !strings.Contains(err.Error(), "not a directory") {
		t.Errorf("Open over a link: %v, want a refusal", err)
	}
}

func TestEveryServerHasADirectoryOfItsOwn(t *testing.T) {
	keys := []broker.ServerKey{
		alice, bob,
		{Hub: "main", User: "bob"}, {Hub: "main", User: "bobg", Server: "pu"}, {Hub: "mainb", User: "ob", Server: "gpu"},
		{Hub: "main", User: "a/../b"}, {Hub: "main", User: "a b}"}, {Hub: "main", User: "zoë"},
		{Hub: "main", User: broker.UserID(strings.Repeat("é", 255))},
		{Hub: "main", User: "1:a"}, {Hub: "main", User: "", Server: "1:a"},
	}
	seen := make(map[string]broker.ServerKey)
	for _, k := range keys {
		name := peersocket.DirectoryName(k)
		if other, ok := seen[name]; ok {
			t.Errorf("%v and %v share %s", k, other, name)
		}
		seen[name] = k
	}
	// Made with hashlib.sha256(b"4:main5:alice0:").hexdigest()[:32]: the Python
	// half of a hub must come to the same names.
	if got, want := peersocket.DirectoryName(alice), "7153f24f4ca7d0d82168b39f57b5f5ae"; got != want {
		t.Errorf("directory of %v: %s, want %s", alice, got, want)
	}
}

func TestTwoThousandServers(t *testing.T) {
	s, _ := newServers(t)
	keys := make([]broker.ServerKey, 2000)
	for i := range keys {
		keys[i] = broker.ServerKey{Hub: "main", User: broker.UserID(fmt.Sprint("user", i))}
		path := open(t, s, keys[i])
		dial(t, path, sayHTTP)
	}
	seen := make(map[broker.ServerKey]bool)
	for range keys {
		seen[accept(t, s.HTTP()).Peer().Server] = true
	}
	if len(seen) != len(keys) {
		t.Errorf("connections of %d servers came, want %d", len(seen), len(keys))
	}
	if err := s.Shutdown(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.HTTP().Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept after Shutdown: %v, want %v", err, net.ErrClosed)
	}
	if err := s.Open(alice); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Open after Shutdown: %v, want %v", err, net.ErrClosed)
	}
}

func TestWhoeverTakesNothingIsGivenUp(t *testing.T) {
	s, _ := newServers(t)
	s.LimitReads(50 * time.Millisecond)
	path := open(t, s, alice)
	for _, later := range []time.Time{{}, time.Now().Add(time.Hour)} {
		dial(t, path, sayGRPC)
		c := accept(t, s.GRPC())
		c.SetWriteDeadline(later) // as a server that has more patience
		if _, err := c.Write(make([]byte, 8<<20)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("write with deadline %s: %v, want %v", later, err, os.ErrDeadlineExceeded)
		}
	}
	s.LimitReads(time.Hour) // its own deadline may be sooner
	dial(t, open(t, s, bob), sayGRPC)
	c := accept(t, s.GRPC())
	c.SetDeadline(time.Now().Add(time.Millisecond))
	if _, err := c.Write(make([]byte, 8<<20)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("write: %v, want %v", err, os.ErrDeadlineExceeded)
	}
}

// What comes over all connections of a server is read at its rate, and so are its
// connections. What waits ends with the connection and with the server.
func TestAServersBytesAreReadAtItsRate(t *testing.T) {
	s, _ := newServers(t)
	s.SetRate(1) // 1 KiB a second
	path := open(t, s, alice)
	var last knowsPeer
	var ended chan error
	for range 2 {
		dial(t, path, strings.Repeat("x", 64<<10))
		c, read := accept(t, s.HTTP()), make(chan error, 1)
		go func() {
			_, err := io.Copy(io.Discard, c)
			read <- err
		}()
		last, ended = c, read
	}
	spent := func() bool { // for the debt, connections wait, too
		c, err := net.DialTimeout("unix", path, time.Second)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		io.WriteString(c, "x")
		c.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
		_, err = c.Read(make([]byte, 1))
		return errors.Is(err, os.ErrDeadlineExceeded)
	}
	for !spent() {
	}
	last.Close()
	if err := <-ended; !errors.Is(err, net.ErrClosed) {
		t.Errorf("a read that waited: %v, want %v", err, net.ErrClosed)
	}
	if err := s.Close(alice); err != nil {
		t.Fatal(err)
	}
}

// What a server may ask at once is not read at once: a neighbour's request would
// wait behind all of it.
func TestABurstIsSpreadOverTime(t *testing.T) {
	const (
		rate  = 100
		burst = 50 << 10 // half of what is read in a second
	)
	s, _ := newServers(t)
	s.SetRate(rate)
	began := time.Now()
	dial(t, open(t, s, alice), strings.Repeat("x", burst))
	if _, err := io.ReadFull(accept(t, s.HTTP()), make([]byte, burst)); err != nil {
		t.Fatal(err)
	}
	took := time.Since(began)
	if least := time.Second / 4; took < least {
		t.Errorf("%d bytes were read within %s, before %s", burst, took, least)
	}
}

// A stranger who knocks all the time costs the hub nothing but the knocking: he
// holds none of its places.
func TestStrangersTakeNobodysPlace(t *testing.T) {
	needRoot(t)
	const stranger = 65532
	dir := shortDir(t)
	hub, err := peersocket.ListenHub(dir+"/hub/hub.sock", "main", 0, untold, quiet)
	if err != nil {
		t.Fatal(err)
	}
	defer hub.Close()
	admin, err := peersocket.ListenAdmin(dir+"/admin/admin.sock", untold, quiet)
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close()
	for _, l := range []struct {
		path string
		from net.Listener
	}{{dir + "/hub/hub.sock", hub.HTTP()}, {dir + "/admin/admin.sock", admin.HTTP()}} {
		if err := os.Chmod(l.path, 0o666); err != nil { // else the kernel refuses him
			t.Fatal(err)
		}
		flood := start(t, "flood", stranger, l.path)
		if got := flood.says(t); got != "1000 connections, none was let in" {
			t.Fatalf("a stranger at %s: %s", l.path, got)
		}
		dial(t, l.path, sayHTTP)
		if p := accept(t, l.from).Peer(); p.UID != 0 {
			t.Errorf("%s let in uid %d", l.path, p.UID)
		}
		dial(t, l.path, sayHTTP) // while he goes on
		accept(t, l.from)
	}
}
