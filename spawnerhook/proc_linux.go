package spawnerhook

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// procfs reads what the kernel says of a process, by its number. A number is
// nothing to trust: whoever reads asks afterwards whether the process that was
// meant still lives.
type procfs string

func (p procfs) path(pid int32, name string) string {
	return string(p) + "/" + strconv.Itoa(int(pid)) + "/" + name
}

// cgroups returns the process's line in each hierarchy.
func (p procfs) cgroups(pid int32) ([]cgroupLine, error) {
	b, err := readFile(p.path(pid, "cgroup"), 4<<10)
	if err != nil {
		return nil, err
	}
	return parseCgroups(b)
}

// mounts returns what the process's mount namespace holds.
func (p procfs) mounts(pid int32) ([]mount, error) {
	b, err := readFile(p.path(pid, "mountinfo"), 64<<10)
	if err != nil {
		return nil, err
	}
	return parseMountinfo(b)
}

// namespace returns the inode of a namespace of the process. Reading it needs
// root or CAP_SYS_PTRACE.
func (p procfs) namespace(pid int32, kind string) (uint64, error) {
	link, err := os.Readlink(p.path(pid, "ns/"+kind))
	if err != nil {
		return 0, err
	}
	number, ok := strings.CutPrefix(link, kind+":[")
	inode, err := strconv.ParseUint(strings.TrimSuffix(number, "]"), 10, 64)
	if !ok || err != nil || inode == 0 {
		return 0, fmt.Errorf("namespace %q is malformed", link)
	}
	return inode, nil
}

// started returns when the process started, in clock ticks since boot. A process
// that has ended but was not waited for yet is an error.
func (p procfs) started(pid int32) (uint64, error) {
	b, err := readFile(p.path(pid, "stat"), 4<<10)
	if err != nil {
		return 0, err
	}
	return parseStart(b)
}

// parseStart finds field 22 of /proc/PID/stat. It counts from the last ")",
// because the name before it is chosen by whoever runs the process.
func parseStart(b []byte) (uint64, error) {
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(fields) < 20 {
		return 0, fmt.Errorf("stat of %d bytes is malformed", len(b))
	}
	if state := fields[0]; state == "Z" || state == "X" {
		return 0, errEnded
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

// maxProcFile bounds what somebody can make us read. A container that mounts all
// of a host with two thousand others has a mountinfo of some megabytes.
const maxProcFile = 64 << 20

// readFile reads a file of /proc whole. os.ReadFile would register each of them
// with Go's poller, which costs more than the reading.
func readFile(name string, guess int) ([]byte, error) {
	fd, err := retry(func() (int, error) { return unix.Open(name, unix.O_RDONLY|unix.O_CLOEXEC, 0) })
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	defer unix.Close(fd)
	b := make([]byte, 0, guess)
	for {
		n, err := retry(func() (int, error) { return unix.Read(fd, b[len(b):cap(b)]) })
		if err != nil {
			return nil, &os.PathError{Op: "read", Path: name, Err: err}
		}
		b = b[:len(b)+n]
		switch {
		case n == 0:
			return b, nil
		case len(b) > maxProcFile:
			return nil, &os.PathError{Op: "read", Path: name, Err: errors.New("far too long")}
		case len(b) == cap(b):
			b = append(b, make([]byte, len(b))...)[:len(b)]
		}
	}
}

// retry repeats a system call that a signal interrupted.
func retry(call func() (int, error)) (int, error) {
	for {
		if n, err := call(); err != unix.EINTR {
			return n, err
		}
	}
}

// A locator says where files and directories of this host are in their file
// systems. It remembers the mounts they were found on, because a host with two
// thousand containers has a mountinfo of megabytes.
type locator struct {
	mu     sync.Mutex // guards mounts
	mounts map[mountKey]mount
}

// A mountKey names a mount of ours. The device tells it from a later mount that
// was given the same number.
type mountKey struct {
	id     int
	device uint64
}

// locate follows symlinks.
func (l *locator) locate(name string) (place, error) {
	fd, err := retry(func() (int, error) { return unix.Open(name, unix.O_PATH|unix.O_CLOEXEC, 0) })
	if err != nil {
		return place{}, &os.PathError{Op: "locate", Path: name, Err: err}
	}
	defer unix.Close(fd)
	path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return place{}, fmt.Errorf("locate %s: %w", name, err)
	}
	m, err := l.mountOf(fd)
	if err != nil {
		return place{}, fmt.Errorf("locate %s: %w", name, err)
	}
	if !under(path, m.point) {
		return place{}, fmt.Errorf("locate %s: %s is not below its mount point %s", name, path, m.point)
	}
	return m.at(path), nil
}

// mountOf returns the mount that a descriptor was opened on.
func (l *locator) mountOf(fd int) (mount, error) {
	key, err := mountKeyOf(fd)
	if err != nil {
		return mount{}, err
	}
	l.mu.Lock()
	m, known := l.mounts[key]
	l.mu.Unlock()
	if known {
		return m, nil
	}
	mounts, err := procfs("/proc").mounts(int32(os.Getpid()))
	if err != nil {
		return mount{}, err
	}
	i := slices.IndexFunc(mounts, func(m mount) bool { return m.id == key.id })
	if i < 0 {
		return mount{}, fmt.Errorf("there is no mount %d", key.id)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mounts == nil {
		l.mounts = map[mountKey]mount{}
	}
	l.mounts[key] = mounts[i]
	return mounts[i], nil
}

// mountKeyOf asks the kernel which mount a descriptor was opened on.
func mountKeyOf(fd int) (mountKey, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return mountKey{}, err
	}
	b, err := readFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd), 512)
	if err != nil {
		return mountKey{}, err
	}
	for line := range strings.Lines(string(b)) {
		if text, ok := strings.CutPrefix(line, "mnt_id:"); ok {
			id, err := strconv.Atoi(strings.TrimSpace(text))
			return mountKey{id, st.Dev}, err
		}
	}
	return mountKey{}, errors.New("fdinfo names no mount")
}
