//go:build !nopidfd

package peersocket

import "golang.org/x/sys/unix"

// peerPidfd returns a pidfd of the process that connected.
func peerPidfd(fd int) (int, error) {
	return unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEERPIDFD)
}
