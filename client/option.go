package client

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	pb "tokenbroker/proto/tokenbroker/v1"
)

// An Option narrows a request. Without any, the broker answers a token of the
// provider that the hub's users log in with, as wide as its policy allows.
type Option func(*request)

type request struct {
	*pb.GetTokenRequest
	wait *time.Duration // nil: don't; 0: as long as the context
}

func newRequest(opts []Option) request {
	r := request{GetTokenRequest: &pb.GetTokenRequest{}}
	for _, o := range opts {
		o(&r)
	}
	return r
}

// Provider asks for a token of another provider than the login provider.
func Provider(name string) Option { return func(r *request) { r.Provider = name } }

// Audience says whom the token is for.
func Audience(aud string) Option { return func(r *request) { r.Audience = aud } }

// Scopes asks for these scopes only.
func Scopes(scopes ...string) Option { return func(r *request) { r.GetTokenRequest.Scopes = scopes } }

// MinTTL says how long the token must still be valid.
func MinTTL(d time.Duration) Option { return func(r *request) { r.MinTtl = durationpb.New(d) } }

// Rejected says that a service has refused this access token with 401, so that
// the broker doesn't answer it once more.
func Rejected(accessToken string) Option {
	sum := sha256.Sum256([]byte(accessToken))
	return func(r *request) { r.RejectedSha256 = hex.EncodeToString(sum[:]) }
}

// Wait makes a call wait, at most for atMost, instead of failing with an error
// that passes: the server is still registering, the broker is restarting, the
// provider is down, the user has to log in again. 0 waits as long as the
// context lives. What only an administrator can change is still an error at
// once.
func Wait(atMost time.Duration) Option { return func(r *request) { r.wait = &atMost } }

// retry calls f until it succeeds or waiting makes no sense any more, and
// then returns its last error that says why.
func retry[T any](ctx context.Context, atMost *time.Duration, f func(context.Context) (T, error)) (T, error) {
	if atMost == nil {
		return f(ctx)
	}
	if *atMost > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, *atMost)
		defer cancel()
	}
	var why error
	for {
		v, err := f(ctx)
		if ctx.Err() != nil && why != nil {
			return v, why
		}
		pause := pauseAfter(err)
		if pause == 0 {
			return v, err
		}
		why = err
		select {
		case <-ctx.Done():
			return v, why
		case <-time.After(pause):
		}
	}
}

// loginPause is how often to look whether the user has logged in again.
const loginPause = 15 * time.Second

// pauseAfter is when to try again after err; 0: there is no use in it, or no
// error.
func pauseAfter(err error) time.Duration {
	var e *Error
	switch {
	case !errors.As(err, &e):
		return 0
	case e.Code == LoginRequired:
		return max(e.RetryAfter, loginPause)
	default:
		return e.RetryAfter
	}
}
