//go:build linux

package attacks_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"tokenbroker/broker"
)

func (w *world) mounts(t *testing.T, alice *server) {
	volume := func(name, dir string) string {
		docker(t, "volume", "create", "-o", "type=none", "-o", "o=bind", "-o", "device="+dir, w.image+name)
		t.Cleanup(func() { dockerCommand("volume", "rm", "-f", w.image+name).Run() })
		return w.image + name
	}
	link := func(name, dir string) string {
		if err := os.Symlink(dir, w.path(name)); err != nil {
			t.Fatal(err)
		}
		return w.path(name)
	}
	parent := filepath.Dir(alice.dir)
	for _, a := range []struct {
		name, tried string
		options     []string
		socket      string
	}{
		{"her directory, read-only", "-v <alice's>:/run/tokenbroker:ro", alice.mount(), socket},
		{"her directory, writable", "the same without ro", []string{"-v", alice.dir + ":" + inside}, socket},
		{"a volume made of it", "docker volume create -o device=<alice's>", []string{"-v", volume("a", alice.dir) + ":" + inside}, socket},
		{"a symlink to it", "-v <link to alice's>:/run/tokenbroker", []string{"-v", link("a", alice.dir) + ":" + inside}, socket},
		{"its parent", "-v <all servers'>:/all", []string{"-v", parent + ":/all"}, "/all/" + filepath.Base(alice.dir) + "/broker.sock"},
		{"all that she mounts", "--volumes-from alice", []string{"--volumes-from", alice.name}, socket},
	} {
		at := attempt{"mounts", a.name, a.tried, broker.UnknownPeer, otherCgroup}
		w.refused(t, at, w.once(t, a.options, "ask", a.socket))
	}
	w.ownDirectory(t, volume, link)
	w.herDirectoryForOwn(t, alice)
}

// ownDirectory hides a second, writable way to the own directory: who can write
// there could put another socket in the place of the broker's.
func (w *world) ownDirectory(t *testing.T, volume, link func(name, dir string) string) {
	for i, a := range []struct {
		name, tried string
		option      func(s *server) string
	}{
		{"own directory writable through a volume", "device=<own>, beside the mount", func(s *server) string { return "-v=" + volume("o", s.dir) + ":/mnt" }},
		{"own directory writable through a symlink", "-v <link to own>:/mnt", func(s *server) string { return "-v=" + link("o", s.dir) + ":/mnt" }},
		{"own directory writable through its parent", "-v <all servers'>:/mnt", func(s *server) string { return "-v=" + filepath.Dir(s.dir) + ":/mnt" }},
		{"own directory writable through another container", "--volumes-from <who mounts own>", func(s *server) string {
			w.run(t, s.name+"-helper", "-v", s.dir+":/mnt")
			return "--volumes-from=" + s.name + "-helper"
		}},
	} {
		s := w.register(t, "main", a.name, "", fmt.Sprintf("own-%d", i))
		s.starts(t, a.option(s))
		w.notBound(t, attempt{kind: "mounts", name: a.name, tried: a.tried, reason: "can write to its server's directory"}, s)
	}
}

// herDirectoryForOwn is a server that a hub has registered, with another one's
// directory.
func (w *world) herDirectoryForOwn(t *testing.T, alice *server) {
	bob := w.register(t, "main", "frank", "frank", "frank")
	w.run(t, bob.name, alice.mount()...)
	e := w.find(t, "refusal to bind frank", func(e broker.Entry) bool { return e.Action == "bind" && e.User == "frank" })
	w.refusedBy(t, attempt{"mounts", "a registered server with hers for its own", "its container mounts alice's at /run/tokenbroker", broker.Denied,
		"not mount its server's directory but another one"}, "not bound", e)
	w.refused(t, attempt{"mounts", "the same asks", "on alice's socket", broker.UnknownPeer, otherCgroup}, execIn(t, bob.name, "ask", socket))

	both := w.register(t, "main", "grace", "grace", "grace")
	both.starts(t, "-v", alice.dir+":/mnt:ro")
	w.refused(t, attempt{"mounts", "a registered server with hers beside its own", "asks on alice's socket", broker.UnknownPeer, otherCgroup},
		execIn(t, both.name, "ask", "/mnt/broker.sock"))
}
