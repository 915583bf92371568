package spawnerhook

import (
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// host says where the things are that no container should have. What is not there
// can't be in a container either.
func (d *Docker) host() host {
	h := d.hostPlaces()
	for _, name := range []string{d.cfg.Socket, DefaultSocket, "/run/containerd/containerd.sock", "/run/docker/containerd/containerd.sock"} {
		if p, err := d.locator.locate(name); err == nil {
			h.sockets = append(h.sockets, p)
		}
	}
	for _, name := range d.cfg.Private {
		if p, err := d.locator.locate(name); err == nil {
			h.private = append(h.private, p)
		}
	}
	return h
}

// readHost finds the host's own mounts as its first process sees them: the
// broker's may be a container's, or a sandbox's. They are where they are while
// the host runs.
func (d *Docker) readHost() (h host) {
	mounts, err := d.proc.mounts(1)
	if err != nil {
		d.log.Warn("can't read the host's mounts, so containers that mount its /, /proc, /sys or /run are not found", "err", err)
		return host{}
	}
	for point, p := range map[string]*place{"/": &h.root, "/proc": &h.proc, "/sys": &h.sys, "/run": &h.run} {
		if m, ok := mountAt(mounts, point); ok {
			*p = m.at(point)
		} else if root, ok := mountAt(mounts, "/"); ok {
			*p = root.at(point)
		}
	}
	return h
}

// cgroupInode returns the inode of the directory of a cgroup of version 2, which
// is its number. ok is false where the broker can't see it.
func (d *Docker) cgroupInode(path string) (inode uint64, ok bool) {
	root := d.cgroup2()
	if root == "" {
		return 0, false
	}
	var st unix.Stat_t
	if err := unix.Stat(root+path, &st); err != nil {
		return 0, false
	}
	return st.Ino, true
}

// findCgroup2 returns where the broker has the whole hierarchy of version 2
// mounted. In a cgroup namespace of its own it has not.
func (d *Docker) findCgroup2() string {
	mounts, err := d.proc.mounts(int32(os.Getpid()))
	if err != nil {
		return ""
	}
	i := slices.IndexFunc(mounts, func(m mount) bool { return m.fsType == "cgroup2" && m.path == "/" })
	if i < 0 {
		return ""
	}
	return mounts[i].point
}
