package spawnerhook_test

import (
	"errors"
	"os"
	"strings"
	"testing"

	"tokenbroker/broker"
)

func TestWatchNamesTheContainersThatSomethingHappensTo(t *testing.T) {
	l := newLab(t)
	names := make(chan string, 100)
	watch(t, l.docker, func(name string) { names <- name })
	if got := within(t, "first hint", names); got != "" {
		t.Fatalf("Watch: got %q first, want a hint to look at all", got)
	}
	l.engine.Create(t, "one", nil)
	for _, step := range []struct {
		why  string
		do   func()
		want string
	}{
		{"start", func() { l.engine.Start("one", 1) }, "one"},
		{"die", func() { l.engine.Die("one") }, "one"},
		{"rename", func() { l.engine.Rename("one", "two") }, "two"},
		{"the name before", func() {}, "one"},
		{"destroy", func() { l.engine.Remove("two") }, "two"},
	} {
		step.do()
		if got := within(t, step.why, names); got != step.want {
			t.Errorf("Watch after %s: got %q, want %q", step.why, got, step.want)
		}
	}
}

func TestWatchConnectsAgainAndSaysThatHintsMayBeLost(t *testing.T) {
	l := newLab(t)
	names := make(chan string, 100)
	watch(t, l.docker, func(name string) { names <- name })
	within(t, "first hint", names)
	for range 2 {
		l.engine.Down()
		if err := l.engine.Up(); err != nil {
			t.Fatal(err)
		}
		if got := within(t, "hint after a restart of the engine", names); got != "" {
			t.Errorf("Watch: got %q, want a hint to look at all", got)
		}
	}
}

func TestWatchLosesNoHintToASlowReader(t *testing.T) {
	l := newLab(t)
	release, names := make(chan struct{}), make(chan string, 100)
	watch(t, l.docker, func(name string) {
		names <- name
		<-release
	})
	within(t, "first hint", names)
	// Several times what the engine and the sockets hold for somebody who does
	// not read, while the reader of the hints is busy.
	l.engine.Create(t, "busy", nil)
	for range 10 {
		for range 1000 {
			l.engine.Start("busy", 1)
		}
		drained := make(chan bool)
		go func() {
			l.engine.Drain()
			close(drained)
		}()
		within(t, "engine's events to be read", drained)
	}
	l.engine.Create(t, "last", nil)
	l.engine.Start("last", 1)
	close(release)
	for within(t, "the last container's hint", names) != "last" {
	}
}

func TestOfDockerExecTheProgramIsToldAndNoArgument(t *testing.T) {
	l := newLab(t)
	names, execs := make(chan string, 100), make(chan broker.Exec, 100)
	watch(t, l.docker, func(name string) { names <- name }, func(x broker.Exec) { execs <- x })
	within(t, "first hint", names)
	id := l.engine.Create(t, "one", nil)
	var alike []string
	for _, command := range []string{"/bin/sh -c 'echo hunter2'", "/bin/sh -c 'echo hunter2'", "/bin/sh -c ls", ""} {
		l.engine.Exec("one", command)
		x := within(t, "command", execs)
		want := "sh"
		if command == "" {
			want = "?"
		}
		if x.Container != id || x.Name != "one" || x.Command != want || strings.Contains(x.Alike, "hunter2") {
			t.Errorf("of %q Watch tells %+v", command, x)
		}
		alike = append(alike, x.Alike)
	}
	if alike[0] != alike[1] || alike[1] == alike[2] {
		t.Errorf("equal command lines are not told from others: %q", alike)
	}
	l.engine.Create(t, "two", nil)
	l.engine.Start("two", 1)
	if got := within(t, "hint", names); got != "two" {
		t.Errorf("Watch: got %q, want two: a command is no hint", got)
	}
	l.engine.Down()
	if err := l.engine.Up(); err != nil {
		t.Fatal(err)
	}
	within(t, "hint after a restart", names)
	if log := l.log.String(); strings.Contains(log, "hunter2") || !strings.Contains(log, "connecting again") {
		t.Errorf("log: %s", log)
	}
}

func TestCheckRefusesByName(t *testing.T) {
	docker, plain := []string{"Engine", "containerd"}, []string{"name=seccomp,profile=default"}
	for _, tt := range []struct {
		why                  string
		components, security []string
		want                 string
	}{
		{"Podman", []string{"Podman Engine", "Conmon"}, plain, "Podman"},
		{"rootless Docker", docker, append(plain, "name=rootless"), "rootless"},
		{"userns-remap", docker, append(plain, "name=userns"), "userns-remap"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			l := newLab(t)
			l.engine.Be(tt.components, tt.security)
			_, err := l.docker.Check(t.Context())
			if !errors.Is(err, broker.ErrDenied) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Check: got %v, want a refusal of %s", err, tt.want)
			}
		})
	}
}

func TestCheckSaysTheLevel(t *testing.T) {
	l := newLab(t)
	level, err := l.docker.Check(t.Context())
	if err != nil || level != "pidfd" && level != "proc" {
		t.Errorf("Check without namespaces to read: got %q, %v", level, err)
	}
	l.namespaces(t, os.Getpid(), 4026531836, 4026531841) // the engine is in this process
	withNamespaces, err := l.docker.Check(t.Context())
	if err != nil || level == "pidfd" && withNamespaces != "pidfd+ns" {
		t.Errorf("Check: got %q, %v", withNamespaces, err)
	}
}

func TestAnEngineThatIsTooOldOrNotThereSaysSo(t *testing.T) {
	l := newLab(t)
	l.engine.SpeakAPI("1.39")
	if _, err := l.docker.Check(t.Context()); !errors.Is(err, broker.ErrDenied) || !strings.Contains(err.Error(), "20.10 or newer is needed: it speaks API version 1.39") {
		t.Errorf("Check of an old engine: got %v", err)
	}
	if _, err := l.docker.Bind(t.Context(), alice); !errors.Is(err, broker.ErrUnavailable) || !strings.Contains(err.Error(), "1.39") {
		t.Errorf("Bind on an old engine: got %v", err)
	}
	l.engine.SpeakAPI("1.41")
	if _, err := l.docker.Check(t.Context()); err != nil {
		t.Errorf("Check after an upgrade: %v", err)
	}
	l.engine.Down()
	if _, err := l.docker.Check(t.Context()); !errors.Is(err, broker.ErrUnavailable) {
		t.Errorf("Check without an engine: got %v", err)
	}
}
