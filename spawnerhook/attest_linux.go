package spawnerhook

import (
	"errors"
	"fmt"

	"tokenbroker/broker"
)

// Attest implements broker.Attestor. It asks the kernel only, so it is fast and
// needs no Docker.
//
// What is read under the peer's number is the peer's, because the peer's pidfd
// says after the reading that the peer lives: a number is not given out again
// before its process is gone.
func (d *Docker) Attest(p *broker.Peer, w *broker.Workload) error {
	switch {
	case w == nil || w.Init == nil || len(w.Cgroups) == 0:
		return elsewhere(errors.New("the server is not bound to a container"))
	case p.PID <= 0:
		return elsewhere(errors.New("the kernel gives no number for the peer: the broker's container needs pid: host"))
	}
	lines, err := d.proc.cgroups(p.PID)
	if err == nil {
		err = sameCgroups(lines, w.Cgroups)
	}
	if err != nil {
		return elsewhere(err)
	}
	if err := sameCgroupID(p, w); err != nil {
		return elsewhere(err)
	}
	sandboxed := d.sameNamespaces(p.PID, w)
	if err := peerAlive(p, d.proc); err != nil {
		return elsewhere(fmt.Errorf("peer: %w", err))
	}
	if err := alive(w.Init); err != nil {
		return elsewhere(fmt.Errorf("the container's first process: %w", err))
	}
	if sandboxed != nil {
		return broker.Errorf(broker.UnknownPeer, "this process is in a sandbox of its own, not directly in the server's container").Because(sandboxed)
	}
	return nil
}

// Alive implements broker.Attestor.
func (d *Docker) Alive(p *broker.Peer) error {
	if err := peerAlive(p, d.proc); err != nil {
		return hasEnded(err)
	}
	return nil
}

// sameCgroupID asks the kernel once more where the peer is, by no number that
// could be another's by now.
func sameCgroupID(p *broker.Peer, w *broker.Workload) error {
	if w.CgroupID == 0 || p.Pidfd == nil {
		return nil
	}
	id, err := cgroupID(p.Pidfd)
	if err != nil {
		return fmt.Errorf("peer: %w", err)
	}
	if id != w.CgroupID {
		return fmt.Errorf("the process is in the cgroup with number %d, the container in %d", id, w.CgroupID)
	}
	return nil
}

// sameNamespaces is the proof that a writable cgroup file system doesn't defeat.
func (d *Docker) sameNamespaces(pid int32, w *broker.Workload) error {
	for _, ns := range []struct {
		kind string
		want uint64
	}{{"pid", w.PIDNamespace}, {"mnt", w.MountNamespace}} {
		if ns.want == 0 {
			continue // not readable when the container was bound
		}
		got, err := d.proc.namespace(pid, ns.kind)
		if err != nil {
			return err
		}
		if got != ns.want {
			return fmt.Errorf("the process is in %s namespace %d, the container in %d", ns.kind, got, ns.want)
		}
	}
	return nil
}

func elsewhere(cause error) error {
	return broker.Errorf(broker.UnknownPeer, "this process is not in the server's container").Because(cause)
}
