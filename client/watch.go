package client

import (
	"context"
	"errors"
	"io"
	"iter"
	"math/rand/v2"
	"time"

	pb "tokenbroker/proto/tokenbroker/v1"
)

// Watch yields what changes: each token, the next one before the one before ends,
// and, in the place of a token, each *Error that says why there is none for now:
// ErrRoleLost, ErrRevoked, ErrLoginRequired, … A token may come after any of them:
// a role that comes back, or a login, brings it.
//
//	for tok, err := range c.Watch(ctx, client.Audience("storage")) {
//		if err != nil {
//			pauseWork(err)
//			continue
//		}
//		goOnWith(tok)
//	}
//
// It goes on until ctx ends or the loop is left, and waits while the broker
// restarts. An error that no waiting ends (ErrInvalid, ErrUnknownPeer, ErrInternal)
// is the last it yields. The broker doesn't wait for a loop that takes long: Watch
// then asks anew, and what came and went meanwhile is not yielded. Of the options
// Wait and Rejected change nothing.
func (c *Client) Watch(ctx context.Context, opts ...Option) iter.Seq2[Token, error] {
	r := newRequest(opts)
	want := &pb.WatchRequest{Provider: r.Provider, Audience: r.Audience, Scopes: r.Scopes, MinTtl: r.MinTtl}
	return func(yield func(Token, error) bool) {
		ctx, cancel := context.WithCancel(ctx) // ends the stream with the loop
		defer cancel()
		w := watch{Client: c, want: want, yield: yield}
		for {
			err := w.follow(ctx)
			if w.left || ctx.Err() != nil {
				return
			}
			wait := pauseAfter(err)
			if wait == 0 {
				yield(Token{}, err)
				return
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(wait + rand.N(wait/4+1)): // all who lost one broker don't come back at once
			}
		}
	}
}

// A watch is a Watch while it is ranged over.
type watch struct {
	*Client
	want  *pb.WatchRequest
	yield func(Token, error) bool
	told  *pb.WatchResponse // what was yielded last
	left  bool              // the loop was left
}

// follow yields what one stream tells, and returns why that has ended.
func (w *watch) follow(ctx context.Context) error {
	stream, err := w.rpc.Watch(ctx, w.want)
	for err == nil {
		var m *pb.WatchResponse
		if m, err = stream.Recv(); err != nil || sameUpdate(w.told, m) {
			continue
		}
		w.told = m
		if w.left = !w.yield(update(m)); w.left {
			return nil
		}
	}
	if errors.Is(err, io.EOF) {
		return &Error{Code: BrokerDown, Sentence: "the token broker has ended the watch", Next: "ask again", RetryAfter: time.Second}
	}
	return w.explain(ctx, err)
}

// update is what m says.
func update(m *pb.WatchResponse) (Token, error) {
	if no := m.GetRefusal(); no != nil {
		e := &Error{Code: Code(no.GetCode()), Sentence: no.GetSentence(), Next: no.GetNext(), Ref: no.GetRef()}
		if Code(m.GetEvent()) == RoleLost {
			e.Code = RoleLost
		}
		return Token{}, e
	}
	return tokenOf(m.GetToken()), nil
}

// sameUpdate says whether is, the first that a new stream tells, was told before.
func sameUpdate(was, is *pb.WatchResponse) bool {
	a, b := was.GetRefusal(), is.GetRefusal()
	return was != nil && was.GetEvent() == is.GetEvent() && was.GetToken().GetAccessToken() == is.GetToken().GetAccessToken() &&
		a.GetCode() == b.GetCode() && a.GetSentence() == b.GetSentence()
}
