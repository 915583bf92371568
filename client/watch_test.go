package client_test

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"

	"tokenbroker/client"
	pb "tokenbroker/proto/tokenbroker/v1"
)

// A telling broker tells one part of a story per stream, and then ends the stream
// as the part says.
type telling struct {
	broker
	parts []part
	wants []*pb.WatchRequest
}

type part struct {
	tells []*pb.WatchResponse
	ends  error // nil: the stream stays open until its reader has gone
}

func (b *telling) Watch(r *pb.WatchRequest, s grpc.ServerStreamingServer[pb.WatchResponse]) error {
	b.mu.Lock()
	b.wants = append(b.wants, r)
	p := part{}
	if len(b.parts) > 0 {
		p, b.parts = b.parts[0], b.parts[1:]
	}
	b.mu.Unlock()
	for _, m := range p.tells {
		if err := s.Send(m); err != nil {
			return err
		}
	}
	if p.ends == nil {
		<-s.Context().Done()
	}
	return p.ends
}

func serveTelling(t *testing.T, parts ...part) (*telling, *client.Client) {
	t.Helper()
	b, path := &telling{parts: parts}, socket(t)
	serve(t, path, b)
	return b, newClient(t, path)
}

func tells(token string) *pb.WatchResponse {
	return &pb.WatchResponse{Event: "token", Token: &pb.GetTokenResponse{AccessToken: token, TokenType: "Bearer", ExpiresIn: 300}}
}

func refuses(event, code string) *pb.WatchResponse {
	return &pb.WatchResponse{Event: event, Refusal: &pb.Refusal{Code: code, Sentence: "so it is", Next: "do this", Ref: "12"}}
}

// seen ranges over a watch until it has yielded n times, or ends.
func seen(t *testing.T, c *client.Client, n int, opts ...client.Option) (all []string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for tok, err := range c.Watch(ctx, opts...) {
		var e *client.Error
		switch {
		case errors.As(err, &e):
			all = append(all, string(e.Code))
		case err != nil:
			t.Fatalf("Watch: %v is no *Error", err)
		default:
			all = append(all, tok.AccessToken)
		}
		if len(all) == n {
			break
		}
	}
	if ctx.Err() != nil {
		t.Fatalf("Watch: got %q, and then nothing", all)
	}
	return all
}

func TestWatchYieldsTokensAndWhyThereIsNone(t *testing.T) {
	b, c := serveTelling(t, part{tells: []*pb.WatchResponse{
		tells("one"), tells("two"), refuses("role_lost", "denied"), tells("three"), refuses("revoked", "revoked"), refuses("denied", "denied"),
	}})
	got := seen(t, c, 6, client.Provider("github"), client.Audience("storage"), client.Scopes("read"), client.MinTTL(time.Minute))
	if want := []string{"one", "two", "role_lost", "three", "revoked", "denied"}; !slices.Equal(got, want) {
		t.Errorf("Watch: got %q, want %q", got, want)
	}
	want := &pb.WatchRequest{Provider: "github", Audience: "storage", Scopes: []string{"read"}, MinTtl: durationpb.New(time.Minute)}
	if diff := cmp.Diff(want, b.wants[0], protocmp.Transform()); diff != "" {
		t.Errorf("Watch asked (-want +got):\n%s", diff)
	}
}

func TestALostRoleIsADenialThatOnlyWatchTells(t *testing.T) {
	_, c := serveTelling(t, part{tells: []*pb.WatchResponse{refuses("role_lost", "denied")}})
	for _, err := range c.Watch(t.Context()) {
		if !errors.Is(err, client.ErrRoleLost) || !errors.Is(err, client.ErrDenied) || errors.Is(err, client.ErrRevoked) {
			t.Errorf("Watch: got %v", err)
		}
		if got, want := err.Error(), "so it is; do this (ref 12)"; got != want {
			t.Errorf("Error: got %q, want %q", got, want)
		}
		break
	}
	if errors.Is(client.ErrDenied, client.ErrRoleLost) {
		t.Error("each denial is taken for a lost role")
	}
}

// Streams end: the broker restarts, a connection grows old, a reader was too slow.
// What a new one tells again is not yielded again.
func TestWatchGoesOnWithANewStream(t *testing.T) {
	_, c := serveTelling(t,
		part{tells: []*pb.WatchResponse{tells("one")}, ends: refusal(t, codes.ResourceExhausted, "limited", "not read", time.Millisecond)},
		part{tells: []*pb.WatchResponse{tells("one")}, ends: refusal(t, codes.Unavailable, "unavailable", "restart", time.Millisecond)},
		part{tells: []*pb.WatchResponse{tells("two"), refuses("login_required", "login_required")}, ends: refusal(t, codes.Unavailable, "pending", "not yet", time.Millisecond)},
		part{tells: []*pb.WatchResponse{refuses("login_required", "login_required"), tells("two")}},
	)
	if got, want := seen(t, c, 4), []string{"one", "two", "login_required", "two"}; !slices.Equal(got, want) {
		t.Errorf("Watch: got %q, want %q", got, want)
	}
}

func TestWatchWaitsForABrokerThatIsNotThereYet(t *testing.T) {
	path := socket(t)
	c := newClient(t, path)
	got := make(chan error, 1)
	go func() {
		for _, err := range c.Watch(t.Context()) {
			got <- err
			return
		}
	}()
	serve(t, path, &telling{parts: []part{{tells: []*pb.WatchResponse{tells("one")}}}})
	if err := <-got; err != nil {
		t.Errorf("Watch: %v", err)
	}
}

func TestWatchEndsWithWhatNoWaitingEnds(t *testing.T) {
	_, c := serveTelling(t,
		part{tells: []*pb.WatchResponse{tells("one")}, ends: refusal(t, codes.Unauthenticated, "unknown_peer", "who are you", 0)},
		part{tells: []*pb.WatchResponse{tells("two")}},
	)
	if got, want := seen(t, c, 9), []string{"one", "unknown_peer"}; !slices.Equal(got, want) {
		t.Errorf("Watch: got %q, want %q", got, want)
	}
}

func TestWatchEndsWithItsContext(t *testing.T) {
	_, c := serveTelling(t, part{tells: []*pb.WatchResponse{tells("one")}})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for _, err := range c.Watch(ctx) {
		if err != nil {
			t.Errorf("Watch: %v", err)
		}
		cancel()
	}
}
