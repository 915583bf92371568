package peersocket

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// newName is what a socket is called until it has its mode. It is no longer
// than the names that sockets have afterwards.
const newName = ".new"

// checkPath says that a path can't be a socket's, and what to change.
func checkPath(key, path string) error {
	if len(path) <= maxPath {
		return nil
	}
	return fmt.Errorf("%s: the socket path %s is %d bytes long, and a Unix socket's has at most %d: choose a shorter directory",
		key, path, len(path), maxPath)
}

// listen makes a socket at path with a mode and, if uid is not nil, an owner.
// A socket that a dead broker left there is replaced in one step, so that
// callers find the old one or the new one. The socket of a living process, and
// what is no socket, stays and is an error.
func listen(path string, mode os.FileMode, uid *uint32) (*net.UnixListener, error) {
	if err := checkFree(path); err != nil {
		return nil, err
	}
	fresh := filepath.Join(filepath.Dir(path), newName)
	if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: fresh, Net: "unix"})
	if err != nil {
		return nil, err
	}
	ln.SetUnlinkOnClose(false) // it would remove the name that is no more
	err = setOwner(fresh, mode, uid)
	if err == nil {
		err = os.Rename(fresh, path)
	}
	if err != nil {
		ln.Close()
		os.Remove(fresh)
		return nil, err
	}
	return ln, nil
}

// checkFree says why path can't become ours.
func checkFree(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s is in the way and is not a socket: remove it", path)
	}
	c, err := net.DialTimeout("unix", path, time.Second)
	if errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist) {
		return nil // left by a broker that was killed
	}
	if err == nil {
		c.Close()
	}
	return fmt.Errorf("another process answers on %s: stop it first", path)
}

// setOwner sets mode and owner of a socket that only we know the name of yet.
func setOwner(path string, mode os.FileMode, uid *uint32) error {
	f, err := openSocket(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if uid != nil && int(*uid) != os.Geteuid() { // a system call filter may forbid even that
		if err := os.Chown(f.Name(), int(*uid), -1); err != nil {
			return err
		}
	}
	return os.Chmod(f.Name(), mode)
}
