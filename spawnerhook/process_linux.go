package spawnerhook

import (
	"errors"
	"fmt"

	"tokenbroker/broker"
)

// processAlive returns nil if the peer still lives.
func processAlive(p *broker.Peer) error { return peerAlive(p, "/proc") }

// peerAlive returns nil if the peer still lives: by its pidfd, or on a kernel
// that gives none, by the start time of the process that has its number now.
func peerAlive(p *broker.Peer, proc procfs) error {
	if p.Pidfd != nil {
		return alive(p.Pidfd)
	}
	if p.Start == 0 || p.PID <= 0 {
		return errors.New("neither pidfd nor start time is known")
	}
	now, err := proc.started(p.PID)
	if err != nil {
		return err
	}
	if now != p.Start {
		return fmt.Errorf("process %d is another one by now", p.PID)
	}
	return nil
}
