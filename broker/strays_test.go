package broker_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"tokenbroker/broker"
)

func TestAContainerThatNoServerIsRegisteredForIsToldOfOnce(t *testing.T) {
	var mu sync.Mutex // guards the two below
	var mounts []broker.Mount
	var fails error
	docker := func(err error, m ...broker.Mount) {
		mu.Lock()
		defer mu.Unlock()
		mounts, fails = m, err
	}
	inBubble(t, func(r *rig) {
		r.running("alice", 100)
		hers := broker.Mount{Container: "c1", Name: "jupyter-alice", Directory: r.Registrations()[0].Directory}
		stray := broker.Mount{Container: "c2", Name: "by-hand", Directory: "/servers/2"}
		docker(nil, hers, stray)
		tells := func(n int, when string) {
			t.Helper()
			lines := r.audit.entries(t, "stray")
			if len(lines) != n || strings.Count(r.log.String(), "container=by-hand") != n {
				t.Fatalf("%s: audit %+v, log %s", when, lines, r.log)
			}
			for _, e := range lines {
				if e.Container != "c2" || e.Reason != "the container by-hand mounts /servers/2, and no server is registered there" {
					t.Errorf("audit: %+v", e)
				}
			}
		}
		time.Sleep(broker.SweepEvery + time.Second)
		tells(0, "seen once")
		time.Sleep(broker.SweepEvery)
		tells(1, "seen twice")
		time.Sleep(5 * broker.SweepEvery)
		tells(1, "still there")

		docker(nil, hers)
		time.Sleep(broker.SweepEvery)
		docker(nil, hers, stray)
		time.Sleep(broker.SweepEvery)
		docker(errors.New("Docker is away"))
		time.Sleep(broker.SweepEvery)
		docker(nil, hers, stray)
		tells(1, "there again, seen once, and then not seen for lack of an answer")
		time.Sleep(broker.SweepEvery)
		tells(2, "there again")

		docker(nil, broker.Mount{Container: "c2", Name: "by-hand", Directory: hers.Directory})
		time.Sleep(3 * broker.SweepEvery)
		tells(2, "its directory is registered: attestation's to refuse")
	}, func(c *broker.Config) {
		c.Mounts = func(context.Context) ([]broker.Mount, error) {
			mu.Lock()
			defer mu.Unlock()
			return mounts, fails
		}
	})
}
