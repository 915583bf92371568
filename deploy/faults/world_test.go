//go:build failpoints && linux

package faults_test

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"net/rpc"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
	"tokenbroker/broker/seal"
)

// client and redirect are the hub's at every provider.
const (
	client   = "jupyterhub"
	redirect = "http://127.0.0.1:8000/hub/oauth_callback"
)

// A world is one deployment: a redis-server, a provider and broker processes.
type world struct {
	t       *testing.T
	idp     *idp
	setup   setup
	hurry   int     // the lease is this many times shorter; 0: as it is
	wires   []*wire // of the brokers to Redis; none: each goes there by itself
	brokers []*process
}

// newWorld starts n broker processes. Each of edit alters what they are told.
func newWorld(t *testing.T, kind string, n int, edit ...func(*world)) *world {
	t.Helper()
	dir, err := os.MkdirTemp("", "faults-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := seal.Create(filepath.Join(dir, "keyset"), filepath.Join(dir, "kek")); err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, idp: startIDP(t, kind)}
	w.setup = setup{Dir: dir, Issuer: w.idp.url, Secret: w.idp.secret, Profile: w.idp.profile, Narrowing: broker.ByScope}
	for _, e := range edit {
		e(w)
	}
	if w.setup.Redis == "" && w.wires == nil {
		w.setup.Redis = brokertest.StartRedis(t).Socket
	}
	for i := range n {
		w.brokers = append(w.brokers, &process{w: w, host: fmt.Sprintf("host%d", i+1), redis: w.setup.Redis})
		if w.wires != nil {
			w.brokers[i].redis = w.wires[i].at
		}
		w.brokers[i].start()
	}
	t.Cleanup(func() {
		for _, p := range w.brokers {
			p.end()
		}
		if t.Failed() {
			w.tell()
		}
	})
	return w
}

// commonly makes the processes refresh the common way.
func commonly(w *world) { w.setup.Common = true }

// hurried makes the lease, and all that must fit into it, 15 times shorter.
func hurried(w *world) { w.hurry, w.setup.Timeout = 15, 2*time.Second }

// tell shows what the brokers logged last.
func (w *world) tell() {
	for _, p := range w.brokers {
		text, _ := os.ReadFile(filepath.Join(w.setup.Dir, p.host+".log"))
		w.t.Logf("%s:\n%s", p.host, text[max(0, len(text)-4000):])
	}
}

// login gives user a new session, through the first broker, and the hub a handle.
// All brokers know of it when it returns.
func (w *world) login(user string) (handle string) {
	w.t.Helper()
	r, err := w.loginAt(w.brokers[0], user)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, b := range w.brokers {
		w.knows(b, user)
	}
	return r.Handle
}

// loginAt gives user a new session through b.
func (w *world) loginAt(b *process, user string) (Reply, error) {
	code, verifier, err := w.idp.code(user, append([]string{"openid"}, scopes...)...)
	if err != nil {
		return Reply{}, err
	}
	r, err := b.call("Login", Call{User: user, Code: code, Verifier: verifier})
	if err == nil && r.Code != "" {
		err = fmt.Errorf("log %s in: %+v", user, r)
	}
	return r, err
}

// knows waits until b gives user a token: for 250 ms a broker goes by what it has
// read before the login.
func (w *world) knows(b *process, user string) {
	w.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		r, err := b.call("Token", Call{User: user, Scopes: scopes})
		switch {
		case err == nil && r.Code == "":
			return
		case err != nil || time.Now().After(deadline):
			w.t.Fatalf("%s gives %s no token after the login: %+v, %v", b.host, user, r, err)
		}
	}
}

// A process is one broker process.
type process struct {
	w      *world
	host   string
	redis  string   // socket
	errors *os.File // what it says when it can't start; nil: our own
	cmd    *exec.Cmd
	rpc    *rpc.Client
}

func (p *process) start() {
	p.w.t.Helper()
	if err := p.launch(); err != nil {
		p.w.t.Fatalf("%s did not start: %v", p.host, err)
	}
}

// launch is start while the broker may find no store, and then ends.
func (p *process) launch() error {
	c := p.w.setup
	c.Host, c.Redis = p.host, p.redis
	text, err := json.Marshal(c)
	if err != nil {
		return err
	}
	p.cmd = exec.Command(os.Args[0])
	p.cmd.Env = append(os.Environ(), envChild+"="+string(text), fmt.Sprintf("TOKENBROKER_HURRY=%d", p.w.hurry))
	p.cmd.Stderr = cmp.Or(p.errors, os.Stderr)
	in, err := p.cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := p.cmd.Start(); err != nil {
		return err
	}
	p.rpc = rpc.NewClient(struct {
		io.Reader
		io.WriteCloser
	}{out, in})
	if _, err := p.call("Ready", Call{}); err != nil {
		p.end()
		return err
	}
	return nil
}

// call asks the process; an error says that it died.
func (p *process) call(method string, c Call) (r Reply, err error) {
	err = p.rpc.Call("Service."+method, c, &r)
	return r, err
}

func (p *process) signal(s os.Signal) {
	p.w.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.w.t.Fatal(err)
	}
}

// end kills the process, if it lives.
func (p *process) end() {
	p.cmd.Process.Kill()
	p.rpc.Close()
	p.cmd.Wait()
}

// killed waits for the process to die of a SIGKILL of its own.
func (p *process) killed() {
	p.w.t.Helper()
	p.rpc.Close()
	p.cmd.Wait()
	if s, ok := p.cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || s.Signal() != syscall.SIGKILL {
		p.w.t.Fatalf("%s ended by itself: %s", p.host, p.cmd.ProcessState)
	}
}

// stop stops the process, and returns when it stands.
func (p *process) stop() {
	p.cmd.Process.Signal(syscall.SIGSTOP)
	p.stopped()
}

// stopped waits until the process is stopped.
func (p *process) stopped() {
	p.w.t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for time.Now().Before(deadline) {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
		if err != nil {
			p.w.t.Error(err)
			return
		}
		if _, after, _ := strings.Cut(string(text), ") "); strings.HasPrefix(after, "T") {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	p.w.t.Errorf("%s never stopped", p.host)
}

// lost says whether the reply means that the user has to log in again, and
// reported whether it was said that an answer got lost.
func (r Reply) lost() bool     { return r.Code == string(broker.LoginRequired) }
func (r Reply) reported() bool { return r.lost() && strings.Contains(r.Sentence, "lost_response") }
