package peersocket

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"

	"tokenbroker/broker"
)

// A Listener is one socket with its two protocols: a hub's or the
// administrator's.
type Listener struct {
	door       *door
	grpc, http *queue
}

// GRPC accepts the connections that speak gRPC.
func (l *Listener) GRPC() net.Listener { return l.grpc }

// HTTP accepts the connections that speak HTTP/1.1.
func (l *Listener) HTTP() net.Listener { return l.http }

// Close stops listening, removes the socket and ends its connections.
func (l *Listener) Close() error {
	l.grpc.Close()
	l.http.Close()
	return l.door.close()
}

// ListenHub opens a hub's socket. Only the hub's uid and root may come in:
// whoever speaks here is the hub.
//
// The socket belongs to uid with mode 0600, so that the kernel keeps everybody
// else from even connecting. A broker that may not give files away keeps it for
// itself if the hub is root, and else leaves it open to all and relies on the check
// of the peer, which is done in any case.
// The directory should hold nothing else: a hub in a container mounts it.
// refused is told of others who connect.
func ListenHub(path string, hub broker.HubID, uid uint32, refused Refused, log *slog.Logger) (*Listener, error) {
	key := fmt.Sprintf("hubs.%s.socket", hub)
	l, err := listenFor(key, path, uid, log.With("hub", hub))
	if err != nil {
		return nil, err
	}
	l.door.limits.conns = 512 // one hub stands for all its users
	l.door.stamp = func(p *broker.Peer) { p.Hub = hub }
	l.door.refused = refused
	l.door.start()
	return l, nil
}

// ListenAdmin opens the administrator's socket, for root and our own uid. refused is
// told of others who connect.
func ListenAdmin(path string, refused Refused, log *slog.Logger) (*Listener, error) {
	l, err := listenFor("admin.socket", path, uint32(os.Geteuid()), log)
	if err != nil {
		return nil, err
	}
	l.door.refused = refused
	l.door.start()
	return l, nil
}

// A Refused is told of a process that may not use a socket: the socket's path, and
// why. Nothing of what it sends is read. p ends with the call, and no other
// connection is taken meanwhile.
type Refused func(p *broker.Peer, socket string, why error)

// listenFor opens a socket for one uid and root. key is its place in the
// configuration.
func listenFor(key, path string, uid uint32, log *slog.Logger) (*Listener, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", key, err)
	}
	if err := checkPath(key, path); err != nil {
		return nil, err
	}
	if err := makeSafe(filepath.Dir(path)); err != nil {
		return nil, fmt.Errorf("%s: %w", key, err)
	}
	ln, err := listen(path, 0o600, &uid)
	switch {
	case !errors.Is(err, fs.ErrPermission) || uid == uint32(os.Geteuid()):
	case uid == 0: // who may open it all the same
		ln, err = listen(path, 0o600, nil)
	default:
		ln, err = listen(path, 0o666, nil)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", key, err)
	}
	l := &Listener{grpc: newQueue(path), http: newQueue(path)}
	l.door = newDoor(ln, path, limits{conns: 64, hello: helloTimeout, read: readWithin}, log, l.grpc, l.http)
	l.door.admit = func(p *broker.Peer) error {
		if p.UID == uid || p.UID == 0 {
			return nil
		}
		return fmt.Errorf("uid %d may not use %s, only uid %d and root", p.UID, path, uid)
	}
	return l, nil
}

// makeSafe makes dir for others to enter, or checks that they can't write to
// the one that is there: they could put a socket of theirs in our place.
func makeSafe(dir string) error {
	err := makeOpen(dir)
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("others may write to %s (mode %04o) and so could take the broker's place: choose another directory or chmod go-w it",
			dir, info.Mode().Perm())
	}
	return nil
}

// makeOpen makes dir, and what is missing above it, for others to enter: a hub
// that isn't root has to get past all of them.
func makeOpen(dir string) error {
	err := os.Mkdir(dir, 0o755)
	if errors.Is(err, fs.ErrNotExist) {
		if err := makeOpen(filepath.Dir(dir)); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		err = os.Mkdir(dir, 0o755)
	}
	if err != nil {
		return err
	}
	return os.Chmod(dir, 0o755) // whatever our umask took away
}
