package spawnerhook_test

import (
	"context"
	"errors"
	"runtime"
	"strings"
	"testing"
	"time"

	"tokenbroker/broker"
	"tokenbroker/spawnerhook"
)

func TestAProcessServerIsItsUID(t *testing.T) {
	d, uid := spawnerhook.NewProcess(), uint32(1000)
	w, err := d.Bind(t.Context(), broker.Registration{UID: &uid})
	if err != nil || w.UID != 1000 || w.Level != "uid" || w.Container != "" {
		t.Fatalf("Bind: got %+v, %v", w, err)
	}
	if err := d.Attest(&broker.Peer{UID: 1001}, w); !errors.Is(err, broker.ErrUnknownPeer) || !strings.Contains(err.Error(), "1001") {
		t.Errorf("Attest of another uid: got %v", err)
	}
	if level, err := d.Check(t.Context()); level != "uid" || err != nil {
		t.Errorf("Check: got %q, %v", level, err)
	}
}

func TestAProcessServerNeedsAUID(t *testing.T) {
	_, err := spawnerhook.NewProcess().Bind(t.Context(), broker.Registration{})
	if !errors.Is(err, broker.ErrInvalid) || !strings.Contains(err.Error(), "uid") {
		t.Errorf("Bind: got %v, want invalid: uid", err)
	}
}

func TestAContainersWorkloadIsNoUID(t *testing.T) {
	for _, w := range []*broker.Workload{nil, {}, {Container: "x", Level: "pidfd+ns"}} {
		if err := spawnerhook.NewProcess().Attest(&broker.Peer{UID: 0}, w); !errors.Is(err, broker.ErrUnknownPeer) {
			t.Errorf("Attest: got %v, want unknown peer", err)
		}
	}
}

func TestNothingHappensToUIDs(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := spawnerhook.NewProcess().Watch(ctx, time.Time{}, func(name string) { t.Errorf("Watch: got %q", name) }, nil)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("Watch: got %v", err)
	}
}

func TestDockerOnOtherSystemsSaysSo(t *testing.T) {
	if runtime.GOOS == "linux" {
		if _, err := spawnerhook.NewDocker(spawnerhook.DockerConfig{}); err == nil || !strings.Contains(err.Error(), "directories") {
			t.Errorf("NewDocker without directories: got %v", err)
		}
		return
	}
	if _, err := spawnerhook.NewDocker(spawnerhook.DockerConfig{}); err == nil || !strings.Contains(err.Error(), "Linux") {
		t.Errorf("NewDocker: got %v", err)
	}
}
