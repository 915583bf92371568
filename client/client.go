// Package client asks the token broker for access tokens, from inside the
// container of a single-user server.
//
//	c, err := client.New()
//	if err != nil { … }
//	defer c.Close()
//	tok, err := c.Token(ctx, client.Provider("keycloak"), client.Audience("storage"))
//
// For HTTP, with a token in each request:
//
//	web := &http.Client{Transport: &oauth2.Transport{Source: c.TokenSource(ctx, client.Audience("storage"))}}
//
// For who needs to know when the right to tokens goes and comes, Watch tells.
//
// Don't keep tokens: ask for one whenever one is needed. The broker keeps them,
// renews them in time, and stops giving them out the moment the user loses the
// right to them. Asking costs a fraction of a millisecond.
//
// Every error is an *Error with a code, a sentence and a next step for the user;
// errors.Is(err, client.ErrLoginRequired) asks for the code.
package client

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"time"

	"golang.org/x/oauth2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	pb "tokenbroker/proto/tokenbroker/v1"
)

const (
	// DefaultSocket is where the broker's socket lies in a container.
	DefaultSocket = "/run/tokenbroker/broker.sock"
	// SocketVariable is the environment variable that names another one.
	SocketVariable = "TOKENBROKER_SOCKET"
)

// A Client asks one broker over its Unix socket. It connects when it is first
// used, and again by itself when the broker was restarted. All methods may be
// called from many goroutines at once.
type Client struct {
	socket string
	conn   *grpc.ClientConn
	rpc    pb.WorkloadClient
}

// New returns a Client for the socket that TOKENBROKER_SOCKET names, or else
// for DefaultSocket. It doesn't connect yet.
func New() (*Client, error) {
	if s := os.Getenv(SocketVariable); s != "" {
		return NewAt(s)
	}
	return NewAt(DefaultSocket)
}

// NewAt returns a Client for a socket that lies elsewhere.
func NewAt(socket string) (*Client, error) {
	conn, err := grpc.NewClient("unix:"+socket,
		// Nobody but the kernel lies between us and the broker.
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		// grpc's own patience grows to two minutes; a broker restarts in seconds.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
			MinConnectTimeout: 5 * time.Second,
		}))
	if err != nil {
		return nil, fmt.Errorf("client of %s: %w", socket, err)
	}
	return &Client{socket: socket, conn: conn, rpc: pb.NewWorkloadClient(conn)}, nil
}

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }

// A Token is an access token and what is known of it. It prints without the
// access token itself.
type Token struct {
	AccessToken string `json:"-"` // for "Authorization: Bearer …", nowhere else
	Type        string
	Provider    string
	Audience    string
	Scopes      []string
	// ExpiresAt is when the token ends, by this machine's clock.
	ExpiresAt time.Time
	// Ref is the number of the audit line. Quote it in questions to the administrator.
	Ref string
}

// String says all but the access token.
func (t Token) String() string {
	return fmt.Sprintf("token of %s for %q, scopes %q, until %s [hidden]",
		t.Provider, t.Audience, t.Scopes, t.ExpiresAt.Format(time.RFC3339))
}

// Format prints as String does, for any verb.
func (t Token) Format(w fmt.State, _ rune) { fmt.Fprint(w, t.String()) }

// LogValue keeps the access token out of logs.
func (t Token) LogValue() slog.Value { return slog.StringValue(t.String()) }

// Token returns an access token of the user whose server this is.
func (c *Client) Token(ctx context.Context, opts ...Option) (Token, error) {
	r := newRequest(opts)
	return retry(ctx, r.wait, func(ctx context.Context) (Token, error) {
		resp, err := c.rpc.GetToken(ctx, r.GetTokenRequest)
		if err != nil {
			return Token{}, c.explain(ctx, err)
		}
		return tokenOf(resp), nil
	})
}

func tokenOf(resp *pb.GetTokenResponse) Token {
	return Token{
		AccessToken: resp.GetAccessToken(),
		Type:        resp.GetTokenType(),
		Provider:    resp.GetProvider(),
		Audience:    resp.GetAudience(),
		Scopes:      resp.GetScopes(),
		// Not ExpiresAt: a container may tell the time differently.
		ExpiresAt: time.Now().Add(time.Duration(resp.GetExpiresIn()) * time.Second),
		Ref:       resp.GetRef(),
	}
}

// TokenSource returns a source that asks the broker for each token. It keeps
// none, so that a right that was taken away is gone at once; oauth2.NewClient
// would keep one until it ends, an oauth2.Transport does not. ctx bounds all
// its requests.
func (c *Client) TokenSource(ctx context.Context, opts ...Option) oauth2.TokenSource {
	return source{ctx, c, opts}
}

// A source is an oauth2.TokenSource. That interface has no context, so it is
// kept here.
type source struct {
	ctx  context.Context
	c    *Client
	opts []Option
}

// Token implements oauth2.TokenSource.
func (s source) Token() (*oauth2.Token, error) {
	t, err := s.c.Token(s.ctx, s.opts...)
	if err != nil {
		return nil, err
	}
	return &oauth2.Token{AccessToken: t.AccessToken, TokenType: t.Type, Expiry: t.ExpiresAt}, nil
}

// A ProviderStatus says what a request for a provider would meet.
type ProviderStatus struct {
	Name      string
	Login     bool     // it is the one that an empty provider means
	State     string   // none, live, login_required, revoked or disabled
	Audiences []string // that some rule allows
	Scopes    []string // that some rule allows
}

// Providers lists the providers for which a token could be asked. Of the
// options only Wait changes anything.
func (c *Client) Providers(ctx context.Context, opts ...Option) ([]ProviderStatus, error) {
	r := newRequest(opts)
	return retry(ctx, r.wait, func(ctx context.Context) ([]ProviderStatus, error) {
		resp, err := c.rpc.ListProviders(ctx, &pb.ListProvidersRequest{})
		if err != nil {
			return nil, c.explain(ctx, err)
		}
		var list []ProviderStatus
		for _, p := range resp.GetProviders() {
			list = append(list, ProviderStatus{p.GetName(), p.GetLogin(), states[p.GetState()], p.GetAudiences(), p.GetScopes()})
		}
		return list, nil
	})
}

// states are the words of the JSON interface and of the broker's documents.
var states = map[pb.GrantState]string{
	pb.GrantState_GRANT_STATE_NONE:           "none",
	pb.GrantState_GRANT_STATE_LIVE:           "live",
	pb.GrantState_GRANT_STATE_LOGIN_REQUIRED: "login_required",
	pb.GrantState_GRANT_STATE_REVOKED:        "revoked",
	pb.GrantState_GRANT_STATE_DISABLED:       "disabled",
}
