package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
	"tokenbroker/spawnerhook"
)

func TestADryRunTellsServersFromNeighbours(t *testing.T) {
	fuse := spawnerhook.Finding{Name: "sys_admin", Verdict: spawnerhook.Refuse, Says: "SYS_ADMIN", Forges: true}
	ipc := spawnerhook.Finding{Name: "ipc_host", Verdict: spawnerhook.Report, Says: "host IPC"}
	users := spawnerhook.Finding{Name: "userns_host", Verdict: spawnerhook.Allow, Says: "host users"}
	container := func(name string, server bool, f ...spawnerhook.Finding) spawnerhook.Container {
		return spawnerhook.Container{Name: name, Server: server, Findings: f}
	}
	all := forecasts([]spawnerhook.Container{
		container("cadvisor", false, fuse), container("db", false, ipc), container("hub", false, fuse),
		container("jupyter-alice", false, ipc, fuse), container("jupyter-bob", false, users), container("jupyter-carol", false, ipc),
		container("notebook", true), container("other", false),
	}, []string{"hub"}, "jupyter-*")
	var got []string
	for _, f := range all {
		got = append(got, f.Would+" "+f.Container)
	}
	want := []string{"neighbour cadvisor", "refuse jupyter-alice", "ok jupyter-bob", "report jupyter-carol", "ok notebook"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	err, ok := refusals(all).(*failure)
	if !ok || err.Error() != "1 server would get no tokens" || err.hint != "start them without, or set servers.docker.posture: {sys_admin: allow}" {
		t.Errorf("refusals: got %v", err)
	}
	if err := refusals(all[2:]); err != nil {
		t.Errorf("refusals without one: got %v", err)
	}
}

func TestADryRunAsksDockerWithoutABroker(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("there is no attestation by Docker here")
	}
	engine := brokertest.NewEngine(t)
	config := site(t, minimal+"servers: {docker: {socket: "+engine.Socket+"}}\n")
	dryRun := func(args ...string) (int, string, string) {
		var out, errs bytes.Buffer
		code := run(t.Context(), append([]string{"doctor", "-c", config, "--dry-run"}, args...), &out, &errs)
		return code, out.String(), errs.String()
	}
	if code, out, errs := dryRun(); code != 0 || !strings.HasPrefix(out, "WOULD") {
		t.Errorf("nothing runs: exit code %d, %s%s", code, out, errs)
	}
	// It runs as this process, which is in no container and has all of the host's files.
	engine.Create(t, "jupyter-alice", []byte(`{"Config": {"Image": "lab:1"}, "State": {}, "HostConfig": {"Privileged": true}}`))
	engine.Start("jupyter-alice", os.Getpid())
	code, out, errs := dryRun()
	if code != 1 || !strings.Contains(out, "refuse  jupyter-alice  privileged") || !strings.Contains(errs, "1 server would get no tokens") || !strings.Contains(errs, "privileged: allow") {
		t.Errorf("a privileged server: exit code %d, %s%s", code, out, errs)
	}
	code, out, _ = dryRun("-o", "json")
	var all []forecast
	if err := json.Unmarshal([]byte(out), &all); err != nil || code != 1 || len(all) != 1 || all[0].Would != "refuse" || len(all[0].Findings) == 0 {
		t.Errorf("as JSON: exit code %d, %v, %s", code, err, out)
	}
	if code, out, errs := dryRun("--servers", "lab-*"); code != 0 || !strings.Contains(out, "neighbour  jupyter-alice") {
		t.Errorf("by another name: exit code %d, %s%s", code, out, errs)
	}
	if code, _, errs := dryRun("--servers", "["); code != 2 || !strings.Contains(errs, "not a pattern") {
		t.Errorf("no pattern: exit code %d, %s", code, errs)
	}
	engine.SpeakAPI("1.39")
	if code, _, errs := dryRun(); code == 0 || !strings.Contains(errs, "20.10 or newer is needed") {
		t.Errorf("an old engine: exit code %d, %s", code, errs)
	}
}

func TestABrokerStartsWithoutDockerButNotOnAnotherEngine(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("there is no attestation by Docker here")
	}
	engine := brokertest.NewEngine(t)
	cfg, err := load(site(t, minimal+"servers: {docker: {socket: "+engine.Socket+"}}\n"))
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	a, err := openAttestor(cfg, func(broker.ServerKey) (string, error) { return "", nil }, log)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if err := checkEngine(t.Context(), a, log); err != nil {
		t.Errorf("with Docker: %v", err)
	}
	engine.Be([]string{"Podman Engine"}, nil)
	if err := checkEngine(t.Context(), a, log); !errors.Is(err, broker.ErrDenied) || !strings.Contains(err.Error(), "Podman") {
		t.Errorf("with Podman: %v", err)
	}
	engine.Down()
	if err := checkEngine(t.Context(), a, log); err != nil {
		t.Errorf("without Docker: %v", err)
	}
}
