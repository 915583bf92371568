package broker_test

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
	"tokenbroker/broker/seal"
)

// A rig is a broker on parts in memory, and what they were told.
type rig struct {
	t        testing.TB
	store    *brokertest.MemStore
	provider *brokertest.Provider
	attestor *brokertest.Attestor
	sockets  *brokertest.Sockets
	audit    *audit
	log      *brokertest.Buffer
	cfg      broker.Config
	name     broker.ServerName // of the servers that run here; each user's is one on one host
	*broker.Broker
}

// inBubble runs f with a started rig in a synctest bubble, so that time passes
// only while all wait.
func inBubble(t *testing.T, f func(r *rig), edit ...func(*broker.Config)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, edit...)
		r.start()
		defer func() { r.Close() }() // of the broker that r holds by then
		f(r)
		r.nothingLeaked()
	})
}

func newRig(t testing.TB, edit ...func(*broker.Config)) *rig {
	t.Helper()
	keys, err := seal.New()
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{
		t: t, store: brokertest.NewMemStore(), provider: brokertest.NewProvider("keycloak"),
		attestor: brokertest.NewAttestor(), sockets: brokertest.NewSockets(), audit: &audit{}, log: &brokertest.Buffer{},
	}
	r.cfg = broker.Config{
		Deployment: "lab", Host: "host1", Contact: "it@lab.example",
		Hubs:      map[broker.HubID]broker.Hub{"main": {Login: "keycloak"}, "other": {Login: "keycloak"}},
		Providers: []broker.Provider{r.provider},
		Rules: []broker.Rule{
			{Provider: "keycloak", Roles: []string{"researcher"}, Audiences: []string{"storage"}, Scopes: []string{"read", "write"}},
		},
		Store: r.store, Keys: keys, Attestor: r.attestor, Sockets: r.sockets,
		Audit: r.audit, Log: slog.New(slog.NewTextHandler(r.log, nil)), Helper: "/opt/access-token",
		Journal: filepath.Join(t.TempDir(), "journal"),
	}
	for _, e := range edit {
		e(&r.cfg)
	}
	r.provider.SetRoles("alice", "researcher")
	return r
}

func (r *rig) start() {
	r.t.Helper()
	b, err := broker.New(r.cfg)
	if err != nil {
		r.t.Fatalf("New: %v", err)
	}
	if err := b.Start(context.Background()); err != nil {
		r.t.Fatalf("Start: %v", err)
	}
	synctest.Wait()
	r.Broker = b
}

// second is another broker of the deployment, on another host.
func (r *rig) second() *rig {
	r.t.Helper()
	s := *r
	s.attestor, s.sockets, s.audit = brokertest.NewAttestor(), brokertest.NewSockets(), &audit{}
	s.cfg.Host, s.cfg.Attestor, s.cfg.Sockets, s.cfg.Audit = "host2", s.attestor, s.sockets, s.audit
	s.cfg.Journal = filepath.Join(r.t.TempDir(), "journal2")
	s.name = "far"
	s.start()
	return &s
}

// away is another broker of the deployment that is configured for none of our hubs.
func (r *rig) away() *rig {
	r.t.Helper()
	s := *r
	s.cfg.Hubs = map[broker.HubID]broker.Hub{"away": {Login: "keycloak", API: (&fakeHub{}).api()}}
	return s.second()
}

func (r *rig) login(sub string) broker.Secret {
	r.t.Helper()
	t, err := r.Login(context.Background(), "main", "keycloak", codeOf(sub))
	if err != nil {
		r.t.Fatalf("Login: %v", err)
	}
	return t.Handle
}

func codeOf(sub string) broker.CodeGrant {
	return broker.CodeGrant{Code: broker.NewSecret(sub), Verifier: broker.NewSecret("verifier"), RedirectURI: "https://hub/cb"}
}

// loggedIn logs user in with a subject of his own name and claims it.
func (r *rig) loggedIn(user broker.UserID) broker.Secret {
	r.t.Helper()
	handle := r.login(string(user))
	if _, err := r.Claim(context.Background(), "main", "keycloak", handle, user); err != nil {
		r.t.Fatalf("Claim: %v", err)
	}
	return handle
}

// running registers user's server, starts its container and returns a
// process in it.
func (r *rig) running(user broker.UserID, pid int32) *broker.Peer {
	r.t.Helper()
	_, err := r.Register(context.Background(), "main", broker.RegisterRequest{User: user, Server: r.name, ContainerName: "jupyter-" + string(user)})
	if err != nil {
		r.t.Fatalf("Register: %v", err)
	}
	r.attestor.Run("jupyter-"+string(user), pid)
	synctest.Wait()
	return r.peer(user, pid)
}

func (r *rig) peer(user broker.UserID, pid int32) *broker.Peer {
	return &broker.Peer{Server: broker.ServerKey{Hub: "main", User: user, Server: r.name}, PID: pid}
}

func (r *rig) token(p *broker.Peer, want broker.Want) broker.Token {
	r.t.Helper()
	t, err := r.Token(context.Background(), p, want)
	if err != nil {
		r.t.Fatalf("Token: %v", err)
	}
	return t
}

// refused fails unless a request of p is refused with want, and returns what was said.
func (r *rig) refused(p *broker.Peer, w broker.Want, want *broker.Error) *broker.Error {
	r.t.Helper()
	_, err := r.Token(context.Background(), p, w)
	return refused(r.t, err, want)
}

func refused(t testing.TB, err error, want *broker.Error) *broker.Error {
	t.Helper()
	var said *broker.Error
	if !errors.Is(err, want) || !errors.As(err, &said) {
		t.Fatalf("got %v, want %s", err, want.Code)
	}
	if said.Sentence == "" || said.Next == "" || said.Ref == "" || strings.Contains(said.Next, "{contact}") {
		t.Errorf("%s: sentence, next step and ref must be there: %+v", want.Code, said)
	}
	return said
}

func (r *rig) grant(user broker.UserID) broker.Grant {
	r.t.Helper()
	all, err := r.Grants(context.Background(), "main", user)
	if err != nil || len(all) != 1 {
		r.t.Fatalf("Grants of %s: %v, %v", user, all, err)
	}
	return all[0]
}

// nothingLeaked looks for the provider's tokens where they must not be.
func (r *rig) nothingLeaked() {
	r.t.Helper()
	places := map[string]string{"audit": r.audit.String(), "log": r.log.String()}
	r.store.Each(func(k broker.Key, rec broker.Record) { places["record "+k.String()] = k.String() + string(rec.Box) })
	for place, text := range places {
		for _, word := range []string{"refresh-", "access-", "tbh_"} {
			if strings.Contains(text, word) && !strings.Contains(place, "log") || strings.Contains(text, word+"alice-") {
				r.t.Errorf("%s holds a secret beginning with %q", place, word)
			}
		}
	}
}

// audit is a writer that can fail.
type audit struct {
	brokertest.Buffer
	slow func()

	mu   sync.Mutex // guards what follows: brokers also write by themselves
	err  error
	room int
}

// fail has each write fail after so many bytes; nil ends that.
func (a *audit) fail(err error, room int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.err, a.room = err, room
}

func (a *audit) Write(p []byte) (int, error) {
	if a.slow != nil {
		a.slow()
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.err != nil {
		n, _ := a.Buffer.Write(p[:a.room])
		return n, a.err
	}
	return a.Buffer.Write(p)
}

// entries are the lines of one action.
func (a *audit) entries(t testing.TB, action string) (all []broker.Entry) {
	t.Helper()
	for line := range strings.Lines(a.String()) {
		var e broker.Entry
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("audit line %q: %v", line, err)
		}
		if e.Action == action {
			all = append(all, e)
		}
	}
	return all
}

func lasts(t testing.TB, tok broker.Token, want time.Duration) {
	t.Helper()
	if tok.ExpiresIn <= 0 || tok.ExpiresIn > want {
		t.Errorf("token lasts %s, want at most %s", tok.ExpiresIn, want)
	}
}
