package spawnerhook

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"time"

	"tokenbroker/broker"
)

// containerName is what Docker takes for a name. Anything else would reach
// another part of Docker's API.
var containerName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]+$`)

// pauses are how long to wait before looking again at a container that changed
// under our eyes. A dying one is in between for some milliseconds.
var pauses = []time.Duration{2, 5, 10, 25, 50, 100}

// errRaced says that what was read does not belong together.
var errRaced = errors.New("the container changed while it was looked at")

// errNoOwnCgroup says that a container which did not change has no cgroup line of
// its own, so it has been moved, or we see other cgroups than Docker does.
var errNoOwnCgroup = errors.New("no cgroup of the container ends in its ID")

// Bind implements broker.Attestor.
//
// Docker says which process is the container's init; then the kernel is asked
// about that process; then Docker is asked again. Only if it says the same, and
// the process lived all the while, does what was read belong together.
func (d *Docker) Bind(ctx context.Context, r broker.Registration) (*broker.Workload, error) {
	if !containerName.MatchString(r.ContainerName) {
		return nil, broker.Errorf(broker.Invalid, "container_name %q is not a name that Docker takes", r.ContainerName)
	}
	path, err := d.cfg.Directory(r.Key)
	if err != nil {
		return nil, fmt.Errorf("directory of %v: %w", r.Key, err)
	}
	dir, err := d.locator.locate(path)
	if err != nil {
		return nil, fmt.Errorf("directory of %v: %w", r.Key, err)
	}
	for _, p := range pauses {
		w, err := d.look(ctx, r.ContainerName, dir)
		if !errors.Is(err, errRaced) && !errors.Is(err, errNoOwnCgroup) {
			return w, err
		}
		d.log.Debug("looking at the container again", "container", r.ContainerName, "err", err)
		if err := pause(ctx, p*time.Millisecond); err != nil {
			return nil, pending("the server's container keeps changing", err)
		}
	}
	w, err := d.look(ctx, r.ContainerName, dir)
	switch {
	case errors.Is(err, errRaced):
		return nil, pending("the server's container keeps changing", err)
	case errors.Is(err, errNoOwnCgroup):
		return nil, denied(r.ContainerName, "no cgroup line of its first process names it").Because(err)
	}
	return w, err
}

// look tries once to see the container whole.
func (d *Docker) look(ctx context.Context, name string, dir place) (*broker.Workload, error) {
	before, err := d.running(ctx, name)
	if err != nil {
		return nil, err
	}
	if found := before.weaknesses(); len(found) > 0 {
		return nil, denied(name, found...)
	}
	init, err := openPidfd(before.PID)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errRaced, err)
	}
	v, err := d.view(before.PID)
	if err == nil {
		err = alive(init)
	}
	if err != nil {
		init.Close()
		return nil, fmt.Errorf("%w: %w", errRaced, err)
	}
	after, err := d.running(ctx, name)
	if err == nil && after.instance() != before.instance() {
		err = errRaced
	}
	if err == nil {
		err = v.judge(after, dir, d.dockerSockets())
	}
	if err != nil {
		init.Close()
		return nil, err
	}
	return d.workload(after, v, init)
}

// running returns the container of that name if it runs.
func (d *Docker) running(ctx context.Context, name string) (containerState, error) {
	c, err := d.engine.inspect(ctx, name)
	switch {
	case errors.Is(err, errNoContainer):
		return containerState{}, pending("the server's container is not there yet", err)
	case err != nil:
		return containerState{}, unavailable(err)
	case !c.Running:
		return containerState{}, pending("the server's container is not running", nil)
	}
	return c, nil
}

// A view is what the kernel said of an init.
type view struct {
	cgroups  []cgroupLine
	mounts   []mount
	pid, mnt uint64 // inodes of its namespaces; 0: may not be read
}

// view reads what there is to read of a process.
func (d *Docker) view(pid int32) (v view, err error) {
	if v.cgroups, err = d.proc.cgroups(pid); err != nil {
		return view{}, err
	}
	if v.mounts, err = d.proc.mounts(pid); err != nil {
		return view{}, err
	}
	if v.pid, err = d.proc.namespace(pid, "pid"); errors.Is(err, os.ErrPermission) {
		return v, nil
	}
	if err != nil {
		return view{}, err
	}
	v.mnt, err = d.proc.namespace(pid, "mnt")
	return v, err
}

// judge says whether the container that was seen may be bound. The cgroups come
// first: where they are not the container's own it may be ending, and what else
// was seen means nothing.
func (v view) judge(c containerState, dir place, sockets []place) error {
	if len(ownCgroups(v.cgroups, c.ID)) == 0 {
		return errNoOwnCgroup
	}
	found := mountWeaknesses(v.mounts, sockets)
	if fault := directoryFault(v.mounts, dir); fault != "" {
		found = append(found, fault)
	}
	if len(found) > 0 {
		return denied(c.Name, found...)
	}
	return nil
}

// workload writes down what identifies the container.
func (d *Docker) workload(c containerState, v view, pidfd *os.File) (*broker.Workload, error) {
	init, err := d.hold(c.instance(), pidfd)
	if err != nil {
		return nil, err
	}
	return &broker.Workload{
		Container:      c.ID,
		Name:           c.Name,
		Image:          c.Image,
		StartedAt:      c.StartedAt,
		PID:            c.PID,
		Init:           init.pidfd,
		Cgroups:        ownCgroups(v.cgroups, c.ID),
		PIDNamespace:   v.pid,
		MountNamespace: v.mnt,
		Level:          d.level(v.mnt != 0),
		Done:           init.done,
	}, nil
}

// dockerSockets says where Docker's sockets are on this host. One that is not
// there can't be in a container either.
func (d *Docker) dockerSockets() []place {
	var places []place
	for _, name := range []string{d.cfg.Socket, DefaultSocket} {
		if p, err := d.locator.locate(name); err == nil {
			places = append(places, p)
		}
	}
	return places
}

// pending says that it is worth looking again.
func pending(sentence string, cause error) error {
	return broker.Errorf(broker.Pending, "%s", sentence).Because(cause)
}

// denied says why a container gets no tokens.
func denied(name string, found ...string) *broker.Error {
	return broker.Errorf(broker.Denied, "container %s gets no tokens: %s", name, strings.Join(found, "; "))
}
