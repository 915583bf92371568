package grpcserver

import (
	"context"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"tokenbroker/broker"
	pb "tokenbroker/proto/tokenbroker/v1"
)

type workload struct {
	pb.UnimplementedWorkloadServer
	b *broker.Broker
}

func (w workload) GetToken(ctx context.Context, r *pb.GetTokenRequest) (*pb.GetTokenResponse, error) {
	if r.MinTtl != nil && !r.MinTtl.IsValid() {
		return nil, broker.Errorf(broker.Invalid, "min_ttl is not a duration")
	}
	t, err := w.b.Token(ctx, peerOf(ctx), broker.Want{
		Provider: broker.ProviderID(r.Provider),
		Audience: r.Audience,
		Scopes:   r.Scopes,
		MinTTL:   r.GetMinTtl().AsDuration(),
		Rejected: r.RejectedSha256,
	})
	if err != nil {
		return nil, err
	}
	return &pb.GetTokenResponse{
		AccessToken: t.Access.Reveal(),
		TokenType:   t.Type,
		ExpiresIn:   int64(t.ExpiresIn / time.Second),
		ExpiresAt:   timestamp(t.ExpiresAt),
		Provider:    string(t.Provider),
		Audience:    t.Audience,
		Scopes:      t.Scopes,
		Ref:         t.Ref,
	}, nil
}

func (w workload) ListProviders(ctx context.Context, _ *pb.ListProvidersRequest) (*pb.ListProvidersResponse, error) {
	list, ref, err := w.b.Providers(ctx, peerOf(ctx))
	if err != nil {
		return nil, err
	}
	answer := &pb.ListProvidersResponse{Ref: ref}
	for _, s := range list {
		answer.Providers = append(answer.Providers, &pb.ProviderStatus{
			Name:      string(s.Name),
			Login:     s.Login,
			State:     grantStates[s.State],
			Audiences: s.Audiences,
			Scopes:    s.Scopes,
		})
	}
	return answer, nil
}

var grantStates = map[broker.GrantState]pb.GrantState{
	broker.NoGrant:       pb.GrantState_GRANT_STATE_NONE,
	broker.Live:          pb.GrantState_GRANT_STATE_LIVE,
	broker.NeedsLogin:    pb.GrantState_GRANT_STATE_LOGIN_REQUIRED,
	broker.Disconnected:  pb.GrantState_GRANT_STATE_REVOKED,
	broker.GrantDisabled: pb.GrantState_GRANT_STATE_DISABLED,
}

// timestamp is unset for a time that isn't known.
func timestamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}
