package spawnerhook_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"tokenbroker/broker"
)

func TestMountsAreThoseOfServersInContainersThatRun(t *testing.T) {
	l := newLab(t)
	create := func(name, source string) string {
		return l.engine.Create(t, name, fmt.Appendf(nil, `{"Mounts": [{"Type": "bind", "Source": %q, "Destination": "/x"}, {"Type": "volume", "Source": ""}]}`, source))
	}
	id := create("stray", "/servers/1/")
	create("broker", "/servers")
	create("deeper", "/servers/1/more")
	create("elsewhere", "/srv/1")
	create("stopped", "/servers/2")
	for _, name := range []string{"stray", "broker", "deeper", "elsewhere"} {
		l.engine.Start(name, 1)
	}
	got, err := l.docker.Mounts(t.Context(), "/servers/")
	if err != nil {
		t.Fatal(err)
	}
	want := []broker.Mount{{Container: id, Name: "stray", Directory: "/servers/1"}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Mounts (-want +got):\n%s", diff)
	}
	l.engine.Down()
	if _, err := l.docker.Mounts(t.Context(), "/servers"); err == nil || !strings.Contains(err.Error(), "Docker") {
		t.Errorf("without Docker: %v", err)
	}
}

func TestRealDockerTellsWhoMountsAServersDirectory(t *testing.T) {
	r := newRealLab(t)
	servers := t.TempDir()
	dir := filepath.Join(servers, "1")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	name := r.prefix + "-stray"
	r.run(t, name, "-v", dir+":/somewhere:ro", "-v", servers+":/all:ro")
	id := docker(t, "inspect", "-f", "{{.Id}}", name)
	got, err := r.docker.Mounts(t.Context(), servers)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]broker.Mount{{Container: id, Name: name, Directory: dir}}, got); diff != "" {
		t.Errorf("Mounts (-want +got):\n%s", diff)
	}
}
