package spawnerhook

import (
	"fmt"
	"strings"
)

// A cgroupLine is one line of /proc/PID/cgroup: a hierarchy, named by its
// controllers as the kernel writes them, and the process's path in it. The
// hierarchy of cgroup v2 has the empty name.
type cgroupLine struct{ hierarchy, path string }

// parseCgroups reads /proc/PID/cgroup. Whatever the kernel would not write is
// an error: what is read here is identity.
func parseCgroups(b []byte) ([]cgroupLine, error) {
	text, whole := strings.CutSuffix(string(b), "\n")
	if !whole {
		return nil, fmt.Errorf("cgroup file of %d bytes ends inside a line", len(b))
	}
	lines := make([]cgroupLine, 0, 16)
	for text := range strings.SplitSeq(text, "\n") {
		_, rest, ok1 := strings.Cut(text, ":")
		hierarchy, path, ok2 := strings.Cut(rest, ":")
		if !ok1 || !ok2 || !strings.HasPrefix(path, "/") {
			return nil, fmt.Errorf("cgroup line %q is malformed", text)
		}
		if _, twice := cgroupIn(lines, hierarchy); twice {
			return nil, fmt.Errorf("cgroup hierarchy %q is there twice", hierarchy)
		}
		lines = append(lines, cgroupLine{hierarchy, path})
	}
	return lines, nil
}

// cgroupIn returns the path in one hierarchy. There are a dozen lines at most.
func cgroupIn(lines []cgroupLine, hierarchy string) (string, bool) {
	for _, l := range lines {
		if l.hierarchy == hierarchy {
			return l.path, true
		}
	}
	return "", false
}

// ownCgroups returns the lines that name the container id: their last element is
// its full ID (cgroupfs driver) or its scope (systemd driver). All others say
// nothing about it: hierarchies that Docker doesn't use stay at "/".
func ownCgroups(lines []cgroupLine, id string) map[string]string {
	own := make(map[string]string, len(lines))
	for _, l := range lines {
		last := l.path[strings.LastIndexByte(l.path, '/')+1:]
		if last == id || last == "docker-"+id+".scope" {
			own[l.hierarchy] = l.path
		}
	}
	return own
}

// sameCgroups returns nil if the process with these lines is, in every recorded
// hierarchy, exactly where the container is. Deeper is elsewhere.
func sameCgroups(lines []cgroupLine, recorded map[string]string) error {
	if len(recorded) == 0 {
		return fmt.Errorf("no cgroup was recorded for the container")
	}
	for hierarchy, want := range recorded {
		got, ok := cgroupIn(lines, hierarchy)
		if !ok {
			return fmt.Errorf("the process has no cgroup in hierarchy %q", hierarchy)
		}
		if got != want {
			return fmt.Errorf("the process is in cgroup %q of hierarchy %q, the container in %q", got, hierarchy, want)
		}
	}
	return nil
}
