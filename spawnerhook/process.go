package spawnerhook

import (
	"context"
	"fmt"
	"time"

	"tokenbroker/broker"
)

// Process attests processes by their uid alone, for spawners that start no
// containers and for the demo. It tells users apart, not the programs of one
// user, and nobody from root.
type Process struct{}

var _ broker.Attestor = (*Process)(nil)

// NewProcess makes an attestor for plain processes.
func NewProcess() *Process { return &Process{} }

// Bind implements broker.Attestor. The server is its uid, so there is nothing to
// wait for, and nobody to watch.
func (*Process) Bind(_ context.Context, r broker.Registration) (*broker.Workload, error) {
	if r.UID == nil {
		return nil, broker.Errorf(broker.Invalid, "uid is missing: process attestation needs to know who the server runs as")
	}
	return &broker.Workload{UID: *r.UID, Level: "uid"}, nil
}

// Attest implements broker.Attestor.
func (*Process) Attest(p *broker.Peer, w *broker.Workload) error {
	var err error
	switch {
	case w == nil || w.Level != "uid":
		err = fmt.Errorf("the server is not bound to a uid")
	case p.UID != w.UID:
		err = fmt.Errorf("the process has uid %d, the server %d", p.UID, w.UID)
	default:
		err = processAlive(p)
	}
	if err != nil {
		return broker.Errorf(broker.UnknownPeer, "this process is not the server's").Because(err)
	}
	return nil
}

// Alive implements broker.Attestor.
func (*Process) Alive(p *broker.Peer) error {
	if err := processAlive(p); err != nil {
		return hasEnded(err)
	}
	return nil
}

func hasEnded(cause error) error {
	return broker.Errorf(broker.UnknownPeer, "the process that opened this connection has ended").Because(cause)
}

// Watch implements broker.Attestor: nothing happens to uids.
func (*Process) Watch(ctx context.Context, _ time.Time, _ func(container string), _ func(broker.Exec)) error {
	<-ctx.Done()
	return ctx.Err()
}

// Worth implements broker.Attestor.
func (*Process) Worth(level string) (now, why string) { return level, "" }

// Check implements broker.Attestor.
func (*Process) Check(context.Context) (string, error) { return "uid", nil }
