package peersocket_test

import (
	"errors"
	"os"
	"strings"
	"syscall"
	"testing"

	"tokenbroker/broker/peersocket"
)

func TestOnlyTheHubSpeaksOnItsSocket(t *testing.T) {
	needRoot(t)
	const hubUID, stranger = 65531, 65532
	path := shortDir(t) + "/hub/hub.sock"
	l, err := peersocket.ListenHub(path, "main", hubUID, untold, quiet)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()

	for _, uid := range []uint32{hubUID, 0} {
		start(t, "dial", uid, path)
		p := accept(t, l.HTTP()).Peer()
		if p.UID != uid || p.Hub != "main" {
			t.Errorf("Peer: uid %d hub %q, want %d and main", p.UID, p.Hub, uid)
		}
	}
	if got := start(t, "dial", stranger, path).says(t); !strings.Contains(got, "permission denied") {
		t.Errorf("a stranger: %s, want the kernel's refusal", got)
	}

	// Were the mode ever wrong, the peer's uid would still be.
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	if got := start(t, "dial", stranger, path).says(t); got != `answer: ""` {
		t.Errorf("a stranger past the mode: %s, want no answer", got)
	}
}

func TestABrokerThatMayNotGiveFilesAwayChecksThePeer(t *testing.T) {
	needRoot(t)
	const brokerUID, stranger = 65531, 65533
	dir := shortDir(t)
	if err := os.Chown(dir, brokerUID, -1); err != nil {
		t.Fatal(err)
	}
	path := dir + "/hub/hub.sock"
	if got := start(t, "hub", brokerUID, path).says(t); got != "open: <nil>" {
		t.Fatal(got)
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := info.Mode().Perm(); got != 0o666 {
		t.Errorf("mode: %04o, want 0666", got)
	}
	if got := start(t, "dial", stranger, path).says(t); got != `answer: ""` {
		t.Errorf("a stranger: %s, want no answer", got)
	}
}

func TestTheAdministratorsSocketIsOursAlone(t *testing.T) {
	path := shortDir(t) + "/tokenbroker/admin.sock"
	l, err := peersocket.ListenAdmin(path, untold, quiet)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := info.Mode().Perm(); got != 0o600 {
		t.Errorf("mode: %04o, want 0600", got)
	}
	dial(t, path, sayGRPC)
	p := accept(t, l.GRPC()).Peer()
	if int(p.UID) != os.Getuid() || p.Hub != "" || p.Server.User != "" {
		t.Errorf("Peer: uid %d hub %q server %v, want our own uid and neither", p.UID, p.Hub, p.Server)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("socket after Close: %v, want it gone", err)
	}
}

func TestAHubContainerSeesTheNewSocketAfterARestart(t *testing.T) {
	path := shortDir(t) + "/hub/hub.sock"
	var inodes []uint64
	for range 2 {
		l, err := peersocket.ListenHub(path, "main", uint32(os.Getuid()), untold, quiet)
		if err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(path[:len(path)-len("/hub.sock")])
		if err != nil {
			t.Fatal(err)
		}
		inodes = append(inodes, info.Sys().(*syscall.Stat_t).Ino)
		l.Close()
	}
	if inodes[0] != inodes[1] {
		t.Errorf("inode of the directory: %d, then %d", inodes[0], inodes[1])
	}
}

func TestAHubCanReachItsSocketWhateverTheUmask(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0o077))
	dir := shortDir(t) + "/run"
	l, err := peersocket.ListenHub(dir+"/hubs/main/hub.sock", "main", uint32(os.Getuid()), untold, quiet)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, path := range []string{dir, dir + "/hubs", dir + "/hubs/main"} {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if got := info.Mode().Perm(); got != 0o755 {
			t.Errorf("mode of %s: %04o, want 0755", path, got)
		}
	}
}

func TestListenersSayWhatIsWrongWithThePath(t *testing.T) {
	dir := shortDir(t)
	open := dir + "/open"
	if err := errors.Join(os.Mkdir(open, 0o755), os.Chmod(open, 0o777)); err != nil {
		t.Fatal(err)
	}
	long := dir + "/" + strings.Repeat("d", 120)
	_, err := peersocket.ListenHub(long+"/hub.sock", "lab", 0, untold, quiet)
	wantAll(t, err, "hubs.lab.socket", long, "bytes", "107")
	_, err = peersocket.ListenAdmin(long+"/admin.sock", untold, quiet)
	wantAll(t, err, "admin.socket", long)
	_, err = peersocket.ListenHub(open+"/hub.sock", "lab", 0, untold, quiet)
	wantAll(t, err, "hubs.lab.socket", open, "0777")
}

func wantAll(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("no error, want one with %q", parts)
		return
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q does not say %q", err, part)
		}
	}
}
