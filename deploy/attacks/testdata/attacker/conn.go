package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const patience = 20 * time.Second

// ask sends one request and prints the answer: for a token, unless it is said
// for what. A target that begins with POST sends an empty object.
func ask(socket string, more ...string) error {
	c, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	defer c.Close()
	return askOn(c, more...)
}

func askOn(c net.Conn, more ...string) error {
	c.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(c, request(more...)); err != nil {
		return err
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return err
	}
	body, err := io.ReadAll(resp.Body)
	say(map[string]any{"status": resp.StatusCode, "body": string(body)})
	return err
}

func request(more ...string) string {
	target, method, body := "/v1/token?audience=storage", "GET", ""
	if len(more) > 0 && more[0] != "" {
		target = more[0]
	}
	host := "Host: localhost\r\n"
	var headers strings.Builder
	for _, h := range more[min(1, len(more)):] {
		if strings.HasPrefix(h, "Host:") {
			host = ""
		}
		headers.WriteString(h + "\r\n")
	}
	if t, ok := strings.CutPrefix(target, "POST "); ok {
		target, method, body = t, "POST", "{}"
		fmt.Fprintf(&headers, "Content-Type: application/json\r\nContent-Length: %d\r\n", len(body))
	}
	return fmt.Sprintf("%s %s HTTP/1.1\r\n%s%s\r\n%s", method, target, host, headers.String(), body)
}

// raw sends what is on standard input and prints all that comes back.
func raw(socket string) error {
	c, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	go io.Copy(c, os.Stdin)
	b, err := io.ReadAll(c)
	say(map[string]any{"raw": string(b), "ended": fmt.Sprint(err)})
	return nil
}

// hold makes n connections that ask and never read, and keeps them until
// standard input ends.
func hold(socket string, n int) error {
	var conns []net.Conn
	refused := 0
	for range n {
		c, err := net.Dial("unix", socket)
		if err != nil {
			refused++
			continue
		}
		c.SetDeadline(time.Now().Add(time.Second))
		for range 20 { // answers pile up in front of a reader who does not read
			if _, err := io.WriteString(c, request()); err != nil {
				break
			}
		}
		conns = append(conns, c)
	}
	say(map[string]any{"made": len(conns), "refused": refused})
	io.Copy(io.Discard, os.Stdin)
	return nil
}

// half makes n connections and sends half a request on each. It keeps as many
// as it may.
func half(socket string, n int) error {
	const atOnce = 500
	var kept []net.Conn
	turned := 0
	for range n {
		c, err := net.Dial("unix", socket)
		if err != nil {
			turned++
			continue
		}
		c.SetDeadline(time.Now().Add(time.Second))
		if _, err := io.WriteString(c, request()[:20]); err != nil {
			turned++
		}
		if kept = append(kept, c); len(kept) > atOnce {
			kept[0].Close()
			kept = kept[1:]
		}
	}
	say(map[string]any{"made": n, "refused": turned})
	io.Copy(io.Discard, os.Stdin)
	return nil
}

// relay passes everything that comes to path on to a socket.
func relay(socket, path string) error {
	l, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	say(map[string]any{"ready": true})
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		to, err := net.Dial("unix", socket)
		if err != nil {
			return err
		}
		var both sync.WaitGroup
		both.Go(func() { io.Copy(to, c); to.(*net.UnixConn).CloseWrite() })
		both.Go(func() { io.Copy(c, to); c.(*net.UnixConn).CloseWrite() })
		go func() { both.Wait(); c.Close(); to.Close() }()
	}
}

// fake answers in the broker's place.
func fake(path string) error {
	if err := os.Remove(path); err != nil {
		return err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	if err := os.Chmod(path, 0o666); err != nil {
		return err
	}
	say(map[string]any{"ready": true})
	return http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, `{"access_token":"planted","token_type":"Bearer"}`)
	}))
}

// pass connects, hands the connection on and ends when its input does.
func pass(socket, channel string) error {
	c, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	f, err := c.(*net.UnixConn).File()
	if err != nil {
		return err
	}
	to, err := net.Dial("unix", channel)
	if err != nil {
		return err
	}
	_, _, err = to.(*net.UnixConn).WriteMsgUnix([]byte{0}, unix.UnixRights(int(f.Fd())), nil)
	say(map[string]any{"passed": err == nil})
	io.Copy(io.Discard, os.Stdin)
	return err
}

// take takes a connection that pass hands on, and asks on it when there is a file.
func take(channel, when string) error {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: channel, Net: "unix"})
	if err != nil {
		return err
	}
	say(map[string]any{"ready": true})
	from, err := l.AcceptUnix()
	if err != nil {
		return err
	}
	c, err := received(from)
	if err != nil {
		return err
	}
	for _, err := os.Stat(when); err != nil; _, err = os.Stat(when) {
		time.Sleep(10 * time.Millisecond)
	}
	return askOn(c)
}

func received(from *net.UnixConn) (net.Conn, error) {
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
	return net.FileConn(f)
}

// own connects and passes the connection to a child of its own, which asks while
// this process lives.
func own(socket string) error {
	c, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	f, err := c.(*net.UnixConn).File()
	if err != nil {
		return err
	}
	cmd := exec.Command("/proc/self/exe", "inherit")
	cmd.ExtraFiles, cmd.Stdout, cmd.Stderr = []*os.File{f}, os.Stdout, os.Stderr
	return cmd.Run()
}

func init() {
	commands["inherit"] = func([]string) error {
		c, err := net.FileConn(os.NewFile(3, "inherited"))
		if err != nil {
			return err
		}
		return askOn(c)
	}
}
