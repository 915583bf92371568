package spawnerhook_test

import (
	"context"
	"net"
	"net/http"
	"net/http/httputil"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"tokenbroker/spawnerhook"
)

// A site may keep the broker out of the group docker, which is root, by a proxy
// before Docker's socket that lets only questions through.
func TestDockerBehindAProxyThatOnlyReads(t *testing.T) {
	r := newRealLab(t)
	var err error
	r.docker, err = spawnerhook.NewDocker(spawnerhook.DockerConfig{Socket: readingProxy(t), Directory: r.directory})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.docker.Close() })
	if _, err := r.docker.Check(t.Context()); err != nil {
		t.Errorf("Check: %v", err)
	}
	t.Run("processes of the container are attested", r.attested)
	t.Run("Watch names containers", r.watched)
	s := r.server(t, "zoe")
	r.run(t, s.name(), "-v", s.mount(), "-v", spawnerhook.DefaultSocket+":/docker.sock:ro")
	if _, err := r.docker.Bind(t.Context(), s.registration); err == nil {
		t.Error("a container with Docker's own socket, past the proxy, was bound")
	}
}

// readingProxy passes GET and HEAD on to Docker and fails the test at anything else.
func readingProxy(t *testing.T) (socket string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "proxy")
	if err != nil {
		t.Fatal(err)
	}
	socket = filepath.Join(dir, "docker.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	toDocker := &httputil.ReverseProxy{
		Rewrite:       func(r *httputil.ProxyRequest) { r.Out.URL.Scheme, r.Out.URL.Host = "http", "docker" },
		FlushInterval: -1, // of events
		Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", spawnerhook.DefaultSocket)
		}},
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if q.Method != http.MethodGet && q.Method != http.MethodHead {
			t.Errorf("the broker asked Docker to change something: %s %s", q.Method, q.URL.Path)
			http.Error(w, "this proxy only reads", http.StatusForbidden)
			return
		}
		toDocker.ServeHTTP(w, q)
	})}
	var serving sync.WaitGroup
	serving.Go(func() { server.Serve(l) })
	t.Cleanup(func() {
		server.Close()
		serving.Wait()
		os.RemoveAll(dir)
	})
	return socket
}
