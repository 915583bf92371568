package peersocket

import (
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"tokenbroker/broker"
)

const (
	// burst is for how many seconds' worth of requests a server may ask at once.
	burst = 4
	// atOnce is how many requests of a server are answered at the same time. An
	// open Watch is one of them, and at most a quarter of them are (broker.Watch).
	atOnce = 128

	// What a server makes the broker do is counted in bytes. A request is a few
	// hundred of them; what costs more than its bytes is counted for more.
	bytesPerRequest = 1 << 10
	connectionCosts = 1 << 9  // to ask the kernel who it is, and a goroutine
	refusalCosts    = 2 << 10 // an answer, and its line in the audit
	// atATime is how much of one connection is read before it is another's turn.
	atATime = 1 << 10
	// share is what part of a second's bytes is read at once. Requests that may all
	// be asked at once are so spread over some time: answered in one go, they would
	// be what a neighbour's request waits behind.
	share = 8
)

// A meter bounds what the callers of one server make the broker do, over all of
// their connections. Requests that are too many are refused with a sentence. The
// bytes they come in, and whatever else comes in, are not refused but read no
// faster than that: the caller waits in the kernel, and costs nothing. So it makes
// no difference of what a flood is made: requests, resets, pings, settings, headers
// or connections.
//
// A nil meter bounds nothing.
type meter struct {
	perSecond int
	requests  *rate.Limiter
	bytes     *rate.Limiter
	busy      atomic.Int64
	end       func() // counts a request out
}

func newMeter(perSecond int) *meter {
	bytes := perSecond * bytesPerRequest
	m := &meter{
		perSecond: perSecond,
		requests:  rate.NewLimiter(rate.Limit(perSecond), burst*perSecond),
		bytes:     rate.NewLimiter(rate.Limit(bytes), max(bytes/share, atATime)),
	}
	m.end = func() { m.busy.Add(-1) }
	return m
}

// begin counts a request in, or says which limit it would exceed.
func (m *meter) begin() (end func(), err error) {
	if m == nil {
		return func() {}, nil
	}
	if !m.requests.Allow() {
		m.spend(refusalCosts)
		return nil, broker.Errorf(broker.Limited, "this server asks the token broker more than %d times a second", m.perSecond).
			Hint("slow down; a token can be used again until it expires")
	}
	if m.busy.Add(1) > atOnce {
		m.end()
		m.spend(refusalCosts)
		return nil, broker.Errorf(broker.Limited, "%d requests of this server are being answered already", atOnce)
	}
	return m.end, nil
}

// read counts bytes that were read, and returns how long they must wait.
func (m *meter) read(n int) time.Duration {
	if m == nil || n <= 0 {
		return 0
	}
	return m.bytes.ReserveN(time.Now(), n).Delay()
}

// spend counts what costs more than its bytes. The debt is bounded, so that
// whoever stops is soon served again.
func (m *meter) spend(n int) {
	if m == nil {
		return
	}
	if now := time.Now(); m.bytes.TokensAt(now) > -float64(m.bytes.Burst()) {
		m.bytes.ReserveN(now, min(n, m.bytes.Burst()))
	}
}

// debt is how long to take no connection.
func (m *meter) debt() time.Duration {
	if m == nil {
		return 0
	}
	return m.bytes.ReserveN(time.Now(), 0).Delay()
}
