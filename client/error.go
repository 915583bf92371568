package client

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// A Code says what kind of refusal an Error is.
type Code string

// The codes.
const (
	Pending       Code = "pending"        // the server is still registering: retry
	BrokerDown    Code = "broker_down"    // the broker is not there, perhaps restarting: retry
	UnknownPeer   Code = "unknown_peer"   // this process is not in the server's container
	Denied        Code = "denied"         // policy says no
	RoleLost      Code = "role_lost"      // policy says no to what it allowed before; only Watch tells it
	LoginRequired Code = "login_required" // the user has to log in again
	Revoked       Code = "revoked"        // an administrator or the provider cut the user off
	Invalid       Code = "invalid"        // the request is wrong
	Unsatisfiable Code = "unsatisfiable"  // the provider gives no such token
	ProviderDown  Code = "provider_down"  // the provider can't be asked: retry
	Unavailable   Code = "unavailable"    // the broker lacks a part of its own: retry
	Limited       Code = "limited"        // too much at once: slow down
	Internal      Code = "internal"       // nothing is known but the ref
)

// Targets for errors.Is.
var (
	ErrPending       = &Error{Code: Pending}
	ErrBrokerDown    = &Error{Code: BrokerDown}
	ErrUnknownPeer   = &Error{Code: UnknownPeer}
	ErrDenied        = &Error{Code: Denied}
	ErrRoleLost      = &Error{Code: RoleLost}
	ErrLoginRequired = &Error{Code: LoginRequired}
	ErrRevoked       = &Error{Code: Revoked}
	ErrInvalid       = &Error{Code: Invalid}
	ErrUnsatisfiable = &Error{Code: Unsatisfiable}
	ErrProviderDown  = &Error{Code: ProviderDown}
	ErrUnavailable   = &Error{Code: Unavailable}
	ErrLimited       = &Error{Code: Limited}
	ErrInternal      = &Error{Code: Internal}
)

// An Error is why there is no token, in words for the user.
type Error struct {
	Code       Code
	Sentence   string        // what happened
	Next       string        // what to do about it
	Ref        string        // number of the broker's audit line; empty if it wrote none
	RetryAfter time.Duration // when trying again may help; 0: it will not
	cause      error
}

// Error returns the sentence and the next step.
func (e *Error) Error() string {
	s := e.Sentence
	if s == "" {
		s = string(e.Code)
	}
	if e.Next != "" {
		s += "; " + e.Next
	}
	if e.Ref != "" {
		s += " (ref " + e.Ref + ")"
	}
	return s
}

// Is matches one of the targets by its code. A role that was lost is a denial, too.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Sentence == "" && (t.Code == e.Code || t.Code == Denied && e.Code == RoleLost)
}

// Unwrap returns the error of the transport or the context, if there is one.
func (e *Error) Unwrap() error { return e.cause }

// explain makes an Error of what a call returned. A caller that gave up gets
// its context's error instead, which no code fits.
func (c *Client) explain(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("ask the token broker: %w", ctx.Err())
	}
	st := status.Convert(err)
	e := &Error{Sentence: st.Message(), cause: err}
	for _, d := range st.Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			e.Code, e.Next, e.Ref = Code(d.GetReason()), d.GetMetadata()["next"], d.GetMetadata()["ref"]
		case *errdetails.RetryInfo:
			e.RetryAfter = d.GetRetryDelay().AsDuration()
		}
	}
	if e.Code != "" {
		return e
	}
	return c.explainTransport(st, e)
}

// explainTransport fills e in where no broker did: the answer came from gRPC
// itself.
func (c *Client) explainTransport(st *status.Status, e *Error) error {
	switch st.Code() {
	case codes.Unavailable:
		e.Code = BrokerDown
		e.Sentence = "the token broker does not answer at " + c.socket + "; it may be restarting, and nothing is lost"
		e.Next = "try again within 30 seconds; then ask your administrator"
		e.RetryAfter = time.Second
	case codes.ResourceExhausted:
		e.Code, e.RetryAfter = Limited, time.Second
	default:
		e.Code = Internal
		e.Next = "send this to your administrator"
	}
	return e
}
