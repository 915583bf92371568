package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "tokenbroker/proto/tokenbroker/v1"
)

var update = flag.Bool("update", false, "write the golden files anew")

// A scribe answers each call with a message in which every field is set.
type scribe struct{ pb.UnimplementedAdminServer }

func (scribe) ListGrants(context.Context, *pb.ListGrantsRequest) (*pb.ListGrantsResponse, error) {
	return filled(&pb.ListGrantsResponse{}), nil
}

func (scribe) ListRegistrations(context.Context, *pb.ListRegistrationsRequest) (*pb.ListRegistrationsResponse, error) {
	return filled(&pb.ListRegistrationsResponse{}), nil
}

func (scribe) Disconnect(context.Context, *pb.DisconnectRequest) (*pb.DisconnectResponse, error) {
	return filled(&pb.DisconnectResponse{}), nil
}

func (scribe) ShowUser(context.Context, *pb.ShowUserRequest) (*pb.ShowUserResponse, error) {
	return filled(&pb.ShowUserResponse{}), nil
}

func (scribe) Rebind(context.Context, *pb.RebindRequest) (*pb.RebindResponse, error) {
	return filled(&pb.RebindResponse{}), nil
}

func (scribe) Explain(context.Context, *pb.ExplainRequest) (*pb.ExplainResponse, error) {
	return filled(&pb.ExplainResponse{}), nil
}

// filled sets every field of m, so that a new one shows in the golden files.
func filled[M proto.Message](m M) M {
	fill(m.ProtoReflect())
	return m
}

func fill(m protoreflect.Message) {
	if t, ok := m.Interface().(*timestamppb.Timestamp); ok {
		t.Seconds = 1791208800 // 2026-10-05 14:00 UTC
		return
	}
	for i := range m.Descriptor().Fields().Len() {
		f := m.Descriptor().Fields().Get(i)
		switch {
		case f.IsList() && f.Message() != nil:
			fill(m.Mutable(f).List().AppendMutable().Message())
		case f.IsList():
			m.Mutable(f).List().Append(value(f))
		case f.Message() != nil:
			fill(m.Mutable(f).Message())
		default:
			m.Set(f, value(f))
		}
	}
}

func value(f protoreflect.FieldDescriptor) protoreflect.Value {
	switch f.Kind() {
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(true)
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(2)
	case protoreflect.Int32Kind:
		return protoreflect.ValueOfInt32(1)
	case protoreflect.Int64Kind:
		return protoreflect.ValueOfInt64(1)
	}
	return protoreflect.ValueOfString("the " + strings.ReplaceAll(string(f.Name()), "_", " "))
}

// What programs read must not change by accident. The fields are documented in
// admin.proto.
func TestOutputIsStable(t *testing.T) {
	dir, err := os.MkdirTemp("/tmp", "tb")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "admin.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	pb.RegisterAdminServer(s, scribe{})
	go s.Serve(l)
	defer s.Stop()
	for _, tt := range []struct{ name, args string }{
		{"sessions-list", "sessions list"},
		{"sessions-show", "sessions show alice"},
		{"users-show", "users show alice"},
		{"users-disconnect", "users disconnect alice"},
		{"users-rebind", "users rebind alice --provider keycloak --yes"},
		{"explain", "explain --user alice"},
	} {
		for _, form := range []string{"json", "table"} {
			var out, errs bytes.Buffer
			args := append(strings.Fields(tt.args), "--socket", socket, "-o", form)
			if code := run(t.Context(), args, &out, &errs); code != 0 || errs.Len() > 0 {
				t.Fatalf("%s: exit code %d, %s", tt.args, code, errs.String())
			}
			if form == "json" && !json.Valid(out.Bytes()) {
				t.Errorf("%s: no JSON: %s", tt.args, out.String())
			}
			golden(t, filepath.Join("testdata", "golden", tt.name+"."+form), out.Bytes())
		}
	}
}

func golden(t *testing.T, file string, got []byte) {
	t.Helper()
	if *update {
		write(t, file, string(got), 0o644)
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s (go test -update writes it anew): %s", file, diff)
	}
}

func TestRebindIsNotDoneWithoutAYes(t *testing.T) {
	u := &pb.ShowUserResponse{Hub: "main", User: "alice", Accounts: []*pb.Account{
		{Provider: "gitlab", Sub: "17", Grant: &pb.Grant{}},
		{Provider: "keycloak", Login: true, Sub: "4711", Grant: &pb.Grant{Username: "alice"}},
	}}
	for _, tt := range []struct {
		provider, sub string
		says          []string
		not           string
	}{
		{"keycloak", "4712", []string{"alice of hub main is now keycloak, sub 4711 (alice).", "From now on it is keycloak, sub 4712.",
			"The grant of keycloak, sub 4711 ends for good", "The grant of gitlab, sub 17 ends for good", "get no tokens until they are stopped and started"}, ""},
		{"gitlab", "", []string{"From now on it is whoever logs in next through gitlab under this name.", "The grant of gitlab, sub 17 ends"}, "4711"},
	} {
		text := rebindText(u, &pb.RebindRequest{User: "alice", Provider: tt.provider, Sub: tt.sub})
		for _, s := range tt.says {
			if !strings.Contains(text, s) {
				t.Errorf("%s: %q is not in\n%s", tt.provider, s, text)
			}
		}
		if tt.not != "" && strings.Contains(text, tt.not) {
			t.Errorf("%s: %q is in\n%s", tt.provider, tt.not, text)
		}
	}
}
