package spawnerhook

import (
	"context"
	"path/filepath"
	"strings"

	"tokenbroker/broker"
)

// Mounts returns what containers that run mount of the directories in servers; whoever
// mounts servers itself is the broker in a container, or an administrator's tool. It is
// Docker's own list, which proves nothing: Bind asks the kernel.
func (d *Docker) Mounts(ctx context.Context, servers string) ([]broker.Mount, error) {
	list, err := d.engine.mounts(ctx)
	if err != nil {
		return nil, unavailable(err)
	}
	var all []broker.Mount
	for _, m := range list {
		if filepath.Dir(m.Directory) == filepath.Clean(servers) {
			all = append(all, m)
		}
	}
	return all, nil
}

// mounts asks for the directories of the host that containers mount.
func (e *engine) mounts(ctx context.Context) ([]broker.Mount, error) {
	running, err := e.running(ctx)
	if err != nil {
		return nil, err
	}
	var all []broker.Mount
	for _, c := range running {
		for _, m := range c.Mounts {
			all = append(all, broker.Mount{
				Container: c.ID, Name: strings.TrimPrefix(strings.Join(c.Names, ","), "/"), Directory: filepath.Clean(m.Source),
			})
		}
	}
	return all, nil
}
