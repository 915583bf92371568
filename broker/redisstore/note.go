package redisstore

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"time"

	"github.com/redis/go-redis/v9"
)

// Notes go by Redis' pub/sub, on one channel per deployment. It keeps nothing for
// those who are away, and needn't: a note is a hint that each reader confirms by
// a read, so a stream, which keeps them, would be something to trim, to read on
// from and to believe, for nothing. In a cluster each node passes them on to all.

// What is listened to in vain for quiet is asked whether it is still there, and
// given up after as long again: a host that was cut off closes no connection.
const quiet = 5 * time.Second

// listenAgain is how long to wait before a new connection, and up to twice that,
// so that brokers which lost theirs together don't come together.
const listenAgain = 500 * time.Millisecond

// Tell implements broker.Store.
func (s *Store) Tell(ctx context.Context, note string) error {
	if err := s.do(ctx, "PUBLISH", s.channel(), note).Err(); err != nil {
		return s.explain("tell the other brokers", err)
	}
	return nil
}

// Listen implements broker.Store. Why a connection can't be had, Check says.
func (s *Store) Listen(ctx context.Context, heard func(note string)) error {
	for ctx.Err() == nil {
		err := s.listenOnce(ctx, heard)
		s.unanswered(ctx, err)
		t := time.NewTimer(listenAgain + rand.N(listenAgain))
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
		}
	}
	return ctx.Err()
}

// listenOnce listens until the connection is lost or ctx ends. go-redis would
// make a new one by itself, but for a server that is silent.
func (s *Store) listenOnce(ctx context.Context, heard func(note string)) error {
	sub := s.client.Subscribe(ctx)
	defer sub.Close()
	defer context.AfterFunc(ctx, func() { sub.Close() })() // a read that waits doesn't see ctx
	if err := sub.Subscribe(ctx, s.channel()); err != nil {
		return err
	}
	for asked := false; ; {
		m, err := sub.ReceiveTimeout(ctx, s.quiet)
		var silence net.Error
		switch {
		case errors.As(err, &silence) && silence.Timeout() && !asked:
			asked = true
			err = sub.Ping(ctx)
		case err == nil:
			asked = false
		}
		if err != nil {
			return err
		}
		switch m := m.(type) {
		case *redis.Subscription:
			heard("")
		case *redis.Message:
			if m.Payload != "" {
				heard(m.Payload)
			}
		}
	}
}

// tryNotes tells nobody something, and listens at the same place.
func tryNotes(ctx context.Context, p primary) error {
	if err := p.client.Publish(ctx, p.key, "").Err(); err != nil {
		return err
	}
	sub := p.client.Subscribe(ctx)
	defer sub.Close()
	if err := sub.Subscribe(ctx, p.key); err != nil {
		return err
	}
	_, err := sub.ReceiveTimeout(ctx, callTimeout)
	return err
}
