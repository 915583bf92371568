//go:build failpoints && linux

package faults_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"io"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/oauth2"
)

// Kinds of providers that none of us wrote, each strict: a refresh token is good
// for one use, and a second use ends the session. deploy/setup installs them.
const (
	realKeycloak = "Keycloak 26.5.5"
	strictNPM    = "oidc-provider 9"
)

// shortLife is how long their access tokens live. A broker gives one out for two of
// these seconds.
const shortLife = 4 * time.Second

// installed is where deploy/setup has put something. Without it the test is
// skipped, but not in CI.
func installed(t *testing.T, name string) string {
	t.Helper()
	dir, err := filepath.EvalSymlinks(filepath.Join("../../.state", name))
	switch {
	case err == nil:
		return dir
	case os.Getenv("CI") != "":
		t.Fatalf("%s is not installed, and CI must have it; run deploy/setup", name)
	}
	t.Skipf("%s is not installed; run deploy/setup", name)
	return ""
}

// forward sends what comes to the server at to. It keeps the Host, by which a
// server knows what it is called.
func forward(t *testing.T, to string) http.Handler {
	t.Helper()
	u, err := url.Parse(to)
	if err != nil {
		t.Fatal(err)
	}
	return &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(u)
		r.Out.Host = r.In.Host
		r.Out.Header.Del("Accept-Encoding") // an answer that we can read
	}}
}

// askStrictNPM puts p before an oidc-provider of its own.
func (p *idp) askStrictNPM(t *testing.T) {
	t.Helper()
	modules := installed(t, "oidc-provider")
	dir := t.TempDir() // where node looks for modules beside the program
	if err := errors.Join(os.CopyFS(dir, os.DirFS("oidcprovider")), os.Symlink(modules+"/node_modules", dir+"/node_modules")); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(installed(t, "node")+"/bin/node", filepath.Join(dir, "server.mjs"))
	cmd.Stderr = log
	in, err1 := cmd.StdinPipe()
	out, err2 := cmd.StdoutPipe()
	if err := errors.Join(err1, err2, cmd.Start()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close() // ends it
		cmd.Wait()
	})
	json.NewEncoder(in).Encode(map[string]any{
		"issuer": p.url, "client": client, "secret": p.secret, "redirect": redirect, "scopes": scopes, "life": shortLife.Seconds(),
	})
	address, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		text, _ := os.ReadFile(log.Name())
		t.Fatalf("oidc-provider did not start: %v\n%s", err, text)
	}
	p.provider, p.profile = forward(t, strings.TrimSpace(address)), "generic"
	p.code = func(user string, scopes ...string) (code, verifier string, err error) {
		// It gives a refresh token for offline_access only, and that only with consent.
		return logIn(p.url+"/auth", user, oauth2.SetAuthURLParam("prompt", "consent"), append(scopes, "offline_access")...)
	}
}

// askKeycloak puts p before the Keycloak of all tests.
func (p *idp) askKeycloak(t *testing.T) {
	t.Helper()
	installed(t, "keycloak")
	if err := theKeycloak.up(); err != nil {
		t.Fatal(err)
	}
	p.provider = forward(t, theKeycloak.url)
	p.url += "/realms/faults"
	p.code = func(user string, scopes ...string) (code, verifier string, err error) {
		return logIn(p.url+"/protocol/openid-connect/auth", user, oauth2.SetAuthURLParam("prompt", "login"), scopes...)
	}
}

// theKeycloak is the one that all tests ask. It takes its time to start, so
// TestMain has it begin beforehand.
var theKeycloak = keycloak{stopped: make(chan struct{})}

type keycloak struct {
	once    sync.Once
	err     error // why there is none
	url     string
	dir     string // its home is there
	cmd     *exec.Cmd
	stopped chan struct{} // closed when it has ended
}

// up starts it, unless that has been done, and returns when it answers.
func (k *keycloak) up() error {
	k.once.Do(func() { k.err = k.start() })
	return k.err
}

func (k *keycloak) start() (err error) {
	if _, err := os.Stat("../../.state/keycloak"); err != nil {
		return err
	}
	if k.dir, err = os.MkdirTemp("", "keycloak-"); err != nil {
		return err
	}
	home := filepath.Join(k.dir, "home")
	// It writes beside its programs.
	out, err := exec.Command("bash", "-ec", `origin=$(realpath ../../.state/keycloak); home=$1
		cp -al "$origin" "$home" 2>/dev/null || { rm -rf "$home"; cp -a "$origin" "$home"; }
		rm -r "$home/lib/quarkus"; cp -a "$origin/lib/quarkus" "$home/lib/quarkus"; mkdir -p "$home/data/import"`, "copy", home).CombinedOutput()
	if err != nil {
		return fmt.Errorf("copy Keycloak: %w: %s", err, out)
	}
	realm, err := keycloakRealm()
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(home, "data/import/realm.json"), realm, 0o600); err != nil {
		return err
	}
	// It starts beside other tests, which are in more of a hurry.
	k.cmd = exec.Command("nice", "bash", filepath.Join(home, "bin/kc.sh"), "start-dev",
		"--db=dev-mem", "--import-realm", "--http-host=127.0.0.1", "--http-port=0")
	k.cmd.Env = append(os.Environ(), "JAVA_OPTS_KC_HEAP=-Xms64m -Xmx384m", "JAVA_OPTS_APPEND=-XX:TieredStopAtLevel=1")
	// SIGTERM, because what we start is a shell, which passes that on.
	k.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	log := filepath.Join(k.dir, "log")
	if k.cmd.Stdout, err = os.Create(log); err != nil {
		return err
	}
	k.cmd.Stderr = k.cmd.Stdout
	if err := k.run(); err != nil {
		return err
	}
	return k.await(log)
}

// run starts the process. It dies with the thread that started it, which is
// therefore kept.
func (k *keycloak) run() error {
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := k.cmd.Start()
		started <- err
		if err == nil {
			k.cmd.Wait()
		}
		close(k.stopped)
	}()
	return <-started
}

var listening = regexp.MustCompile(`Listening on: (http://[0-9.:]+)`)

// await returns when the log says where it listens.
func (k *keycloak) await(log string) error {
	tick, over := time.NewTicker(100*time.Millisecond), time.After(4*time.Minute)
	defer tick.Stop()
	for {
		text, _ := os.ReadFile(log)
		if m := listening.FindSubmatch(text); m != nil {
			k.url = string(m[1])
			return nil
		}
		select {
		case <-tick.C:
		case <-over:
			return fmt.Errorf("Keycloak does not answer; its log:\n%s", text)
		case <-k.stopped:
			return fmt.Errorf("Keycloak did not start; its log:\n%s", text)
		}
	}
}

// stop ends it, if it was started.
func (k *keycloak) stop() {
	k.once.Do(func() {})
	if k.cmd != nil && k.cmd.Process != nil {
		k.cmd.Process.Signal(syscall.SIGTERM)
		<-k.stopped
	}
	os.RemoveAll(k.dir)
}

// keycloakRealm is the reference stack's realm with the clients, scopes and users
// that these tests have everywhere. It takes refresh tokens back like the stack's:
// none is good twice.
func keycloakRealm() ([]byte, error) {
	text, err := os.ReadFile("../keycloak/realm.json")
	if err != nil {
		return nil, err
	}
	var realm map[string]any
	if err := json.Unmarshal(text, &realm); err != nil {
		return nil, err
	}
	if realm["revokeRefreshToken"] != true || realm["refreshTokenMaxReuse"] != 0.0 {
		return nil, errors.New("deploy/keycloak/realm.json: refresh tokens are not for single use any more")
	}
	hub := realm["clients"].([]any)[0].(map[string]any)
	hub["secret"], hub["redirectUris"] = "secret of the test", []string{redirect}
	hub["optionalClientScopes"] = scopes
	var users []any
	for i := range 32 {
		users = append(users, map[string]any{
			"username": fmt.Sprintf("user%d", i), "enabled": true, "realmRoles": []string{"researcher"},
			"email": fmt.Sprintf("user%d@lab.example", i), "firstName": "U", "lastName": "U",
			"credentials": []any{map[string]any{"type": "password", "value": "pw"}},
		})
	}
	for _, s := range scopes {
		realm["clientScopes"] = append(realm["clientScopes"].([]any), map[string]any{
			"name": s, "protocol": "openid-connect", "attributes": map[string]string{"include.in.token.scope": "true"},
		})
	}
	realm["realm"], realm["clients"], realm["users"] = "faults", []any{hub}, users
	realm["accessTokenLifespan"] = shortLife.Seconds()
	realm["passwordPolicy"] = "hashAlgorithm(pbkdf2-sha256) and hashIterations(1)" // logins are not what is tested
	return json.Marshal(realm)
}

// logIn does what a person with a browser does: it opens the login page, sends
// each form it is shown, and returns the code that comes back to the hub.
func logIn(page, user string, prompt oauth2.AuthCodeOption, scopes ...string) (code, verifier string, err error) {
	verifier = oauth2.GenerateVerifier()
	c := oauth2.Config{ClientID: client, RedirectURL: redirect, Scopes: scopes, Endpoint: oauth2.Endpoint{AuthURL: page}}
	b := browser{cookies: map[string]*http.Cookie{}, person: url.Values{"username": {user}, "login": {user}, "password": {"pw"}}}
	at, err := b.open(http.MethodGet, c.AuthCodeURL("state", oauth2.S256ChallengeOption(verifier), prompt), nil)
	for range 12 {
		if err != nil {
			return "", "", fmt.Errorf("log %s in: %w", user, err)
		}
		if strings.HasPrefix(at.next, redirect) {
			back, _ := url.Parse(at.next)
			return back.Query().Get("code"), verifier, nil
		}
		at, err = b.open(at.method, at.next, at.form)
	}
	return "", "", fmt.Errorf("log %s in: round in circles at %s", user, at.next)
}

// A browser has cookies, also those that are marked Secure on plain HTTP to the
// loopback address, as real ones do.
type browser struct {
	cookies map[string]*http.Cookie
	person  url.Values // what the person would type into fields of such names
}

// A page says what is done next: a redirect is followed, a form is sent.
type page struct {
	method, next string
	form         url.Values
}

var (
	action = regexp.MustCompile(`<form[^>]*action="([^"]+)"`)
	hidden = regexp.MustCompile(`<input type="hidden" name="([^"]+)" value="([^"]*)"`)
)

func (b *browser) open(method, address string, form url.Values) (page, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, address, strings.NewReader(form.Encode()))
	if err != nil {
		return page{}, err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	for _, c := range b.cookies {
		req.AddCookie(c)
	}
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		return page{}, err
	}
	defer resp.Body.Close()
	for _, c := range resp.Cookies() {
		b.cookies[c.Name] = c
		if c.MaxAge < 0 {
			delete(b.cookies, c.Name)
		}
	}
	if to, err := resp.Location(); err == nil {
		return page{method: http.MethodGet, next: to.String()}, nil
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return page{}, err
	}
	m := action.FindSubmatch(body)
	if m == nil {
		return page{}, fmt.Errorf("%s: no form: %.300s", resp.Status, body)
	}
	to, err := req.URL.Parse(html.UnescapeString(string(m[1])))
	if err != nil {
		return page{}, err
	}
	fields := url.Values{}
	for name, v := range b.person {
		fields[name] = v
	}
	for _, m := range hidden.FindAllSubmatch(body, -1) {
		fields.Set(string(m[1]), html.UnescapeString(string(m[2])))
	}
	return page{http.MethodPost, to.String(), fields}, nil
}
