//go:build !release

package devidp

import (
	"io"
	"maps"
	"net/http"
	"sync"
	"time"
)

// faults counts requests and spoils token requests on demand.
type faults struct {
	mu       sync.Mutex // guards what follows
	seen     map[string]int
	delay    time.Duration
	gate     chan struct{} // closed: go on; nil: no gate
	arrived  chan struct{}
	failures int
	status   int
	body     string
	lose     bool
}

// count notes what kind of request r is. It reads the form of a token request;
// the handlers after it find it parsed.
func (f *faults) count(r *http.Request) string {
	kind := Other
	switch r.URL.Path {
	case "/.well-known/openid-configuration":
		kind = Discovery
	case "/keys":
		kind = Keys
	case "/authorize":
		kind = Authorize
	case "/login":
		kind = LoginPage
	case "/userinfo":
		kind = Userinfo
	case "/revoke":
		kind = Revoke
	case "/oauth/introspect":
		kind = Introspect
	case "/end_session":
		kind = EndSession
	case "/oauth/token":
		switch r.PostFormValue("grant_type") {
		case "authorization_code":
			kind = Code
		case "refresh_token":
			kind = Refresh
		case "urn:ietf:params:oauth:grant-type:token-exchange":
			kind = Exchange
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.seen == nil {
		f.seen = map[string]int{}
	}
	f.seen[kind]++
	return kind
}

func (f *faults) counts() map[string]int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.seen)
}

func (f *faults) setDelay(d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.delay = d
}

// maxHeld is more token requests than any test holds at once.
const maxHeld = 1024

func (f *faults) hold() (<-chan struct{}, func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	gate, arrived := make(chan struct{}), make(chan struct{}, maxHeld)
	f.gate, f.arrived = gate, arrived
	return arrived, sync.OnceFunc(func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		close(gate)
		if f.gate == gate {
			f.gate = nil
		}
	})
}

func (f *faults) fail(n, status int, body string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.failures, f.status, f.body = n, status, body
}

func (f *faults) loseNext() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lose = true
}

// next takes the faults of one request.
func (f *faults) next() (delay time.Duration, gate, arrived chan struct{}, fail, lose bool, status int, body string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delay, gate, arrived = f.delay, f.gate, f.arrived
	if f.failures > 0 {
		f.failures--
		return delay, gate, arrived, true, false, f.status, f.body
	}
	lose, f.lose = f.lose, false
	return delay, gate, arrived, false, lose, 0, ""
}

// serve passes a token request on, or not.
func (f *faults) serve(w http.ResponseWriter, r *http.Request, next http.Handler) {
	delay, gate, arrived, fail, lose, status, body := f.next()
	if !wait(r, delay, gate, arrived) {
		return // the client has gone
	}
	switch {
	case fail:
		w.WriteHeader(status)
		io.WriteString(w, body)
	case lose:
		next.ServeHTTP(nowhere{}, r)
		panic(http.ErrAbortHandler) // net/http cuts the connection
	default:
		next.ServeHTTP(w, r)
	}
}

func wait(r *http.Request, delay time.Duration, gate, arrived chan struct{}) bool {
	if gate != nil {
		arrived <- struct{}{}
		select {
		case <-gate:
		case <-r.Context().Done():
			return false
		}
	}
	if delay == 0 {
		return true
	}
	t := time.NewTimer(delay)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-r.Context().Done():
		return false
	}
}

// nowhere is a ResponseWriter of an answer that gets lost.
type nowhere struct{}

func (nowhere) Header() http.Header         { return http.Header{} }
func (nowhere) Write(b []byte) (int, error) { return len(b), nil }
func (nowhere) WriteHeader(int)             {}
