package broker

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

// A Code says what kind of refusal an error is. Callers act on the code; the
// edges only map it to the numbers of their protocol (DESIGN.md, section 8).
type Code string

// The codes. There are no others; what has none is internal.
const (
	Pending       Code = "pending"        // the server is not bound to its container yet: retry
	UnknownPeer   Code = "unknown_peer"   // the caller is not in the server's container
	Denied        Code = "denied"         // policy says no
	LoginRequired Code = "login_required" // there is no usable grant: log in
	Revoked       Code = "revoked"        // an administrator or the provider cut the user off
	Invalid       Code = "invalid"        // the request itself is wrong
	Unsatisfiable Code = "unsatisfiable"  // the provider gives no token that lies inside the decision
	ProviderDown  Code = "provider_down"  // the provider can't be asked: retry
	Unavailable   Code = "unavailable"    // the broker's store or Docker can't be asked: retry
	Limited       Code = "limited"        // too much at once: slow down
	Internal      Code = "internal"       // nothing but the ref
)

// An Error is what a caller may be told. Its cause is for operators and is
// never sent.
type Error struct {
	Code       Code
	Sentence   string        // what happened, for a person
	Next       string        // the next step, for the same person
	Ref        string        // number of the audit line, set where the answer is recorded
	RetryAfter time.Duration // when to try again; 0: no use in trying again
	cause      error
}

// Error is for logs: the code, the sentence and the cause.
func (e *Error) Error() string {
	s := string(e.Code) + ": " + e.Sentence
	if e.cause != nil {
		s += ": " + e.cause.Error()
	}
	return s
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.cause }

// Is matches a target *Error with the same code, so that
// errors.Is(err, broker.ErrDenied) asks for the code.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Code == e.Code && t.Sentence == ""
}

// Targets for errors.Is.
var (
	ErrPending       = &Error{Code: Pending}
	ErrUnknownPeer   = &Error{Code: UnknownPeer}
	ErrDenied        = &Error{Code: Denied}
	ErrLoginRequired = &Error{Code: LoginRequired}
	ErrRevoked       = &Error{Code: Revoked}
	ErrInvalid       = &Error{Code: Invalid}
	ErrUnsatisfiable = &Error{Code: Unsatisfiable}
	ErrProviderDown  = &Error{Code: ProviderDown}
	ErrUnavailable   = &Error{Code: Unavailable}
	ErrLimited       = &Error{Code: Limited}
)

// nexts is the next step of each code, where the error knows no better one.
// {contact} is replaced by the site's contact when the error is answered.
var nexts = map[Code]string{
	Pending:       "try again shortly",
	UnknownPeer:   "call from the notebook itself",
	Denied:        "ask {contact}",
	LoginRequired: "log in to the hub again; this kernel then gets tokens, no restart is needed",
	Revoked:       "ask {contact}",
	Invalid:       "correct the request",
	Unsatisfiable: "ask for less",
	ProviderDown:  "try again; nothing is lost",
	Unavailable:   "try again shortly; nothing is lost",
	Limited:       "slow down",
	Internal:      "send the ref to {contact}",
}

// retryAfter is when a caller should try again, by code.
var retryAfter = map[Code]time.Duration{
	Pending:      time.Second,
	ProviderDown: 5 * time.Second,
	Unavailable:  2 * time.Second,
	Limited:      time.Second,
}

// Errorf makes an Error of a code with its usual next step. The sentence is
// shown to users: no secrets, no internals.
func Errorf(code Code, sentence string, args ...any) *Error {
	return &Error{
		Code:       code,
		Sentence:   fmt.Sprintf(sentence, args...),
		Next:       nexts[code],
		RetryAfter: retryAfter[code],
	}
}

// Because adds the cause for operators.
func (e *Error) Because(cause error) *Error {
	c := *e
	c.cause = cause
	return &c
}

// Hint replaces the next step.
func (e *Error) Hint(next string, args ...any) *Error {
	c := *e
	c.Next = fmt.Sprintf(next, args...)
	return &c
}

// public returns what may be told of err: the Error in it, else internal. That
// the caller's time was over is nobody's fault inside.
func public(err error, contact, ref string) *Error {
	var e *Error
	switch {
	case errors.As(err, &e):
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		e = Errorf(Unavailable, "the token broker could not answer in time").Because(err)
	default:
		e = Errorf(Internal, "something went wrong inside the token broker").Because(err)
	}
	c := *e
	c.Next = strings.ReplaceAll(c.Next, "{contact}", contact)
	c.Ref = ref
	return &c
}
