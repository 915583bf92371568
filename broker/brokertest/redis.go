package brokertest

import (
	"bufio"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A Redis is a real redis-server of the test's own.
type Redis struct {
	Socket string // in a directory that only we may open
	Addr   string // host:port, of those that StartSentinels and StartCluster start
	Dir    string // configuration, append-only file, log

	t       testing.TB
	process *exec.Cmd
	args    []string // of redis-server, beside the configuration
}

// StartRedis starts a redis-server on a Unix socket, as a careful administrator
// would: append-only file, no eviction, no TCP port. settings are lines of
// redis.conf that say otherwise. It ends with the test.
//
// Without redis-server the test is skipped on a laptop, and fails in CI.
func StartRedis(t testing.TB, settings ...string) *Redis {
	t.Helper()
	return startRedis(t, settings)
}

func startRedis(t testing.TB, settings []string, args ...string) *Redis {
	t.Helper()
	if _, err := exec.LookPath("redis-server"); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal("this test needs redis-server 7, and CI must have it")
		}
		t.Skip("this test needs redis-server 7")
	}
	// Not t.TempDir: it holds the test's name, and a socket's path must be short.
	dir, err := os.MkdirTemp("", "redis-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })

	r := &Redis{Socket: filepath.Join(dir, "redis.sock"), Dir: dir, t: t, args: args}
	conf := append([]string{
		"port 0", "unixsocket " + r.Socket, "unixsocketperm 700", "dir " + dir, "logfile " + filepath.Join(dir, "log"),
		"daemonize no", `save ""`, "appendonly yes",
	}, settings...)
	if err := os.WriteFile(filepath.Join(dir, "redis.conf"), []byte(strings.Join(conf, "\n")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r.Start()
	t.Cleanup(r.Kill)
	return r
}

// Start starts the server (again) and returns when it answers and has read what
// it has on disk.
func (r *Redis) Start() {
	r.t.Helper()
	r.Launch()
	r.Ready()
}

// Launch is Start that doesn't wait; see Ready.
func (r *Redis) Launch() {
	r.t.Helper()
	r.process = exec.Command("redis-server", append([]string{filepath.Join(r.Dir, "redis.conf")}, r.args...)...)
	if err := r.process.Start(); err != nil {
		r.t.Fatal(err)
	}
}

// Ready returns when the server answers and has read what it has on disk.
func (r *Redis) Ready() {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !answers(r.Socket) {
		select {
		case <-tick.C:
		case <-ctx.Done():
			log, _ := os.ReadFile(filepath.Join(r.Dir, "log"))
			r.Kill()
			r.t.Fatalf("redis-server doesn't answer; its log:\n%s", log)
		}
	}
}

// Kill ends the server as a crash would, and returns when it is gone. What it
// had written to its append-only file is there after the next Start.
func (r *Redis) Kill() {
	if r.process == nil {
		return
	}
	r.process.Process.Kill()
	r.process.Wait()
	r.process = nil
}

// Freeze stops the server in the middle of whatever it does, as a machine that
// hangs; Thaw lets it go on.
func (r *Redis) Freeze() { r.signal(syscall.SIGSTOP) }

// Thaw ends Freeze.
func (r *Redis) Thaw() { r.signal(syscall.SIGCONT) }

func (r *Redis) signal(s os.Signal) {
	r.t.Helper()
	if err := r.process.Process.Signal(s); err != nil {
		r.t.Fatal(err)
	}
}

// answers reports whether a server is up; that it wants a password first is an
// answer too.
func answers(socket string) bool {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return false
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Second))
	if _, err := conn.Write([]byte("PING\r\n")); err != nil {
		return false
	}
	line, err := bufio.NewReader(conn).ReadString('\n')
	return err == nil && !strings.HasPrefix(line, "-LOADING")
}
