package brokertest

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"
)

// A RedisSet is several servers that stand in for each other, each with a TCP
// port on the loopback and one password for all.
type RedisSet struct {
	Password string
	Nodes    []*Redis

	// Master is the name that the Sentinels know the primary by, Sentinels are
	// they. A cluster has neither.
	Master    string
	Sentinels []*Redis
}

// Addrs are the addresses of some servers.
func Addrs(servers []*Redis) (all []string) {
	for _, r := range servers {
		all = append(all, r.Addr)
	}
	return all
}

// StartSentinels starts a primary, a replica of it and three Sentinels, which
// promote the replica about two seconds after the primary is gone; they do so if
// one of them is gone, too. It returns
// when they are ready for that.
func StartSentinels(t testing.TB) *RedisSet {
	t.Helper()
	s := &RedisSet{Password: "PASSW0RD", Master: "lab"}
	s.add(t)
	s.add(t, "replicaof 127.0.0.1 "+port(s.Nodes[0]))
	await(t, "the replica follows the primary", func() error {
		return s.Nodes[0].says(s.Password, "state=online", "INFO", "replication")
	})
	for range 3 {
		addr, settings := listening(t, s.Password)
		r := startRedis(t, append(settings,
			"sentinel monitor lab 127.0.0.1 "+port(s.Nodes[0])+" 2",
			"sentinel auth-pass lab "+s.Password,
			"sentinel sentinel-pass "+s.Password,
			"sentinel down-after-milliseconds lab 1000",
			"sentinel failover-timeout lab 3000"), "--sentinel")
		r.Addr = addr
		// Else they look around once in ten seconds.
		s.must(t, r, "SENTINEL", "DEBUG", "publish-period", "100", "info-period", "200", "ask-period", "100", "election-timeout", "500")
		s.Sentinels = append(s.Sentinels, r)
	}
	for _, r := range s.Sentinels {
		await(t, "the Sentinels know each other and the replica", func() error {
			return r.says(s.Password, "status=ok,address=127.0.0.1:"+port(s.Nodes[0])+",slaves=1,sentinels=3", "INFO", "sentinel")
		})
	}
	return s
}

// StartCluster starts a Redis Cluster of three masters, Nodes 0 to 2, and a
// replica of the first, Nodes 3. It returns when the cluster serves.
func StartCluster(t testing.TB) *RedisSet {
	t.Helper()
	s := &RedisSet{Password: "PASSW0RD"}
	for range 4 {
		s.add(t, "cluster-enabled yes", "cluster-node-timeout 1000")
	}
	const slots = 16384
	for i, r := range s.Nodes[:3] {
		s.must(t, r, "CLUSTER", "ADDSLOTSRANGE", strconv.Itoa(slots*i/3), strconv.Itoa(slots*(i+1)/3-1))
		s.must(t, r, "CLUSTER", "SET-CONFIG-EPOCH", strconv.Itoa(i+1))
	}
	for _, r := range s.Nodes[1:] {
		s.must(t, s.Nodes[0], "CLUSTER", "MEET", "127.0.0.1", port(r))
	}
	for _, r := range s.Nodes {
		await(t, "the nodes know each other", func() error { return r.says(s.Password, "cluster_known_nodes:4", "CLUSTER", "INFO") })
	}
	id := s.must(t, s.Nodes[0], "CLUSTER", "MYID")
	s.must(t, s.Nodes[3], "CLUSTER", "REPLICATE", id)
	await(t, "the replica follows the first master", func() error {
		return s.Nodes[0].says(s.Password, "state=online", "INFO", "replication")
	})
	for _, r := range s.Nodes {
		await(t, "the cluster serves", func() error { return r.says(s.Password, "cluster_state:ok", "CLUSTER", "INFO") })
		await(t, "all know the replica", func() error { return r.says(s.Password, "slave "+id, "CLUSTER", "NODES") })
	}
	return s
}

// add starts a server and makes it one of the nodes.
func (s *RedisSet) add(t testing.TB, settings ...string) {
	t.Helper()
	addr, listen := listening(t, s.Password)
	r := StartRedis(t, append(append(listen, "masterauth "+s.Password, "repl-diskless-sync-delay 0"), settings...)...)
	r.Addr = addr
	s.Nodes = append(s.Nodes, r)
}

// must runs a command that has to work, and returns the answer.
func (s *RedisSet) must(t testing.TB, r *Redis, command ...string) string {
	t.Helper()
	answer, err := r.Ask(s.Password, command...)
	if err != nil {
		t.Fatalf("%q at %s: %v", command, r.Addr, err)
	}
	return answer
}

// listening returns a free port's address and the lines of redis.conf that have
// a server listen there.
func listening(t testing.TB, password string) (addr string, settings []string) {
	t.Helper()
	p := FreePort(t)
	return fmt.Sprint("127.0.0.1:", p), []string{fmt.Sprint("port ", p), "bind 127.0.0.1", "requirepass " + password}
}

func port(r *Redis) string { return r.Addr[strings.LastIndexByte(r.Addr, ':')+1:] }

// FreePort returns a TCP port on the loopback that nobody listens at, nor at the one
// 10000 above, which is a cluster's bus. Both lie below the ports that the kernel
// gives to connections, so that nobody gets them by chance before they are used.
func FreePort(t testing.TB) int {
	t.Helper()
	for range 1000 {
		port := 12000 + rand.N(10000)
		if free(port) && free(port+10000) {
			return port
		}
	}
	t.Fatal("no TCP port is free")
	return 0
}

func free(port int) bool {
	l, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", port))
	if err != nil {
		return false
	}
	l.Close()
	return true
}

// await asks until there is no error.
func await(t testing.TB, what string, f func() error) {
	t.Helper()
	deadline := time.After(30 * time.Second)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("%s: not within 30 s: %v", what, err)
		}
	}
}

// says returns an error unless the answer to a command contains want.
func (r *Redis) says(password, want string, command ...string) error {
	answer, err := r.Ask(password, command...)
	if err == nil && !strings.Contains(answer, want) {
		err = fmt.Errorf("%s: want %q in the answer to %q: %s", r.Addr, want, command, answer)
	}
	return err
}

// Ask runs one command, over a connection of its own to the socket, past
// whatever the test is about. The answer must be one string or number.
func (r *Redis) Ask(password string, command ...string) (string, error) {
	conn, err := net.Dial("unix", r.Socket)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	in := bufio.NewReader(conn)
	if password != "" {
		if _, err := ask(conn, in, "AUTH", password); err != nil {
			return "", err
		}
	}
	return ask(conn, in, command...)
}

func ask(conn net.Conn, in *bufio.Reader, command ...string) (string, error) {
	fmt.Fprintf(conn, "*%d\r\n", len(command))
	for _, word := range command {
		fmt.Fprintf(conn, "$%d\r\n%s\r\n", len(word), word)
	}
	line, err := in.ReadString('\n')
	if err != nil {
		return "", err
	}
	rest := strings.TrimSpace(line[1:])
	switch line[0] {
	case '-':
		return "", errors.New(rest)
	case '$':
		n, err := strconv.Atoi(rest)
		if err != nil || n < 0 {
			return "", err
		}
		text := make([]byte, n)
		_, err = io.ReadFull(in, text)
		return string(text), err
	}
	return rest, nil
}
