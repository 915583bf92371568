package grpcserver

import (
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	"tokenbroker/broker"
)

// statusCodes is what gRPC calls the domain's codes (DESIGN.md, section 8).
var statusCodes = map[broker.Code]codes.Code{
	broker.Pending:       codes.Unavailable,
	broker.UnknownPeer:   codes.Unauthenticated,
	broker.Denied:        codes.PermissionDenied,
	broker.LoginRequired: codes.FailedPrecondition,
	broker.Revoked:       codes.PermissionDenied,
	broker.Invalid:       codes.InvalidArgument,
	broker.Unsatisfiable: codes.OutOfRange,
	broker.ProviderDown:  codes.Unavailable,
	broker.Unavailable:   codes.Unavailable,
	broker.Limited:       codes.ResourceExhausted,
	broker.Internal:      codes.Internal,
}

// statusOf says e in gRPC's way: the sentence is the message, the rest are
// details that every gRPC library can read.
func statusOf(e *broker.Error) error {
	code, ok := statusCodes[e.Code]
	if !ok {
		code = codes.Internal
	}
	details := []protoadapt.MessageV1{&errdetails.ErrorInfo{
		Reason:   string(e.Code),
		Domain:   "tokenbroker",
		Metadata: map[string]string{"next": e.Next, "ref": e.Ref},
	}}
	if e.RetryAfter > 0 {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(e.RetryAfter)})
	}
	st := status.New(code, e.Sentence)
	if detailed, err := st.WithDetails(details...); err == nil {
		st = detailed
	}
	return st.Err()
}
