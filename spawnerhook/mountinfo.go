package spawnerhook

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// A place is a file or directory as its file system knows it. Unlike a path it
// is the same from inside and outside of a container, whatever symlinks, parents
// or volumes led to it.
type place struct {
	device string // major:minor
	path   string // inside the file system
}

// A mount is one line of /proc/PID/mountinfo.
type mount struct {
	id, parent int
	place             // what is mounted
	point      string // where, as the process sees it
	readOnly   bool   // this mount, whatever its file system allows
	fsType     string
}

// reaches says whether p can be found below the mount.
func (m mount) reaches(p place) bool {
	return m.device == p.device && under(p.path, m.path)
}

// at is the place of a path that lies on the mount.
func (m mount) at(path string) place {
	below := strings.TrimPrefix(path, strings.TrimSuffix(m.point, "/"))
	if below = strings.TrimSuffix(m.path, "/") + below; below == "" {
		below = "/"
	}
	return place{m.device, below}
}

// under says whether path is dir or lies below it.
func under(path, dir string) bool {
	rest, ok := strings.CutPrefix(path, strings.TrimSuffix(dir, "/"))
	return ok && (rest == "" || rest[0] == '/')
}

// mountAt returns the mount a process sees at point: of several on top of each
// other, the one that none is mounted on.
func mountAt(mounts []mount, point string) (mount, bool) {
	for _, m := range mounts {
		hidden := func(o mount) bool { return o.point == point && o.parent == m.id && o.id != m.id }
		if m.point == point && !slices.ContainsFunc(mounts, hidden) {
			return m, true
		}
	}
	return mount{}, false
}

// parseMountinfo reads /proc/PID/mountinfo (proc_pid_mountinfo(5)).
func parseMountinfo(b []byte) ([]mount, error) {
	text, whole := strings.CutSuffix(string(b), "\n")
	if !whole {
		return nil, fmt.Errorf("mountinfo of %d bytes ends inside a line", len(b))
	}
	var mounts []mount
	for line := range strings.SplitSeq(text, "\n") {
		m, err := parseMount(line)
		if err != nil {
			return nil, fmt.Errorf("mountinfo line %q: %w", line, err)
		}
		mounts = append(mounts, m)
	}
	return mounts, nil
}

// parseMount reads one line:
//
//	36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
func parseMount(line string) (m mount, err error) {
	mine, fs, ok := strings.Cut(line, " - ")
	fields, fsFields := strings.Split(mine, " "), strings.Split(fs, " ")
	if !ok || len(fields) < 6 || len(fsFields) < 2 {
		return mount{}, fmt.Errorf("too few fields")
	}
	if m.id, err = strconv.Atoi(fields[0]); err != nil {
		return mount{}, fmt.Errorf("mount ID: %w", err)
	}
	if m.parent, err = strconv.Atoi(fields[1]); err != nil {
		return mount{}, fmt.Errorf("parent ID: %w", err)
	}
	m.device = fields[2]
	m.path, m.point = unescape(fields[3]), unescape(fields[4])
	m.readOnly = slices.Contains(strings.Split(fields[5], ","), "ro")
	m.fsType = fsFields[0]
	return m, nil
}

// unescape undoes the kernel's \ooo for blanks, newlines and backslashes.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+4 <= len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
