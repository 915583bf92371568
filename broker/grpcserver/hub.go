package grpcserver

import (
	"context"
	"strings"
	"time"

	"tokenbroker/broker"
	pb "tokenbroker/proto/tokenbroker/v1"
)

type hub struct {
	pb.UnimplementedHubServer
	b *broker.Broker
}

func (h hub) Claim(ctx context.Context, r *pb.ClaimRequest) (*pb.ClaimResponse, error) {
	ref, err := h.b.Claim(ctx, peerOf(ctx).Hub, broker.ProviderID(r.Provider), broker.NewSecret(r.Handle), broker.UserID(r.User))
	if err != nil {
		return nil, err
	}
	return &pb.ClaimResponse{Ref: ref}, nil
}

func (h hub) CheckSession(ctx context.Context, r *pb.CheckSessionRequest) (*pb.CheckSessionResponse, error) {
	s, err := h.b.CheckSession(ctx, peerOf(ctx).Hub, broker.ProviderID(r.Provider), broker.NewSecret(r.Handle), broker.UserID(r.User), r.HaveSha256)
	if err != nil {
		return nil, err
	}
	return &pb.CheckSessionResponse{
		Active: s.Active,
		Stale:  s.Stale,
		Token:  hubToken(s.Token),
		Reason: s.Reason,
		Ref:    s.Ref,
	}, nil
}

func hubToken(t *broker.HubToken) *pb.HubToken {
	if t == nil {
		return nil
	}
	return &pb.HubToken{
		AccessToken:  t.Access.Reveal(),
		TokenType:    t.Type,
		ExpiresIn:    int64(t.ExpiresIn / time.Second),
		Scope:        strings.Join(t.Scopes, " "),
		IdToken:      t.IDToken.Reveal(),
		RefreshToken: t.Handle.Reveal(),
	}
}

func (h hub) Register(ctx context.Context, r *pb.RegisterRequest) (*pb.RegisterResponse, error) {
	done, err := h.b.Register(ctx, peerOf(ctx).Hub, broker.RegisterRequest{
		User:          broker.UserID(r.User),
		Server:        broker.ServerName(r.Server),
		ContainerName: r.ContainerName,
		Provider:      broker.ProviderID(r.Provider),
		Handle:        broker.NewSecret(r.Handle),
		Groups:        r.Groups,
		Shared:        r.Shared,
		RequireGrant:  r.RequireGrant,
		UID:           r.Uid,
	})
	if err != nil {
		return nil, err
	}
	return &pb.RegisterResponse{
		Directory:  done.Directory,
		Helper:     done.Helper,
		Grant:      grantStates[done.Grant],
		Generation: done.Generation,
		Ref:        done.Ref,
	}, nil
}

func (h hub) Unregister(ctx context.Context, r *pb.UnregisterRequest) (*pb.UnregisterResponse, error) {
	ref, err := h.b.Unregister(ctx, peerOf(ctx).Hub, broker.UserID(r.User), broker.ServerName(r.Server), r.Generation)
	if err != nil {
		return nil, err
	}
	return &pb.UnregisterResponse{Ref: ref}, nil
}

func (h hub) SetGroups(ctx context.Context, r *pb.SetGroupsRequest) (*pb.SetGroupsResponse, error) {
	ref, err := h.b.SetGroups(ctx, peerOf(ctx).Hub, broker.UserID(r.User), r.Groups)
	if err != nil {
		return nil, err
	}
	return &pb.SetGroupsResponse{Ref: ref}, nil
}

func (h hub) SetShared(ctx context.Context, r *pb.SetSharedRequest) (*pb.SetSharedResponse, error) {
	ref, err := h.b.SetShared(ctx, peerOf(ctx).Hub, broker.UserID(r.User), broker.ServerName(r.Server), r.Shared)
	if err != nil {
		return nil, err
	}
	return &pb.SetSharedResponse{Ref: ref}, nil
}

func (h hub) Logout(ctx context.Context, r *pb.LogoutRequest) (*pb.LogoutResponse, error) {
	ref, err := h.b.HubLogout(ctx, peerOf(ctx).Hub, broker.UserID(r.User), r.NotAllowed)
	if err != nil {
		return nil, err
	}
	return &pb.LogoutResponse{Ref: ref}, nil
}
