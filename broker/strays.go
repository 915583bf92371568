package broker

import (
	"context"
	"fmt"
)

// A container may mount a server's directory while no server is registered there: it
// has outlived its registration, or somebody has started it past the hub. It gets no
// token: nobody listens there, and once a server is registered there attestation
// refuses whoever is not in that server's container. So it is told of and nothing
// more: who ends containers is not the broker.

// A Mount is a running container that mounts a server's directory.
type Mount struct {
	Container string // full ID
	Name      string
	Directory string
}

// strays looks for such containers until ctx ends.
func (b *Broker) strays(ctx context.Context) {
	seen := make(map[Mount]int) // → in how many rounds in a row
	every(ctx, SweepEvery, func(ctx context.Context) { seen = b.straysAgain(ctx, seen) })
}

// straysAgain is one round. It tells of a container once it has been seen in two
// rounds in a row: one that stops has often been unregistered a moment before.
func (b *Broker) straysAgain(ctx context.Context, before map[Mount]int) map[Mount]int {
	mounts, err := b.cfg.Mounts(ctx)
	if err != nil {
		b.cfg.Log.Warn("containers that no server is registered for can't be looked for; it is tried again", "err", err)
		return before
	}
	registered := make(map[string]bool) // looked up after the mounts: a server is registered before its container starts
	for _, s := range b.servers.list() {
		registered[s.Directory] = true
	}
	seen := make(map[Mount]int)
	for _, m := range mounts {
		if registered[m.Directory] {
			continue
		}
		if seen[m] = before[m] + 1; seen[m] == 2 {
			b.tellStray(ctx, m)
		}
	}
	return seen
}

func (b *Broker) tellStray(ctx context.Context, m Mount) {
	b.cfg.Log.Warn("a container mounts the directory of a server that is not registered, and gets no tokens; "+
		"find out who started it, and stop it", "container", m.Name, "id", m.Container, "directory", m.Directory)
	e := b.entry("stray", nil)
	e.Container = m.Container
	e.Reason = fmt.Sprintf("the container %s mounts %s, and no server is registered there", m.Name, m.Directory)
	_ = b.record(ctx, e, nil) // nothing was done that would need it; record has logged why
}
