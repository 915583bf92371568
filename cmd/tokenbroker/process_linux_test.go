//go:build !release

package main

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// Files in /proc belong to root once a process of another uid is not dumpable
// (proc(5)).
func TestNobodyOfTheSameUidReadsTheMemory(t *testing.T) {
	c := exec.CommandContext(t.Context(), os.Args[0], "demo")
	c.Args[0] = "tokenbroker" // the test's binary is the program then
	if os.Getuid() == 0 {
		c.Path = copyForAll(t)
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	}
	c.Dir = "/"
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { c.Process.Kill(); c.Wait() }()
	if _, err := bufio.NewReader(out).ReadByte(); err != nil { // it has begun
		t.Fatal(err)
	}
	proc := fmt.Sprintf("/proc/%d/", c.Process.Pid)
	for _, name := range []string{"mem", "environ"} {
		info, err := os.Stat(proc + name)
		if err != nil {
			t.Fatal(err)
		}
		if uid := info.Sys().(*syscall.Stat_t).Uid; uid != 0 {
			t.Errorf("%s belongs to uid %d, who may read it", name, uid)
		}
	}
	limits, err := os.ReadFile(proc + "limits")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(limits)) {
		if rest, ok := strings.CutPrefix(line, "Max core file size"); ok && strings.Fields(rest)[1] != "0" {
			t.Errorf("core dumps are on: %s", line)
		}
	}
}

// copyForAll copies the test's binary to where everybody can run it.
func copyForAll(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("/tmp", "tb")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/program", text, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir + "/program"
}
