package broker

import (
	"context"
	"time"
)

// A Registration is a hub's statement that a server runs on this host for a
// user. It is made before the container starts (reserved), is then bound to
// the one container that Docker and the kernel confirm, and ends as stopped.
type Registration struct {
	Key        ServerKey
	Host       HostID
	Generation int64 // grows with every Register; late words of an older one are void
	State      RegistrationState
	// ContainerName is the name the container will have; for Docker attestation.
	ContainerName string
	// UID is who the server runs as; for process attestation. Nil: not said.
	UID       *uint32
	Groups    []string // the user's groups at the hub
	Directory string   // on this host, stable for the server
	Container string   // full ID of the container last bound
	Level     string   // of attestation, once bound
	Reason    string   // why it is not bound, if something said so
	Changed   time.Time
}

// RegistrationState says how far a registration is.
type RegistrationState string

const (
	Reserved RegistrationState = "reserved" // the hub has announced it
	Bound    RegistrationState = "bound"    // its container is known and lives
	Stopped  RegistrationState = "stopped"  // its container has ended
)

// RegisterRequest is what a hub says of a server that is about to start.
type RegisterRequest struct {
	User          UserID
	Server        ServerName
	ContainerName string
	Provider      ProviderID // with Handle; empty: the hub's login provider
	Handle        Secret     // may be empty
	Groups        []string
	RequireGrant  bool
	UID           *uint32
}

// Registered is what the hub needs to start the server.
type Registered struct {
	Directory  string
	Helper     string // empty: there is none to mount
	Grant      GrantState
	Generation int64
	Ref        string
}

// Register reserves a place for a server.
func (b *Broker) Register(ctx context.Context, hub HubID, r RegisterRequest) (Registered, error) {
	panic("wip")
}

// Unregister ends a server's registration; see hub.proto. ref is empty if there was nothing to do.
func (b *Broker) Unregister(ctx context.Context, hub HubID, user UserID, server ServerName, generation int64) (ref string, err error) {
	panic("wip")
}

// Registrations lists this host's registrations, sorted.
func (b *Broker) Registrations() []Registration { panic("wip") }
