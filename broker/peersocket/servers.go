package peersocket

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"sync"

	"golang.org/x/sys/unix"

	"tokenbroker/broker"
)

// socketName is the socket's name in each server's directory.
const socketName = "broker.sock"

// Servers opens and closes the sockets of single-user servers. It implements
// broker.Sockets.
type Servers struct {
	dir    string
	lock   *os.File // keeps a second broker out of dir
	limits limits
	log    *slog.Logger

	grpc, http *queue

	mu    sync.Mutex // guards open, and keeps Open and Close of one server apart
	open  map[broker.ServerKey]*door
	ended bool
}

// DefaultRate is how many requests a second one server may make.
const DefaultRate = 50

// NewServers makes dir, if need be, and keeps other brokers out of it until
// Shutdown. It opens no socket yet.
func NewServers(dir string, log *slog.Logger) (*Servers, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("servers.directory: %w", err)
	}
	longest := filepath.Join(dir, directoryName(broker.ServerKey{}), socketName)
	if err := checkPath("servers.directory", longest); err != nil {
		return nil, err
	}
	if err := makePrivate(dir); err != nil {
		return nil, fmt.Errorf("servers.directory: %w", err)
	}
	lock, err := lockDirectory(dir)
	if err != nil {
		return nil, fmt.Errorf("servers.directory: %w", err)
	}
	return &Servers{
		dir: dir, lock: lock, limits: limits{conns: 64, hello: helloTimeout, read: readWithin, rate: DefaultRate}, log: log,
		grpc: newQueue(dir), http: newQueue(dir),
		open: make(map[broker.ServerKey]*door),
	}, nil
}

// SetRate is for the servers opened from now on: how many requests a second each
// may make, and four times as many at once.
func (s *Servers) SetRate(perSecond int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.limits.rate = perSecond
}

// GRPC accepts the connections of all servers that speak gRPC.
func (s *Servers) GRPC() net.Listener { return s.grpc }

// HTTP accepts the connections of all servers that speak HTTP/1.1.
func (s *Servers) HTTP() net.Listener { return s.http }

// Directory returns the directory of k. Its name is a hash, so that no user
// name is too long for it or means something to a file system.
func (s *Servers) Directory(k broker.ServerKey) (string, error) {
	return filepath.Join(s.dir, directoryName(k)), nil
}

// directoryName hashes the length-prefixed parts, so that no two keys run
// into one.
func directoryName(k broker.ServerKey) string {
	h := sha256.New()
	for _, part := range []string{string(k.Hub), string(k.User), string(k.Server)} {
		fmt.Fprintf(h, "%d:%s", len(part), part)
	}
	return hex.EncodeToString(h.Sum(nil)[:16])
}

// Open listens for k. If it does already but somebody removed the socket, or put
// something in its place, it listens anew.
func (s *Servers) Open(k broker.ServerKey) error {
	dir, err := s.Directory(k)
	if err != nil {
		return err
	}
	path := filepath.Join(dir, socketName)

	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return net.ErrClosed
	}
	if d := s.open[k]; d != nil {
		if now, err := os.Lstat(path); err == nil && os.SameFile(now, d.file) {
			return nil
		}
		d.close()
		delete(s.open, k)
	}
	if err := makeDirectory(dir); err != nil {
		return fmt.Errorf("open %s: %w", k, err)
	}
	// Attestation is the lock; the uids inside are not known yet.
	ln, err := listen(path, 0o666, nil)
	if err != nil {
		return fmt.Errorf("open %s: %w", k, err)
	}
	file, err := os.Lstat(path)
	if err != nil {
		ln.Close()
		return fmt.Errorf("open %s: %w", k, err)
	}
	d := newDoor(ln, path, s.limits, s.log.With("server", k.String()), s.grpc, s.http)
	d.file = file
	d.stamp = func(p *broker.Peer) { p.Server = k }
	d.start()
	s.open[k] = d
	return nil
}

// Hangup ends connections of k.
func (s *Servers) Hangup(k broker.ServerKey, meant func(*broker.Peer) bool) {
	s.mu.Lock()
	d := s.open[k]
	s.mu.Unlock()
	if d != nil {
		d.hangup(meant)
	}
}

// Close ends what Open began.
func (s *Servers) Close(k broker.ServerKey) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closeLocked(k)
}

func (s *Servers) closeLocked(k broker.ServerKey) error {
	d := s.open[k]
	if d == nil {
		return nil
	}
	delete(s.open, k)
	return d.close()
}

// Shutdown closes all servers' sockets and both listeners, and lets another
// broker have the directory. The servers' directories stay.
func (s *Servers) Shutdown() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return nil
	}
	s.ended = true
	s.grpc.Close()
	s.http.Close()
	var errs []error
	for k := range s.open {
		errs = append(errs, s.closeLocked(k))
	}
	return errors.Join(append(errs, s.lock.Close())...)
}

var serverDirectory = regexp.MustCompile(`^[0-9a-f]{32}$`)

// makePrivate makes dir, or sees to it that only we may enter it. It doesn't
// take a directory away from others who use it: a wrong line in the
// configuration must not close /tmp.
func makePrivate(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if info.Mode().Perm()&0o077 == 0 {
		return nil
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !serverDirectory.MatchString(e.Name()) {
			return fmt.Errorf("%s is open to others (mode %04o) and holds %q: give the broker a directory of its own, mode 0700",
				dir, info.Mode().Perm(), e.Name())
		}
	}
	return os.Chmod(dir, 0o700)
}

// makeDirectory makes a server's directory, or keeps the one that is there:
// containers have it mounted.
func makeDirectory(dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return fmt.Errorf("%s is not a directory: remove it", dir)
	}
	if info.Mode().Perm() == 0o755 {
		return nil
	}
	return os.Chmod(dir, 0o755) // whatever our umask took away
}

// lockDirectory keeps other brokers out of dir until the file is closed or
// this process ends, however it ends.
func lockDirectory(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		return f, nil
	}
	f.Close()
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, fmt.Errorf("another broker is running on %s", dir)
	}
	return nil, fmt.Errorf("lock %s: %w", dir, err)
}
