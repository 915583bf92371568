package broker

import (
	"context"
	"time"
)

// A Broker joins the parts; its methods are the flows.
type Broker struct{}

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

// Grants lists the deployment's grants, without their refresh tokens. Empty arguments narrow nothing.
func (b *Broker) Grants(ctx context.Context, hub HubID, user UserID) ([]Grant, error) { panic("wip") }

// Refuse records a request that an edge could not even read, and returns what
// to answer. action names what was asked for, p may be nil.
func (b *Broker) Refuse(p *Peer, action string, err error) *Error { panic("wip") }
