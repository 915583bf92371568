//go:build !failpoints || !linux

package broker

import "time"

// A failpoint is a named step at which the harness in deploy/faults kills or
// freezes the process. It does so only in builds with the tag failpoints; in any
// other the compiler leaves nothing of it, neither the call nor the name.
func failpoint(string) {}

// scaled is d. The harness shortens the lease by it, and what must fit into it.
func scaled(d time.Duration) time.Duration { return d }
