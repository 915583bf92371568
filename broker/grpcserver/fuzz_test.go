package grpcserver_test

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"tokenbroker/broker/grpcserver"
	pb "tokenbroker/proto/tokenbroker/v1"
)

// raw sends messages as they are.
type raw struct{}

func (raw) Marshal(v any) ([]byte, error)      { return *v.(*[]byte), nil }
func (raw) Unmarshal(text []byte, v any) error { *v.(*[]byte) = text; return nil }
func (raw) Name() string                       { return "proto" }

// Whatever a container or a hub sends, it is answered in our codes; nothing is our
// own mistake, and the server lives.
func FuzzGRPC(f *testing.F) {
	r := newRig(f)
	servers := map[string]*grpc.ClientConn{
		pb.Workload_ServiceDesc.ServiceName: r.dial(grpcserver.NewWorkload(r.b, r.logger), asServer),
		pb.Hub_ServiceDesc.ServiceName:      r.dial(grpcserver.NewHub(r.b, r.logger), asHub),
	}
	type method struct{ service, name string }
	var methods []method
	for _, d := range []grpc.ServiceDesc{pb.Workload_ServiceDesc, pb.Hub_ServiceDesc} {
		for _, m := range d.Methods {
			methods = append(methods, method{d.ServiceName, m.MethodName})
		}
	}
	for i := range methods {
		for _, seed := range []string{"", "\x0a\x05alice", "\x0a\x08keycloak\x12\x07storage", "\xff", "\x0a\xff\xff\xff\xff\x0f", "\x0a\x02\xff\xfe"} {
			f.Add(byte(i), []byte(seed))
		}
	}
	f.Fuzz(func(t *testing.T, which byte, text []byte) {
		m := methods[int(which)%len(methods)]
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		var answer []byte
		err := servers[m.service].Invoke(ctx, "/"+m.service+"/"+m.name, &text, &answer, grpc.ForceCodec(raw{}))
		switch status.Code(err) {
		case codes.Unknown, codes.DeadlineExceeded, codes.Canceled:
			t.Errorf("%s: %v", m.name, err)
		case codes.Internal: // gRPC's own word for a message that can't be read
			if s := status.Convert(err); len(s.Details()) > 0 {
				t.Errorf("%s: %v", m.name, err)
			}
		}
	})
}
