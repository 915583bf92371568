//go:build !release

package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/alicebob/miniredis/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"tokenbroker/broker"
	"tokenbroker/broker/devidp"
	"tokenbroker/broker/seal"
	pb "tokenbroker/proto/tokenbroker/v1"
)

// accessTTL is short, so that the demo sees tokens end.
const accessTTL = 6 * time.Second

// demoConfig is the demo's configuration file: what a site would write, but
// for process attestation and a Redis that forgets.
const demoConfig = `# Made by tokenbroker demo.
deployment: demo
contact: it-help@lab.example
hubs:
  main: {socket: %[1]s/hubs/main/hub.sock, uid: %[2]d, login: devidp}
servers: {directory: %[1]s/servers, attestation: process, rate: 1000} # it asks in a tight loop, to measure
admin: {socket: %[1]s/admin.sock}
audit: {file: %[1]s/audit.log}
store:
  redis: {address: "%[3]s", password_file: redis-password, allow_no_persistence: true}
providers:
  devidp:
    profile: keycloak
    issuer: %[4]s
    client_id: jupyterhub
    client_secret_file: client-secret
    roles: [roles, groups]
    audiences: {storage: [storage], compute: [compute]}
policy:
- {roles: [researcher], audiences: [storage], scopes: [read], max_ttl: 10m}
- {roles: [admin], audiences: [compute]}
`

// A world is all that the demo needs around it.
type world struct {
	dir        string
	configFile string
	cfg        *Config
	stderr     io.Writer
	log        *os.File

	idp      *spiedIDP
	redis    *demoRedis
	hub      *demoHub
	notebook *notebook
	admin    pb.AdminClient

	stop   context.CancelFunc // ends the broker
	ended  chan error         // what it ended with
	closes []func() error     // in reverse
}

// newWorld starts everything but the notebook.
func newWorld(ctx context.Context, stderr io.Writer) (_ *world, err error) {
	w := &world{stderr: stderr}
	defer func() {
		if err != nil {
			w.close()
		}
	}()
	// Not $TMPDIR, which may be too long for the path of a socket.
	if w.dir, err = os.MkdirTemp("/tmp", "tokenbroker-demo"); err != nil {
		return nil, err
	}
	w.onClose(func() error { return os.RemoveAll(w.dir) })
	if w.log, err = os.OpenFile(w.path("broker.log"), os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600); err != nil {
		return nil, err
	}
	w.onClose(w.log.Close)
	log := slog.New(slog.NewJSONHandler(w.log, nil))
	for _, start := range []func(context.Context, *slog.Logger) error{w.startIDP, w.startRedis, w.configure, w.startBroker} {
		if err := start(ctx, log); err != nil {
			return nil, err
		}
	}
	return w, nil
}

func (w *world) path(name string) string     { return filepath.Join(w.dir, name) }
func (w *world) onClose(f func() error)      { w.closes = append(w.closes, f) }
func (w *world) secret(name, s string) error { return os.WriteFile(w.path(name), []byte(s), 0o400) }

func (w *world) close() error {
	var errs []error
	for _, f := range slices.Backward(w.closes) {
		errs = append(errs, f())
	}
	return errors.Join(errs...)
}

func (w *world) startIDP(_ context.Context, log *slog.Logger) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	w.onClose(func() error { l.Close(); return nil })
	issuer := "http://" + l.Addr().String()
	idp, err := devidp.New(devidp.Config{Issuer: issuer, AccessTTL: accessTTL, Log: log})
	if err != nil {
		return err
	}
	_, secret := idp.Client()
	w.idp = &spiedIDP{Server: idp, issuer: issuer}
	s := &http.Server{Handler: w.idp, ReadHeaderTimeout: 5 * time.Second, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug)}
	go s.Serve(l)
	w.onClose(s.Close)
	return w.secret("client-secret", secret.Reveal())
}

func (w *world) startRedis(context.Context, *slog.Logger) error {
	m, password := miniredis.NewMiniRedis(), rand.Text()
	m.RequireAuth(password)
	if err := m.StartAddr("127.0.0.1:0"); err != nil {
		return err
	}
	w.onClose(func() error { m.Close(); return nil })
	w.redis = &demoRedis{m}
	return w.secret("redis-password", password)
}

// configure writes the configuration file and its keys, and reads it as the
// broker does.
func (w *world) configure(context.Context, *slog.Logger) error {
	w.configFile = w.path("tokenbroker.yaml")
	text := fmt.Sprintf(demoConfig, w.dir, os.Geteuid(), w.redis.Addr(), w.idp.issuer)
	if err := os.WriteFile(w.configFile, []byte(text), 0o600); err != nil {
		return err
	}
	if err := seal.Create(w.path("keyset.json"), w.path("kek")); err != nil {
		return err
	}
	var err error
	w.cfg, err = load(w.configFile)
	return err
}

func (w *world) startBroker(ctx context.Context, log *slog.Logger) error {
	ctx, w.stop = context.WithCancel(ctx)
	w.ended = make(chan error, 1)
	ready := make(chan struct{})
	go func() { w.ended <- serve(ctx, w.cfg, io.Discard, log, func(*broker.Broker) { close(ready) }) }()
	select {
	case err := <-w.ended:
		return err
	case <-ready:
	}
	w.onClose(func() error { w.stop(); return <-w.ended })
	conn, err := grpc.NewClient("unix:"+w.cfg.Admin.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	w.onClose(conn.Close)
	w.admin = pb.NewAdminClient(conn)
	w.hub = &demoHub{http: unixClient(w.cfg.Hubs["main"].Socket), issuer: w.idp.issuer}
	w.onClose(func() error { w.hub.http.CloseIdleConnections(); return nil })
	return nil
}

func (w *world) startNotebook(dir string) (err error) {
	w.notebook, err = startNotebook(filepath.Join(dir, "broker.sock"), w.stderr)
	if err == nil {
		w.onClose(w.notebook.close)
	}
	return err
}

// askNotebook asks several things at once and waits for all answers.
func (w *world) askNotebook(qs ...question) ([]answer, error) {
	var replies []reply
	for _, q := range qs {
		replies = append(replies, w.notebook.send(q))
	}
	var answers []answer
	for _, r := range replies {
		a, err := r.answer()
		if err != nil {
			return nil, err
		}
		answers = append(answers, a)
	}
	return answers, nil
}

// places is wherever a refresh token could have got to.
func (w *world) places() (map[string][]byte, error) {
	places := map[string][]byte{"the hub": w.hub.said()}
	w.notebook.mu.Lock()
	places["the notebook's answers"] = w.notebook.said
	w.notebook.mu.Unlock()
	for name, path := range map[string]string{
		"the audit": w.cfg.Audit.File, "the log": w.log.Name(),
	} {
		text, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		places[name] = text
	}
	// Linux tells what a process was started with.
	if env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", w.notebook.pid())); err == nil {
		places["the notebook's environment"] = env
	}
	sealed, plain := w.redis.records()
	for _, value := range slices.Concat(slices.Collect(maps.Values(sealed)), slices.Collect(maps.Values(plain))) {
		places["Redis"] = append(places["Redis"], value...)
	}
	return places, nil
}

// leaks says whether one of the words can be read in one of the places.
func leaks(places map[string][]byte, words ...string) bool {
	for _, text := range places {
		for _, w := range words {
			if bytes.Contains(text, []byte(w)) {
				return true
			}
		}
	}
	return false
}

// A spiedIDP is the provider with somebody who writes down every refresh token
// that it gives, so that they can be searched for.
type spiedIDP struct {
	*devidp.Server
	issuer string

	mu     sync.Mutex // guards tokens
	tokens []string
}

// ServeHTTP passes a request on and looks at what comes back.
func (s *spiedIDP) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	tee := &teeWriter{ResponseWriter: w}
	s.Server.ServeHTTP(tee, r)
	var issued struct {
		RefreshToken string `json:"refresh_token"`
	}
	if json.Unmarshal(tee.text.Bytes(), &issued) != nil || issued.RefreshToken == "" {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tokens = append(s.tokens, issued.RefreshToken)
}

func (s *spiedIDP) spied() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.tokens)
}

type teeWriter struct {
	http.ResponseWriter
	text bytes.Buffer
}

// Write keeps a copy.
func (w *teeWriter) Write(p []byte) (int, error) {
	w.text.Write(p)
	return w.ResponseWriter.Write(p)
}

// demoRedis is Redis in this process.
type demoRedis struct{ *miniredis.Miniredis }

// records returns all values by their keys: sealed records, and what else there is.
func (r *demoRedis) records() (sealed, plain map[string][]byte) {
	sealed, plain = map[string][]byte{}, map[string][]byte{}
	for _, key := range r.Keys() {
		switch r.Type(key) {
		case "hash":
			sealed[key] = []byte(r.HGet(key, "b"))
		case "set":
			members, _ := r.SMembers(key)
			plain[key] = []byte(strings.Join(members, " "))
		default:
			value, _ := r.Get(key)
			plain[key] = []byte(value)
		}
	}
	return sealed, plain
}

// kindOf is the kind of record that a key names.
func kindOf(key string) string {
	parts := strings.Split(key, ":")
	return parts[min(3, len(parts)-1)]
}

// demoHub plays what JupyterHub, OAuthenticator and our hooks do.
type demoHub struct {
	http   *http.Client
	issuer string

	mu     sync.Mutex // guards the rest
	handle string
	heard  []byte // all that the broker ever told it
}

// hubToken is what a token endpoint answers.
type hubToken struct {
	AccessToken  string `json:"access_token"`
	RefreshToken string `json:"refresh_token"`
}

const hubCallback = "http://127.0.0.1:8000/hub/oauth_callback"

// login does what a browser and OAuthenticator do.
func (h *demoHub) login(ctx context.Context, user string) (hubToken, error) {
	code, verifier, err := devidp.CodeFor(ctx, h.issuer, "jupyterhub", hubCallback, user, "openid", "profile", "read", "write", "storage", "compute")
	if err != nil {
		return hubToken{}, err
	}
	return h.token(ctx, url.Values{
		"grant_type": {"authorization_code"}, "code": {code}, "code_verifier": {verifier}, "redirect_uri": {hubCallback},
	})
}

// refresh does what OAuthenticator does when its token has ended.
func (h *demoHub) refresh(ctx context.Context) error {
	_, err := h.token(ctx, url.Values{"grant_type": {"refresh_token"}, "refresh_token": {h.session()}})
	return err
}

// token asks the token endpoint on the hub's socket.
func (h *demoHub) token(ctx context.Context, form url.Values) (t hubToken, err error) {
	err = h.post(ctx, "/oauth2/token/devidp", "application/x-www-form-urlencoded", form.Encode(), &t)
	if err == nil && t.AccessToken == "" {
		err = errors.New("the broker refused the login") // in the body, as OAuthenticator needs it
	}
	if err != nil {
		return t, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.handle = t.RefreshToken
	return t, nil
}

// claim is what post_auth_hook does.
func (h *demoHub) claim(ctx context.Context, user string) error {
	return h.call(ctx, "/v1/claim", map[string]any{"provider": "devidp", "handle": h.session(), "user": user}, &struct{}{})
}

// register is what pre_spawn_hook does.
func (h *demoHub) register(ctx context.Context, user string) (directory string, err error) {
	var answer struct {
		Directory string `json:"directory"`
	}
	err = h.call(ctx, "/v1/register", map[string]any{
		"user": user, "server": "", "provider": "devidp", "handle": h.session(), "uid": os.Geteuid(),
	}, &answer)
	return answer.Directory, err
}

// checkSession is what refresh_user_hook does.
func (h *demoHub) checkSession(ctx context.Context, user string) (active bool, err error) {
	var answer struct {
		Active bool `json:"active"`
	}
	err = h.call(ctx, "/v1/check-session", map[string]any{"provider": "devidp", "handle": h.session(), "user": user}, &answer)
	return answer.Active, err
}

func (h *demoHub) call(ctx context.Context, path string, question map[string]any, answer any) error {
	body, err := json.Marshal(question)
	if err != nil {
		return err
	}
	return h.post(ctx, path, "application/json", string(body), answer)
}

func (h *demoHub) post(ctx context.Context, path, kind, body string, answer any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://localhost"+path, strings.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", kind)
	text, err := exchange(h.http, req, answer)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.heard = append(h.heard, text...)
	return err
}

// session is what the hub keeps in auth_state.
func (h *demoHub) session() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.handle
}

func (h *demoHub) said() []byte {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.heard)
}
