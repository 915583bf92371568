//go:build linux

package attacks_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tokenbroker/broker"
)

// alone are the attacks that hold the provider, or stop or freeze the broker.
func (w *world) alone(t *testing.T, alice *server) {
	w.hangingExchange(t)
	w.numbersAgain(t, alice)
	w.planted(t)
}

// hangingExchange revokes while the provider takes its time to answer.
func (w *world) hangingExchange(t *testing.T) {
	w.user(t, "main", "olivia", "olivia")
	s := w.register(t, "main", "olivia", "olivia", "olivia")
	s.starts(t)
	arrived, release := w.idp.Hold()
	defer release()
	answered := make(chan answer, 1)
	go func() {
		for {
			out, err := dockerCommand("exec", s.name, "/attacker", "ask", socket).CombinedOutput()
			if a := read(t, out, err); a.said.Code != string(broker.Pending) {
				answered <- a
				return
			}
		}
	}()
	<-arrived
	out, err := exec.Command(w.program, "users", "disconnect", "olivia", "--hub", "main", "--socket", w.sockets+"/admin.sock").CombinedOutput()
	if err != nil {
		t.Fatalf("disconnect: %v: %s", err, out)
	}
	release()
	a := <-answered
	w.refused(t, attempt{"policy", "a revocation during a hanging exchange", "users disconnect, then the provider answers", broker.Revoked, "."}, a)
}

const reuses = 100

// numbersAgain gives the number of a process that has connected to a process in
// alice's container. In half of the runs the broker has not yet seen the
// connection by then.
func (w *world) numbersAgain(t *testing.T, alice *server) {
	at := attempt{"identity", "a process number used again", "ns_last_pid: the maker's number is now in alice's container",
		broker.UnknownPeer, gone + "|another one by now|cgroup"}
	f, err := os.OpenFile(lastPID, os.O_WRONLY, 0)
	if err != nil {
		theTable.add(line{"not run here", at.name, at.tried, "-", err.Error()})
		return
	}
	f.Close()
	c := w.forker(t, alice)
	answers := map[bool][]answer{} // by whether the broker was frozen
	hits, tries := 0, 0
	for ; hits < reuses && tries < 20*reuses; tries++ {
		if a, hit := w.reuse(t, c, alice, hits%2 == 1); hit {
			answers[hits%2 == 1] = append(answers[hits%2 == 1], a)
			hits++
		}
	}
	t.Logf("%d numbers used again in %d tries", hits, tries)
	if hits < reuses {
		t.Errorf("only %d of %d numbers were used again, in %d tries", hits, reuses, tries)
	}
	w.reused(t, at, alice, answers[false])
	at.name += ", in the backlog"
	w.reused(t, at, alice, answers[true])
}

// reused checks the answers to connections whose maker's number is another's.
func (w *world) reused(t *testing.T, at attempt, alice *server, answers []answer) {
	at.tried = fmt.Sprintf("%s: %d runs", at.tried, len(answers))
	var closed, served int
	var refused []answer
	for _, a := range answers {
		switch {
		case a.Error != "":
			closed++
		case a.said.AccessToken != "":
			served++
			alice.got(a)
		default:
			refused = append(refused, a)
		}
	}
	// A kernel before 6.5 names a peer by its number alone.
	if served > 0 && strings.Contains(*tags, "nopidfd") && strings.Contains(at.name, "backlog") {
		theTable.add(line{"not protected", at.name, at.tried, fmt.Sprintf("without SO_PEERPIDFD %d got a token of alice", served),
			"token done, level proc: whoever may reach her socket, choose numbers and slow the broker down"})
		return
	}
	if served > 0 {
		t.Errorf("%s: %d GOT A TOKEN", at.name, served)
	}
	if len(refused) == 0 {
		theTable.add(line{at.kind, at.name, at.tried, "all connections are closed", "-"})
		return
	}
	at.tried += fmt.Sprintf(", %d refused, %d closed", len(refused), closed)
	w.refused(t, at, refused[0])
}

const lastPID = "/proc/sys/kernel/ns_last_pid"

// reuse makes a connection whose maker's number is used again in alice's
// container, and asks on it. It reports false if somebody else got the number.
func (w *world) reuse(t *testing.T, c *forker, alice *server, frozen bool) (a answer, hit bool) {
	if frozen {
		syscall.Kill(w.broker.pid, syscall.SIGSTOP)
	}
	conn, pid, end := w.maker(t, alice)
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Minute))
	asked := len(question) // all of it, before the maker ends
	if !frozen {
		asked = 10
	}
	io.WriteString(conn, question[:asked])
	if !frozen { // who reads has asked before who is there
		eventually(t, "the broker to read", func() bool { return unread(t, conn) == 0 })
	}
	end()
	os.WriteFile(lastPID, fmt.Appendf(nil, "%d", pid-1), 0)
	c.order(t, "fork")
	defer c.order(t, "kill")
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	hit = strings.Contains(string(text), alice.id)
	if frozen {
		syscall.Kill(w.broker.pid, syscall.SIGCONT)
	}
	if !hit {
		return answer{}, false
	}
	if _, err := io.WriteString(conn, question[asked:]); err != nil {
		return answer{Error: err.Error()}, true
	}
	return answerOn(conn), true
}

// unread is how many bytes that were written to conn its other end has not read.
func unread(t *testing.T, conn *net.UnixConn) (n int) {
	t.Helper()
	raw, err := conn.SyscallConn()
	if err == nil {
		cerr := raw.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.TIOCOUTQ) })
		err = errors.Join(err, cerr)
	}
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// A forker makes processes in a container.
type forker struct {
	orders  io.Writer
	replies *bufio.Reader
}

func (w *world) forker(t *testing.T, s *server) *forker {
	t.Helper()
	cmd := dockerCommand("exec", "-i", s.name, "/attacker", "fork")
	orders, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	replies, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { orders.Close(); cmd.Wait() })
	return &forker{orders, bufio.NewReader(replies)}
}

func (f *forker) order(t *testing.T, what string) {
	t.Helper()
	fmt.Fprintln(f.orders, what)
	if _, err := f.replies.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
}

// maker runs a process that connects to a server's socket and passes the connection
// here. Its number is free when end returns.
func (w *world) maker(t *testing.T, s *server) (conn *net.UnixConn, pid int, end func()) {
	t.Helper()
	path := filepath.Join(w.shared, "maker.sock")
	cmd := exec.Command(w.attack, "pass", s.socket(), path)
	hold, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	conn = handed(t, path, func() {
		if err := cmd.Start(); err != nil {
			t.Fatalf("pass: %v", err)
		}
	})
	return conn, cmd.Process.Pid, func() { hold.Close(); cmd.Wait() }
}

// planted puts other things in the place of a server's socket, out of a container
// that somebody has, wrongly, given the directory writable.
func (w *world) planted(t *testing.T) {
	victim := w.up(t, "main", "ursula", "ursula")
	mount := []string{"-v", victim.dir + ":" + inside}
	key := func() string {
		i, err := os.Stat(w.path("kek"))
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(i.Mode(), i.ModTime(), i.Size())
	}
	before := key()
	w.once(t, mount, "plant", inside, w.path("kek"))
	victim.again(t)
	victim.served(t)
	w.once(t, mount, "plant", inside, w.path("kek"))
	w.stopBroker(w.broker)
	w.startBroker(t)
	victim.served(t)
	if key() != before {
		t.Errorf("the broker changed a file outside: %s, it was %s", key(), before)
	}
	theTable.add(line{"mounts", "links planted in a directory", "writable by mistake; broker.sock and .new lead to the broker's key file",
		"after the next register, and after a restart: the socket is back, the file untouched", "register done"})

	w.runs(t, w.image+"-fake", mount, "fake", socket)
	eventually(t, "the fake's answer", func() bool {
		a := execIn(t, victim.name, "ask", socket)
		victim.got(a)
		return a.said.AccessToken == "planted"
	})
	victim.again(t)
	victim.served(t)
	theTable.add(line{"mounts", "a fake socket planted in a directory", "the same; a process of another container answers in the broker's place",
		"until the next register, a token of the attacker's choice; then the socket is back", "register done"})
}
