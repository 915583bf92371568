package spawnerhook

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// errEnded says that a process has ended, waited for or not.
var errEnded = errors.New("the process has ended")

// openPidfd opens the process that has this number now. The descriptor doesn't
// block, so that Go's poller can wait for the end of the process.
func openPidfd(pid int32) (*os.File, error) {
	fd, err := unix.PidfdOpen(int(pid), 0)
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	return os.NewFile(uintptr(fd), fmt.Sprintf("pidfd of %d", pid)), nil
}

// alive returns nil while the process lives and errEnded from the moment it is a
// zombie. (A signal 0 would still reach a zombie.)
func alive(pidfd *os.File) error {
	raw, err := pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var ended bool
	var pollErr error
	err = raw.Control(func(fd uintptr) { ended, pollErr = readable(fd) })
	switch {
	case err != nil:
		return err
	case pollErr != nil:
		return fmt.Errorf("poll pidfd: %w", pollErr)
	case ended:
		return errEnded
	}
	return nil
}

// waitEnd returns nil when the process has ended, and os.ErrClosed when the
// descriptor was closed before. The goroutine that calls it parks in Go's
// poller; it holds no thread.
func waitEnd(pidfd *os.File) error {
	raw, err := pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var pollErr error
	err = raw.Read(func(fd uintptr) bool {
		var ended bool
		ended, pollErr = readable(fd)
		return ended || pollErr != nil
	})
	return errors.Join(err, pollErr)
}

// readable says whether the process behind a pidfd has ended.
func readable(fd uintptr) (bool, error) {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	n, err := retry(func() (int, error) { return unix.Poll(fds, 0) })
	return n > 0, err
}

// cgroupID returns the kernel's number of the cgroup of version 2 that a process
// is in. It needs no /proc, so no number that could have been given to another.
// errNoCgroupID: the kernel doesn't tell.
func cgroupID(pidfd *os.File) (uint64, error) {
	raw, err := pidfd.SyscallConn()
	if err != nil {
		return 0, err
	}
	var id uint64
	var askErr error
	if err := raw.Control(func(fd uintptr) { id, askErr = askCgroupID(int(fd)) }); err != nil {
		return 0, err
	}
	switch askErr {
	case nil:
		return id, nil
	case unix.ESRCH:
		return 0, errEnded
	case unix.ENOTTY, unix.EINVAL: // before Linux 6.13
		return 0, errNoCgroupID
	}
	return 0, fmt.Errorf("PIDFD_GET_INFO: %w", askErr)
}

var errNoCgroupID = errors.New("this kernel tells no cgroup's number")
