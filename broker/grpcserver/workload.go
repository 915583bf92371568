package grpcserver

import (
	"context"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"tokenbroker/broker"
	pb "tokenbroker/proto/tokenbroker/v1"
)

type workload struct {
	pb.UnimplementedWorkloadServer
	b *broker.Broker
}

func (w workload) GetToken(ctx context.Context, r *pb.GetTokenRequest) (*pb.GetTokenResponse, error) {
	want, err := wantOf(r)
	if err != nil {
		return nil, err
	}
	want.Rejected = r.RejectedSha256
	t, err := w.b.Token(ctx, peerOf(ctx), want)
	if err != nil {
		return nil, err
	}
	return tokenResponse(t), nil
}

// wantOf reads what GetToken and Watch are both asked for.
func wantOf(r interface {
	GetProvider() string
	GetAudience() string
	GetScopes() []string
	GetMinTtl() *durationpb.Duration
}) (broker.Want, error) {
	if d := r.GetMinTtl(); d != nil && !d.IsValid() {
		return broker.Want{}, broker.Errorf(broker.Invalid, "min_ttl is not a duration")
	}
	return broker.Want{
		Provider: broker.ProviderID(r.GetProvider()),
		Audience: r.GetAudience(),
		Scopes:   r.GetScopes(),
		MinTTL:   r.GetMinTtl().AsDuration(),
	}, nil
}

func tokenResponse(t broker.Token) *pb.GetTokenResponse {
	return &pb.GetTokenResponse{
		AccessToken: t.Access.Reveal(),
		TokenType:   t.Type,
		ExpiresIn:   int64(t.ExpiresIn / time.Second),
		ExpiresAt:   timestamp(t.ExpiresAt),
		Provider:    string(t.Provider),
		Audience:    t.Audience,
		Scopes:      t.Scopes,
		Ref:         t.Ref,
	}
}

// readWithin is how long a reader may take for one message. It is the same over
// HTTP.
const readWithin = 10 * time.Second

func (w workload) Watch(r *pb.WatchRequest, s grpc.ServerStreamingServer[pb.WatchResponse]) error {
	want, err := wantOf(r)
	if err != nil {
		return err
	}
	ctx := s.Context()
	return w.b.Watch(ctx, peerOf(ctx), want, func(u broker.Update) error {
		return giveUp(ctx, readWithin, func() error { return s.Send(watchResponse(u)) })
	})
}

// giveUp gives up on a reader who takes nothing. send goes on until the
// stream ends, which it does with the call.
func giveUp(ctx context.Context, d time.Duration, send func() error) error {
	sent := make(chan error, 1)
	go func() { sent <- send() }()
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case err := <-sent:
		return err
	case <-t.C:
		return broker.Errorf(broker.Limited, "what the token broker tells is not read within %s", d)
	case <-ctx.Done():
		return ctx.Err()
	}
}

func watchResponse(u broker.Update) *pb.WatchResponse {
	if u.Refusal == nil {
		return &pb.WatchResponse{Event: u.Event, Token: tokenResponse(u.Token)}
	}
	return &pb.WatchResponse{Event: u.Event, Refusal: refusal(u.Refusal)}
}

func refusal(e *broker.Error) *pb.Refusal {
	return &pb.Refusal{Code: string(e.Code), Sentence: e.Sentence, Next: e.Next, Ref: e.Ref}
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
