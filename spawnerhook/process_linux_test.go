package spawnerhook_test

import (
	"testing"

	"tokenbroker/broker"
	"tokenbroker/spawnerhook"
)

func TestAProcessMustLive(t *testing.T) {
	d, uid := spawnerhook.NewProcess(), uint32(1000)
	w, err := d.Bind(t.Context(), broker.Registration{UID: &uid})
	if err != nil {
		t.Fatal(err)
	}
	p := sleeper(t)
	caller := peer(t, p.pid)
	caller.UID = 1000
	wantAttested(t, d.Attest(caller, w), "")
	wantAttested(t, d.Alive(caller), "")
	p.kill()
	wantAttested(t, d.Attest(caller, w), "has ended")
	wantAttested(t, d.Alive(caller), "has ended")
	wantAttested(t, d.Attest(&broker.Peer{UID: 1000, PID: int32(p.pid)}, w), "neither pidfd nor start time")
}
