//go:build !linux

package spawnerhook

import (
	"context"

	"tokenbroker/broker"
)

// Mounts says that there are none on this system.
func (*Docker) Mounts(context.Context, string) ([]broker.Mount, error) { return nil, errNotLinux }
