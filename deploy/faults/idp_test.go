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

// guests are those that the role guest gives; researcher gives all.
var guests = scopes[:5]

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
	alive   map[string]bool     // refresh tokens, those of logins too, that are neither used nor revoked
	gives   func(access string) // called with each access token of a refresh, before the answer leaves
}

// startIDP starts a provider of a kind, with 64 users or more.
func startIDP(t *testing.T, kind string) *idp {
	t.Helper()
	p := &idp{uses: map[string]int{}, alive: map[string]bool{}, secret: "secret of the test", profile: "keycloak"}
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
	if kind == grace || kind == soaking {
		cfg.Grace = 30 * time.Second
	}
	if kind == soaking {
		cfg.AccessTTL = 20 * time.Second
	}
	for i := range 2100 {
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
	form := formOf(r)
	refresh := form.Get("refresh_token")
	switch {
	case r.URL.Path == "/login" && r.Method == http.MethodGet && p.Server != nil:
		return // the page lists all users, and nobody reads it
	case form.Get("grant_type") == "authorization_code":
		answer := httptest.NewRecorder()
		p.provider.ServeHTTP(answer, r)
		p.live(answer.Body.Bytes())
		pass(w, answer)
		return
	case form.Get("grant_type") != "refresh_token":
		p.dead(form.Get("token")) // of a revocation
		p.provider.ServeHTTP(w, r)
		return
	}
	p.dead(refresh)
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
	pass(w, answer)
}

// pass sends an answer on.
func pass(w http.ResponseWriter, answer *httptest.ResponseRecorder) {
	for name, v := range answer.Header() {
		w.Header()[name] = v
	}
	w.WriteHeader(answer.Code)
	w.Write(answer.Body.Bytes())
}

// formOf is the form of a request to the token endpoint or the one that revokes.
func formOf(r *http.Request) url.Values {
	if name := path.Base(r.URL.Path); name != "token" && name != "revoke" {
		return nil
	}
	body, _ := io.ReadAll(r.Body)
	r.Body = io.NopCloser(bytes.NewReader(body))
	form, _ := url.ParseQuery(string(body))
	return form
}

// SetRoles replaces a user's roles, between two answers.
func (p *idp) SetRoles(user string, roles ...string) {
	p.roles.Lock()
	defer p.roles.Unlock()
	if err := p.Server.SetRoles(user, roles...); err != nil {
		panic(err)
	}
}

// note keeps what was given in the answer to a refresh.
func (p *idp) note(body []byte) {
	refresh, access := p.live(body)
	if refresh == "" {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gave = append(p.gave, refresh)
	if p.gives != nil {
		p.gives(access)
	}
}

// live takes note that the refresh token in an answer works from now on.
func (p *idp) live(body []byte) (refresh, access string) {
	var a struct {
		Refresh string `json:"refresh_token"`
		Access  string `json:"access_token"`
	}
	if json.Unmarshal(body, &a) != nil || a.Refresh == "" {
		return "", ""
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.alive[a.Refresh] = true
	return a.Refresh, a.Access
}

func (p *idp) dead(token string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.alive, token)
}

// lives is how many refresh tokens work at the provider, of those it gave since count.
func (p *idp) lives() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.alive)
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
	p.uses, p.gave, p.alive = map[string]int{}, nil, map[string]bool{}
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
