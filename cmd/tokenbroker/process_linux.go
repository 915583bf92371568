package main

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// hardenProcess keeps other processes of our uid out of our memory, where refresh
// tokens and keys are (ptrace, /proc/PID/mem, /proc/PID/environ; prctl(2)), and the
// kernel from writing it to a disk.
func hardenProcess() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("make the process not dumpable: %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("switch core dumps off: %w", err)
	}
	return nil
}
