package rolewatch_test

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
	"tokenbroker/broker/rolewatch"
)

// A realm is a Keycloak realm as far as its events go. Its clock is ahead of ours
// by as much as it says.
type realm struct {
	mu       sync.Mutex // guards all below
	ahead    time.Duration
	life     time.Duration // of tokens
	admin    []stored
	user     []stored
	good     map[string]bool // tokens
	issued   int
	asked    []string                                 // "GET path" or "POST token"
	types    []string                                 // of the last request for user events
	trouble  func(path string) (status int, b string) // in place of an answer; 0: none
	settings string
}

// stored is an event as it is kept: when, and as it is answered.
type stored struct {
	at   int64
	body string
}

func newRealm() *realm {
	return &realm{
		life: time.Minute, good: make(map[string]bool),
		settings: `{"eventsEnabled":true,"enabledEventTypes":["LOGIN","LOGOUT","REVOKE_GRANT"],"adminEventsEnabled":true,"adminEventsDetailsEnabled":true}`,
	}
}

// RoundTrip makes a realm answer without a network, so that it can be asked in a
// synctest bubble.
func (k *realm) RoundTrip(r *http.Request) (*http.Response, error) {
	if err := r.Context().Err(); err != nil {
		return nil, err
	}
	w := httptest.NewRecorder()
	k.ServeHTTP(w, r)
	return w.Result(), nil
}

func (k *realm) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	k.mu.Lock()
	defer k.mu.Unlock()
	path := strings.TrimPrefix(strings.TrimPrefix(r.URL.Path, "/auth/admin/realms/lab"), "/auth/realms/lab/protocol/openid-connect")
	k.asked = append(k.asked, r.Method+" "+path)
	if k.trouble != nil {
		if status, body := k.trouble(path); status != 0 {
			http.Error(w, body, status)
			return
		}
	}
	switch path {
	case "/token":
		k.giveToken(w, r)
	case "/events/config":
		k.guarded(w, r, func() { w.Write([]byte(k.settings)) })
	case "/admin-events":
		k.guarded(w, r, func() { k.list(w, r, k.admin) })
	case "/events":
		k.types = r.URL.Query()["type"]
		k.guarded(w, r, func() { k.list(w, r, k.user) })
	default:
		http.NotFound(w, r)
	}
}

func (k *realm) giveToken(w http.ResponseWriter, r *http.Request) {
	id, secret, _ := r.BasicAuth()
	if id != "events" || secret != "s3%25cret" || r.FormValue("grant_type") != "client_credentials" {
		http.Error(w, `{"error":"unauthorized_client","error_description":"Invalid client or Invalid client credentials"}`, http.StatusUnauthorized)
		return
	}
	k.issued++
	payload := base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil, `{"iat":%d,"jti":"%d"}`, k.now().Unix(), k.issued))
	t := "e30." + payload + ".c2ln"
	k.good[t] = true
	fmt.Fprintf(w, `{"access_token":%q,"expires_in":%d,"token_type":"Bearer"}`, t, int(k.life.Seconds()))
}

func (k *realm) guarded(w http.ResponseWriter, r *http.Request, answer func()) {
	t, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !k.good[t] {
		http.Error(w, `{"error":"HTTP 401 Unauthorized"}`, http.StatusUnauthorized)
		return
	}
	answer()
}

// list answers as Keycloak does: by time, the oldest first, from a moment on.
func (k *realm) list(w http.ResponseWriter, r *http.Request, all []stored) {
	q := r.URL.Query()
	n, _ := strconv.Atoi(q.Get("max"))
	from, err := strconv.ParseInt(q.Get("dateFrom"), 10, 64)
	if q.Has("dateFrom") && (err != nil || q.Get("direction") != "asc") {
		http.Error(w, "Invalid value for 'dateFrom'", http.StatusBadRequest)
		return
	}
	all = slices.Clone(all)
	slices.SortStableFunc(all, func(a, b stored) int { return int(a.at - b.at) })
	var page []string
	for _, e := range all {
		if e.at >= from && len(page) < n {
			page = append(page, e.body)
		}
	}
	w.Write([]byte("[" + strings.Join(page, ",") + "]"))
}

func (k *realm) now() time.Time { return time.Now().Add(k.ahead) }

// did stores an administrator's event, with a time that is so far past.
func (k *realm) did(id, operation, resource, path string, past time.Duration) {
	k.mu.Lock()
	defer k.mu.Unlock()
	at := k.now().Add(-past).UnixMilli()
	k.admin = append(k.admin, stored{at, fmt.Sprintf(
		`{"id":%q,"time":%d,"realmId":"529a14ef","authDetails":{"realmId":"master","userId":"u"},"operationType":%q,"resourceType":%q,"resourcePath":%q,"representation":"[{\"id\":\"109632eb\",\"name\":\"researcher\"}]"}`,
		id, at, operation, resource, path)})
}

// lost takes a role from a user.
func (k *realm) lost(id, user string) {
	k.did(id, "DELETE", "REALM_ROLE_MAPPING", "users/"+user+"/role-mappings/realm", 0)
}

// userDid stores a user's event.
func (k *realm) userDid(id, kind, user string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	at := k.now().UnixMilli()
	k.user = append(k.user, stored{at, fmt.Sprintf(
		`{"id":%q,"time":%d,"type":%q,"realmId":"529a14ef","clientId":"jupyterhub","userId":%q,"sessionId":"qpgm","details":{"a":"b"}}`,
		id, at, kind, user)})
}

// raw stores an administrator's event that says what it says.
func (k *realm) raw(body string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.admin = append(k.admin, stored{k.now().UnixMilli(), body})
}

// in makes trouble for paths; nil ends it.
func (k *realm) in(trouble func(path string) (int, string)) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.trouble = trouble
}

// change changes the realm.
func (k *realm) change(f func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	f()
}

// requests forgets what was asked and returns it.
func (k *realm) requests() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	asked := k.asked
	k.asked = nil
	return asked
}

// A looker writes down whom it was to look at.
type looker struct {
	mu    sync.Mutex // guards all below
	looks []string   // "sub: cause", "*: cause"
	fail  error
	hold  map[string]chan struct{} // sub or "*" → the look ends when it is closed
}

func (l *looker) LookNow(ctx context.Context, p broker.ProviderID, sub, cause string) error {
	return l.look(ctx, p, sub, cause)
}

func (l *looker) LookAtAll(ctx context.Context, p broker.ProviderID, cause string) error {
	return l.look(ctx, p, "*", cause)
}

func (l *looker) look(ctx context.Context, p broker.ProviderID, who, cause string) error {
	l.mu.Lock()
	if p != "keycloak" {
		who = string(p) + "?" + who
	}
	l.looks = append(l.looks, who+": "+cause)
	fail, hold := l.fail, l.hold[who]
	l.mu.Unlock()
	if hold != nil {
		select {
		case <-hold:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return fail
}

// looked forgets whom was looked at and returns it, sorted.
func (l *looker) looked() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := l.looks
	l.looks = nil
	slices.Sort(all)
	return all
}

// A rig is a source between a realm and a looker.
type rig struct {
	*realm
	looker
	t   *testing.T
	log *brokertest.Buffer
	cfg rolewatch.KeycloakConfig
}

const (
	every = 5 * time.Second
	// seenBy is when a poll has been for sure: polls come early, never late.
	seenBy = every + time.Millisecond
	// started is what everybody is looked at for at each start.
	started = "*: the broker has started"
)

// inBubble runs f with a source that has polled once.
func inBubble(t *testing.T, f func(r *rig), edit ...func(*rig)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		r := &rig{realm: newRealm(), t: t, log: &brokertest.Buffer{}}
		r.cfg = rolewatch.KeycloakConfig{
			Provider: "keycloak", URL: "https://sso.example.org/auth/admin/realms/lab", ClientID: "events",
			ClientSecret: broker.NewSecret("s3%cret"), Transport: r.realm,
			Log: slog.New(slog.NewTextHandler(r.log, nil)),
		}
		for _, e := range edit {
			e(r)
		}
		stop := r.run()
		f(r)
		stop()
		if said := r.log.String(); strings.Contains(said, "s3%") || strings.Contains(said, "e30.") {
			t.Errorf("the log holds a secret:\n%s", said)
		}
	})
}

// run starts a source; stop ends it.
func (r *rig) run() (stop func()) {
	r.t.Helper()
	k := r.source()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); k.Run(ctx, &r.looker) }()
	synctest.Wait()
	return func() { cancel(); <-ended }
}

func (r *rig) source() *rolewatch.Keycloak {
	r.t.Helper()
	k, err := rolewatch.NewKeycloak(r.cfg)
	if err != nil {
		r.t.Fatalf("NewKeycloak: %v", err)
	}
	return k
}

// wait lets time pass.
func (r *rig) wait(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// saw fails unless by the next poll want, and nobody else, was looked at.
func (r *rig) saw(want ...string) {
	r.t.Helper()
	r.wait(seenBy)
	r.lookedAt(want...)
}

// lookedAt fails unless want, and nobody else, was looked at until now.
func (r *rig) lookedAt(want ...string) {
	r.t.Helper()
	if got := r.looked(); !slices.Equal(got, want) {
		r.t.Errorf("looked at %q, want %q", got, want)
	}
}

// says fails unless the log has text n times.
func (r *rig) says(text string, n int) {
	r.t.Helper()
	if got := strings.Count(r.log.String(), text); got != n {
		r.t.Errorf("the log has %q %d times, want %d:\n%s", text, got, n, r.log)
	}
}

var errNothingKnown = errors.New("nothing is known")
