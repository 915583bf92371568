package spawnerhook

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
)

// A container that could forge the proofs of another makes them worth less on the
// whole host, whether it is a server of ours or somebody's monitoring. So all that
// run are looked at: each time Docker is connected to, and each when something
// happens to it. They are reported; it is not for us to stop them.

// neighbours are the containers on this host that could forge proofs.
type neighbours struct {
	why atomic.Pointer[string] // in words; nil: there are none

	round  sync.Mutex // held for a look at all
	looked bool       // guarded by round: there has been one

	mu     sync.Mutex        // guards forger
	forger map[string]string // by container: what it could forge by
}

// maxLooks is how many containers are looked at at once.
const maxLooks = 4

// Containers looks at all containers that run, sorted by name.
func (d *Docker) Containers(ctx context.Context) ([]Container, error) {
	names, err := d.engine.list(ctx)
	if err != nil {
		return nil, unavailable(err)
	}
	slices.Sort(names)
	h := d.host()
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	all := make([]*Container, len(names))
	slots := make(chan struct{}, maxLooks)
	var looks sync.WaitGroup
	for i, name := range names {
		slots <- struct{}{}
		looks.Go(func() {
			defer func() { <-slots }()
			var err error
			if all[i], err = d.posture(ctx, name, h); err != nil {
				stop(err) // it would be the same for each
			}
		})
	}
	looks.Wait()
	if err := context.Cause(ctx); err != nil {
		return nil, unavailable(err)
	}
	var running []Container
	for _, c := range all {
		if c != nil {
			running = append(running, *c)
		}
	}
	return running, nil
}

// posture looks at one container. It returns nil if it has ended meanwhile or is
// none that could be looked at, and an error if Docker can't be asked.
func (d *Docker) posture(ctx context.Context, name string, h host) (*Container, error) {
	c, err := d.engine.inspect(ctx, name)
	switch {
	case errors.Is(err, errNoContainer) || errors.Is(err, errOddAnswer) || err == nil && c.PID <= 0:
		return nil, nil
	case err != nil:
		return nil, err
	}
	v, err := d.view(c.PID)
	if err != nil {
		d.log.Debug("can't look at a container", "container", name, "err", err)
		return nil, nil
	}
	m, server := mountAt(v.mounts, MountPoint)
	h.own = m.place
	return &Container{name, server, evidenceOf(c, v, h).findings(d.cfg.Posture), c.ID, c.Execs}, nil
}

// lookAroundOnce looks at all containers, unless that has been done.
func (d *Docker) lookAroundOnce(ctx context.Context) error {
	d.around.round.Lock()
	defer d.around.round.Unlock()
	if d.around.looked {
		return nil
	}
	return d.lookAround(ctx)
}

// lookAround looks at all containers; around.round is held.
func (d *Docker) lookAround(ctx context.Context) (err error) {
	d.execs.begin()
	defer func() { d.execs.end(err == nil) }()
	all, err := d.Containers(ctx)
	if err != nil {
		return err
	}
	now := map[string]string{}
	for _, c := range all {
		if by := c.Forges(); by != "" {
			now[c.Name] = by
		}
	}
	d.around.looked = true
	d.around.mu.Lock()
	gone := slices.DeleteFunc(slices.Collect(maps.Keys(d.around.forger)), func(name string) bool { return now[name] != "" })
	d.around.mu.Unlock()
	for _, name := range gone {
		d.neighbour(name, "")
	}
	for name, by := range now {
		d.neighbour(name, by)
	}
	return d.findExecs(ctx, all)
}

// lookAroundFor follows a hint that something has happened to a container; an
// empty name means all. Until Docker can be asked all is as it was.
func (d *Docker) lookAroundFor(ctx context.Context, name string) error {
	d.around.round.Lock()
	defer d.around.round.Unlock()
	if name == "" {
		return d.lookAround(ctx)
	}
	c, err := d.posture(ctx, name, d.host())
	if err != nil {
		return err
	}
	by := ""
	if c != nil {
		by = c.Forges()
	}
	d.neighbour(name, by)
	return nil
}

// neighbour notes by what a container could forge proofs, and says so once.
func (d *Docker) neighbour(name, by string) {
	if slices.Contains(d.cfg.Trusted, name) {
		return
	}
	n := &d.around
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.forger[name] == by {
		return
	}
	if by == "" {
		delete(n.forger, name)
		d.log.Info("a container that could forge proofs has ended", "container", name)
	} else {
		if n.forger == nil {
			n.forger = map[string]string{}
		}
		n.forger[name] = by
		d.log.Warn("a container could forge the proofs of others, so attestation on this host is worth less", "container", name, "because", by, "unless", TrustOption(name))
	}
	n.why.Store(n.words())
}

// words says who could forge proofs; n.mu is held.
func (n *neighbours) words() *string {
	names := slices.Sorted(maps.Keys(n.forger))
	if len(names) == 0 {
		return nil
	}
	says := fmt.Sprintf("the container %s could forge proofs: %s", names[0], n.forger[names[0]])
	if more := len(names) - 1; more > 0 {
		says += fmt.Sprintf("; so could %d more: %s", more, strings.Join(names[1:min(len(names), 4)], ", "))
	}
	says += "; " + TrustOption(names[0])
	return &says
}
