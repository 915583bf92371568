package client_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"

	"tokenbroker/client"
	pb "tokenbroker/proto/tokenbroker/v1"
)

// A broker plays the broker's side: it answers with the errors it was given,
// one per request, and then with a token.
type broker struct {
	pb.UnimplementedWorkloadServer

	mu    sync.Mutex // guards the rest
	errs  []error
	asked []*pb.GetTokenRequest
}

func (b *broker) GetToken(_ context.Context, r *pb.GetTokenRequest) (*pb.GetTokenResponse, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.asked = append(b.asked, r)
	if len(b.errs) > 0 {
		err := b.errs[0]
		b.errs = b.errs[1:]
		return nil, err
	}
	return &pb.GetTokenResponse{
		AccessToken: "secret-token", TokenType: "Bearer", ExpiresIn: 300,
		Provider: "keycloak", Audience: "storage", Scopes: []string{"read"}, Ref: "7",
	}, nil
}

func (b *broker) ListProviders(context.Context, *pb.ListProvidersRequest) (*pb.ListProvidersResponse, error) {
	return &pb.ListProvidersResponse{Providers: []*pb.ProviderStatus{
		{Name: "keycloak", Login: true, State: pb.GrantState_GRANT_STATE_LOGIN_REQUIRED, Audiences: []string{"storage"}},
	}}, nil
}

// socket returns a path short enough for a Unix socket.
func socket(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "client")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "broker.sock")
}

// serve lets b answer at path until the test ends.
func serve(t *testing.T, path string, b pb.WorkloadServer) {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	pb.RegisterWorkloadServer(s, b)
	go s.Serve(l)
	t.Cleanup(s.Stop)
}

func newClient(t *testing.T, path string) *client.Client {
	t.Helper()
	c, err := client.NewAt(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// refusal is an error as the broker sends it.
func refusal(t *testing.T, code codes.Code, reason, sentence string, retry time.Duration) error {
	t.Helper()
	st, err := status.New(code, sentence).WithDetails(&errdetails.ErrorInfo{
		Reason: reason, Domain: "tokenbroker", Metadata: map[string]string{"next": "do this", "ref": "12"},
	})
	if err == nil && retry > 0 {
		st, err = st.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(retry)})
	}
	if err != nil {
		t.Fatal(err)
	}
	return st.Err()
}

func TestTokenSendsWhatTheOptionsSay(t *testing.T) {
	b, path := &broker{}, socket(t)
	serve(t, path, b)
	_, err := newClient(t, path).Token(t.Context(), client.Provider("github"), client.Audience("storage"),
		client.Scopes("read", "write"), client.MinTTL(time.Minute), client.Rejected("old"))
	if err != nil {
		t.Fatal(err)
	}
	want := &pb.GetTokenRequest{
		Provider: "github", Audience: "storage", Scopes: []string{"read", "write"}, MinTtl: durationpb.New(time.Minute),
		RejectedSha256: "cba06b5736faf67e54b07b561eae94395e774c517a7d910a54369e1263ccfbd4",
	}
	if diff := cmp.Diff(want, b.asked[0], protocmp.Transform()); diff != "" {
		t.Errorf("Token asked (-want +got):\n%s", diff)
	}
}

func TestATokenPrintsWithoutItsSecret(t *testing.T) {
	path := socket(t)
	serve(t, path, &broker{})
	tok, err := newClient(t, path).Token(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if tok.AccessToken != "secret-token" || tok.Type != "Bearer" || tok.Ref != "7" {
		t.Errorf("Token: got %q, %q, %q", tok.AccessToken, tok.Type, tok.Ref)
	}
	var log strings.Builder
	slog.New(slog.NewJSONHandler(&log, nil)).Info("got", "token", tok)
	for _, s := range []string{fmt.Sprint(tok), fmt.Sprintf("%#v %+v", tok, []client.Token{tok}), log.String()} {
		if strings.Contains(s, "secret-token") {
			t.Errorf("the access token is in %q", s)
		}
	}
}

func TestTokenSourceAsksEachTime(t *testing.T) {
	b, path := &broker{}, socket(t)
	serve(t, path, b)
	src := newClient(t, path).TokenSource(t.Context(), client.Audience("storage"))
	for range 2 {
		tok, err := src.Token()
		if err != nil {
			t.Fatal(err)
		}
		if tok.AccessToken != "secret-token" || !tok.Valid() {
			t.Errorf("TokenSource: got a token that is valid: %t", tok.Valid())
		}
	}
	b.errs = []error{refusal(t, codes.PermissionDenied, "revoked", "you were disconnected", 0)}
	if _, err := src.Token(); !errors.Is(err, client.ErrRevoked) {
		t.Errorf("TokenSource after the revocation: got %v, want ErrRevoked", err)
	}
	if len(b.asked) != 3 {
		t.Errorf("the broker was asked %d times, want 3", len(b.asked))
	}
}

func TestEachCodeHasItsSentinel(t *testing.T) {
	for reason, want := range map[string]error{
		"pending": client.ErrPending, "unknown_peer": client.ErrUnknownPeer, "denied": client.ErrDenied,
		"login_required": client.ErrLoginRequired, "revoked": client.ErrRevoked, "invalid": client.ErrInvalid,
		"unsatisfiable": client.ErrUnsatisfiable, "provider_down": client.ErrProviderDown,
		"unavailable": client.ErrUnavailable, "limited": client.ErrLimited, "internal": client.ErrInternal,
	} {
		t.Run(reason, func(t *testing.T) {
			path := socket(t)
			serve(t, path, &broker{errs: []error{refusal(t, codes.Unknown, reason, "so it is", 3*time.Second)}})
			_, err := newClient(t, path).Token(t.Context())
			if !errors.Is(err, want) {
				t.Fatalf("Token: got %v, want %v", err, want)
			}
			var e *client.Error
			errors.As(err, &e)
			if e.Sentence != "so it is" || e.Next != "do this" || e.Ref != "12" || e.RetryAfter != 3*time.Second {
				t.Errorf("Token: got %+v", *e)
			}
			if got, want := err.Error(), "so it is; do this (ref 12)"; got != want {
				t.Errorf("Error: got %q, want %q", got, want)
			}
		})
	}
}

func TestAnAbsentBrokerIsDown(t *testing.T) {
	path := socket(t)
	_, err := newClient(t, path).Token(t.Context())
	if !errors.Is(err, client.ErrBrokerDown) {
		t.Fatalf("Token: got %v, want ErrBrokerDown", err)
	}
	if errors.Is(err, client.ErrPending) || !strings.Contains(err.Error(), path) {
		t.Errorf("Token: %v", err)
	}
}

func TestAContextThatEndsIsNotTheBrokersFault(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := newClient(t, socket(t)).Token(ctx)
	if !errors.Is(err, context.Canceled) || errors.Is(err, client.ErrBrokerDown) {
		t.Errorf("Token: got %v, want context.Canceled", err)
	}
}

func TestWaitOutlastsWhatPasses(t *testing.T) {
	path := socket(t)
	b := &broker{errs: []error{
		refusal(t, codes.Unavailable, "pending", "still registering", time.Millisecond),
		refusal(t, codes.Unavailable, "provider_down", "keycloak is away", time.Millisecond),
	}}
	got := make(chan error, 1)
	go func() { // the broker comes up while we wait for it
		_, err := newClient(t, path).Token(t.Context(), client.Wait(0))
		got <- err
	}()
	serve(t, path, b)
	if err := <-got; err != nil {
		t.Errorf("Token with Wait: %v", err)
	}
	if len(b.asked) != 3 {
		t.Errorf("the broker was asked %d times, want 3", len(b.asked))
	}
}

func TestWaitEndsWithTheReason(t *testing.T) {
	for _, tt := range []struct {
		why    string
		refuse error
		wait   time.Duration
		want   error
	}{
		{"nobody will change a denial by waiting", refusal(t, codes.PermissionDenied, "denied", "no", 0), 0, client.ErrDenied},
		{"the time is over", refusal(t, codes.Unavailable, "pending", "not yet", time.Hour), time.Second, client.ErrPending},
		{"the user may log in again, but not within a second", refusal(t, codes.FailedPrecondition, "login_required", "log in", 0), time.Second, client.ErrLoginRequired},
	} {
		t.Run(tt.why, func(t *testing.T) {
			t.Parallel()
			path := socket(t)
			serve(t, path, &broker{errs: []error{tt.refuse}})
			c := newClient(t, path)
			if _, err := c.Providers(t.Context()); err != nil { // connects, so that the wait is not for that
				t.Fatal(err)
			}
			if _, err := c.Token(t.Context(), client.Wait(tt.wait)); !errors.Is(err, tt.want) {
				t.Errorf("Token: got %v, want %v", err, tt.want)
			}
		})
	}
}

func TestProvidersListsWhatCouldBeAsked(t *testing.T) {
	path := socket(t)
	t.Setenv(client.SocketVariable, path)
	serve(t, path, &broker{})
	c, err := client.New()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	got, err := c.Providers(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := []client.ProviderStatus{{Name: "keycloak", Login: true, State: "login_required", Audiences: []string{"storage"}}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Providers (-want +got):\n%s", diff)
	}
}
