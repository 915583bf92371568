//go:build linux

package attacks_test

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tokenbroker/broker"
)

// gone is what the audit says of a connection whose maker has ended.
const gone = "process has ended|no such (file|process)"

func (w *world) identity(t *testing.T, alice *server) {
	w.looks(t, alice)
	w.early(t)
	w.late(t)
	w.nameAgain(t)
	w.sameContainer(t)
	w.handedOn(t)
	w.outlived(t)
}

// looks are all that a container can say of itself.
func (w *world) looks(t *testing.T, alice *server) {
	like := []string{"--label", "user=alice", "--label", "hub.user=alice", "-e", "JUPYTERHUB_USER=alice",
		"-e", "JUPYTERHUB_SERVICE_PREFIX=/user/alice/", "--hostname", alice.name}
	bob := w.up(t, "main", "bob", "bob", like...)
	a := bob.served(t)
	theTable.add(line{"identity", "alice's labels, environment, host name", "bob's container has them, and asks", "200: a token of bob", w.issued(t, a)})

	at := attempt{"identity", "the same on her socket", "with alice's directory", broker.UnknownPeer, otherCgroup}
	w.refused(t, at, w.once(t, append(append(like, "--name", w.image+"-main-alice-2"), alice.mount()...), "ask", socket))

	image := w.image + "-labels"
	w.importImage(t, image, "LABEL user=alice hub.user=alice", "ENV JUPYTERHUB_USER=alice")
	at = attempt{"identity", "an image with alice's labels and ENV", "with alice's directory", broker.UnknownPeer, otherCgroup}
	w.refused(t, at, w.once(t, append(alice.mount(), "image:"+image), "ask", socket))
}

// early asks before the server's container is there.
func (w *world) early(t *testing.T) {
	w.user(t, "main", "carol", "carol")
	carol := w.register(t, "main", "carol", "carol", "carol")
	w.refused(t, attempt{"identity", "before the container is there", "another container asks on the reserved socket", broker.Pending, "not there yet"},
		w.once(t, carol.mount(), "ask", socket))
	carol.starts(t)
	carol.served(t)
}

// late asks after the server's container has ended.
func (w *world) late(t *testing.T) {
	dave := w.up(t, "main", "dave", "dave", "-v", w.shared+":/chan")
	conn := w.passed(t, func(channel string) { execIn(t, dave.name, "pass", socket, channel) })
	defer conn.Close()
	docker(t, "stop", "-t", "0", dave.name)
	w.find(t, "the end of dave's server", func(e broker.Entry) bool { return e.Action == "stopped" && e.User == "dave" })
	w.refused(t, attempt{"identity", "after the container has stopped", "another container asks", broker.Pending, "not running"},
		w.once(t, dave.mount(), "ask", socket))
	w.oldConnection(t, attempt{"identity", "on a connection from before the stop", "it was passed to a process of the host",
		broker.UnknownPeer, gone + "|not running"}, conn)

	dave.unregister(t)
	w.kernel(t, attempt{kind: "identity", name: "after the server was unregistered", tried: "another container asks", reason: "no such file|refused"},
		w.once(t, dave.mount(), "ask", socket))
}

// nameAgain gives the name of a container that is gone to another one.
func (w *world) nameAgain(t *testing.T) {
	ivan := w.up(t, "main", "ivan", "ivan")
	docker(t, "rm", "-f", ivan.name)
	w.find(t, "the end of ivan's server", func(e broker.Entry) bool { return e.Action == "stopped" && e.User == "ivan" })
	w.run(t, ivan.name)
	e := w.find(t, "refusal to bind ivan's name", func(e broker.Entry) bool {
		return e.Action == "bind" && e.User == "ivan" && e.Outcome == "refused"
	})
	w.refusedBy(t, attempt{"identity", "the name of a container that is gone", "another container takes it", broker.Denied, "does not mount"}, "not bound", e)
	w.refused(t, attempt{"identity", "and another one asks meanwhile", "with ivan's directory", broker.Denied, "does not mount"},
		w.once(t, ivan.mount(), "ask", socket))
	docker(t, "rm", "-f", ivan.name)
}

// sameContainer has two registrations name one container.
func (w *world) sameContainer(t *testing.T) {
	judy := w.up(t, "main", "judy", "judy")
	other := &server{w: w, hub: "other", user: "judy", name: judy.name}
	other.again(t)
	w.refused(t, attempt{"identity", "another hub names the same container", "registers it, and its process asks", broker.Denied, "not mount its server's directory|already bound"},
		w.onHost(t, "ask", other.socket()))
	other.unregister(t)
	judy.served(t)
}

// passed has a process connect and hand the connection to this test; the
// process has ended when it returns.
func (w *world) passed(t *testing.T, pass func(channel string)) *net.UnixConn {
	t.Helper()
	name := strings.ReplaceAll(t.Name(), "/", "-")
	name = name[max(0, len(name)-20):] + ".sock"
	return handed(t, filepath.Join(w.shared, name), func() { pass("/chan/" + name) })
}

// handed is the connection that pass has somebody send to a new socket at path.
func handed(t *testing.T, path string, pass func()) *net.UnixConn {
	t.Helper()
	os.Remove(path)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	pass()
	l.SetDeadline(time.Now().Add(time.Minute))
	from, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	conn, err := received(from)
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

func received(from *net.UnixConn) (*net.UnixConn, error) {
	oob := make([]byte, 64)
	_, n, _, _, err := from.ReadMsgUnix(make([]byte, 1), oob)
	if err != nil {
		return nil, err
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return nil, errors.Join(err, errors.New("no descriptor came"))
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fds[0]), "passed")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return c.(*net.UnixConn), nil
}

const question = "GET /v1/token?audience=storage HTTP/1.1\r\nHost: localhost\r\n\r\n"

// askOn asks on a connection. A connection that was closed is an error of the
// kernel's.
func askOn(conn net.Conn) answer {
	conn.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := io.WriteString(conn, question); err != nil {
		return answer{Error: err.Error()}
	}
	return answerOn(conn)
}

func answerOn(conn net.Conn) answer {
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return answer{Error: err.Error()}
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	a := answer{Status: resp.StatusCode, Body: string(body)}
	a.parse()
	return a
}

// oldConnection asks on a connection that must not serve any more: closed or
// refused.
func (w *world) oldConnection(t *testing.T, at attempt, conn net.Conn) {
	t.Helper()
	a := askOn(conn)
	if a.Error != "" {
		theTable.add(line{at.kind, at.name, at.tried, "the connection is closed: " + a.Error, "- (nothing was asked)"})
		return
	}
	if a.said.Code == string(broker.Pending) { // it found the server stopped before it found the process gone
		at.code = broker.Pending
	}
	w.refused(t, at, a)
}

// handedOn passes a connection from one container to another, and its maker ends.
func (w *world) handedOn(t *testing.T) {
	mallory := w.up(t, "main", "mallory", "mallory", "-v", w.shared+":/chan")
	victim := w.up(t, "main", "peggy", "peggy", "-v", w.shared+":/chan")
	taker := dockerCommand("exec", mallory.name, "/attacker", "take", "/chan/take.sock", "/chan/take.go")
	out, err := taker.StdoutPipe()
	if err == nil {
		err = taker.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(out)
	if _, err := lines.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	execIn(t, victim.name, "pass", socket, "/chan/take.sock") // has ended now
	if err := os.WriteFile(filepath.Join(w.shared, "take.go"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	rest, _ := io.ReadAll(lines)
	w.refused(t, attempt{"identity", "a connection whose maker has ended", "passed to mallory's container by SCM_RIGHTS", broker.UnknownPeer, gone},
		read(t, rest, taker.Wait()))
}

// outlived is a process that is still there when its container is not.
func (w *world) outlived(t *testing.T) {
	w.user(t, "main", "rupert", "rupert")
	s := w.register(t, "main", "rupert", "rupert", "rupert")
	options := append(s.mount(), "-v", w.shared+":/chan", "-v", "/sys/fs/cgroup:/cg", "--pid=host", "--cgroupns=host")
	w.runs(t, s.name, options, "outlive", socket, "/chan/outlive.go", "/chan/outlive")
	file := func(name string) func() bool {
		return func() bool { _, err := os.Stat(filepath.Join(w.shared, name)); return err == nil }
	}
	eventually(t, "a process outside its cgroups", file("outlive.ready"))
	docker(t, "rm", "-f", s.name)
	s.starts(t)
	// Until then what is known is that its predecessor was refused.
	w.find(t, "the next container's bind", func(e broker.Entry) bool {
		return e.Action == "bind" && e.Outcome == "done" && e.Container == s.id
	})
	s.served(t)
	if err := os.WriteFile(filepath.Join(w.shared, "outlive.go"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	eventually(t, "its answer", file("outlive"))
	text, err := os.ReadFile(filepath.Join(w.shared, "outlive"))
	w.refused(t, attempt{"identity", "a process that outlives its container", "the container is removed, and the next one of that name is bound",
		broker.UnknownPeer, otherCgroup}, read(t, text, err))
}

// restarts are of one container, which keeps its name and ID.
func (w *world) restarts(t *testing.T, _ *server) {
	heidi := w.up(t, "main", "heidi", "heidi", "-v", w.shared+":/chan")
	old := w.passed(t, func(channel string) { execIn(t, heidi.name, "pass", socket, channel) })
	defer old.Close()
	docker(t, "restart", "-t", "0", heidi.name)
	again := heidi.served(t)
	w.oldConnection(t, attempt{"identity", "a connection from before a restart", "the same container runs again and is served", broker.UnknownPeer, gone}, old)
	theTable.add(line{"by design", "the same container again", "docker restart, then its new process asks", "200: a token of its user", w.issued(t, again)})
	w.restartLoop(t, heidi)
}

// restartLoop has a container restarted all the time, and its own processes, and
// a stranger's with its directory, ask all the time.
func (w *world) restartLoop(t *testing.T, heidi *server) {
	heidi.unread = true
	stranger := w.image + "-stranger"
	w.run(t, stranger, append(heidi.mount(), "-v", w.shared+":/chan")...)
	done := make(chan struct{})
	var asking sync.WaitGroup
	var own, others []answer
	asking.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			out, err := bounded(dockerCommand("exec", heidi.name, "/attacker", "ask", socket))
			if err == nil { // else the container was not there to be asked
				own = append(own, read(t, out, err))
			}
		}
	})
	asking.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
				others = append(others, execIn(t, stranger, "ask", socket))
			}
		}
	})
	for range 8 {
		docker(t, "restart", "-t", "0", heidi.name)
	}
	close(done)
	asking.Wait()
	for _, a := range own {
		heidi.got(a)
		if a.said.AccessToken != "" {
			heidi.isOwn(t, a)
		}
	}
	var last answer
	for _, a := range others {
		if strings.Contains(a.Body, "access_token") {
			t.Errorf("restart loop: A STRANGER GOT A TOKEN: %s", a.Body)
		}
		if a.said.Code == string(broker.UnknownPeer) {
			last = a
		}
	}
	t.Logf("restart loop: %d answers inside, %d outside", len(own), len(others))
	if last.said.Code == "" { // it was between two runs each time
		last = execIn(t, stranger, "ask", socket)
	}
	w.refused(t, attempt{"identity", "a restart -t 0 loop while binding", "8 restarts; a stranger with the directory asks all the time",
		last.code(), "not in the server's container|not running|keeps changing"}, last)
	heidi.served(t)
}

// bounded runs a command that need not end: Docker 20.10 has forgotten an exec for
// ever when the container ended just then.
func bounded(cmd *exec.Cmd) ([]byte, error) {
	forgotten := time.AfterFunc(30*time.Second, func() { cmd.Process.Kill() })
	defer forgotten.Stop()
	return cmd.Output()
}

func (a answer) code() broker.Code { return broker.Code(a.said.Code) }
