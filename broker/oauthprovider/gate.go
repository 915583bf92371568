package oauthprovider

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sony/gobreaker/v2"
	"golang.org/x/time/rate"

	"tokenbroker/broker"
)

// A gate stands before a provider. It keeps to the rate, and while the provider
// as a whole is in trouble it lets nothing through, so that callers hear so at
// once and no refresh token is risked. What it turns away was not sent: nothing
// is spent.
//
// There is one line for all requests, first come, first served. What the broker
// does by itself, looks and keeping sessions alive, is a few requests at a time
// (broker/recheck.go, keepalive.go), so a user never stands behind many of them.
//
// A login passes even then, and waits as long as its caller does: its code works
// once and for a minute, and a person has just come with it from the provider.
// To turn it away would end it as surely as a failure. What follows an answer
// (keys, userinfo) is counted and never held up: it must not be lost now.
type gate struct {
	log     *slog.Logger
	line    chan struct{} // holds one item while somebody is at the head of the line
	inLine  atomic.Int32
	longest int32         // the line that waitAtMost is enough for
	pace    *rate.Limiter // asked by the head only, so that it knows of all that went before
	breaker *gobreaker.TwoStepCircuitBreaker[struct{}]
	rest    time.Duration               // how long the breaker stays open
	reach   func(context.Context) error // whether the provider is there; spends nothing

	mu     sync.Mutex      // guards what follows; taken within the breaker's own
	failed map[string]bool // whose requests failed since one went well, up to failUsers
	since  time.Time       // when the first of them did; zero: none has
	opened time.Time       // when the breaker did
	until  time.Time       // when the provider wants to be asked again; see hold
}

const (
	// DefaultRate is enough for 2,000 users with running servers on one host: 67
	// looks a second, and two requests for each access token of five minutes.
	DefaultRate = 100
	// waitAtMost is how long a request stands in line. The lease on a grant holds
	// for that and the provider's own time together (broker/refresh.go).
	waitAtMost = 5 * time.Second

	// failUsers users with failTimes failures in a row are the provider's
	// trouble; one user's, whose session it chokes on, are not.
	failTimes = 5
	failUsers = 3
	// restFor is how long a provider in trouble is left alone, and up to as much
	// again: brokers don't come back in step.
	restFor = 3 * time.Second
	// longEnough is how long a request must have been out for its having no answer
	// to say something of the provider. Callers break off much earlier, some.
	longEnough = 8 * time.Second
	// probeWithin bounds the question whether a provider is back.
	probeWithin = 5 * time.Second
	// maxHold is how long a Retry-After is kept to for everybody.
	maxHold = time.Minute
)

// What a request has shown of the provider as a whole, besides nil: it works.
var (
	errFailed  = errors.New("the provider is in trouble")
	errUnclear = errors.New("this says nothing of the provider")
)

// newGate lets perSecond requests through in any second.
func newGate(perSecond int, log *slog.Logger, reach func(context.Context) error) *gate {
	// A limiter lets its burst through, and in the second after that the rest.
	burst := max(1, perSecond/10)
	g := &gate{
		log: log, reach: reach, rest: restFor + rand.N(restFor), failed: make(map[string]bool),
		line: make(chan struct{}, 1), longest: int32(perSecond * int(waitAtMost/time.Second)),
		pace: rate.NewLimiter(rate.Limit(perSecond-burst+1), burst),
	}
	g.breaker = gobreaker.NewTwoStepCircuitBreaker[struct{}](gobreaker.Settings{
		Timeout:       g.rest,
		ReadyToTrip:   func(c gobreaker.Counts) bool { return c.ConsecutiveFailures >= failTimes && g.concernsAll() },
		IsExcluded:    func(err error) bool { return err == errUnclear },
		OnStateChange: func(_ string, _, to gobreaker.State) { g.changed(to) },
	})
	return g
}

// pass has send make one request, in its turn. who is whose it is; empty: nobody's.
func (g *gate) pass(ctx context.Context, o op, who string, send func() error) error {
	if err := g.wait(ctx, o); err != nil {
		return err
	}
	done, err := g.admit(ctx, o)
	if err != nil {
		return err
	}
	// When the breaker is half open this may be the one request that finds out.
	// If it hangs, that may be its user's trouble only: another may try then.
	hanging := time.AfterFunc(longEnough, func() { done(errUnclear) })
	defer hanging.Stop()
	began := time.Now()
	err = send()
	v := verdict(err, time.Since(began))
	g.note(who, v, err)
	done(v)
	return err
}

// wait returns when it is the request's turn.
func (g *gate) wait(ctx context.Context, o op) error {
	defer g.inLine.Add(-1)
	before := g.inLine.Add(1) - 1
	turn := ctx
	if o&opCode == 0 {
		if err := g.shut(); err != nil {
			return err
		}
		if before > g.longest {
			return tooMany()
		}
		var cancel context.CancelFunc
		turn, cancel = context.WithTimeout(ctx, waitAtMost)
		defer cancel()
	}
	err := g.head(turn)
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return unreached(o, false, ctx.Err())
	}
	return tooMany()
}

// head waits until it is at the head of the line, and then for the pace.
func (g *gate) head(ctx context.Context) error {
	select {
	case g.line <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-g.line }()
	return g.pace.Wait(ctx)
}

// tooMany is the error of a request for which the line is too long.
func tooMany() error {
	return &broker.ProviderError{Class: broker.TryLater, Reason: "rate_limited", RetryAfter: waitAtMost + rand.N(waitAtMost)}
}

// admit asks the breaker. done tells it what came of the request.
func (g *gate) admit(ctx context.Context, o op) (done func(error), err error) {
	if o&opCode == 0 {
		if err := g.shut(); err != nil { // while the request stood in line
			return nil, err
		}
	}
	done, err = g.breaker.Allow()
	switch {
	case err != nil && o&opCode != 0:
		return func(error) {}, nil
	case err != nil:
		return nil, g.refusal(time.Second)
	case o&opRefresh == 0 || g.breaker.State() != gobreaker.StateHalfOpen:
		return done, nil
	}
	// No refresh token finds out whether the provider is back.
	g.count()
	probe, cancel := context.WithTimeout(ctx, probeWithin)
	defer cancel()
	if err := g.reach(probe); err == nil {
		return done, nil
	}
	if ctx.Err() != nil {
		done(errUnclear)
		return nil, unreached(o, false, ctx.Err())
	}
	done(errFailed)
	return nil, g.refusal(g.rest)
}

// count is for a request that does not wait for its turn: the line does instead.
func (g *gate) count() { g.pace.Reserve() }

// shut returns the error of a request that is not sent; nil: it may be.
func (g *gate) shut() error {
	open := g.breaker.State() == gobreaker.StateOpen
	g.mu.Lock()
	until := g.until
	if again := g.opened.Add(g.rest); open && again.After(until) {
		until = again
	}
	g.mu.Unlock()
	if d := time.Until(until); open || d > 0 {
		return g.refusal(d)
	}
	return nil
}

// said is what there is to say of a provider that was reached, or not.
func (g *gate) said(err error) error {
	if err == nil {
		err = g.shut()
	}
	if err == nil && g.breaker.State() == gobreaker.StateHalfOpen {
		err = g.refusal(0)
	}
	var e *broker.ProviderError
	if errors.As(err, &e) {
		g.mu.Lock()
		defer g.mu.Unlock()
		e.Since = g.since
	}
	return err
}

// refusal is the error of a request that is not sent.
func (g *gate) refusal(after time.Duration) *broker.ProviderError {
	g.mu.Lock()
	defer g.mu.Unlock()
	after = max(after, time.Second)
	return &broker.ProviderError{
		Class: broker.TryLater, Reason: "circuit_open", RetryAfter: after, Since: g.since,
		Err: fmt.Errorf("nothing is sent to it for another %v", after.Round(time.Second)),
	}
}

// verdict is what a request that took so long has shown of the provider as a
// whole. An answer about one grant shows that it works; that our own caller went
// away shows nothing, and neither does an answer that may be a gateway's.
func verdict(err error, took time.Duration) error {
	var e *broker.ProviderError
	switch {
	case err == nil:
		return nil
	case !errors.As(err, &e), errors.Is(e.Err, context.Canceled):
		return errUnclear
	case errors.Is(e.Err, context.DeadlineExceeded) && took < longEnough:
		return errUnclear
	case e.Class == broker.Lost, e.Class == broker.TryLater && theirs(e):
		return errFailed
	case e.Code != "", e.Class == broker.Dead, e.Class == broker.Disabled, e.Class == broker.UserAction, e.Class == broker.Refused:
		return nil
	}
	return errUnclear
}

// theirs reports whether a passing trouble is the provider's.
func theirs(e *broker.ProviderError) bool {
	return e.Status == 0 || e.Status >= 500 || busy(e.Status) || e.Reason == "busy" || e.Reason == "provider_error"
}

// note remembers a verdict and puts into err since when it is so.
func (g *gate) note(who string, v, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch v {
	case nil:
		clear(g.failed)
		g.since = time.Time{}
	case errFailed:
		var e *broker.ProviderError
		errors.As(err, &e)
		if g.since.IsZero() {
			g.since = time.Now()
		}
		if who == "" || e.Reason == "unreachable" { // nobody got so far as to say who
			who = fmt.Sprint(len(g.failed))
		}
		if len(g.failed) < failUsers {
			g.failed[who] = true
		}
		e.Since = g.since
		g.hold(e)
	}
}

// hold keeps everybody away for as long as the provider wants. That it speaks to
// the client as a whole is so of all requests that come here: they are made in
// the client's name. The userinfo endpoint, which is asked in a user's, is not.
func (g *gate) hold(e *broker.ProviderError) {
	if e.RetryAfter <= 0 || e.Status != http.StatusTooManyRequests && e.Status < 500 {
		return
	}
	d := min(e.RetryAfter, maxHold)
	if until := time.Now().Add(d + rand.N(d/4+time.Second)); until.After(g.until) {
		g.until = until
	}
}

// concernsAll reports whether more than one or two users' requests have failed.
func (g *gate) concernsAll() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.failed) >= failUsers
}

// changed is told what the breaker has become.
func (g *gate) changed(to gobreaker.State) {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch to {
	case gobreaker.StateOpen:
		g.opened = time.Now()
		g.log.Warn("the provider is in trouble and not asked for a while; nothing is spent", "since", g.since, "again_in", g.rest)
	case gobreaker.StateClosed:
		g.log.Info("the provider answers again")
	}
}

// counted is the transport of what follows an answer.
type counted struct {
	gate *gate
	next http.RoundTripper
}

func (c counted) RoundTrip(req *http.Request) (*http.Response, error) {
	c.gate.count()
	return c.next.RoundTrip(req)
}
