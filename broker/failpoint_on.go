//go:build failpoints

package broker

import (
	"os"
	"strconv"
	"syscall"
	"time"
)

// failpoint ends this process as kill -9 does if TOKENBROKER_KILL names the step,
// and stops it until somebody sends SIGCONT if TOKENBROKER_STOP does. The
// environment is asked each time, so that a test can arm a running process.
func failpoint(step string) {
	switch step {
	case os.Getenv("TOKENBROKER_KILL"):
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	case os.Getenv("TOKENBROKER_STOP"):
		os.Unsetenv("TOKENBROKER_STOP")
		syscall.Kill(os.Getpid(), syscall.SIGSTOP)
	}
}

// scaled is d divided by TOKENBROKER_HURRY.
func scaled(d time.Duration) time.Duration {
	if n, _ := strconv.Atoi(os.Getenv("TOKENBROKER_HURRY")); n > 0 {
		return d / time.Duration(n)
	}
	return d
}
