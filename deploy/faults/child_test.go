//go:build failpoints && linux

package faults_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http/httptrace"
	"net/rpc"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
	"tokenbroker/broker/oauthprovider"
	"tokenbroker/broker/redisstore"
	"tokenbroker/broker/seal"
)

// envChild holds a setup, and makes the test's binary a broker.
const envChild = "FAULTS_CHILD"

// A setup is what a broker process is told.
type setup struct {
	Host   string
	Dir    string // keyset, KEK and journals
	Redis  string // socket
	Issuer string
	// By is where the provider is reached, trusted by CAFile; zero: where its
	// discovery document says.
	By      oauthprovider.Endpoints
	CAFile  string
	Secret  string
	Profile string
	// Narrowing is by scope, where each set of scopes is another refresh, or the
	// profile's.
	Narrowing broker.Narrowing
	Common    bool          // refresh the common way; see control_test.go
	Timeout   time.Duration // of a call to the provider; 0: the usual
}

// A Call is what the test asks of a broker.
type Call struct {
	User           string
	Code, Verifier string        // of a login
	Handle         string        // of the hub's
	Scopes         []string      // of a token
	Patience       time.Duration // the caller hangs up then; 0: never
	Step           string        // to kill or stop at
	Stop           bool
	Roles          []string // that the user has from now on
}

// A Reply is what a caller was told.
type Reply struct {
	Code     string // of the error; empty: it worked
	Sentence string
	Next     string    // what to do about it
	Handle   string    // after a login
	Print    string    // of the token
	Ends     time.Time // of the token, as it says itself
	Stopped  time.Time // of a disconnect: when issuing stopped
	Until    time.Time // likewise: when the last token ends that was handed out
	NotKept  string    // likewise: why the store may forget it
}

// A Service is the door of a broker process.
type Service struct{ s system }

// A system keeps refresh tokens: ours, and how it is commonly done.
type system interface {
	login(ctx context.Context, c Call) (handle string, err error)
	token(ctx context.Context, c Call) (print string, err error)
}

// child is the main function of a broker process: it answers calls on its
// standard input until that ends.
func child() {
	s, err := open()
	if err != nil {
		fmt.Fprintln(os.Stderr, "broker process:", err)
		os.Exit(1)
	}
	server := rpc.NewServer()
	if err := server.Register(&Service{s}); err != nil {
		panic(err)
	}
	server.ServeConn(struct {
		io.Reader
		io.WriteCloser
	}{os.Stdin, os.Stdout})
}

// Ready answers when the process has started.
func (*Service) Ready(Call, *Reply) error { return nil }

// Arm makes the process kill or stop itself at a step.
func (*Service) Arm(c Call, _ *Reply) error {
	if c.Stop {
		return os.Setenv("TOKENBROKER_STOP", c.Step)
	}
	return os.Setenv("TOKENBROKER_KILL", c.Step)
}

// Login logs the user in.
func (s *Service) Login(c Call, r *Reply) (err error) {
	r.Handle, err = s.s.login(context.Background(), c)
	return r.of(err)
}

// Token gets the user's container a token.
func (s *Service) Token(c Call, r *Reply) error {
	ctx := context.Background()
	if c.Patience > 0 {
		var hangUp context.CancelFunc
		ctx, hangUp = context.WithTimeout(ctx, c.Patience)
		defer hangUp()
	}
	var err error
	r.Print, err = s.s.token(ctx, c)
	return r.of(err)
}

// Refresh is the hub's asking for a new token, as at a token endpoint.
func (s *Service) Refresh(c Call, r *Reply) error {
	_, err := s.s.(*ours).RefreshHub(context.Background(), "hub", "idp", broker.NewSecret(c.Handle))
	return r.of(err)
}

// Check is the hub's asking whether the session lives.
func (s *Service) Check(c Call, r *Reply) error {
	session, err := s.s.(*ours).CheckSession(context.Background(), "hub", "idp", broker.NewSecret(c.Handle), broker.UserID(c.User), "")
	if err == nil && !session.Active {
		r.Code, r.Sentence = string(broker.LoginRequired), session.Reason
		return nil
	}
	return r.of(err)
}

func (r *Reply) of(err error) error {
	var said *broker.Error
	switch {
	case err == nil:
	case errors.As(err, &said):
		r.Code, r.Sentence, r.Next = string(said.Code), said.Sentence, said.Next
	default:
		r.Code, r.Sentence = string(broker.Internal), err.Error()
	}
	return nil
}

// open makes the system that the environment describes.
func open() (system, error) {
	var c setup
	if err := json.Unmarshal([]byte(os.Getenv(envChild)), &c); err != nil {
		return nil, err
	}
	p, err := oauthprovider.New(oauthprovider.Config{
		Name: "idp", Profile: c.Profile, Issuer: c.Issuer, ClientID: client, ClientSecret: broker.NewSecret(c.Secret),
		Endpoints: c.By, CAFile: c.CAFile, Narrowing: c.Narrowing, Roles: []string{"roles"}, Timeout: c.Timeout,
	})
	if err != nil {
		return nil, err
	}
	if c.Common {
		return newCommon(c, p), nil
	}
	return newOurs(c, traced{p})
}

// ours is a Broker.
type ours struct {
	*broker.Broker
	store *tapped
	host  string

	mu      sync.Mutex      // lets one server be started at a time, and guards what follows
	servers map[string]bool // whose run here; nil: not asked yet
	watches map[string]*stream
}

func newOurs(c setup, p broker.Provider) (*ours, error) {
	keys, err := seal.Load(filepath.Join(c.Dir, "keyset"), filepath.Join(c.Dir, "kek"))
	if err != nil {
		return nil, err
	}
	store, err := redisstore.Open(redisstore.Config{Deployment: "faults", Socket: c.Redis, AllowNoPersistence: true})
	if err != nil {
		return nil, err
	}
	if err := store.Check(context.Background()); err != nil {
		return nil, err
	}
	tap := &tapped{Store: store}
	log, err := os.OpenFile(filepath.Join(c.Dir, c.Host+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	audit, err := os.OpenFile(filepath.Join(c.Dir, c.Host+".audit"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	b, err := broker.New(broker.Config{
		Deployment: "faults", Host: broker.HostID(c.Host), Contact: "nobody",
		Hubs: map[broker.HubID]broker.Hub{"hub": {Login: "idp"}}, Providers: []broker.Provider{p},
		Rules: []broker.Rule{
			// oidc-provider's access tokens can't be read; whom they are for is not known.
			{Provider: "idp", Roles: []string{"researcher"}, Scopes: scopes, Unverified: c.Profile == "generic"},
			{Provider: "idp", Roles: []string{"guest"}, Scopes: guests},
		},
		Store: tap, Keys: keys, Attestor: anybody{}, Sockets: brokertest.NewSockets(),
		Audit: audit, Log: slog.New(slog.NewTextHandler(log, nil)), Journal: filepath.Join(c.Dir, c.Host+".journal"),
	})
	if err != nil {
		return nil, err
	}
	return &ours{Broker: b, store: tap, host: c.Host, watches: map[string]*stream{}}, b.Start(context.Background())
}

func (o *ours) login(ctx context.Context, c Call) (handle string, err error) {
	t, err := o.Login(ctx, "hub", "idp", broker.CodeGrant{
		Code: broker.NewSecret(c.Code), Verifier: broker.NewSecret(c.Verifier), RedirectURI: redirect,
	})
	if err != nil {
		return "", err
	}
	_, err = o.Claim(ctx, "hub", "idp", t.Handle, broker.UserID(c.User))
	return t.Handle.Reveal(), err
}

func (o *ours) token(ctx context.Context, c Call) (print string, err error) {
	t, err := o.get(ctx, c)
	return t.Access.Fingerprint(), err
}

func (o *ours) get(ctx context.Context, c Call) (broker.Token, error) {
	if err := o.serve(c.User); err != nil {
		return broker.Token{}, err
	}
	return o.Token(ctx, o.peer(c.User), broker.Want{Scopes: c.Scopes})
}

// peer is a process in the user's server here. There is one on each host, which is
// called like that.
func (o *ours) peer(user string) *broker.Peer {
	return &broker.Peer{Server: broker.ServerKey{Hub: "hub", User: broker.UserID(user), Server: broker.ServerName(o.host)}, PID: 1}
}

// serve starts the user's server here, once, unless it was there before the
// broker was.
func (o *ours) serve(user string) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.servers == nil {
		o.servers = map[string]bool{}
		for _, r := range o.Registrations() {
			o.servers[string(r.Key.User)] = true
		}
	}
	if o.servers[user] {
		return nil
	}
	_, err := o.Register(context.Background(), "hub", broker.RegisterRequest{User: broker.UserID(user), Server: broker.ServerName(o.host), ContainerName: "jupyter-" + user})
	o.servers[user] = err == nil
	return err
}

// anybody is an Attestor that finds every container running: who calls is not
// what is proved here.
type anybody struct{}

func (anybody) Bind(_ context.Context, r broker.Registration) (*broker.Workload, error) {
	return &broker.Workload{Container: r.ContainerName, Name: r.ContainerName, PID: 1, Level: "proc"}, nil
}
func (anybody) Attest(*broker.Peer, *broker.Workload) error { return nil }
func (anybody) Alive(*broker.Peer) error                    { return nil }
func (anybody) Watch(ctx context.Context, _ time.Time, _ func(string), _ func(broker.Exec)) error {
	<-ctx.Done()
	return ctx.Err()
}
func (anybody) Worth(level string) (string, string) { return level, "" }

func (anybody) Check(context.Context) (string, error) { return "proc", nil }

// traced is a Provider in whose requests the process can be killed.
type traced struct{ broker.Provider }

func (p traced) Refresh(ctx context.Context, refresh broker.Secret, sub string, scopes []string) (broker.Identity, broker.Issued, error) {
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		ConnectDone:          func(_, _ string, _ error) { dieAt("connected") },
		WroteRequest:         func(httptrace.WroteRequestInfo) { dieAt("request written") },
		GotFirstResponseByte: func() { dieAt("answer begins") },
	})
	return p.Provider.Refresh(ctx, refresh, sub, scopes)
}

// dieAt is a failpoint of the broker's, for the steps inside its HTTP client.
func dieAt(step string) {
	if os.Getenv("TOKENBROKER_KILL") == step {
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
}
