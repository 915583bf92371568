package spawnerhook

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
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
	// Before the first workload has a level, what would lower it is known.
	if err := d.lookAroundOnce(ctx); err != nil {
		return nil, unavailable(err)
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
	init, err := openPidfd(before.PID)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errRaced, err)
	}
	w, err := d.lookAt(ctx, before, init, dir)
	if err != nil {
		init.Close()
		return nil, err
	}
	held, err := d.hold(before.instance(), init)
	if err != nil {
		return nil, err
	}
	w.Init, w.Done = held.pidfd, held.done
	return w, nil
}

// lookAt asks the kernel about a container's init, and Docker once more.
func (d *Docker) lookAt(ctx context.Context, before containerState, init *os.File, dir place) (*broker.Workload, error) {
	v, err := d.view(before.PID)
	var id uint64
	if err == nil {
		id, err = d.cgroupID(init, ownCgroups(v.cgroups, before.ID))
	}
	if err == nil {
		err = alive(init)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errRaced, err)
	}
	after, err := d.running(ctx, before.Name)
	if err != nil {
		return nil, err
	}
	if after.instance() != before.instance() {
		return nil, errRaced
	}
	w := d.workload(after, v, id)
	w.Posture, err = d.judge(after, v, dir)
	return w, err
}

// running returns the container of that name if it runs.
func (d *Docker) running(ctx context.Context, name string) (containerState, error) {
	c, err := d.engine.inspect(ctx, name)
	switch {
	case errors.Is(err, errNoContainer):
		return containerState{}, pending("the server's container is not there yet", fmt.Errorf("Docker on %s: %w", name, err))
	case err != nil:
		return containerState{}, unavailable(err)
	case !c.Running:
		return containerState{}, pending("the server's container is not running", fmt.Errorf("Docker on %s: id %s", name, c.ID))
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

// judge says whether the container that was seen may be bound, and what lets it
// pass. The cgroups come first: where they are not the container's own it may be
// ending, and what else was seen means nothing.
func (d *Docker) judge(c containerState, v view, dir place) (posture []string, err error) {
	if len(ownCgroups(v.cgroups, c.ID)) == 0 {
		return nil, errNoOwnCgroup
	}
	h := d.host()
	h.own = dir
	all := evidenceOf(c, v, h).findings(d.cfg.Posture)
	faults := []string{directoryFault(v.mounts, dir), refusal(all)}
	if faults = slices.DeleteFunc(faults, func(s string) bool { return s == "" }); len(faults) > 0 {
		return nil, denied(c.Name, strings.Join(faults, "; "))
	}
	for _, f := range all {
		posture = append(posture, f.Name)
		if f.Verdict == Report {
			d.log.Warn("a server's container has a weak posture", "container", c.Name, "finding", f.Name, "says", f.Says)
		}
	}
	return posture, nil
}

// evidenceOf is what the table of weaknesses is asked about.
func evidenceOf(c containerState, v view, h host) *evidence {
	own := ownCgroups(v.cgroups, c.ID)
	_, v2 := own[""]
	return &evidence{posture: c.posture, mounts: v.mounts, v2: v2 && len(own) == 1, host: h}
}

// cgroupID returns the number of the container's cgroup, if it is in one of
// version 2. The kernel says it of the process, and the file system of the path;
// they must be one.
func (d *Docker) cgroupID(init *os.File, own map[string]string) (uint64, error) {
	path, ok := own[""]
	if !ok {
		return 0, nil
	}
	id, err := cgroupID(init)
	if errors.Is(err, errNoCgroupID) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	if inode, ok := d.cgroupInode(path); ok && inode != id {
		return 0, fmt.Errorf("the container's cgroup %s has number %d, its first process is in %d", path, inode, id)
	}
	return id, nil
}

// workload writes down what identifies the container.
func (d *Docker) workload(c containerState, v view, cgroup uint64) *broker.Workload {
	return &broker.Workload{
		Container:      c.ID,
		Name:           c.Name,
		Image:          c.Image,
		StartedAt:      c.StartedAt,
		PID:            c.PID,
		Cgroups:        ownCgroups(v.cgroups, c.ID),
		CgroupID:       cgroup,
		PIDNamespace:   v.pid,
		MountNamespace: v.mnt,
		Level:          d.level(v.mnt != 0),
	}
}

// pending says that it is worth looking again.
func pending(sentence string, cause error) error {
	return broker.Errorf(broker.Pending, "%s", sentence).Because(cause)
}

// denied says why a container gets no tokens.
func denied(name, why string) *broker.Error {
	return broker.Errorf(broker.Denied, "container %s gets no tokens: %s", name, why)
}
