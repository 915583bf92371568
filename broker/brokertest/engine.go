package brokertest

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// An Engine is a fake Docker engine on a real Unix socket. It does what Docker
// 20.10 does where somebody looks who wants to know which containers there are:
// it finds a container by ID, name or the beginning of an ID, in that order; it
// streams events and replays the last 256; what it forgets when it goes Down is
// what Docker forgets. Its containers run nothing: Start is told a process.
type Engine struct {
	Socket string

	mu         sync.Mutex // guards everything below
	api        string
	components []string
	security   []string
	containers map[string]*fakeContainer // by name
	events     []engineEvent             // the newest 256
	streams    map[*engineStream]bool
	sent       *sync.Cond // on mu: a stream has written an event, or ended
	onInspect  func(name string)
	hidden     bool // execs
	server     *http.Server
	down       chan struct{} // closed when the server goes down
	served     chan struct{} // closed when the server has ended
}

// A fakeContainer is a container's inspect answer.
type fakeContainer struct {
	id      string
	inspect map[string]any
	execs   []*fakeExec
}

// A fakeExec is a command in a container. Docker lists it while it runs, and answers
// on it for some minutes more.
type fakeExec struct {
	id, command string
	running     bool
}

// An engineStream is somebody who reads events.
type engineStream struct {
	news    chan engineEvent
	pending int // events that are not written yet
}

type engineEvent struct {
	Type     string
	Action   string
	Actor    engineActor
	TimeNano int64 `json:"timeNano"`
}

type engineActor struct {
	ID         string
	Attributes map[string]string
}

// NewEngine starts an engine that ends with the test.
func NewEngine(t testing.TB) *Engine {
	t.Helper()
	// Not t.TempDir: a Unix socket's path is at most 107 bytes long.
	dir, err := os.MkdirTemp("", "engine")
	if err != nil {
		t.Fatal(err)
	}
	e := &Engine{
		Socket:     filepath.Join(dir, "docker.sock"),
		api:        "1.41",
		components: []string{"Engine", "containerd", "runc"},
		security:   []string{"name=seccomp,profile=default"},
		containers: map[string]*fakeContainer{},
	}
	e.sent = sync.NewCond(&e.mu)
	if err := e.Up(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		e.Down()
		os.RemoveAll(dir)
	})
	return e
}

// Up starts the engine after Down. Its containers are as they were.
func (e *Engine) Up() error {
	os.Remove(e.Socket)
	l, err := net.Listen("unix", e.Socket)
	if err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.events, e.streams = nil, map[*engineStream]bool{}
	e.down = make(chan struct{})
	server, served := &http.Server{Handler: e.handler()}, make(chan struct{})
	e.server, e.served = server, served
	go func() {
		defer close(served)
		server.Serve(l)
	}()
	return nil
}

// Down ends all connections and removes the socket. It forgets the events.
func (e *Engine) Down() {
	e.mu.Lock()
	server, down, served := e.server, e.down, e.served
	e.server = nil
	e.mu.Unlock()
	if server != nil {
		close(down)
		server.Close()
		<-served // or it would remove the socket of the next one
	}
}

// SpeakAPI sets the API version that the engine offers.
func (e *Engine) SpeakAPI(version string) { e.locked(func() { e.api = version }) }

// Be sets what the engine says it is made of ("Podman Engine") and its security
// options ("name=rootless").
func (e *Engine) Be(components, security []string) {
	e.locked(func() { e.components, e.security = components, security })
}

// OnInspect has f called before each answer on a container, with what was asked
// for. f may change the engine.
func (e *Engine) OnInspect(f func(name string)) { e.locked(func() { e.onInspect = f }) }

// Create adds a container that doesn't run, and returns its ID. inspect is what
// Docker answered on such a container once; nil is a plain one.
func (e *Engine) Create(t testing.TB, name string, inspect []byte) string {
	t.Helper()
	if inspect == nil {
		inspect = []byte(`{"Config": {"Image": "lab:1"}, "State": {}, "HostConfig": {
			"NetworkMode": "default", "MaskedPaths": ["/proc/kcore"], "ReadonlyPaths": ["/proc/sys"]}}`)
	}
	c := &fakeContainer{}
	if err := json.Unmarshal(inspect, &c.inspect); err != nil {
		t.Fatalf("inspect answer of %s: %v", name, err)
	}
	c.id, _ = c.inspect["Id"].(string)
	if c.id == "" {
		c.id = newID()
	}
	c.inspect["Id"], c.inspect["Name"] = c.id, "/"+name
	c.state("created", 0)
	e.locked(func() {
		e.containers[name] = c
		e.emit(c, "create", nil)
	})
	return c.id
}

func newID() string {
	id := make([]byte, 32)
	rand.Read(id)
	return hex.EncodeToString(id)
}

// Start runs a container, as process pid.
func (e *Engine) Start(name string, pid int) {
	e.with(name, func(c *fakeContainer) {
		c.state("running", pid)
		e.emit(c, "start", nil)
	})
}

// Die ends a container.
func (e *Engine) Die(name string) {
	e.with(name, func(c *fakeContainer) {
		c.state("exited", 0)
		e.emit(c, "die", map[string]string{"exitCode": "137"})
	})
}

// Restart ends a container and runs it again, as process pid.
func (e *Engine) Restart(name string, pid int) {
	e.Die(name)
	e.Start(name, pid)
}

// Pause holds a container.
func (e *Engine) Pause(name string) {
	e.with(name, func(c *fakeContainer) {
		c.inspect["State"].(map[string]any)["Paused"] = true
		e.emit(c, "pause", nil)
	})
}

// Exec runs a command in a container until EndExec, and returns its ID. Docker tells
// of it with its command line.
func (e *Engine) Exec(name, command string) (id string) {
	e.with(name, func(c *fakeContainer) {
		id = newID()
		c.execs = append(c.execs, &fakeExec{id, command, true})
		e.emit(c, "exec_start: "+command, map[string]string{"execID": id})
	})
	return id
}

// EndExec ends a command in a container.
func (e *Engine) EndExec(name, id string) {
	e.with(name, func(c *fakeContainer) {
		for _, x := range c.execs {
			if x.id == id {
				x.running = false
			}
		}
		e.emit(c, "exec_die", map[string]string{"execID": id, "exitCode": "0"})
	})
}

// HideExecs has the engine refuse questions on commands, as a proxy might.
func (e *Engine) HideExecs() { e.locked(func() { e.hidden = true }) }

// Rename gives a container another name.
func (e *Engine) Rename(name, to string) {
	e.with(name, func(c *fakeContainer) {
		delete(e.containers, name)
		e.containers[to] = c
		c.inspect["Name"] = "/" + to
		e.emit(c, "rename", map[string]string{"oldName": "/" + name})
	})
}

// Remove forgets a container.
func (e *Engine) Remove(name string) {
	e.with(name, func(c *fakeContainer) {
		delete(e.containers, name)
		e.emit(c, "destroy", nil)
	})
}

// Drain waits until everybody who reads events was told of all there are.
func (e *Engine) Drain() {
	e.locked(func() {
		for slices.ContainsFunc(slices.Collect(maps.Keys(e.streams)), func(s *engineStream) bool { return s.pending > 0 }) {
			e.sent.Wait()
		}
	})
}

// state fills in what Docker says of a container's state.
func (c *fakeContainer) state(status string, pid int) {
	state, ok := c.inspect["State"].(map[string]any)
	if !ok {
		state = map[string]any{}
		c.inspect["State"] = state
	}
	state["Status"], state["Running"], state["Pid"] = status, pid > 0, pid
	state["Paused"], state["Restarting"] = false, false
	if pid > 0 {
		state["StartedAt"] = time.Now().UTC().Format(time.RFC3339Nano)
	} else if state["StartedAt"] == nil {
		state["StartedAt"] = "0001-01-01T00:00:00Z"
	}
}

func (e *Engine) locked(f func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	f()
}

// with calls f with the container of that name. A test that names none has a
// mistake.
func (e *Engine) with(name string, f func(*fakeContainer)) {
	e.locked(func() {
		c := e.containers[name]
		if c == nil {
			panic(fmt.Sprintf("brokertest: there is no container %q", name))
		}
		f(c)
	})
}

// emit tells everybody of an event; e.mu is held.
func (e *Engine) emit(c *fakeContainer, action string, attributes map[string]string) {
	all := maps.Clone(attributes)
	if all == nil {
		all = map[string]string{}
	}
	if config, ok := c.inspect["Config"].(map[string]any); ok {
		labels, _ := config["Labels"].(map[string]any)
		for k, v := range labels { // as Docker does, over its own
			all[k] = fmt.Sprint(v)
		}
	}
	all["name"] = strings.TrimPrefix(c.inspect["Name"].(string), "/")
	event := engineEvent{"container", action, engineActor{c.id, all}, time.Now().UnixNano()}
	e.events = append(e.events, event)
	e.events = e.events[max(0, len(e.events)-256):]
	for s := range e.streams {
		select {
		case s.news <- event:
			s.pending++
		default: // like Docker: who reads slowly is not told
		}
	}
}

func (e *Engine) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/_ping", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "OK") })
	mux.HandleFunc("GET /{v}/version", e.version)
	mux.HandleFunc("GET /{v}/info", e.info)
	mux.HandleFunc("GET /{v}/containers/{name}/json", e.inspect)
	mux.HandleFunc("GET /{v}/containers/json", e.list)
	mux.HandleFunc("GET /{v}/events", e.stream)
	mux.HandleFunc("GET /{v}/exec/{id}/json", e.inspectExec)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var api string
		e.locked(func() { api = e.api })
		w.Header().Set("Api-Version", api)
		w.Header().Set("Content-Type", "application/json")
		v, _, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v"), "/")
		if v != "_ping" && strings.HasPrefix(r.URL.Path, "/v") && newer(v, api) {
			refuse(w, http.StatusBadRequest, "client version %s is too new. Maximum supported API version is %s", v, api)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// newer says whether API version a comes after b.
func newer(a, b string) bool {
	minor := func(v string) int {
		_, m, _ := strings.Cut(v, ".")
		n, _ := strconv.Atoi(m)
		return n
	}
	return minor(a) > minor(b)
}

func refuse(w http.ResponseWriter, status int, format string, args ...any) {
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(map[string]string{"message": fmt.Sprintf(format, args...)})
}

func (e *Engine) version(w http.ResponseWriter, _ *http.Request) {
	e.mu.Lock()
	defer e.mu.Unlock()
	var components []map[string]string
	for _, name := range e.components {
		components = append(components, map[string]string{"Name": name, "Version": "1"})
	}
	json.NewEncoder(w).Encode(map[string]any{"Version": "20.10.24", "ApiVersion": e.api, "Components": components})
}

func (e *Engine) info(w http.ResponseWriter, _ *http.Request) {
	e.mu.Lock()
	defer e.mu.Unlock()
	json.NewEncoder(w).Encode(map[string]any{"ServerVersion": "20.10.24", "SecurityOptions": e.security})
}

// list answers with what runs, as Docker does if nothing else is asked for.
func (e *Engine) list(w http.ResponseWriter, _ *http.Request) {
	e.mu.Lock()
	defer e.mu.Unlock()
	all := []map[string]any{}
	for name, c := range e.containers {
		if running, _ := c.inspect["State"].(map[string]any)["Running"].(bool); running {
			all = append(all, map[string]any{"Id": c.id, "Names": []string{"/" + name}, "Mounts": c.inspect["Mounts"]})
		}
	}
	json.NewEncoder(w).Encode(all)
}

func (e *Engine) inspect(w http.ResponseWriter, r *http.Request) {
	name := r.PathValue("name")
	var hook func(string)
	e.locked(func() { hook = e.onInspect })
	if hook != nil {
		hook(name)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	c := e.find(name)
	if c == nil {
		refuse(w, http.StatusNotFound, "No such container: %s", name)
		return
	}
	var execs []string // null where there are none
	for _, x := range c.execs {
		if x.running {
			execs = append(execs, x.id)
		}
	}
	c.inspect["ExecIDs"] = execs
	json.NewEncoder(w).Encode(c.inspect)
}

func (e *Engine) inspectExec(w http.ResponseWriter, r *http.Request) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.hidden {
		refuse(w, http.StatusForbidden, "forbidden")
		return
	}
	id := r.PathValue("id")
	for _, c := range e.containers {
		for _, x := range c.execs {
			if x.id == id {
				words := strings.Split(x.command, " ")
				json.NewEncoder(w).Encode(map[string]any{"ID": id, "ContainerID": c.id, "Running": x.running,
					"ProcessConfig": map[string]any{"entrypoint": words[0], "arguments": words[1:]}})
				return
			}
		}
	}
	refuse(w, http.StatusNotFound, "No such exec instance: %s", id)
}

// find looks for a container as Docker does.
func (e *Engine) find(name string) *fakeContainer {
	var begins []*fakeContainer
	for _, c := range e.containers {
		if c.id == name {
			return c
		}
		if strings.HasPrefix(c.id, name) {
			begins = append(begins, c)
		}
	}
	if c := e.containers[name]; c != nil {
		return c
	}
	if len(begins) == 1 {
		return begins[0]
	}
	return nil
}

func (e *Engine) stream(w http.ResponseWriter, r *http.Request) {
	wanted := wantedEvents(r)
	since, _ := strconv.ParseFloat(r.URL.Query().Get("since"), 64)
	s := &engineStream{news: make(chan engineEvent, 1024)}
	var old []engineEvent
	var down chan struct{}
	e.locked(func() {
		old, down = slices.Clone(e.events), e.down
		e.streams[s] = true
	})
	defer e.locked(func() {
		delete(e.streams, s)
		e.sent.Broadcast()
	})
	send := func(v engineEvent) {
		if wanted(v) {
			json.NewEncoder(w).Encode(v)
		}
		http.NewResponseController(w).Flush()
	}
	http.NewResponseController(w).Flush()
	for _, v := range old {
		if since > 0 && float64(v.TimeNano) >= since*1e9 {
			send(v)
		}
	}
	for {
		select {
		case v := <-s.news:
			send(v)
			e.locked(func() {
				s.pending--
				e.sent.Broadcast()
			})
		case <-r.Context().Done():
			return
		case <-down:
			return
		}
	}
}

// wantedEvents reads the filter of a request. As soon as one exec event is asked
// for, Docker compares beginnings.
func wantedEvents(r *http.Request) func(engineEvent) bool {
	var filters map[string]map[string]bool
	json.Unmarshal([]byte(r.URL.Query().Get("filters")), &filters)
	types, actions := filters["type"], filters["event"]
	begins := actions["exec_start"] || actions["exec_create"]
	return func(v engineEvent) bool {
		if len(types) > 0 && !types[v.Type] {
			return false
		}
		for a := range actions {
			if a == v.Action || begins && strings.HasPrefix(v.Action, a) {
				return true
			}
		}
		return len(actions) == 0
	}
}
