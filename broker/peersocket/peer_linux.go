package peersocket

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"tokenbroker/broker"
)

// maxPath is the longest path of a socket: sun_path has 108 bytes, one of them
// for the zero at the end.
const maxPath = 107

// peerOf asks the kernel who connected. The pidfd, if the kernel has one, is
// the caller's to close.
func peerOf(c *net.UnixConn) (*broker.Peer, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	p := new(broker.Peer)
	if cerr := raw.Control(func(fd uintptr) { err = readPeer(int(fd), p) }); cerr != nil {
		return nil, cerr
	}
	return p, err
}

func readPeer(fd int, p *broker.Peer) error {
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return fmt.Errorf("SO_PEERCRED: %w", err)
	}
	p.PID, p.UID, p.GID = cred.Pid, cred.Uid, cred.Gid

	pidfd, err := peerPidfd(fd)
	if errors.Is(err, unix.ENOPROTOOPT) { // Linux before 6.5
		// Whoever has the number by now: since the connection was made it may have
		// become another's, from here on it can't.
		pidfd, err = unix.PidfdOpen(int(p.PID), 0)
	}
	switch {
	case err == nil:
		p.Pidfd = os.NewFile(uintptr(pidfd), "pidfd")
		return nil
	case errors.Is(err, unix.ENOSYS): // Linux before 5.3
		p.Start, err = startTime(p.PID)
		return err
	}
	return fmt.Errorf("pidfd of the peer: %w", err) // it is dead already
}

// startTime reads when a process started, to the hundredth of a second. Without a
// pidfd it is what tells the peer from a later process with the same number.
func startTime(pid int32) (uint64, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	return parseStart(stat)
}

// parseStart finds the 22nd field of /proc/PID/stat. The second one is the
// program's name in parentheses and may itself hold spaces and parentheses.
func parseStart(stat []byte) (uint64, error) {
	end := bytes.LastIndexByte(stat, ')')
	if end < 0 {
		return 0, errors.New("stat of a process: no name")
	}
	fields := bytes.Fields(stat[end+1:])
	const starttime = 22 - 3 // fields begins with the third
	if len(fields) <= starttime {
		return 0, errors.New("stat of a process: too short")
	}
	start, err := strconv.ParseUint(string(fields[starttime]), 10, 64)
	if err != nil {
		return 0, errors.New("stat of a process: no start time")
	}
	return start, nil
}

// A socketFile names the inode of a socket, whatever its path means by now.
type socketFile struct{ fd int }

// openSocket takes hold of the socket at path without following a link, so
// that nobody who could write to its directory can turn our chmod on another
// file.
func openSocket(path string) (socketFile, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return socketFile{}, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		unix.Close(fd)
		return socketFile{}, fmt.Errorf("%s is not our socket", path)
	}
	return socketFile{fd}, nil
}

func (f socketFile) Name() string { return fmt.Sprintf("/proc/self/fd/%d", f.fd) }
func (f socketFile) Close()       { unix.Close(f.fd) }
