package grpcserver

import (
	"context"
	"time"

	"tokenbroker/broker"
	pb "tokenbroker/proto/tokenbroker/v1"
)

type admin struct {
	pb.UnimplementedAdminServer
	b *broker.Broker
}

// looked records who looks at what. What changes something the domain records.
func (a admin) looked(ctx context.Context, method, hub, user string) {
	a.b.Looked(peerOf(ctx), actions[method], broker.HubID(hub), broker.UserID(user))
}

func (a admin) Status(ctx context.Context, _ *pb.StatusRequest) (*pb.StatusResponse, error) {
	a.looked(ctx, "Status", "", "")
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
	a.looked(ctx, "ListGrants", r.Hub, r.User)
	list, err := a.b.Report(ctx, broker.HubID(r.Hub), broker.UserID(r.User), broker.ProviderID(r.Provider))
	if err != nil {
		return nil, err
	}
	answer := new(pb.ListGrantsResponse)
	for _, g := range list {
		answer.Grants = append(answer.Grants, grant(&g))
	}
	return answer, nil
}

// grant is g on the wire; nil stays nil.
func grant(g *broker.GrantReport) *pb.Grant {
	if g == nil {
		return nil
	}
	m := &pb.Grant{
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
		Username:         g.Username,
		Since:            timestamp(g.Since),
		LoginAt:          timestamp(g.LoginAt),
		Why:              g.Outlook.Why,
		Next:             string(g.Outlook.Next),
		NextAt:           timestamp(g.Outlook.At),
		NextText:         g.Outlook.Says,
		EndFixed:         g.End.Fixed,
		Mark:             markText(g.Mark),

		ProviderRevocation: string(g.Revocation),
	}
	if g.Lease.Holder != "" {
		m.Lease = &pb.Lease{Host: string(g.Lease.Host), Until: timestamp(g.Lease.Until)}
	}
	for _, h := range g.Running {
		m.RunningOn = append(m.RunningOn, string(h))
	}
	return m
}

func markText(m broker.Mark) string {
	switch {
	case m.Lost:
		return "lost"
	case m.Attempt != "":
		return "sent"
	}
	return ""
}

func (a admin) ListRegistrations(ctx context.Context, _ *pb.ListRegistrationsRequest) (*pb.ListRegistrationsResponse, error) {
	a.looked(ctx, "ListRegistrations", "", "")
	return &pb.ListRegistrationsResponse{Registrations: registrations(a.b.Registrations())}, nil
}

func registrations(list []broker.Registration) (all []*pb.Registration) {
	for _, r := range list {
		all = append(all, &pb.Registration{
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
	return all
}

// administrator is who asks, for the audit.
func administrator(ctx context.Context) string { return peerOf(ctx).Administrator() }

func (a admin) Disconnect(ctx context.Context, r *pb.DisconnectRequest) (*pb.DisconnectResponse, error) {
	gone, ref, err := a.b.Disconnect(ctx, administrator(ctx), broker.HubID(r.Hub), broker.UserID(r.User), broker.ProviderID(r.Provider))
	if err != nil {
		return nil, err
	}
	return &pb.DisconnectResponse{Disconnected: disconnected(gone), Ref: ref}, nil
}

func disconnected(gone []broker.Disconnection) (all []*pb.Disconnected) {
	for _, d := range gone {
		all = append(all, &pb.Disconnected{
			Provider:         string(d.Provider),
			Sub:              d.Sub,
			IssuingStoppedAt: timestamp(d.IssuingStoppedAt),
			OutstandingUntil: timestamp(d.OutstandingUntil),

			ProviderRevocation: string(d.Revocation),
			NotKept:            d.NotKept,
		})
	}
	return all
}

func (a admin) ShowUser(ctx context.Context, r *pb.ShowUserRequest) (*pb.ShowUserResponse, error) {
	a.looked(ctx, "ShowUser", r.Hub, r.User)
	u, err := a.b.User(ctx, broker.HubID(r.Hub), broker.UserID(r.User))
	if err != nil {
		return nil, err
	}
	answer := &pb.ShowUserResponse{
		Hub:              string(u.Hub),
		User:             string(u.User),
		Groups:           u.Groups,
		ReboundAt:        timestamp(u.Rebound),
		Registrations:    registrations(u.Servers),
		OutstandingUntil: timestamp(u.OutstandingUntil),
	}
	for _, c := range u.Accounts {
		answer.Accounts = append(answer.Accounts, &pb.Account{Provider: string(c.Provider), Login: c.Login, Sub: c.Sub, Grant: grant(c.Grant)})
	}
	return answer, nil
}

func (a admin) Rebind(ctx context.Context, r *pb.RebindRequest) (*pb.RebindResponse, error) {
	done, err := a.b.Rebind(ctx, administrator(ctx), broker.HubID(r.Hub), broker.UserID(r.User), broker.ProviderID(r.Provider), r.Sub)
	if err != nil {
		return nil, err
	}
	return &pb.RebindResponse{WasSub: done.Was, Sub: done.Sub, Ended: disconnected(done.Ended), Ref: done.Ref}, nil
}

func (a admin) Explain(ctx context.Context, r *pb.ExplainRequest) (*pb.ExplainResponse, error) {
	a.looked(ctx, "Explain", r.Hub, r.User)
	x, err := a.b.Explain(ctx, broker.Question{
		Hub: broker.HubID(r.Hub), User: broker.UserID(r.User), Server: broker.ServerName(r.Server),
		Want: broker.Want{Provider: broker.ProviderID(r.Provider), Audience: r.Audience, Scopes: r.Scopes},
	})
	if err != nil {
		return nil, err
	}
	answer := &pb.ExplainResponse{
		Hub:              string(x.Server.Hub),
		Provider:         string(x.Want.Provider),
		Assumed:          x.Assumed,
		Rule:             int32(x.Rule),
		RuleText:         x.RuleText,
		Needs:            x.Needs,
		Has:              x.Has,
		Fits:             x.Fits,
		Audience:         x.Target.Audience,
		Scopes:           x.Target.Scopes,
		AskedScopes:      x.AskedScopes,
		MaxTtl:           int32(x.MaxTTL / time.Second),
		Unverified:       x.Unverified,
		Grant:            grant(x.Grant),
		CachedUntil:      timestamp(x.CachedUntil),
		OutstandingUntil: timestamp(x.OutstandingUntil),
	}
	if x.Refusal != nil {
		answer.Refusal = refusal(x.Refusal)
	}
	return answer, nil
}
