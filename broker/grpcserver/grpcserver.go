// Package grpcserver offers the broker over gRPC: Workload to containers, Hub
// to hubs and Admin to the administrator's command line, one *grpc.Server
// each, since each has sockets of its own. It decides nothing: it turns
// messages into the domain's words and back, and errors into status codes.
//
// Package httpserver offers the same as JSON.
package grpcserver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"runtime/debug"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	protocodec "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"tokenbroker/broker"
	pb "tokenbroker/proto/tokenbroker/v1"
)

// ages bound a connection's life: a caller's credentials are those of its connect,
// so none is for ever. Tests shorten them for the servers they make.
var ages = keepalive.ServerParameters{
	MaxConnectionIdle:     5 * time.Minute,
	MaxConnectionAge:      10 * time.Minute,
	MaxConnectionAgeGrace: time.Minute,
	Time:                  5 * time.Minute,
	Timeout:               20 * time.Second,
}

// maxMessage bounds a request. It is the same over HTTP.
const maxMessage = 64 << 10

// NewWorkload serves containers, on the servers' sockets.
func NewWorkload(b *broker.Broker, log *slog.Logger) *grpc.Server {
	e := edge{b: b, log: log, serves: func(p *broker.Peer) bool { return p.Server != broker.ServerKey{} }}
	return e.server(pb.Workload_ServiceDesc, workload{b: b})
}

// NewHub serves a hub, on its socket.
func NewHub(b *broker.Broker, log *slog.Logger) *grpc.Server {
	e := edge{b: b, log: log, serves: func(p *broker.Peer) bool { return p.Hub != "" }}
	return e.server(pb.Hub_ServiceDesc, hub{b: b})
}

// NewAdmin serves the administrator, on a socket of his own.
func NewAdmin(b *broker.Broker, log *slog.Logger) *grpc.Server {
	e := edge{b: b, log: log, serves: func(p *broker.Peer) bool { return p.Hub == "" && p.Server == broker.ServerKey{} }}
	return e.server(pb.Admin_ServiceDesc, admin{b: b})
}

// An edge answers the calls of one service.
type edge struct {
	b      *broker.Broker
	log    *slog.Logger
	serves func(*broker.Peer) bool // keeps a service off another one's sockets

	sendWithin time.Duration
}

func (e edge) server(desc grpc.ServiceDesc, service any) *grpc.Server {
	e.sendWithin = sendWithin
	s := grpc.NewServer(
		grpc.Creds(peerCredentials{}),
		grpc.ConnectionTimeout(5*time.Second),
		grpc.ForceServerCodecV2(codec{encoding.GetCodecV2(protocodec.Name)}),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxHeaderListSize(16<<10),
		grpc.MaxConcurrentStreams(32),
		// Goroutines that live on keep the stacks that a request has made grow;
		// one that waits for a provider holds up nobody.
		grpc.NumStreamWorkers(uint32(runtime.GOMAXPROCS(0))),
		// Thousands of containers keep a connection each and rarely use it.
		grpc.ReadBufferSize(4<<10),
		// Requests are small: a window never grows, so nobody can fill memory by it.
		grpc.StaticStreamWindowSize(maxMessage),
		grpc.StaticConnWindowSize(maxMessage),
		grpc.KeepaliveParams(ages),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
	)
	s.RegisterService(e.wrap(desc), service)
	h := health.NewServer()
	h.SetServingStatus(desc.ServiceName, healthpb.HealthCheckResponse_SERVING)
	healthpb.RegisterHealthServer(s, h)
	return s
}

// wrap puts answer around each method. An interceptor would come too late: it
// doesn't see requests that can't be read.
func (e edge) wrap(desc grpc.ServiceDesc) *grpc.ServiceDesc {
	methods := make([]grpc.MethodDesc, len(desc.Methods))
	for i, m := range desc.Methods {
		methods[i] = grpc.MethodDesc{MethodName: m.MethodName, Handler: e.answer(actions[m.MethodName], m.Handler)}
	}
	desc.Methods = methods
	streams := make([]grpc.StreamDesc, len(desc.Streams))
	for i, s := range desc.Streams {
		s.Handler = e.stream(actions[s.StreamName], s.Handler)
		streams[i] = s
	}
	desc.Streams = streams
	return &desc
}

// actions is what the audit calls the methods.
var actions = map[string]string{
	"GetToken":          "token",
	"Watch":             "watch",
	"ListProviders":     "providers",
	"Claim":             "claim",
	"CheckSession":      "session",
	"Register":          "register",
	"Unregister":        "unregister",
	"SetGroups":         "groups",
	"SetShared":         "shared",
	"Logout":            "logout",
	"Status":            "status",
	"ListGrants":        "grants",
	"ListRegistrations": "registrations",
	"Disconnect":        "disconnect",
	"ShowUser":          "user",
	"Rebind":            "rebind",
	"Explain":           "explain",
}

// answer calls a method and turns whatever goes wrong into a status that may
// be told.
func (e edge) answer(action string, method grpc.MethodHandler) grpc.MethodHandler {
	return func(service any, ctx context.Context, read func(any) error, i grpc.UnaryServerInterceptor) (answer any, err error) {
		p := peerOf(ctx)
		defer func() {
			if v := recover(); v != nil {
				answer, err = nil, e.refuse(p, action, e.crashed(action, v))
			}
		}()
		c, err := e.begin(ctx)
		if err != nil {
			return nil, e.refuse(p, action, err)
		}
		defer c.end()
		answer, err = method(service, ctx, func(m any) error { return c.receive(read, m) }, i)
		if err != nil {
			return nil, e.failed(ctx, p, action, err)
		}
		return answer, nil
	}
}

// stream is answer for a method that tells more than once.
func (e edge) stream(action string, method grpc.StreamHandler) grpc.StreamHandler {
	return func(service any, s grpc.ServerStream) (err error) {
		ctx := s.Context()
		p := peerOf(ctx)
		defer func() {
			if v := recover(); v != nil {
				err = e.refuse(p, action, e.crashed(action, v))
			}
		}()
		c, err := e.begin(ctx)
		if err != nil {
			return e.refuse(p, action, err)
		}
		defer c.end()
		if err := method(service, received{s, c}); err != nil {
			return e.failed(ctx, p, action, err)
		}
		return nil
	}
}

// A call is one that was counted in.
type call struct {
	caller
	end        func() // counts it out
	sendWithin time.Duration
}

// begin counts a call in, before anything is done for it.
func (e edge) begin(ctx context.Context) (call, error) {
	c := callerOf(ctx)
	if c == nil || !e.serves(c.Peer()) {
		return call{}, broker.Errorf(broker.UnknownPeer, "this socket serves others")
	}
	end, err := c.Begin()
	return call{c, end, e.sendWithin}, err
}

// received is a stream whose requests are read as those of other methods are.
type received struct {
	grpc.ServerStream
	call call
}

func (s received) RecvMsg(m any) error { return s.call.receive(s.ServerStream.RecvMsg, m) }

// failed returns the status of a call that was not served. What the domain
// answered is recorded already.
func (e edge) failed(ctx context.Context, p *broker.Peer, action string, err error) error {
	var told *broker.Error
	switch {
	case errors.As(err, &told) && told.Ref != "":
		return statusOf(told)
	case told == nil && ctx.Err() != nil:
		return status.FromContextError(ctx.Err()).Err() // nobody listens any more
	}
	return e.refuse(p, action, err)
}

// refuse records what the domain never saw.
func (e edge) refuse(p *broker.Peer, action string, err error) error {
	return statusOf(e.b.Refuse(p, action, err))
}

// crashed logs a panic. Only what the runtime says is put into words: another
// value could hold anything.
func (e edge) crashed(action string, v any) error {
	err := fmt.Errorf("panic with a %T", v)
	if r, ok := v.(runtime.Error); ok {
		err = fmt.Errorf("panic: %w", r)
	}
	e.log.Error("a call crashed", "action", action, "err", err, "stack", string(debug.Stack()))
	return err
}
