//go:build linux

package attacks_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"syscall"
	"testing"
	"time"

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
	out, err := exec.Command(w.program, "users", "disconnect", "olivia", "--hub", "main", "--socket", w.path("admin.sock")).CombinedOutput()
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
	const last = "/proc/sys/kernel/ns_last_pid"
	at := attempt{"identity", "a process number used again", "ns_last_pid: the maker's number is now in alice's container",
		broker.UnknownPeer, gone + "|cgroup"}
	if f, err := os.OpenFile(last, os.O_WRONLY, 0); err != nil {
		theTable.add(line{"not run here", at.name, at.tried, "-", err.Error()})
		return
	} else {
		f.Close()
	}
	inside := dockerCommand("exec", "-i", alice.name, "/attacker", "fork")
	orders, err := inside.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := inside.StdoutPipe()
	if err == nil {
		err = inside.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() { orders.Close(); inside.Wait() }()
	replies := bufio.NewReader(out)
	order := func(what string) {
		fmt.Fprintln(orders, what)
		if _, err := replies.ReadString('\n'); err != nil {
			t.Fatal(err)
		}
	}
	mine := regexp.MustCompile(`:/\S*` + alice.id)
	var answers []answer
	hits, closed, tries := 0, 0, 0
	for ; hits < reuses && tries < 20*reuses; tries++ {
		frozen := hits%2 == 1
		if frozen {
			w.broker.cmd.Process.Signal(syscall.SIGSTOP)
		}
		conn, pid := w.maker(t, alice)
		if frozen {
			io.WriteString(conn, question)
		}
		os.WriteFile(last, fmt.Appendf(nil, "%d", pid-1), 0)
		order("fork")
		text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
		hit := mine.Match(text)
		if frozen {
			w.broker.cmd.Process.Signal(syscall.SIGCONT)
		}
		if hit {
			hits++
			a := answer{}
			if frozen {
				conn.SetDeadline(time.Now().Add(30 * time.Second))
				a = answerOn(conn)
			} else {
				a = askOn(conn)
			}
			if a.Error != "" {
				closed++
			} else {
				answers = append(answers, a)
			}
		}
		conn.Close()
		order("kill")
	}
	if hits < reuses {
		t.Errorf("only %d of %d numbers were used again, in %d tries", hits, reuses, tries)
	}
	if i := slices.IndexFunc(answers, func(a answer) bool { return a.code() != broker.UnknownPeer }); i > 0 {
		t.Errorf("%s: answer %d is %d %s", at.name, i, answers[i].Status, answers[i].said.Code)
	}
	at.tried = fmt.Sprintf("%s: %d runs, half of them in the backlog", at.tried, hits)
	t.Logf("%d numbers used again in %d tries", hits, tries)
	if len(answers) == 0 {
		theTable.add(line{at.kind, at.name, at.tried, "all connections are closed", "-"})
		return
	}
	at.tried += fmt.Sprintf(", %d refused, %d closed", len(answers), closed)
	w.refused(t, at, answers[0])
}

// maker runs a process that connects to a server's socket, passes the connection
// here and ends; its number is free when maker returns.
func (w *world) maker(t *testing.T, s *server) (*net.UnixConn, int) {
	t.Helper()
	name := filepath.Join(w.shared, "maker.sock")
	os.Remove(name)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: name, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	cmd := exec.Command(w.attack, "pass", s.socket(), name)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("pass: %v: %s", err, out)
	}
	from, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	conn, err := received(from)
	if err != nil {
		t.Fatal(err)
	}
	return conn, cmd.ProcessState.Pid()
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
