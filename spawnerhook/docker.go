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

	// Private are files and directories that no container but the hub's may
	// reach, the servers' directories first. One that is not there is not looked
	// for.
	Private []string

	// Posture says what becomes of findings; see FindingNames.
	Posture Posture

	// Trusted are names of containers that may be able to forge proofs, such as
	// a hub's that has the Docker socket: they lower nobody's level.
	Trusted []string

	Log *slog.Logger // nil: none

	// ProcRoot replaces /proc for what is read of containers and peers. For
	// tests; pidfds are the real ones all the same.
	ProcRoot string
}
