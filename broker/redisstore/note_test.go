package redisstore_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"tokenbroker/broker/brokertest"
	"tokenbroker/broker/redisstore"
)

// listen returns what is heard at s until the test ends.
func listen(t testing.TB, s *redisstore.Store) <-chan string {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	heard, ended := make(chan string, 1000), make(chan struct{})
	go func() {
		defer close(ended)
		s.Listen(ctx, func(note string) { heard <- note })
	}()
	t.Cleanup(func() { cancel(); <-ended })
	return heard
}

func hears(t testing.TB, notes <-chan string, want string) {
	t.Helper()
	select {
	case got := <-notes:
		if got != want {
			t.Errorf("heard %q, want %q", got, want)
		}
	case <-time.After(30 * time.Second):
		t.Fatalf("nothing was heard within 30 s, want %q", want)
	}
}

// hearsAgain checks that notes get through once Redis is back, and that it was
// said before that some were missed.
func hearsAgain(t *testing.T, s *redisstore.Store, notes <-chan string) {
	t.Helper()
	hears(t, notes, "")
	eventually(t, "a note is heard", func() error {
		if err := s.Tell(t.Context(), "again"); err != nil {
			return err
		}
		select {
		case note := <-notes:
			if note == "again" {
				return nil
			}
			return fmt.Errorf("heard %q", note)
		case <-time.After(time.Second):
			return errors.New("heard nothing")
		}
	})
}

func TestNotesAreHeardAgainAfterARestart(t *testing.T) {
	server := brokertest.StartRedis(t)
	s := open(t, redisstore.Config{Socket: server.Socket})
	notes := listen(t, s)
	hears(t, notes, "")
	for range 2 {
		server.Kill()
		if err := s.Tell(t.Context(), "to nobody"); err == nil {
			t.Error("Tell without Redis: got no error")
		}
		server.Start()
		hearsAgain(t, s, notes)
	}
}

func TestListenWaitsForARedisThatIsNotThereYet(t *testing.T) {
	server := brokertest.StartRedis(t)
	server.Kill()
	s := open(t, redisstore.Config{Socket: server.Socket})
	notes := listen(t, s)
	if _, err := s.Pulse(t.Context()); err == nil {
		t.Fatal("Redis is there")
	}
	server.Start()
	hearsAgain(t, s, notes)
}

func TestNotesStayInTheirDeployment(t *testing.T) {
	_, cfg := mini(t)
	cfg.Deployment = "lab"
	lab := open(t, cfg)
	notes := listen(t, lab)
	hears(t, notes, "")
	for _, name := range []string{"Lab", "lab:notes", "*", "la"} {
		cfg.Deployment = name
		if err := open(t, cfg).Tell(t.Context(), "not for lab"); err != nil {
			t.Errorf("%s: Tell: %v", name, err)
		}
	}
	if err := lab.Tell(t.Context(), "for lab"); err != nil {
		t.Fatal(err)
	}
	hears(t, notes, "for lab")
}

func TestASilentConnectionIsAskedAndThenGivenUp(t *testing.T) {
	s := open(t, redisstore.Config{Addr: publisher(t, func(io.Writer) {})})
	s.SetQuiet(20 * time.Millisecond)
	notes := listen(t, s)
	hears(t, notes, "")
	hears(t, notes, "") // another connection
	hears(t, notes, "")

	alive := 0
	quiet := open(t, redisstore.Config{Addr: publisher(t, func(w io.Writer) {
		alive++
		io.WriteString(w, "*2\r\n$4\r\npong\r\n$0\r\n\r\n")
		if alive == 5 {
			io.WriteString(w, "*3\r\n$7\r\nmessage\r\n$1\r\nx\r\n$4\r\nnote\r\n")
		}
	})})
	quiet.SetQuiet(20 * time.Millisecond)
	notes = listen(t, quiet)
	hears(t, notes, "")
	hears(t, notes, "note") // over the same
}

// publisher is a Redis that takes subscriptions, and does as told when it is
// asked whether it is there.
func publisher(t *testing.T, ping func(io.Writer)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			r := bufio.NewReader(conn)
			for {
				args, err := command(r)
				if err != nil {
					break
				}
				switch strings.ToLower(args[0]) {
				case "subscribe":
					io.WriteString(conn, "*3\r\n$9\r\nsubscribe\r\n$1\r\nx\r\n:1\r\n")
				case "ping":
					ping(conn)
				default:
					io.WriteString(conn, "-ERR unknown command\r\n")
				}
			}
			conn.Close()
		}
	}()
	return l.Addr().String()
}
