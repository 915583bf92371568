package grpcserver_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
	"tokenbroker/broker/grpcserver"
	"tokenbroker/broker/seal"
	pb "tokenbroker/proto/tokenbroker/v1"
)

// That gRPC and JSON say the same is tested in package httpserver; here is what
// only gRPC has.

func TestMain(m *testing.M) { brokertest.Main(m) }

// Peers as the sockets of a server, a hub and the administrator have them.
var (
	workload = broker.ServerKey{Hub: "main", User: "alice"}
	asServer = func(p *broker.Peer) { p.Server = workload }
	asHub    = func(p *broker.Peer) { p.Hub = "main" }
	asAdmin  = func(*broker.Peer) {}
)

// A rig is a broker on which alice has logged in and her server runs.
type rig struct {
	t        testing.TB
	b        *broker.Broker
	store    *brokertest.MemStore
	provider *brokertest.Provider
	log      bytes.Buffer
	audit    brokertest.Buffer
	logger   *slog.Logger
}

func newRig(t testing.TB) *rig {
	t.Helper()
	r := &rig{t: t, store: brokertest.NewMemStore(), provider: brokertest.NewProvider("keycloak")}
	r.logger = slog.New(slog.NewTextHandler(&r.log, nil))
	keys, err := seal.New()
	check(t, err)
	attestor := brokertest.NewAttestor()
	r.b, err = broker.New(broker.Config{
		Deployment: "test", Host: "here", Contact: "it-help@lab.example", Version: "v1",
		Hubs:      map[broker.HubID]broker.Hub{"main": {Login: "keycloak"}},
		Providers: []broker.Provider{r.provider},
		Rules:     []broker.Rule{{Provider: "keycloak", Audiences: []string{"storage"}, Scopes: []string{"read"}}},
		Store:     r.store, Keys: keys, Attestor: attestor, Sockets: brokertest.NewSockets(), Audit: &r.audit, Log: r.logger,
		Journal: t.TempDir() + "/journal",
	})
	check(t, err)
	check(t, r.b.Start(context.Background()))
	t.Cleanup(r.b.Close)
	r.login("alice")
	attestor.Run("jupyter-alice", int32(os.Getpid()))
	_, err = r.b.Register(context.Background(), "main", broker.RegisterRequest{User: "alice", ContainerName: "jupyter-alice"})
	check(t, err)
	return r
}

func (r *rig) login(user broker.UserID) {
	r.t.Helper()
	ctx := context.Background()
	r.provider.SetRoles(string(user), "researcher")
	token, err := r.b.Login(ctx, "main", "keycloak", broker.CodeGrant{Code: broker.NewSecret(string(user)), Verifier: broker.NewSecret("v")})
	check(r.t, err)
	_, err = r.b.Claim(ctx, "main", "keycloak", token.Handle, user)
	check(r.t, err)
}

// peerListener gives each connection a Peer, or none.
type peerListener struct {
	net.Listener
	as func(*broker.Peer)
}

type peerConn struct {
	net.Conn
	peer *broker.Peer
}

func (c peerConn) Peer() *broker.Peer             { return c.peer }
func (c peerConn) Begin() (end func(), err error) { return func() {}, nil }

func (l peerListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil || l.as == nil {
		return c, err
	}
	p := &broker.Peer{PID: int32(os.Getpid()), UID: uint32(os.Getuid())}
	l.as(p)
	return peerConn{c, p}, nil
}

// dial serves s to a client whose peer is as it says.
func (r *rig) dial(s *grpc.Server, as func(*broker.Peer)) *grpc.ClientConn {
	r.t.Helper()
	dir, err := os.MkdirTemp("", "grpc")
	check(r.t, err)
	ln, err := net.Listen("unix", dir+"/sock")
	check(r.t, err)
	var served sync.WaitGroup
	served.Go(func() { s.Serve(peerListener{ln, as}) })
	cc, err := grpc.NewClient("unix:"+dir+"/sock", grpc.WithTransportCredentials(insecure.NewCredentials()))
	check(r.t, err)
	r.t.Cleanup(func() {
		cc.Close()
		s.Stop()
		served.Wait()
		os.RemoveAll(dir)
	})
	return cc
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A method that is added is in the audit, too, with who asked.
func TestEachCallOfTheAdministratorIsInTheAuditWithWhoAsked(t *testing.T) {
	r := newRig(t)
	cc := r.dial(grpcserver.NewAdmin(r.b, r.logger), asAdmin)
	service := pb.File_tokenbroker_v1_admin_proto.Services().ByName("Admin")
	for i := range service.Methods().Len() {
		m := service.Methods().Get(i)
		request := dynamicpb.NewMessage(m.Input())
		if f := m.Input().Fields().ByName("user"); f != nil {
			request.Set(f, protoreflect.ValueOfString("alice"))
		}
		before := len(r.audit.String())
		// Refused or not.
		err := cc.Invoke(context.Background(), fmt.Sprintf("/%s/%s", service.FullName(), m.Name()), request, dynamicpb.NewMessage(m.Output()))
		var of []broker.Entry // those that say who asked
		for line := range strings.Lines(r.audit.String()[before:]) {
			var e broker.Entry
			check(t, json.Unmarshal([]byte(line), &e))
			if e.By != "" {
				of = append(of, e)
			}
		}
		if len(of) != 1 {
			t.Errorf("%s (%v): the audit says who asked in %d lines, want one", m.Name(), err, len(of))
			continue
		}
		e, who := of[0], fmt.Sprintf("uid %d (", os.Getuid())
		if e.Action == "" || !strings.HasPrefix(e.By, who) || !strings.HasSuffix(e.By, fmt.Sprintf(", pid %d", os.Getpid())) {
			t.Errorf("%s: the audit says %+v, want it to say that it was %s", m.Name(), e, who)
		}
		if m.Input().Fields().ByName("user") != nil && e.User != "alice" {
			t.Errorf("%s: the audit does not say who was looked at: %+v", m.Name(), e)
		}
	}
}

func TestTheAdministratorSeesAllButSecrets(t *testing.T) {
	r := newRig(t)
	c := pb.NewAdminClient(r.dial(grpcserver.NewAdmin(r.b, r.logger), asAdmin))
	ctx := context.Background()

	st, err := c.Status(ctx, &pb.StatusRequest{})
	check(t, err)
	if st.Deployment != "test" || st.Host != "here" || st.Version != "v1" || !st.Store.GetOk() || st.Attestation.GetDetail() != "pidfd+ns" ||
		len(st.Providers) != 1 || st.StartedAt == nil || st.Registrations["reserved"]+st.Registrations["bound"] != 1 {
		t.Errorf("Status: %v", st)
	}

	grants, err := c.ListGrants(ctx, &pb.ListGrantsRequest{User: "alice"})
	check(t, err)
	if len(grants.Grants) != 1 {
		t.Fatalf("ListGrants: %v, want one", grants)
	}
	g := grants.Grants[0]
	if g.Hub != "main" || g.User != "alice" || g.Sub != "alice" || g.State != pb.GrantState_GRANT_STATE_LIVE || g.Version == 0 ||
		len(g.Roles) != 1 || g.RefreshedAt == nil || g.ExpiresAt != nil || g.OutstandingUntil == nil {
		t.Errorf("ListGrants: %v", g)
	}
	if text := protojson.Format(grants); strings.Contains(text, r.provider.RefreshToken("alice")) {
		t.Errorf("ListGrants shows the refresh token: %s", text)
	}

	regs, err := c.ListRegistrations(ctx, &pb.ListRegistrationsRequest{})
	check(t, err)
	if len(regs.Registrations) != 1 || regs.Registrations[0].User != "alice" || regs.Registrations[0].Generation == 0 {
		t.Errorf("ListRegistrations: %v", regs)
	}

	if g.Next != "on_request" || g.NextText == "" || g.Why == "" || g.LoginAt == nil || g.Since == nil || g.Username != "alice" || g.Mark != "" || g.Lease != nil {
		t.Errorf("ListGrants: %v", g)
	}
	if none, err := c.ListGrants(ctx, &pb.ListGrantsRequest{Provider: "another"}); err != nil || len(none.Grants) != 0 {
		t.Errorf("ListGrants of another provider: %v, %v", none, err)
	}

	r.store.Before(func(method string, _ broker.Key) error {
		if method == "Settle" {
			return errors.New("in memory only")
		}
		return nil
	})
	gone, err := c.Disconnect(ctx, &pb.DisconnectRequest{User: "alice"})
	check(t, err)
	if len(gone.Disconnected) != 1 || !strings.Contains(gone.Disconnected[0].NotKept, "in memory only") || gone.Disconnected[0].IssuingStoppedAt == nil || gone.Ref == "" {
		t.Errorf("Disconnect: %v", gone)
	}
	_, err = c.Disconnect(ctx, &pb.DisconnectRequest{User: "nobody"})
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("Disconnect of nobody: %v, want INVALID_ARGUMENT", err)
	}
}

func TestTheAdministratorAsksAboutOneUser(t *testing.T) {
	r := newRig(t)
	c := pb.NewAdminClient(r.dial(grpcserver.NewAdmin(r.b, r.logger), asAdmin))
	ctx := context.Background()

	x, err := c.Explain(ctx, &pb.ExplainRequest{User: "alice"})
	check(t, err)
	if x.Hub != "main" || x.Provider != "keycloak" || x.Refusal != nil || x.Rule != 1 || x.RuleText == "" || x.Audience != "storage" ||
		len(x.Scopes) != 1 || len(x.Has) != 1 || x.Grant.GetSub() != "alice" || x.OutstandingUntil == nil || x.CachedUntil != nil {
		t.Errorf("Explain: %v", x)
	}
	x, err = c.Explain(ctx, &pb.ExplainRequest{User: "alice", Audience: "moon", Server: "gpu"})
	check(t, err)
	if x.Refusal.GetCode() != "denied" || x.Refusal.GetSentence() == "" || !strings.Contains(x.Refusal.GetNext(), "it-help@lab.example") || len(x.Assumed) == 0 {
		t.Errorf("Explain: %v", x)
	}
	_, err = c.Explain(ctx, &pb.ExplainRequest{User: "alice", Provider: "x"})
	if info := infoOf(err); status.Code(err) != codes.InvalidArgument || info.GetMetadata()["ref"] == "" {
		t.Errorf("Explain of no provider: %v with %v, want INVALID_ARGUMENT with a ref", err, info)
	}

	u, err := c.ShowUser(ctx, &pb.ShowUserRequest{User: "alice"})
	check(t, err)
	if u.Hub != "main" || u.User != "alice" || len(u.Accounts) != 1 || !u.Accounts[0].Login || u.Accounts[0].Grant.GetState() != pb.GrantState_GRANT_STATE_LIVE ||
		len(u.Registrations) != 1 || u.OutstandingUntil == nil || u.ReboundAt != nil {
		t.Errorf("ShowUser: %v", u)
	}

	done, err := c.Rebind(ctx, &pb.RebindRequest{User: "alice", Provider: "keycloak", Sub: "eve"})
	check(t, err)
	if done.WasSub != "alice" || done.Sub != "eve" || len(done.Ended) != 1 || done.Ended[0].IssuingStoppedAt == nil || done.Ref == "" {
		t.Errorf("Rebind: %v", done)
	}
	if u, err = c.ShowUser(ctx, &pb.ShowUserRequest{User: "alice"}); err != nil || u.ReboundAt == nil || u.Accounts[0].Sub != "eve" {
		t.Errorf("ShowUser after Rebind: %v, %v", u, err)
	}
	if _, err := c.Rebind(ctx, &pb.RebindRequest{User: "alice", Provider: "keycloak", Sub: "eve"}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("Rebind again: %v, want INVALID_ARGUMENT", err)
	}
}

func TestAFailedListIsToldAndRecorded(t *testing.T) {
	r := newRig(t)
	c := pb.NewAdminClient(r.dial(grpcserver.NewAdmin(r.b, r.logger), asAdmin))
	r.store.Fail(io.ErrUnexpectedEOF)
	_, err := c.ListGrants(context.Background(), &pb.ListGrantsRequest{})
	if info := infoOf(err); status.Code(err) != codes.Unavailable || info.GetReason() != "unavailable" || info.GetMetadata()["ref"] == "" {
		t.Errorf("ListGrants: %v with %v, want UNAVAILABLE with a ref", err, info)
	}
}

func infoOf(err error) *errdetails.ErrorInfo {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			return info
		}
	}
	return nil
}

func TestAServiceKeepsOffOtherSockets(t *testing.T) {
	r := newRig(t)
	for _, tt := range []struct {
		why    string
		server *grpc.Server
		method string
		own    func(*broker.Peer)
		others []func(*broker.Peer)
	}{
		{"Workload", grpcserver.NewWorkload(r.b, r.logger), pb.Workload_ListProviders_FullMethodName, asServer, []func(*broker.Peer){asHub, asAdmin}},
		{"Hub", grpcserver.NewHub(r.b, r.logger), pb.Hub_Unregister_FullMethodName, asHub, []func(*broker.Peer){asServer, asAdmin}},
		{"Admin", grpcserver.NewAdmin(r.b, r.logger), pb.Admin_ListRegistrations_FullMethodName, asAdmin, []func(*broker.Peer){asServer, asHub}},
	} {
		call := func(as func(*broker.Peer)) error {
			return r.dial(tt.server, as).Invoke(context.Background(), tt.method, &pb.StatusRequest{}, &pb.StatusRequest{})
		}
		for _, as := range tt.others {
			if err := call(as); status.Code(err) != codes.Unauthenticated || infoOf(err).GetReason() != "unknown_peer" {
				t.Errorf("%s on another's socket: %v, want UNAUTHENTICATED", tt.why, err)
			}
		}
		if err := call(tt.own); status.Code(err) == codes.Unauthenticated {
			t.Errorf("%s on its own socket: %v", tt.why, err)
		}
	}
}

func TestAConnectionWithoutAPeerIsEnded(t *testing.T) {
	r := newRig(t)
	cc := r.dial(grpcserver.NewWorkload(r.b, r.logger), nil)
	_, err := pb.NewWorkloadClient(cc).GetToken(context.Background(), &pb.GetTokenRequest{})
	if status.Code(err) != codes.Unavailable {
		t.Errorf("GetToken: %v, want UNAVAILABLE", err)
	}
}

func TestEachServerSaysThatItServes(t *testing.T) {
	r := newRig(t)
	cc := r.dial(grpcserver.NewWorkload(r.b, r.logger), asServer)
	for _, service := range []string{"", "tokenbroker.v1.Workload"} {
		got, err := healthpb.NewHealthClient(cc).Check(context.Background(), &healthpb.HealthCheckRequest{Service: service})
		if err != nil || got.Status != healthpb.HealthCheckResponse_SERVING {
			t.Errorf("health of %q: %v, %v", service, got, err)
		}
	}
	err := cc.Invoke(context.Background(), pb.Hub_Claim_FullMethodName, &pb.ClaimRequest{}, &pb.ClaimResponse{})
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("a hub's method: %v, want UNIMPLEMENTED", err)
	}
}

func TestACrashTellsNothing(t *testing.T) {
	r := newRig(t)
	c := pb.NewHubClient(r.dial(grpcserver.NewHub(r.b, r.logger), asHub))
	const secret = "a secret in a panic"
	r.store.Before(func(string, broker.Key) error { panic(secret) })
	_, err := c.Register(context.Background(), &pb.RegisterRequest{User: "alice", ContainerName: "c"})
	if info := infoOf(err); status.Code(err) != codes.Internal || info.GetReason() != "internal" || info.GetMetadata()["ref"] == "" {
		t.Errorf("Register: %v with %v, want INTERNAL with a ref", err, info)
	}
	r.store.Before(nil)
	if strings.Contains(err.Error()+r.log.String(), secret) {
		t.Errorf("a crash told its value: %v, %s", err, r.log.String())
	}
	if !strings.Contains(r.log.String(), "stack") {
		t.Error("the log has no stack of the crash")
	}
}

func TestACallerWhoLeavesEndsHisOwnCallOnly(t *testing.T) {
	r := newRig(t)
	c := pb.NewWorkloadClient(r.dial(grpcserver.NewWorkload(r.b, r.logger), asServer))
	asked, answer := make(chan struct{}), make(chan struct{})
	r.provider.Next(brokertest.Answer{Before: func() { close(asked); <-answer }})
	r.store.Advance(time.Hour)
	r.login("bob") // moves the revision, so that the broker reads the time anew

	ctx, leave := context.WithCancel(context.Background())
	left := make(chan error)
	go func() {
		_, err := c.GetToken(ctx, &pb.GetTokenRequest{})
		left <- err
	}()
	<-asked
	leave()
	if err := <-left; status.Code(err) != codes.Canceled {
		t.Errorf("GetToken after leaving: %v, want CANCELLED", err)
	}
	close(answer)
	if _, err := c.GetToken(context.Background(), &pb.GetTokenRequest{}); err != nil {
		t.Errorf("GetToken of the next one: %v", err)
	}
	if n := r.provider.Calls("refresh"); n != 1 {
		t.Errorf("the provider was asked %d times, want once", n)
	}
}

// The headers of a call and no message: whoever doesn't go on is cut off, and the
// broker has no goroutine left that waits for him.
func TestARequestThatNeverArrivesEndsItsConnection(t *testing.T) {
	r := newRig(t)
	undo := grpcserver.ShortenSends(time.Millisecond)
	cc := r.dial(grpcserver.NewWorkload(r.b, r.logger), asServer)
	undo()
	for _, method := range []string{pb.Workload_GetToken_FullMethodName, pb.Workload_Watch_FullMethodName} {
		s, err := cc.NewStream(context.Background(), &grpc.StreamDesc{ClientStreams: true}, method)
		check(t, err)
		if err := s.RecvMsg(new(pb.GetTokenResponse)); status.Code(err) != codes.Unavailable {
			t.Errorf("%s: %v, want the connection's end", method, err)
		}
	}
}

// aged serves alice's server with other ages, which a connection reaches at once.
func (r *rig) aged(idle, age, grace time.Duration) (*grpc.ClientConn, pb.WorkloadClient) {
	r.t.Helper()
	undo := grpcserver.ShortenAges(idle, age, grace)
	s := grpcserver.NewWorkload(r.b, r.logger)
	undo()
	cc := r.dial(s, asServer)
	return cc, pb.NewWorkloadClient(cc)
}

// untilGoAway returns once the server has said that the connection ends. A client
// is idle then, whatever is still under way.
func untilGoAway(t *testing.T, cc *grpc.ClientConn) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for cc.GetState() == connectivity.Ready {
		if !cc.WaitForStateChange(ctx, connectivity.Ready) {
			t.Fatal("the connection has not ended within a minute")
		}
	}
}

func TestAConnectionThatIsIdleEnds(t *testing.T) {
	cc, c := newRig(t).aged(time.Millisecond, time.Hour, time.Hour)
	for range 2 { // the next request opens another
		_, err := c.GetToken(context.Background(), &pb.GetTokenRequest{})
		check(t, err)
		untilGoAway(t, cc)
	}
}

func TestAnOldConnectionEndsOnceItsRequestsAreAnswered(t *testing.T) {
	r := newRig(t)
	cc, c := r.aged(time.Hour, time.Millisecond, time.Hour)
	asked, answer := make(chan struct{}), make(chan struct{})
	r.provider.Next(brokertest.Answer{Before: func() { close(asked); <-answer }})
	r.store.Advance(time.Hour)
	r.login("bob") // moves the revision, so that the broker reads the time anew

	answered := make(chan error)
	go func() {
		_, err := c.GetToken(context.Background(), &pb.GetTokenRequest{})
		answered <- err
	}()
	<-asked
	untilGoAway(t, cc)
	select {
	case err := <-answered:
		t.Errorf("answered with the end of the connection: %v", err)
	default:
		close(answer)
		check(t, <-answered)
	}
	_, err := c.GetToken(context.Background(), &pb.GetTokenRequest{})
	check(t, err)
}

// A Watch has no end of its own, so it is cut off, with what tells a client to open
// another.
func TestAWatchEndsWithItsOldConnection(t *testing.T) {
	_, c := newRig(t).aged(time.Hour, time.Millisecond, time.Millisecond)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for range 2 {
		w, err := c.Watch(ctx, &pb.WatchRequest{})
		for err == nil {
			_, err = w.Recv()
		}
		if status.Code(err) != codes.Unavailable || infoOf(err) != nil {
			t.Errorf("Watch: %v, want UNAVAILABLE and no refusal", err)
		}
	}
}
