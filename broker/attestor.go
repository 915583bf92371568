package broker

import (
	"context"
	"os"
	"slices"
	"sync/atomic"
	"time"
)

// An Attestor says which process runs in which server's workload. It has two
// parts: Bind, which asks Docker and the kernel once per start of a container,
// and Attest, which asks only the kernel, once per connection.
//
// All methods may be called from many goroutines at once.
type Attestor interface {
	// Bind looks for the workload that was reserved as r and records what
	// identifies it. It never guesses. It returns ErrPending while there is none
	// yet, and ErrDenied with the finding if the workload's posture breaks
	// identity, or if it does not mount r's directory read-only; then a look
	// makes sense again only after Watch names the container.
	Bind(ctx context.Context, r Registration) (*Workload, error)

	// Attest returns nil if p is a live process of w. Otherwise it returns
	// ErrUnknownPeer with what the kernel said as the cause.
	Attest(p *Peer, w *Workload) error

	// Alive returns nil while p's process lives, else ErrUnknownPeer. It costs
	// one system call, so that every request can ask. A connection outlives its
	// maker if the descriptor was handed on; the token must not.
	Alive(p *Peer) error

	// Watch calls changed with the name of each container that something has
	// happened to, until ctx is done. A call is a hint to look, never a fact;
	// hints may repeat. An empty name says that hints may have been lost, so
	// look at all. It calls ran once with each command that was run in a container from
	// outside after since, as far as it hears of it, and with each that it finds
	// running from before; a zero since is now. Watch reconnects by itself.
	Watch(ctx context.Context, since time.Time, changed func(container string), ran func(Exec)) error

	// Check says whether the engine can be asked. The string is the best level
	// of attestation this host gives: pidfd+ns, pidfd, proc or uid. ErrDenied
	// says that it is an engine of a kind that can't be believed.
	Check(ctx context.Context) (level string, err error)

	// Worth says what proofs of a level are worth on this host now, and why that
	// is less: while a container runs here that could forge them, Lowered. It
	// asks nobody.
	Worth(level string) (now, why string)
}

// levels of attestation, the weakest first: by the caller's uid, by its cgroups,
// by these of a process that can't be mistaken, and by its namespaces, too.
var levels = []string{"uid", "proc", "pidfd", "pidfd+ns"}

// Levels are the levels of attestation, the weakest first.
func Levels() []string { return slices.Clone(levels) }

// Lowered is the level below.
func Lowered(level string) string {
	return levels[max(0, slices.Index(levels, level)-1)]
}

// reaches says whether level is need or better. No need is always met, and one
// that is none of levels never.
func reaches(level, need string) bool {
	if need == "" {
		return true
	}
	i := slices.Index(levels, need)
	return i >= 0 && slices.Index(levels, level) >= i
}

// A Peer is the process at the other end of a connection, as the kernel named
// it when the connection was made, and the socket it came in on. A Peer is made
// by the listener, lives as long as its connection, and must not be copied.
type Peer struct {
	Server ServerKey // the server whose socket it is; zero on other sockets
	Hub    HubID     // the hub whose socket it is; empty on other sockets
	PID    int32
	UID    uint32
	GID    uint32
	Pidfd  *os.File // who connected; before Linux 6.5 who had PID when it was accepted; before 5.3 nil
	Start  uint64   // start time of PID in clock ticks, if Pidfd is nil

	// attested is the workload for which Attest last succeeded. A server that
	// is bound again has another one, so the peer is attested again.
	attested atomic.Pointer[Workload]
}

// A Workload is what Docker and the kernel said about one container (or, with
// process attestation, one uid) when a registration was bound to it. It is
// immutable; the same container started again is another Workload.
type Workload struct {
	Container string // full ID; empty with process attestation
	Name      string // name of the container
	Image     string // image reference as configured
	StartedAt time.Time
	PID       int32    // the init process, in the broker's PID namespace
	Init      *os.File // its pidfd; nil where there is none
	UID       uint32   // with process attestation

	// Cgroups is the exact path per hierarchy, keyed as in the second field of
	// /proc/PID/cgroup, only lines that end in the container's own full ID.
	Cgroups map[string]string
	// CgroupID is the kernel's number of the cgroup at Cgroups[""]; 0 where it
	// tells none.
	CgroupID uint64
	// PIDNamespace and MountNamespace are inodes; 0 where the broker may not
	// read them.
	PIDNamespace, MountNamespace uint64

	Level   string   // one of Levels, by what was read; what it is worth, Worth says
	Posture []string // weaknesses found that the configuration lets pass, by name

	// Done is closed when the init process has ended. Nil: nobody watches.
	Done <-chan struct{}
}
