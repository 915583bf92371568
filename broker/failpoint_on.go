//go:build failpoints && linux

package broker

import (
	"context"
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

// SetRoles gives a user's grant other roles, as a source does that knows them
// without asking: also while a refresh is under way.
func (b *Broker) SetRoles(ctx context.Context, hub HubID, user UserID, provider ProviderID, roles ...string) error {
	if err := b.pulse.sync(ctx); err != nil {
		return err
	}
	l, err := b.loadLink(ctx, userKey{hub, user})
	if err != nil {
		return err
	}
	var was Grant
	is, err := b.changeGrant(ctx, GrantKey{hub, provider, l.Subs[provider]}, func(g *Grant, exists bool) error {
		if !exists {
			return ErrAbsent
		}
		was = *g
		g.Roles, g.Epoch = canonical(provider, roles), later(g.Epoch, b.pulse.now())
		return nil
	})
	if err != nil {
		return err
	}
	return b.rightsMoved(ctx, was, is, "set by a test")
}
