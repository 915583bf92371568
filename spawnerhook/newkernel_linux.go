//go:build !nopidfd

package spawnerhook

import "golang.org/x/sys/unix"

// hasPeerPidfd says whether this kernel names peers by pidfd (Linux 6.5).
func hasPeerPidfd() bool {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	fd, err := unix.GetsockoptInt(pair[0], unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	if err != nil {
		return false
	}
	unix.Close(fd)
	return true
}

// askCgroupID asks for the number of a process's cgroup; 0 if the kernel has been
// built without them.
func askCgroupID(pidfd int) (uint64, error) {
	info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_CGROUPID}
	err := unix.IoctlPidfdInfo(pidfd, &info)
	if err == nil && info.Mask&unix.PIDFD_INFO_CGROUPID == 0 {
		return 0, unix.ENOTTY
	}
	return info.Cgroupid, err
}
