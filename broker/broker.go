package broker

import (
	"context"
	"io"
	"log/slog"
	"time"

	"tokenbroker/broker/seal"
)

// Config is what a Broker is made of. All fields but Helper and Version are
// needed; New says which is missing.
type Config struct {
	Deployment string // names the Redis and the brokers on it
	Host       HostID // this machine; brokers of one deployment have different ones
	Contact    string // whom users are told to ask
	Version    string // of the program, for Status

	Hubs      map[HubID]Hub
	Providers []Provider
	Rules     []Rule

	Store    Store
	Keys     *seal.Keyset
	Attestor Attestor
	Sockets  Sockets

	Audit  io.Writer // one JSON line per decision
	Log    *slog.Logger
	Helper string // path of the helper's binary on this host; empty: none
}

// A Hub is what the broker knows of one JupyterHub.
type Hub struct {
	Login ProviderID // the provider its users log in with
}

// A Broker joins the parts; its methods are the flows. All of them may be
// called from many goroutines at once.
type Broker struct{}

// New checks cfg and joins the parts. It asks none of them anything.
func New(cfg Config) (*Broker, error) { panic("wip") }

// Start restores this host's registrations, opens their sockets and begins to
// watch their containers. Close ends what it began.
func (b *Broker) Start(ctx context.Context) error { panic("wip") }

// Close stops watching and returns when the refreshes under way have ended, so
// that no answer of a provider is lost. Sockets and Store stay open; whoever
// made them closes them afterwards.
func (b *Broker) Close() { panic("wip") }

// PartStatus is the state of one part of a broker.
type PartStatus struct {
	Name   string
	OK     bool
	Detail string
}

// Status is one broker's state.
type Status struct {
	Deployment    string
	Host          HostID
	StartedAt     time.Time
	Version       string
	Revision      int64
	Store         PartStatus
	Attestation   PartStatus
	Providers     []PartStatus
	Registrations map[RegistrationState]int
}

// Status asks each part how it does.
func (b *Broker) Status(ctx context.Context) Status { panic("wip") }

// Grants lists the deployment's grants, without their refresh tokens. Empty
// arguments narrow nothing.
func (b *Broker) Grants(ctx context.Context, hub HubID, user UserID) ([]Grant, error) { panic("wip") }

// Refuse records a request that an edge could not even read, and returns what
// to answer. action names what was asked for, p may be nil.
func (b *Broker) Refuse(p *Peer, action string, err error) *Error { panic("wip") }
