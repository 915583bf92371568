//go:build linux

package attacks_test

import (
	"archive/tar"
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
	"tokenbroker/broker/devidp"
	"tokenbroker/broker/seal"
)

const (
	inside   = "/run/tokenbroker"          // where a container has its directory
	socket   = inside + "/broker.sock"     // and its socket
	callback = "http://127.0.0.1:8000/hub" // of both hubs
)

// A world is one broker, and all that is around it.
type world struct {
	t       *testing.T // ends with all of the attacks
	dir     string     // configuration
	state   string     // servers' sockets, and the audit
	sockets string     // the sockets of hubs and administrator
	shared  string     // a directory that some containers share
	image   string     // its name, and the beginning of all containers' names
	program string     // tokenbroker
	attack  string     // the attacker's program, for the host
	since   string     // where its log begins in the journal, if it is the unit
	idp     *devidp.Server
	issuer  string
	broker  *process

	mu     sync.Mutex         // guards what follows
	owners map[string]*server // of containers, by their full ID
	given  map[string]*server // answers with a token, by their ref: who got them
}

// config is what a site writes.
const config = `deployment: attacks
contact: it-help@lab.example
hubs:
  main: {socket: %[1]s/hubs/main/hub.sock, login: idp}
  other: {socket: %[1]s/hubs/other/hub.sock, login: idp}
servers: {directory: %[2]s/servers, docker: {socket: %[3]s}}
admin: {socket: %[1]s/admin.sock}
audit: {file: %[2]s/audit.jsonl}
store: {redis: {socket: %[4]s}}
providers:
%[5]spolicy:
- {provider: idp, audiences: [storage], scopes: [read], max_ttl: 10m}
- {provider: second, audiences: [storage], scopes: [read], max_ttl: 10m}
- {provider: no-audience, audiences: [storage], scopes: [read], max_ttl: 10m}
- {provider: no-scope, audiences: [storage], scopes: [read], max_ttl: 10m}
- {provider: no-exchange, audiences: [storage], scopes: [read], max_ttl: 10m}
- {provider: no-refresh, scopes: [read], max_ttl: 10m}
`

// provider is one of them; they are one server behind several addresses.
const provider = `  %s:
    profile: keycloak
    issuer: %s
    client_id: jupyterhub
    client_secret_file: client-secret
    redirect_uri: %s
    audiences: {storage: [storage], compute: [compute]}
%s`

// emptyWorld is one in which nothing runs yet. The name of its image begins with name.
func emptyWorld(t *testing.T, name string) *world {
	t.Helper()
	need(t)
	return &world{
		t: t, shared: makeDir(t), image: name + "-" + strings.ToLower(rand.Text()[:8]),
		owners: map[string]*server{}, given: map[string]*server{},
	}
}

// newWorld starts everything.
func newWorld(t *testing.T) *world {
	t.Helper()
	w := emptyWorld(t, "tbattack")
	redis := w.place(t)
	w.build(t)
	w.importImage(t, w.image)
	w.startProvider(t)
	if err := seal.Create(w.path("keyset.json"), w.path("kek")); err != nil {
		t.Fatal(err)
	}
	_, secret := w.idp.Client()
	w.write(t, "client-secret", secret.Reveal())
	var providers strings.Builder
	for name, of := range lax {
		extra := ""
		if name == "no-refresh" {
			extra = "    narrowing: scope\n"
		}
		fmt.Fprintf(&providers, provider, name, w.serve(t, of), callback, extra)
	}
	fmt.Fprintf(&providers, provider, "idp", w.issuer, callback, "")
	w.write(t, "tokenbroker.yaml", fmt.Sprintf(config, w.sockets, w.state, *engine, redis, providers.String()))
	if unit {
		w.refusalsKill(t)
	} else {
		w.handOver(t, redis)
	}
	w.startBroker(t)
	return w
}

// place says where everything is, and starts a Redis: the path of its socket.
func (w *world) place(t *testing.T) (redis string) {
	t.Helper()
	if unit {
		return w.placeOfUnit(t)
	}
	w.dir = makeDir(t)
	w.state, w.sockets = w.dir, w.dir
	w.program = w.path("tokenbroker")
	return brokertest.StartRedis(t).Socket
}

// need fails where CI is set and something is missing; elsewhere it skips.
func need(t *testing.T) {
	t.Helper()
	missing := ""
	if os.Geteuid() != 0 {
		missing = "the attacks need root"
	} else if out, err := dockerCommand("version", "-f", "{{.Server.Version}}").CombinedOutput(); err != nil {
		missing = fmt.Sprintf("there is no Docker to test on: %v: %s", err, out)
	}
	switch {
	case missing != "" && os.Getenv("CI") != "":
		t.Fatal(missing)
	case missing != "":
		t.Skip(missing)
	}
}

// makeDir makes a directory whose path is short enough for sockets, and which
// containers may enter.
func makeDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "tba")
	if err == nil {
		err = os.Chmod(dir, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func (w *world) path(name string) string { return filepath.Join(w.dir, name) }

func (w *world) write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(w.path(name), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// build makes both programs.
func (w *world) build(t *testing.T) {
	t.Helper()
	w.attack = w.path("attacker")
	for _, args := range [][]string{
		{"build", "-tags", *tags, "-o", w.program, "tokenbroker/cmd/tokenbroker"},
		{"build", "-o", w.attack, "./testdata/attacker"},
	} {
		cmd := exec.Command("go", args...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("go %s: %v: %s", strings.Join(args, " "), err, out)
		}
	}
}

// importImage makes an image that holds the attacker and nothing else.
func (w *world) importImage(t *testing.T, name string, changes ...string) {
	t.Helper()
	binary, err := os.ReadFile(w.attack)
	if err != nil {
		t.Fatal(err)
	}
	var image bytes.Buffer
	archive := tar.NewWriter(&image)
	for _, h := range []*tar.Header{
		{Name: "attacker", Mode: 0o755, Size: int64(len(binary))}, {Name: "cg/", Typeflag: tar.TypeDir, Mode: 0o755},
	} {
		if err := archive.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Size == 0 {
			continue
		}
		if _, err := archive.Write(binary); err != nil {
			t.Fatal(err)
		}
	}
	if err := archive.Close(); err != nil {
		t.Fatal(err)
	}
	args := []string{"import"}
	for _, c := range append(changes, `ENTRYPOINT ["/attacker"]`) {
		args = append(args, "--change", c)
	}
	load := dockerCommand(append(args, "-", name)...)
	load.Stdin = &image
	if out, err := load.CombinedOutput(); err != nil {
		t.Fatalf("import: %v: %s", err, out)
	}
	t.Cleanup(func() { dockerCommand("rmi", "-f", name).Run() })
}

// startProvider starts the provider. Each account has its name as its subject.
func (w *world) startProvider(t *testing.T) {
	t.Helper()
	var users []devidp.User
	for name := range strings.FieldsSeq(accounts) {
		users = append(users, devidp.User{Name: name, Roles: []string{"researcher"}})
	}
	var err error
	if w.idp, err = devidp.New(devidp.Config{Users: users}); err != nil {
		t.Fatal(err)
	}
	w.issuer = w.serve(t, nil)
}

// accounts are the people at the provider.
const accounts = "alice anna bob carol dave erin frank grace heidi ivan judy mallory niaj olivia peggy quentin " +
	"rupert sybil trent ursula victor walter wendy xavier yves zoe"

// everything is what a login asks for.
var everything = []string{"openid", "read", "write", "storage", "compute"}

// lax are providers that don't do what a request says. Each changes the form of
// a token request before the provider sees it.
var lax = map[string]func(url.Values){
	"second": nil, // as it should be, but another one
	"no-audience": func(f url.Values) {
		if f.Has("audience") {
			f["audience"] = []string{"storage", "compute"}
			f.Set("scope", f.Get("scope")+" compute")
		}
	},
	"no-scope": func(f url.Values) {
		if f.Has("subject_token") {
			f.Set("scope", strings.Join(everything, " "))
		}
	},
	"no-refresh": func(f url.Values) {
		if f.Has("refresh_token") {
			f.Del("scope")
		}
	},
	"no-exchange": func(f url.Values) {
		if f.Has("subject_token") {
			f.Set("instead", f.Get("subject_token"))
		}
	},
}

// serve serves the provider at an address of its own.
func (w *world) serve(t *testing.T, change func(url.Values)) (issuer string) {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/oauth/token" && change != nil {
			body, _ := io.ReadAll(r.Body)
			form, _ := url.ParseQuery(string(body))
			change(form)
			if same := form.Get("instead"); same != "" {
				fmt.Fprintf(rw, `{"access_token":%q,"issued_token_type":%q,"token_type":"Bearer","expires_in":300}`, same, form.Get("subject_token_type"))
				return
			}
			text := form.Encode()
			r.Body, r.ContentLength = io.NopCloser(strings.NewReader(text)), int64(len(text))
			r.Header.Set("Content-Length", fmt.Sprint(len(text)))
		}
		w.idp.ServeHTTP(rw, r)
	}))
	s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)
	t.Cleanup(s.Close)
	return s.URL
}

// A process is a running tokenbroker.
type process struct {
	pid  int
	cmd  *exec.Cmd     // nil if it is the unit's
	done chan struct{} // closed when it has ended
}

// startBroker starts the broker and returns when it serves.
func (w *world) startBroker(t *testing.T) {
	t.Helper()
	if unit {
		w.startUnit(t)
		return
	}
	log, err := os.OpenFile(w.path("log"), os.O_CREATE|os.O_APPEND|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	before, _ := log.Seek(0, io.SeekEnd)
	p := &process{cmd: exec.Command("setpriv", append(w.privileges(t), w.program, "serve", "--config", w.path("tokenbroker.yaml"))...), done: make(chan struct{})}
	p.cmd.Stderr = log
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { p.cmd.Wait(); close(p.done) }()
	p.pid = p.cmd.Process.Pid
	w.broker = p
	w.t.Cleanup(func() { w.stopBroker(p) })
	eventually(t, "the broker to serve", func() bool {
		select {
		case <-p.done:
			text, _ := os.ReadFile(log.Name())
			t.Fatalf("the broker has ended:\n%s", text)
		default:
		}
		text, _ := os.ReadFile(log.Name())
		return bytes.Contains(text[before:], []byte(`"msg":"serving"`))
	})
}

// brokerUID is nobody else on this machine.
const brokerUID = 64990

// privileges are those that deploy/site/tokenbroker.service gives the broker: it is
// not root, reaches Docker by a group, and has one capability.
func (w *world) privileges(t *testing.T) []string {
	t.Helper()
	info, err := os.Stat(*engine)
	if err != nil {
		t.Fatal(err)
	}
	uid, caps := strconv.Itoa(brokerUID), "-all,+sys_ptrace"
	return []string{
		"--reuid", uid, "--regid", uid, "--groups", fmt.Sprint(info.Sys().(*syscall.Stat_t).Gid),
		"--bounding-set", caps, "--inh-caps", caps, "--ambient-caps", caps, "--no-new-privs",
	}
}

// handOver gives the broker's user what is the broker's, and Redis' socket.
func (w *world) handOver(t *testing.T, socket string) {
	t.Helper()
	err := filepath.WalkDir(w.dir, func(path string, _ fs.DirEntry, err error) error {
		return errors.Join(err, os.Chown(path, brokerUID, brokerUID))
	})
	err = errors.Join(err, os.Chmod(filepath.Dir(socket), 0o711), os.Chown(socket, brokerUID, brokerUID))
	if err != nil {
		t.Fatal(err)
	}
}

// stopBroker ends it in order.
func (w *world) stopBroker(p *process) {
	if p.cmd == nil {
		systemctl(w.t, "stop", service)
		return
	}
	p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(30 * time.Second):
		p.cmd.Process.Kill()
		<-p.done
	}
}

// eventually waits for a condition, for as long as a loaded machine may need.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within a minute", what)
		}
	}
}

// dockerCommand is a command of Docker's, on the engine under test.
func dockerCommand(args ...string) *exec.Cmd {
	cmd := exec.Command("docker", args...)
	cmd.Env = append(os.Environ(), "DOCKER_HOST=unix://"+*engine)
	return cmd
}

func docker(t *testing.T, args ...string) string {
	t.Helper()
	out, err := dockerCommand(args...).CombinedOutput()
	if err != nil {
		t.Fatalf("docker %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// run starts a container that waits. It needs no network.
func (w *world) run(t *testing.T, name string, options ...string) (id string) {
	t.Helper()
	return w.runs(t, name, options, "sleep")
}

// runs is run with another command.
func (w *world) runs(t *testing.T, name string, options []string, command ...string) (id string) {
	t.Helper()
	t.Cleanup(func() { dockerCommand("rm", "-f", "-v", name).Run() })
	return docker(t, w.runArgs(append([]string{"-d", "--name", name}, options...), command...)...)
}

func (w *world) runArgs(options []string, command ...string) []string {
	image := w.image
	if i := len(options) - 1; i >= 0 && strings.HasPrefix(options[i], "image:") {
		image, options = strings.TrimPrefix(options[i], "image:"), options[:i]
	}
	args := append([]string{"run"}, options...)
	if !strings.Contains(strings.Join(options, " "), "--network") {
		args = append(args, "--network", "none")
	}
	return append(append(args, image), command...)
}

// An answer is what a program of the attacker's was told.
type answer struct {
	Status int
	Body   string
	Error  string // of the kernel
	Raw    string

	said struct {
		Code, Detail, Ref string
		AccessToken       string `json:"access_token"`
		Error             string // of the token endpoint
		Description       string `json:"error_description"`
		Directory         string
		Generation        int64
		Active            bool
		Reason            string
		RefreshToken      string `json:"refresh_token"`
	}
}

// read takes the last line that a program printed.
func read(t *testing.T, out []byte, err error) answer {
	t.Helper()
	var a answer
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	if jerr := json.Unmarshal([]byte(lines[len(lines)-1]), &a); jerr != nil {
		t.Fatalf("the attacker printed %q: %v", out, err)
	}
	a.parse()
	return a
}

func (a *answer) parse() { json.Unmarshal([]byte(a.Body), &a.said) }

// once runs a command in a container of its own.
func (w *world) once(t *testing.T, options []string, command ...string) answer {
	t.Helper()
	out, err := dockerCommand(w.runArgs(append([]string{"--rm"}, options...), command...)...).CombinedOutput()
	return read(t, out, err)
}

// exec runs a command in a container that is there.
func execIn(t *testing.T, name string, command ...string) answer {
	t.Helper()
	out, err := dockerCommand(append([]string{"exec", name, "/attacker"}, command...)...).CombinedOutput()
	return read(t, out, err)
}

// onHost runs a command on the host, as root.
func (w *world) onHost(t *testing.T, command ...string) answer {
	t.Helper()
	out, err := exec.Command(w.attack, command...).CombinedOutput()
	return read(t, out, err)
}

// audit reads the audit and returns its lines in their order.
func (w *world) audit(t *testing.T) []broker.Entry {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(w.state, "audit.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	var all []broker.Entry
	for line := range bytes.Lines(text) {
		var e broker.Entry
		if err := json.Unmarshal(line, &e); err != nil {
			t.Fatalf("audit line %q: %v", line, err)
		}
		all = append(all, e)
	}
	return all
}

// find waits for an audit line.
func (w *world) find(t *testing.T, what string, is func(broker.Entry) bool) broker.Entry {
	t.Helper()
	var found broker.Entry
	eventually(t, what, func() bool {
		for _, e := range w.audit(t) {
			if is(e) {
				found = e
				return true
			}
		}
		return false
	})
	return found
}
