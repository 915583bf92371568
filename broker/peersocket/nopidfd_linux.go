//go:build nopidfd

package peersocket

import "golang.org/x/sys/unix"

// peerPidfd is what a kernel before 6.5 answers, for the tests of what we do there.
func peerPidfd(int) (int, error) { return -1, unix.ENOPROTOOPT }
