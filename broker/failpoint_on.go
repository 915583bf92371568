//go:build failpoints && linux

package broker

import (
	"os"
	"runtime"
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
		// To this very thread, which then can't go on; if another one took the
		// signal, it could for a moment.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		syscall.Tgkill(os.Getpid(), syscall.Gettid(), syscall.SIGSTOP)
	}
}

// scaled is d divided by TOKENBROKER_HURRY.
func scaled(d time.Duration) time.Duration {
	if n, _ := strconv.Atoi(os.Getenv("TOKENBROKER_HURRY")); n > 0 {
		return d / time.Duration(n)
	}
	return d
}
