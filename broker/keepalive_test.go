package broker_test

import (
	"testing"
	"time"

	"tokenbroker/broker"
)

func TestLongComputationKeepsItsSession(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.provider.SetIdle(30 * time.Minute)
		r.loggedIn("alice")
		p := r.running("alice", 100)
		other := r.second() // with a server of hers, too
		defer other.Close()
		other.running("alice", 200)
		time.Sleep(5 * time.Hour)
		r.token(p, broker.Want{})
		if n := r.provider.Calls("refresh"); n < 10 || n > 22 {
			t.Errorf("%d refreshes in 5 hours, want about one per two thirds of the idle limit, whichever broker does it", n)
		}
	})
}

func TestSessionWithoutAServerEndsAsTheProviderSays(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.provider.SetIdle(30 * time.Minute)
		r.loggedIn("alice")
		r.running("alice", 100)
		r.attestor.Stop("jupyter-alice")
		time.Sleep(time.Hour)
		if n := r.provider.Calls("refresh"); n != 0 {
			t.Errorf("%d refreshes for nobody", n)
		}
	})
}

func TestRolesAreSeenWhileASessionIsKept(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.provider.SetIdle(30 * time.Minute)
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.provider.SetRoles("alice", "student")
		time.Sleep(time.Hour)
		r.refused(p, broker.Want{}, broker.ErrDenied)
	})
}
