package spawnerhook

import (
	"fmt"
	"slices"
	"strings"
)

// These are the postures that break identity outright: with each of them a
// container can become another one, or the host. They are said in the words of
// the option that makes them, so that an administrator finds it.

// A posture is what of a container's configuration bears on identity.
type posture struct {
	Privileged  bool
	PidMode     string
	NetworkMode string
	CapAdd      []string
}

// weaknesses lists what the configuration gives away.
func (p posture) weaknesses() []string {
	var found []string
	if p.Privileged {
		found = append(found, "it is privileged (--privileged)")
	}
	if p.PidMode == "host" {
		found = append(found, "it sees the host's processes (--pid=host)")
	}
	if strings.HasPrefix(p.PidMode, "container:") {
		found = append(found, "it sees another container's processes (--pid=container:…)")
	}
	if p.NetworkMode == "host" {
		found = append(found, "it uses the host network (--network=host)")
	}
	for _, c := range p.CapAdd {
		switch c = strings.ToUpper(c); c {
		case "ALL", "CAP_ALL":
			found = append(found, "it has all capabilities (--cap-add=ALL)")
		case "SYS_ADMIN", "CAP_SYS_ADMIN":
			found = append(found, "it has the capability SYS_ADMIN (--cap-add=SYS_ADMIN)")
		}
	}
	return found
}

// mountWeaknesses lists what the container's mounts give away, as the kernel
// shows them: Docker's own list shows neither what a symlink leads to nor what a
// volume is made of. sockets are Docker's.
func mountWeaknesses(mounts []mount, sockets []place) []string {
	var found []string
	for _, m := range mounts {
		if (m.fsType == "cgroup" || m.fsType == "cgroup2") && !m.readOnly {
			found = append(found, fmt.Sprintf("it can write to the host's cgroups (mounted at %s)", m.point))
			break // v1 has a dozen of them
		}
	}
	// Read-only doesn't help: connecting needs no writing.
	for _, m := range mounts {
		if slices.ContainsFunc(sockets, m.reaches) {
			found = append(found, fmt.Sprintf("it has the Docker socket (in what is mounted at %s)", m.point))
			break
		}
	}
	return found
}

// directoryFault says in which way the container does not hold its server's
// directory as it must. Empty: it does.
func directoryFault(mounts []mount, dir place) string {
	m, ok := mountAt(mounts, MountPoint)
	switch {
	case !ok:
		return "it does not mount its server's directory at " + MountPoint
	case m.place != dir:
		return "it does not mount its server's directory but another one at " + MountPoint
	case !m.readOnly:
		return "it mounts its server's directory writable at " + MountPoint + "; that must be read-only"
	}
	for _, m := range mounts {
		if m.reaches(dir) && !m.readOnly {
			return fmt.Sprintf("it can write to its server's directory (in what is mounted at %s)", m.point)
		}
	}
	return ""
}
