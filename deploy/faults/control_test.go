//go:build failpoints && linux

package faults_test

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"

	"tokenbroker/broker"
)

// common is the control of the experiment: not ours, but how refresh tokens are
// commonly refreshed by several processes on one Redis. A lock with SET NX and a
// short TTL, a second look under it, the refresh on the request's own context, a
// blind SET, and a session that is deleted when the provider says invalid_grant.
// It is here so that this harness is seen to find loss where there is loss.
type common struct {
	redis *redis.Client
	p     broker.Provider
}

// lockFor is the TTL of the lock; 2 s is what a widely used proxy has.
const lockFor = 2 * time.Second

func newCommon(c setup, p broker.Provider) *common {
	return &common{redis.NewClient(&redis.Options{Network: "unix", Addr: c.Redis}), p}
}

func (s *common) login(ctx context.Context, c Call) (handle string, err error) {
	_, iss, err := s.p.Login(ctx, broker.CodeGrant{
		Code: broker.NewSecret(c.Code), Verifier: broker.NewSecret(c.Verifier), RedirectURI: redirect,
	})
	if err != nil {
		return "", err
	}
	return "", s.redis.Set(ctx, "session:"+c.User, iss.RefreshToken.Reveal(), 0).Err()
}

func (s *common) token(ctx context.Context, c Call) (print string, err error) {
	return "", s.get(ctx, c)
}

func (s *common) get(ctx context.Context, c Call) error {
	token, lock := "token:"+c.User+":"+strings.Join(c.Scopes, " "), "lock:"+c.User
	for {
		if s.redis.Exists(ctx, token).Val() == 1 {
			return nil
		}
		if s.redis.SetNX(ctx, lock, "1", lockFor).Val() {
			break
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	defer s.redis.Del(context.WithoutCancel(ctx), lock)
	if s.redis.Exists(ctx, token).Val() == 1 {
		return nil
	}
	refresh, err := s.redis.Get(ctx, "session:"+c.User).Result()
	if errors.Is(err, redis.Nil) {
		return broker.Errorf(broker.LoginRequired, "there is no session")
	} else if err != nil {
		return err
	}
	_, iss, err := s.p.Refresh(ctx, broker.NewSecret(refresh), "", c.Scopes)
	var pe *broker.ProviderError
	if errors.As(err, &pe) && pe.Class == broker.Dead {
		s.redis.Del(ctx, "session:"+c.User)
		return broker.Errorf(broker.LoginRequired, "the session has ended (%s)", pe.Reason)
	} else if err != nil {
		return err
	}
	if !iss.RefreshToken.IsZero() {
		s.redis.Set(ctx, "session:"+c.User, iss.RefreshToken.Reveal(), 0)
	}
	return s.redis.Set(ctx, token, iss.AccessToken.Reveal(), time.Hour).Err()
}
