//go:build failpoints && linux

package faults_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"tokenbroker/broker"
	"tokenbroker/broker/devidp"
)

// Kinds of providers, by what they do when a refresh token is used again.
const (
	keeping = "no rotation"
	grace   = "rotation with a grace of 30 s"
	strict  = "strict single use"
)

// scopes are ten that give rights. Each subset of them is another token, so a
// grant can be refreshed a thousand times without waiting for a token to end.
var scopes = []string{"s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7", "s8", "s9"}

// subset is the nth set of scopes.
func subset(n int) (list []string) {
	for i, s := range scopes {
		if (n%1023+1)>>i&1 == 1 {
			list = append(list, s)
		}
	}
	return list
}

// An idp is a devidp that is slow, and tells the test when a refresh request has
// come and when the refresh token is spent. Like a real server it doesn't notice
// that a client hangs up: what it has begun happens.
type idp struct {
	*devidp.Server
	url string

	mu      sync.Mutex // guards all below
	latency time.Duration
	arrived func() bool    // called before anything happens; true: nothing will
	spent   func()         // called before the answer leaves
	uses    map[string]int // refresh token → how often it was sent
	gave    []string       // refresh tokens, in order
}

func startIDP(t *testing.T, kind string) *idp {
	t.Helper()
	p := &idp{uses: map[string]int{}}
	front := httptest.NewUnstartedServer(p)
	p.url = "http://" + front.Listener.Addr().String()
	cfg := devidp.Config{
		Issuer: p.url, ClientSecret: broker.NewSecret("secret of the test"), Scopes: scopes, Audiences: map[string][]string{},
		AccessTTL: time.Hour, KeepRefresh: kind == keeping,
	}
	if kind == grace {
		cfg.Grace = 30 * time.Second
	}
	for i := range 64 {
		cfg.Users = append(cfg.Users, devidp.User{Name: fmt.Sprintf("user%d", i), Roles: []string{"researcher"}})
	}
	var err error
	if p.Server, err = devidp.New(cfg); err != nil {
		t.Fatal(err)
	}
	front.Start()
	t.Cleanup(front.Close)
	return p
}

func (p *idp) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != "/oauth/token" || r.PostFormValue("grant_type") != "refresh_token" {
		p.Server.ServeHTTP(w, r)
		return
	}
	p.mu.Lock()
	p.uses[r.PostFormValue("refresh_token")]++
	latency, arrived, spent := p.latency, p.arrived, p.spent
	p.mu.Unlock()
	if arrived != nil && arrived() {
		panic(http.ErrAbortHandler)
	}
	time.Sleep(latency / 2)
	answer := httptest.NewRecorder()
	p.Server.ServeHTTP(answer, r.WithContext(context.WithoutCancel(r.Context())))
	p.note(answer.Body.Bytes())
	if spent != nil {
		spent()
	}
	time.Sleep(latency - latency/2)
	for name, v := range answer.Header() {
		w.Header()[name] = v
	}
	w.WriteHeader(answer.Code)
	w.Write(answer.Body.Bytes())
}

// note keeps the refresh token of an answer.
func (p *idp) note(body []byte) {
	var a struct {
		Refresh string `json:"refresh_token"`
	}
	if json.Unmarshal(body, &a) != nil || a.Refresh == "" {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gave = append(p.gave, a.Refresh)
}

func (p *idp) setLatency(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.latency = d
}

// when sets what happens at the two moments; nil: nothing.
func (p *idp) when(arrived func() bool, spent func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.arrived, p.spent = arrived, spent
}

// count forgets the requests so far, and returns how many there were and the
// most with one refresh token.
func (p *idp) count() (all, most int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, n := range p.uses {
		all, most = all+n, max(most, n)
	}
	p.uses, p.gave = map[string]int{}, nil
	return all, most
}

// peek is count that forgets nothing.
func (p *idp) peek() (all int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, n := range p.uses {
		all += n
	}
	return all
}

// used says how often the nth refresh token was sent that was given since count.
func (p *idp) used(n int) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n >= len(p.gave) {
		return 0
	}
	return p.uses[p.gave[n]]
}
