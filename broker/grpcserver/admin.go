package grpcserver

import (
	"context"
	"fmt"

	"tokenbroker/broker"
	pb "tokenbroker/proto/tokenbroker/v1"
)

type admin struct {
	pb.UnimplementedAdminServer
	b *broker.Broker
}

func (a admin) Status(ctx context.Context, _ *pb.StatusRequest) (*pb.StatusResponse, error) {
	s := a.b.Status(ctx)
	answer := &pb.StatusResponse{
		Deployment:    s.Deployment,
		Host:          string(s.Host),
		StartedAt:     timestamp(s.StartedAt),
		Version:       s.Version,
		Revision:      s.Revision,
		Store:         partStatus(s.Store),
		Attestation:   partStatus(s.Attestation),
		Registrations: make(map[string]int32),
	}
	for _, p := range s.Providers {
		answer.Providers = append(answer.Providers, partStatus(p))
	}
	for state, n := range s.Registrations {
		answer.Registrations[string(state)] = int32(n)
	}
	return answer, nil
}

func partStatus(p broker.PartStatus) *pb.PartStatus {
	return &pb.PartStatus{Name: p.Name, Ok: p.OK, Detail: p.Detail}
}

func (a admin) ListGrants(ctx context.Context, r *pb.ListGrantsRequest) (*pb.ListGrantsResponse, error) {
	list, err := a.b.Grants(ctx, broker.HubID(r.Hub), broker.UserID(r.User))
	if err != nil {
		return nil, err
	}
	answer := new(pb.ListGrantsResponse)
	for _, g := range list {
		answer.Grants = append(answer.Grants, &pb.Grant{
			Hub:              string(g.Key.Hub),
			User:             string(g.User),
			Provider:         string(g.Key.Provider),
			Sub:              g.Key.Sub,
			State:            grantStates[g.State],
			Reason:           g.Reason,
			Version:          g.Version,
			Epoch:            g.Epoch,
			Roles:            g.Roles,
			RefreshedAt:      timestamp(g.RefreshedAt),
			RefreshedBy:      string(g.RefreshedBy),
			ExpiresAt:        timestamp(g.Expires),
			OutstandingUntil: timestamp(g.OutstandingUntil),
		})
	}
	return answer, nil
}

func (a admin) ListRegistrations(context.Context, *pb.ListRegistrationsRequest) (*pb.ListRegistrationsResponse, error) {
	answer := new(pb.ListRegistrationsResponse)
	for _, r := range a.b.Registrations() {
		answer.Registrations = append(answer.Registrations, &pb.Registration{
			Hub:           string(r.Key.Hub),
			User:          string(r.Key.User),
			Server:        string(r.Key.Server),
			Host:          string(r.Host),
			Generation:    r.Generation,
			State:         string(r.State),
			Reason:        r.Reason,
			ContainerName: r.ContainerName,
			ContainerId:   r.Container,
			Level:         r.Level,
			Directory:     r.Directory,
		})
	}
	return answer, nil
}

func (a admin) Disconnect(ctx context.Context, r *pb.DisconnectRequest) (*pb.DisconnectResponse, error) {
	by := fmt.Sprintf("uid %d", peerOf(ctx).UID)
	gone, ref, err := a.b.Disconnect(ctx, by, broker.HubID(r.Hub), broker.UserID(r.User), broker.ProviderID(r.Provider))
	if err != nil {
		return nil, err
	}
	answer := &pb.DisconnectResponse{Ref: ref}
	for _, d := range gone {
		answer.Disconnected = append(answer.Disconnected, &pb.Disconnected{
			Provider:         string(d.Provider),
			Sub:              d.Sub,
			IssuingStoppedAt: timestamp(d.IssuingStoppedAt),
			OutstandingUntil: timestamp(d.OutstandingUntil),

			ProviderRevocation: string(d.Revocation),
		})
	}
	return answer, nil
}
