//go:build failpoints && linux

package faults_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path"
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

// An idp is a provider, and what stands before it: that is slow, counts, and tells
// the test when a refresh request has come and when the refresh token is spent.
// Like a real server it doesn't notice that a client hangs up: what it has begun
// happens.
type idp struct {
	*devidp.Server              // nil before a stranger
	provider       http.Handler // who is asked
	url            string       // the issuer
	secret         string       // of the hub's client
	profile        string
	// code logs a user in, and returns what the hub then gets.
	code func(user string, scopes ...string) (code, verifier string, err error)

	roles sync.RWMutex // one answer shows one state of the roles

	mu      sync.Mutex // guards all below
	latency time.Duration
	arrived func() bool         // called before anything happens; true: nothing will
	spent   func()              // called before the answer leaves
	uses    map[string]int      // refresh token → how often it was sent
	gave    []string            // refresh tokens, in order
	gives   func(access string) // called with each access token of a refresh, before the answer leaves
}

// startIDP starts a provider of a kind, with 64 users or more.
func startIDP(t *testing.T, kind string) *idp {
	t.Helper()
	p := &idp{uses: map[string]int{}, secret: "secret of the test", profile: "keycloak"}
	front := httptest.NewUnstartedServer(p)
	p.url = "http://" + front.Listener.Addr().String()
	switch kind {
	case realKeycloak:
		p.askKeycloak(t)
	case strictNPM:
		p.askStrictNPM(t)
	default:
		p.askDev(t, kind)
	}
	front.Start()
	t.Cleanup(front.Close)
	return p
}

// askDev puts p before a devidp.
func (p *idp) askDev(t *testing.T, kind string) {
	t.Helper()
	cfg := devidp.Config{
		Issuer: p.url, ClientSecret: broker.NewSecret(p.secret), Scopes: scopes, Audiences: map[string][]string{},
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
	p.provider = p.Server
	p.code = func(user string, scopes ...string) (code, verifier string, err error) {
		return devidp.CodeFor(context.Background(), p.url, client, redirect, user, scopes...)
	}
}

func (p *idp) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	refresh := refreshToken(r)
	if refresh == "" {
		p.provider.ServeHTTP(w, r)
		return
	}
	p.mu.Lock()
	p.uses[refresh]++
	latency, arrived, spent := p.latency, p.arrived, p.spent
	p.mu.Unlock()
	if arrived != nil && arrived() {
		panic(http.ErrAbortHandler)
	}
	time.Sleep(latency / 2)
	answer := httptest.NewRecorder()
	p.roles.RLock()
	p.provider.ServeHTTP(answer, r.WithContext(context.WithoutCancel(r.Context())))
	p.roles.RUnlock()
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

// refreshToken is what a request spends; empty: it is no refresh.
func refreshToken(r *http.Request) string {
	if path.Base(r.URL.Path) != "token" {
		return ""
	}
	body, _ := io.ReadAll(r.Body)
	r.Body = io.NopCloser(bytes.NewReader(body))
	form, _ := url.ParseQuery(string(body))
	if form.Get("grant_type") != "refresh_token" {
		return ""
	}
	return form.Get("refresh_token")
}

// SetRoles replaces a user's roles, between two answers.
func (p *idp) SetRoles(user string, roles ...string) {
	p.roles.Lock()
	defer p.roles.Unlock()
	if err := p.Server.SetRoles(user, roles...); err != nil {
		panic(err)
	}
}

// note keeps what was given in an answer.
func (p *idp) note(body []byte) {
	var a struct {
		Refresh string `json:"refresh_token"`
		Access  string `json:"access_token"`
	}
	if json.Unmarshal(body, &a) != nil || a.Refresh == "" {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gave = append(p.gave, a.Refresh)
	if p.gives != nil {
		p.gives(a.Access)
	}
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

// rotations is how many refresh tokens were given since count.
func (p *idp) rotations() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.gave)
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
