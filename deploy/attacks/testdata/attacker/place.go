package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// forge moves this process into the cgroups at path of the hierarchies below
// root: of all, or of the first most.
func forge(root, path string, most int) error {
	files := procsFiles(root, path)
	if most > 0 {
		files = files[:min(most, len(files))]
	}
	return enter(files)
}

// procsFiles are those of a cgroup in all hierarchies, of v1 and of v2.
func procsFiles(root, path string) []string {
	v1, _ := filepath.Glob(root + "/*" + path + "/cgroup.procs")
	v2, _ := filepath.Glob(root + path + "/cgroup.procs")
	return append(v1, v2...)
}

func enter(files []string) error {
	if len(files) == 0 {
		return errors.New("there is no such cgroup")
	}
	for _, name := range files {
		if err := os.WriteFile(name, []byte("0"), 0); err != nil {
			return err
		}
	}
	return nil
}

// mountAndForge mounts each hierarchy itself first.
func mountAndForge(path string) error {
	lines, err := cgroups()
	if err != nil {
		return err
	}
	for i, l := range lines {
		dir := fmt.Sprintf("/cg/%d", i)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		kind, options := "cgroup", l.hierarchy
		if l.hierarchy == "" {
			kind = "cgroup2"
		}
		if strings.HasPrefix(options, "name=") {
			options = "none," + options
		}
		if err := unix.Mount("none", dir, kind, 0, options); err != nil && !strings.HasPrefix(l.path, "/docker") {
			continue // a hierarchy that Docker does not use
		} else if err != nil {
			return fmt.Errorf("mount %s %s: %w", kind, options, err)
		}
	}
	return forge("/cg", path, 0)
}

// nest makes a child of each cgroup of ours and enters it.
func nest(root, name string) error {
	lines, err := cgroups()
	if err != nil {
		return err
	}
	dirs := map[string]bool{}
	for _, l := range lines {
		for _, procs := range procsFiles(root, l.path) {
			if l.path != "/" {
				dirs[filepath.Join(filepath.Dir(procs), name)] = true
			}
		}
	}
	var files []string
	for dir := range dirs {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		for _, knob := range []string{"cpuset.cpus", "cpuset.mems"} { // a new cpuset takes nobody before it has these
			if b, err := os.ReadFile(filepath.Join(filepath.Dir(dir), knob)); err == nil {
				os.WriteFile(filepath.Join(dir, knob), b, 0)
			}
		}
		files = append(files, filepath.Join(dir, "cgroup.procs"))
	}
	return enter(files)
}

type cgroup struct{ hierarchy, path string }

func cgroups() (all []cgroup, err error) {
	b, err := os.ReadFile("/proc/self/cgroup")
	for line := range strings.Lines(string(b)) {
		if f := strings.SplitN(strings.TrimSpace(line), ":", 3); len(f) == 3 {
			all = append(all, cgroup{f[1], f[2]})
		}
	}
	return all, err
}

// child asks from a user namespace, where this process may mount.
func child(socket, name string) error {
	cmd := exec.Command("/proc/self/exe", "child2", socket, name)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}},
	}
	return cmd.Run()
}

// childCgroup mounts cgroup v2, which shows what lies below this process, and
// makes a cgroup there.
func childCgroup(name string) error {
	if err := unix.Mount("none", "/cg", "cgroup2", 0, ""); err != nil {
		return fmt.Errorf("mount cgroup2: %w", err)
	}
	if err := os.Mkdir("/cg/"+name, 0o755); err != nil {
		return err
	}
	return enter([]string{"/cg/" + name + "/cgroup.procs"})
}

// become moves into the cgroups of another container, then enters the namespaces
// of its first process, and asks there.
func become(socket, path string, pid int) error {
	if err := mountAndForge(path); err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return err
	}
	for _, kind := range []string{"pid", "mnt"} {
		f, err := os.Open(fmt.Sprintf("/proc/%d/ns/%s", pid, kind))
		if err != nil {
			return err
		}
		defer f.Close()
		if err := unix.Setns(int(f.Fd()), 0); err != nil {
			return fmt.Errorf("enter %s: %w", kind, err)
		}
	}
	cmd := exec.Command("/attacker", "ask", socket) // a child: it is in that PID namespace
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	return cmd.Run()
}

// outlive starts a process that is in none of the container's cgroups, so that
// nobody ends it with the container, and waits to be ended.
func outlive(socket, when, where string) error {
	cmd := exec.Command("/attacker", "linger", socket, when, where)
	if err := cmd.Start(); err != nil {
		return err
	}
	return cmd.Wait()
}

func linger(socket, when, where string) error {
	roots := []string{"/cg/cgroup.procs"} // of v2
	if _, err := os.Stat(roots[0]); err != nil {
		roots = procsFiles("/cg", "")
	}
	if err := enter(roots); err != nil {
		return err
	}
	if err := os.WriteFile(where+".ready", nil, 0o644); err != nil {
		return err
	}
	for range 6000 { // a minute; a test that has failed asks for nothing
		if _, err := os.Stat(when); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	f, err := os.Create(where + ".new")
	if err != nil {
		return err
	}
	os.Stdout = f
	if err := ask(socket); err != nil {
		say(map[string]any{"error": err.Error()})
	}
	return os.Rename(where+".new", where)
}

// plant puts links to target where the broker looks for its sockets.
func plant(dir, target string) error {
	socket := filepath.Join(dir, "broker.sock")
	if err := os.Remove(socket); err != nil {
		return err
	}
	err := errors.Join(os.Symlink(target, socket), os.Symlink(target, filepath.Join(dir, ".new")),
		os.WriteFile(filepath.Join(dir, "hub.json"), []byte("{}"), 0o666))
	say(map[string]any{"planted": err == nil})
	return err
}

// fork starts a child for each line "fork" on standard input, and ends all of
// them at "kill".
func fork() error {
	var children []*exec.Cmd
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		switch lines.Text() {
		case "fork":
			cmd := exec.Command("/proc/self/exe", "sleep")
			if err := cmd.Start(); err != nil {
				return err
			}
			children = append(children, cmd)
		case "kill":
			for _, c := range children {
				c.Process.Kill()
				c.Wait()
			}
			children = nil
		}
		say(map[string]any{"children": len(children)})
	}
	return nil
}
