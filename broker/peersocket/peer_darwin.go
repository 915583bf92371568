package peersocket

import (
	"fmt"
	"net"

	"golang.org/x/sys/unix"

	"tokenbroker/broker"
)

// maxPath is the longest path of a socket: sun_path has 104 bytes here.
const maxPath = 103

// peerOf asks the kernel who connected. macOS has no pidfd and no containers,
// so this serves the demo only, with attestation by uid.
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
	cred, err := unix.GetsockoptXucred(fd, unix.SOL_LOCAL, unix.LOCAL_PEERCRED)
	if err != nil {
		return fmt.Errorf("LOCAL_PEERCRED: %w", err)
	}
	pid, err := unix.GetsockoptInt(fd, unix.SOL_LOCAL, unix.LOCAL_PEERPID)
	if err != nil {
		return fmt.Errorf("LOCAL_PEERPID: %w", err)
	}
	p.PID, p.UID = int32(pid), cred.Uid
	if cred.Ngroups > 0 {
		p.GID = cred.Groups[0]
	}
	return nil
}

// A socketFile is a socket by its path; macOS has no O_PATH.
type socketFile struct{ path string }

func openSocket(path string) (socketFile, error) { return socketFile{path}, nil }

func (f socketFile) Name() string { return f.path }
func (f socketFile) Close()       {}
