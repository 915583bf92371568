package httpserver_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
	pb "tokenbroker/proto/tokenbroker/v1"
)

// minutes are the times in sentences.
var minutes = regexp.MustCompile(`\d{4}-\d\d-\d\d \d\d:\d\d UTC`)

// A said is what a caller was told and what the audit says of it, in words that
// gRPC and JSON share.
type said struct {
	Code, Sentence, Next string
	RetryAfter           int64
	Ref                  bool
	Answer               map[string]any
	Action, Outcome      string // of the audit line that Ref names
}

var badRefresh = &broker.ProviderError{Class: broker.TryLater, Status: 503}

// TestBothEdgesSayTheSame runs each case through gRPC and through JSON, each
// time on a stack of its own, and compares.
func TestBothEdgesSayTheSame(t *testing.T) {
	ready := func(s *stack) { s.ready() }
	for _, tt := range []struct {
		why     string
		prepare func(*stack)
		ask     proto.Message
		want    broker.Code
		words   string // part of the sentence
	}{
		{"nothing named", ready, &pb.GetTokenRequest{}, "", ""},
		{"everything named", ready, &pb.GetTokenRequest{Provider: "keycloak", Audience: "storage", Scopes: []string{"write", "read"}, MinTtl: durationpb.New(time.Minute)}, "", ""},
		{"fewer scopes", ready, &pb.GetTokenRequest{Scopes: []string{"read"}}, "", ""},
		{"a token that no service refused", ready, &pb.GetTokenRequest{RejectedSha256: strings.Repeat("ab", 32)}, "", ""},
		{"what there is", ready, &pb.ListProvidersRequest{}, "", ""},

		{"an unknown provider", ready, &pb.GetTokenRequest{Provider: "nope"}, broker.Invalid, `"nope"`},
		{"a provider with a strange name", ready, &pb.GetTokenRequest{Provider: "a/b c%?#é"}, broker.Invalid, "provider"},
		{"a provider without a rule", ready, &pb.GetTokenRequest{Provider: "gitlab"}, broker.Denied, ""},
		{"an unknown audience", ready, &pb.GetTokenRequest{Audience: "payroll"}, broker.Denied, "payroll"},
		{"an unknown scope", ready, &pb.GetTokenRequest{Scopes: []string{"read", "admin"}}, broker.Denied, "admin"},
		{"no scope at all", ready, &pb.GetTokenRequest{Scopes: []string{`re"ad`}}, broker.Invalid, "scope"},
		{"a life below nothing", ready, &pb.GetTokenRequest{MinTtl: durationpb.New(-time.Second)}, broker.Invalid, "min_ttl"},
		{"a life for ever", ready, &pb.GetTokenRequest{MinTtl: &durationpb.Duration{Seconds: 300_000_000_000}}, broker.Invalid, "min_ttl"},
		{"half a fingerprint", ready, &pb.GetTokenRequest{RejectedSha256: "abcd"}, broker.Invalid, "rejected_sha256"},

		{"an unknown registration", func(s *stack) { s.sock(alice) }, &pb.GetTokenRequest{}, broker.UnknownPeer, "registered"},
		{"a container that is not there yet", func(s *stack) { s.login(); s.register() }, &pb.GetTokenRequest{}, broker.Pending, "jupyter-alice"},
		{"a process from elsewhere", func(s *stack) { s.attestor.Run("jupyter-alice", 1); s.register() }, &pb.GetTokenRequest{}, broker.UnknownPeer, "container"},
		{"the same, asking for the list", func(s *stack) { s.attestor.Run("jupyter-alice", 1); s.register() }, &pb.ListProvidersRequest{}, broker.UnknownPeer, "container"},
		{"nobody logged in", func(s *stack) { s.run(); s.register() }, &pb.GetTokenRequest{}, broker.LoginRequired, "logged in"},
		{"the role was taken away", func(s *stack) { s.ready(); s.expire(); s.provider.SetRoles("alice", "guest") }, &pb.GetTokenRequest{}, broker.Denied, "researcher"},
		{"the session has ended", func(s *stack) { s.ready(); s.provider.EndSession("alice"); s.expire() }, &pb.GetTokenRequest{}, broker.LoginRequired, ""},
		{"an administrator cut her off", func(s *stack) { s.ready(); s.disconnect() }, &pb.GetTokenRequest{}, broker.Revoked, ""},
		{"the provider is down", func(s *stack) { s.ready(); s.expire(); s.provider.Next(brokertest.Answer{Err: badRefresh}) }, &pb.GetTokenRequest{}, broker.ProviderDown, "keycloak"},
		{"the store is down", func(s *stack) { s.ready(); s.store.Fail(errors.New("redis: refused")) }, &pb.GetTokenRequest{}, broker.Unavailable, ""},
		{"something crashes", func(s *stack) { s.ready(); s.crash() }, &pb.RegisterRequest{User: "alice"}, broker.Internal, ""},

		{"a claim of nothing", nil, &pb.ClaimRequest{}, broker.Invalid, ""},
		{"a claim with an unknown handle", nil, &pb.ClaimRequest{Provider: "keycloak", Handle: "tbh_guess", User: "alice"}, broker.LoginRequired, ""},
		{"a claim at an unknown provider", nil, &pb.ClaimRequest{Provider: "nope", Handle: "tbh_guess", User: "alice"}, broker.Invalid, `"nope"`},
		{"a session of an unknown handle", nil, &pb.CheckSessionRequest{Provider: "keycloak", Handle: "tbh_guess", User: "alice"}, "", ""},
		{"a server", ready, &pb.RegisterRequest{User: "alice", Server: "gpu", ContainerName: "jupyter-alice--gpu", Groups: []string{"lab"}}, "", ""},
		{"a server with a uid", ready, &pb.RegisterRequest{User: "bob", ContainerName: "b", Uid: new(uint32(1000))}, "", ""},
		{"a server of a user with a strange name", nil, &pb.RegisterRequest{User: "a b/c}é", ContainerName: "c"}, "", ""},
		{"a server of a user with a long name", nil, &pb.RegisterRequest{User: strings.Repeat("ü", 255), ContainerName: "c"}, "", ""},
		{"a server of a user with a longer name", nil, &pb.RegisterRequest{User: strings.Repeat("ü", 256), ContainerName: "c"}, broker.Invalid, "255"},
		{"a server of nobody", nil, &pb.RegisterRequest{ContainerName: "c"}, broker.Invalid, "user"},
		{"a server that needs a grant", nil, &pb.RegisterRequest{User: "bob", ContainerName: "c", RequireGrant: true}, broker.LoginRequired, "bob"},
		{"a server that somebody else may open", ready, &pb.RegisterRequest{User: "alice", ContainerName: "jupyter-alice", Shared: true}, "", ""},
		{"a token on it", func(s *stack) { s.ready(); s.share() }, &pb.GetTokenRequest{}, broker.Denied, "tokens are off while this server is shared"},
		{"groups", ready, &pb.SetGroupsRequest{User: "alice", Groups: []string{"lab", "staff"}}, "", ""},
		{"groups that are no others", ready, &pb.SetGroupsRequest{User: "alice"}, "", ""},
		{"groups of nobody", nil, &pb.SetGroupsRequest{Groups: []string{"lab"}}, broker.Invalid, "user"},
		{"a group with a line break", nil, &pb.SetGroupsRequest{User: "alice", Groups: []string{"lab\nstaff"}}, broker.Invalid, "groups holds a control character"},
		{"a share", ready, &pb.SetSharedRequest{User: "alice", Shared: true}, "", ""},
		{"a share that ends", func(s *stack) { s.ready(); s.share() }, &pb.SetSharedRequest{User: "alice"}, "", ""},
		{"a logout", ready, &pb.LogoutRequest{User: "alice"}, "", ""},
		{"a logout of who is not allowed any more", ready, &pb.LogoutRequest{User: "alice", NotAllowed: true}, "", ""},
		{"a logout of nobody", nil, &pb.LogoutRequest{}, broker.Invalid, "user"},
		{"a share of an unknown server", nil, &pb.SetSharedRequest{User: "alice", Server: "gpu", Shared: true}, "", ""},
		{"the end of a server", ready, &pb.UnregisterRequest{User: "alice"}, "", ""},
		{"the end of the start before", ready, &pb.UnregisterRequest{User: "alice", Generation: 1}, "", ""},
		{"the end of nothing", nil, &pb.UnregisterRequest{User: "nobody"}, "", ""},
	} {
		t.Run(tt.why, func(t *testing.T) {
			var answers []said
			for _, ask := range []func(*stack, proto.Message) said{askGRPC, askJSON} {
				s := newStack(t, setup{})
				if tt.prepare != nil {
					tt.prepare(s)
				}
				answers = append(answers, ask(s, tt.ask))
			}
			got := answers[0]
			if got.Code != string(tt.want) || !strings.Contains(got.Sentence, tt.words) {
				t.Errorf("answer: %s %q, want %s with %q", got.Code, got.Sentence, tt.want, tt.words)
			}
			if tt.want != "" && (!got.Ref || got.Next == "") {
				t.Errorf("answer has ref %v and next %q, want both", got.Ref, got.Next)
			}
			for i := range answers { // each asked in a minute of its own
				answers[i].Sentence = minutes.ReplaceAllString(answers[i].Sentence, "TIME")
			}
			if diff := cmp.Diff(answers[0], answers[1]); diff != "" {
				t.Errorf("gRPC (-) and JSON (+) differ:\n%s", diff)
			}
		})
	}
}

// What Register says has no trace in its answer.
func TestBothEdgesPassOnThatAServerIsShared(t *testing.T) {
	for why, ask := range map[string]func(*stack, proto.Message) said{"gRPC": askGRPC, "JSON": askJSON} {
		s := newStack(t, setup{})
		ask(s, &pb.RegisterRequest{User: "alice", ContainerName: "c", Shared: true})
		if all := s.b.Registrations(); len(all) != 1 || !all[0].Shared {
			t.Errorf("%s: registered are %+v", why, all)
		}
	}
}

// expire lets so much time pass that every access token of alice has ended. The
// broker reads the time from the store anew after bob's login has moved the
// revision.
func (s *stack) expire() {
	s.t.Helper()
	s.store.Advance(time.Hour)
	s.loginAs("bob")
	s.b.Status(context.Background())
}

func (s *stack) disconnect() {
	s.t.Helper()
	_, _, err := s.b.Disconnect(context.Background(), "test", "main", "alice", "")
	check(s.t, err)
}

// share opens alice's server to somebody else.
func (s *stack) share() {
	s.t.Helper()
	_, err := s.b.SetShared(context.Background(), "main", "alice", "", true)
	check(s.t, err)
}

// crashSecret is what a crash must not tell.
const crashSecret = "a secret in a panic"

// crash makes the store panic in the middle of whatever comes.
func (s *stack) crash() {
	s.store.Before(func(string, broker.Key) error { panic(crashSecret) })
}

// path returns where a request goes and as what.
func (s *stack) path(m proto.Message) (socket, method string, answer proto.Message) {
	switch m.(type) {
	case *pb.GetTokenRequest:
		return s.sock(alice), pb.Workload_GetToken_FullMethodName, new(pb.GetTokenResponse)
	case *pb.ListProvidersRequest:
		return s.sock(alice), pb.Workload_ListProviders_FullMethodName, new(pb.ListProvidersResponse)
	case *pb.ClaimRequest:
		return s.hub, pb.Hub_Claim_FullMethodName, new(pb.ClaimResponse)
	case *pb.CheckSessionRequest:
		return s.hub, pb.Hub_CheckSession_FullMethodName, new(pb.CheckSessionResponse)
	case *pb.RegisterRequest:
		return s.hub, pb.Hub_Register_FullMethodName, new(pb.RegisterResponse)
	case *pb.UnregisterRequest:
		return s.hub, pb.Hub_Unregister_FullMethodName, new(pb.UnregisterResponse)
	case *pb.SetGroupsRequest:
		return s.hub, pb.Hub_SetGroups_FullMethodName, new(pb.SetGroupsResponse)
	case *pb.LogoutRequest:
		return s.hub, pb.Hub_Logout_FullMethodName, new(pb.LogoutResponse)
	case *pb.SetSharedRequest:
		return s.hub, pb.Hub_SetShared_FullMethodName, new(pb.SetSharedResponse)
	}
	s.t.Fatalf("no method takes a %T", m)
	return "", "", nil
}

func askGRPC(s *stack, m proto.Message) said {
	s.t.Helper()
	socket, method, answer := s.path(m)
	err := s.grpc(socket).Invoke(context.Background(), method, m, answer)
	if err == nil {
		return s.done(fields(answer))
	}
	return s.refused(saidBy(s.t, err))
}

// saidBy reads a status as any client can.
func saidBy(t testing.TB, err error) (got said, ref string) {
	t.Helper()
	st := status.Convert(err)
	got.Sentence = st.Message()
	for _, d := range st.Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			got.Code, got.Next, ref = d.Reason, d.Metadata["next"], d.Metadata["ref"]
		case *errdetails.RetryInfo:
			got.RetryAfter = int64(d.RetryDelay.AsDuration() / time.Second)
		}
	}
	if got.Code == "" {
		t.Fatalf("a status without details: %v", err)
	}
	return got, ref
}

func askJSON(s *stack, m proto.Message) said {
	s.t.Helper()
	socket, _, _ := s.path(m)
	resp, err := s.http(socket).Do(requestFor(s.t, m))
	check(s.t, err)
	defer resp.Body.Close()
	var body map[string]any
	check(s.t, json.NewDecoder(resp.Body).Decode(&body))
	if got := resp.Header.Get("Cache-Control"); got != "no-store" {
		s.t.Errorf("Cache-Control: %q, want no-store", got)
	}
	if resp.StatusCode == http.StatusOK {
		return s.done(body)
	}
	got := said{Code: body["code"].(string), Sentence: body["detail"].(string), Next: body["next"].(string)}
	if after, ok := body["retry_after"].(float64); ok {
		got.RetryAfter = int64(after)
	}
	if want := resp.Header.Get("Retry-After"); (got.RetryAfter != 0 || want != "") && fmt.Sprint(got.RetryAfter) != want {
		s.t.Errorf("Retry-After: %q, and %d in the body", want, got.RetryAfter)
	}
	return s.refused(got, body["ref"].(string))
}

// done compares an answer's ref with the audit and takes out what differs from
// stack to stack.
func (s *stack) done(answer map[string]any) said {
	s.t.Helper()
	got := said{Answer: answer}
	if ref, _ := answer["ref"].(string); ref != "" {
		got.Ref = true
		e := s.audit.last(s.t)
		if e.Ref != ref {
			s.t.Errorf("ref: %s, and the audit has %s", ref, e.Ref)
		}
		got.Action, got.Outcome = e.Action, e.Outcome
	}
	for _, name := range []string{"ref", "access_token", "expires_at", "directory", "generation"} {
		if v, ok := answer[name]; ok && v != "" {
			answer[name] = fmt.Sprintf("a %T", v)
		}
	}
	// The fields that proto leaves out when they are empty.
	for name, v := range answer {
		if v == nil || v == false || v == "" || v == 0.0 {
			delete(answer, name)
		}
	}
	return got
}

func (s *stack) refused(got said, ref string) said {
	s.t.Helper()
	got.Ref = ref != ""
	e := s.audit.last(s.t)
	if e.Ref != ref || string(e.Code) != got.Code {
		s.t.Errorf("answer: %s %s, and the audit has %s %s", got.Code, ref, e.Code, e.Ref)
	}
	got.Action, got.Outcome = e.Action, e.Outcome
	return got
}

// requestFor writes a message as the request that means the same.
func requestFor(t testing.TB, m proto.Message) *http.Request {
	t.Helper()
	post := func(path string) *http.Request {
		body, err := json.Marshal(fields(m))
		check(t, err)
		return newRequest(t, "POST", path, "application/json", string(body))
	}
	switch m := m.(type) {
	case *pb.GetTokenRequest:
		return newRequest(t, "GET", tokenURL(m), "", "")
	case *pb.ListProvidersRequest:
		return newRequest(t, "GET", "/v1/providers", "", "")
	case *pb.ClaimRequest:
		return post("/v1/claim")
	case *pb.CheckSessionRequest:
		return post("/v1/check-session")
	case *pb.RegisterRequest:
		return post("/v1/register")
	case *pb.SetGroupsRequest:
		return post("/v1/set-groups")
	case *pb.LogoutRequest:
		return post("/v1/logout")
	case *pb.SetSharedRequest:
		return post("/v1/set-shared")
	}
	return post("/v1/unregister")
}

func tokenURL(m *pb.GetTokenRequest) string {
	path := "/v1/token"
	if m.Provider != "" {
		path += "/" + url.PathEscape(m.Provider)
	}
	q := make(url.Values)
	for name, v := range map[string]string{
		"audience": m.Audience, "scope": strings.Join(m.Scopes, " "), "rejected_sha256": m.RejectedSha256,
	} {
		if v != "" {
			q.Set(name, v)
		}
	}
	if m.MinTtl != nil {
		q.Set("min_ttl", fmt.Sprint(m.MinTtl.Seconds))
	}
	return path + "?" + q.Encode()
}

func newRequest(t testing.TB, method, path, contentType, body string) *http.Request {
	t.Helper()
	r, err := http.NewRequest(method, "http://localhost"+path, strings.NewReader(body))
	check(t, err)
	if contentType != "" {
		r.Header.Set("Content-Type", contentType)
	}
	return r
}

// fields is a message as JSON has it: names and values, numbers as numbers.
func fields(m proto.Message) map[string]any {
	all := make(map[string]any)
	m.ProtoReflect().Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		all[f.TextName()] = plain(f, v)
		return true
	})
	return all
}

func plain(f protoreflect.FieldDescriptor, v protoreflect.Value) any {
	if f.IsList() {
		list := []any{}
		for i := range v.List().Len() {
			list = append(list, plainOne(f, v.List().Get(i)))
		}
		return list
	}
	return plainOne(f, v)
}

func plainOne(f protoreflect.FieldDescriptor, v protoreflect.Value) any {
	switch f.Kind() {
	case protoreflect.Int64Kind:
		return float64(v.Int())
	case protoreflect.Uint32Kind:
		return float64(v.Uint())
	case protoreflect.EnumKind:
		name := string(f.Enum().Values().ByNumber(v.Enum()).Name())
		return strings.ToLower(strings.TrimPrefix(name, "GRANT_STATE_"))
	case protoreflect.MessageKind:
		if at, ok := v.Message().Interface().(*timestamppb.Timestamp); ok {
			return at.AsTime().Format(time.RFC3339)
		}
		return fields(v.Message().Interface())
	}
	return v.Interface()
}

// TestATooLargeMessageIsRefusedByGRPCItself: its library answers, and the audit
// has the line all the same.
func TestATooLargeMessageIsRefusedByGRPCItself(t *testing.T) {
	s := newStack(t, setup{})
	var out []byte
	in := []byte(strings.Repeat("\x1a\x01a", 10<<20/3))
	err := s.grpc(s.hub).Invoke(context.Background(), pb.Hub_Claim_FullMethodName, in, &out, grpc.ForceCodec(rawCodec{}))
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("ten megabytes: %v, want RESOURCE_EXHAUSTED", err)
	}
	if e := s.audit.last(t); e.Code != broker.Invalid || e.Action != "claim" {
		t.Errorf("audit: %s %s, want an invalid claim", e.Action, e.Code)
	}
}

// rawCodec sends bytes as they are, as only a broken client does.
type rawCodec struct{}

func (rawCodec) Name() string                  { return "proto" }
func (rawCodec) Marshal(v any) ([]byte, error) { return v.([]byte), nil }
func (rawCodec) Unmarshal(b []byte, v any) error {
	*v.(*[]byte) = b
	return nil
}

// TestBothEdgesRefuseWhatTheyCannotRead sends rubbish: each edge has its own
// words for it, but the code is the same and the audit knows.
func TestBothEdgesRefuseWhatTheyCannotRead(t *testing.T) {
	for _, tt := range []struct {
		why, grpc, json string
	}{
		{"rubbish", "\xff\xff\xff", "\xff\xff"},
		{"half a message", "\x0a\x20keyc", `{"provider":"keyc`},
		{"text that is no UTF-8", "\x1a\x02\xff\xfe", "{\"user\":\"\xff\xfe\"}"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			s := newStack(t, setup{})
			var out []byte
			err := s.grpc(s.hub).Invoke(context.Background(), pb.Hub_Claim_FullMethodName, []byte(tt.grpc), &out, grpc.ForceCodec(rawCodec{}))
			got, ref := saidBy(t, err)
			if got = s.refused(got, ref); got.Code != "invalid" || got.Action != "claim" || !got.Ref {
				t.Errorf("gRPC: %+v, want invalid, recorded as a claim", got)
			}
			resp, err := s.http(s.hub).Do(newRequest(t, "POST", "/v1/claim", "application/json", tt.json))
			check(t, err)
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			check(t, err)
			if e := s.audit.last(t); e.Code != "invalid" || e.Action != "claim" || !bytes.Contains(body, []byte(e.Ref)) {
				t.Errorf("JSON: %s, and the audit has %s %s %s", body, e.Action, e.Code, e.Ref)
			}
		})
	}
}
