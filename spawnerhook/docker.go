package spawnerhook

import (
	"log/slog"

	"tokenbroker/broker"
)

// MountPoint is where a server's directory is mounted in its container.
const MountPoint = "/run/tokenbroker"

// DefaultSocket is where Docker listens if nobody says otherwise.
const DefaultSocket = "/var/run/docker.sock"

// DockerConfig is what a Docker attestor needs to know.
type DockerConfig struct {
	Socket string // of the Docker engine; empty: DefaultSocket

	// Directory says which directory of this host a server's container must
	// mount at MountPoint; Sockets.Directory is such a function. It is asked
	// instead of believing a record.
	Directory func(broker.ServerKey) (string, error)

	Log *slog.Logger // nil: none

	// ProcRoot replaces /proc for what is read of containers and peers. For
	// tests; pidfds are the real ones all the same.
	ProcRoot string
}
