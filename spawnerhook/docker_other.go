//go:build !linux

package spawnerhook

import (
	"context"
	"errors"
	"time"

	"tokenbroker/broker"
)

// Docker exists on Linux only: identity comes from its kernel.
type Docker struct{}

var errNotLinux = errors.New("docker attestation needs Linux; use process attestation here")

// NewDocker says that there is none on this system.
func NewDocker(DockerConfig) (*Docker, error) { return nil, errNotLinux }

// Bind implements broker.Attestor.
func (*Docker) Bind(context.Context, broker.Registration) (*broker.Workload, error) {
	return nil, errNotLinux
}

// Attest implements broker.Attestor.
func (*Docker) Attest(*broker.Peer, *broker.Workload) error { return errNotLinux }

// Alive implements broker.Attestor.
func (*Docker) Alive(*broker.Peer) error { return errNotLinux }

// Watch implements broker.Attestor.
func (*Docker) Watch(context.Context, time.Time, func(container string), func(broker.Exec)) error {
	return errNotLinux
}

// Check implements broker.Attestor.
func (*Docker) Check(context.Context) (string, error) { return "", errNotLinux }

// Worth implements broker.Attestor.
func (*Docker) Worth(level string) (now, why string) { return level, "" }

// Containers says that there is none on this system.
func (*Docker) Containers(context.Context) ([]Container, error) { return nil, errNotLinux }

// Close does nothing.
func (*Docker) Close() error { return nil }
