package broker_test

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"

	"tokenbroker/broker"
)

func TestNoTwoServersShareACgroup(t *testing.T) {
	const path = "/docker/x"
	for _, tt := range []struct {
		why        string
		alice, bob broker.Workload
		refused    bool
	}{
		{"different ones", broker.Workload{Cgroups: map[string]string{"": "/docker/a"}, CgroupID: 1}, broker.Workload{Cgroups: map[string]string{"": "/docker/b"}, CgroupID: 2}, false},
		{"the same path in one hierarchy", broker.Workload{Cgroups: map[string]string{"pids": path, "": "/docker/a"}}, broker.Workload{Cgroups: map[string]string{"pids": path, "": "/docker/b"}}, true},
		{"the same path in different hierarchies", broker.Workload{Cgroups: map[string]string{"pids": path}}, broker.Workload{Cgroups: map[string]string{"cpu": path}}, false},
		{"the same number", broker.Workload{CgroupID: 7}, broker.Workload{CgroupID: 7}, true},
		{"numbers that are not known", broker.Workload{}, broker.Workload{}, false},
	} {
		t.Run(tt.why, func(t *testing.T) {
			inBubble(t, func(r *rig) {
				r.loggedIn("alice")
				r.loggedIn("bob")
				for i, w := range []broker.Workload{tt.alice, tt.bob} {
					user := []broker.UserID{"alice", "bob"}[i]
					r.attestor.Run("jupyter-"+string(user), int32(100+i))
					r.attestor.Edit("jupyter-"+string(user), func(now *broker.Workload) { now.Cgroups, now.CgroupID = w.Cgroups, w.CgroupID })
					r.registered(user)
				}
				r.token(r.peer("alice", 100), broker.Want{})
				if !tt.refused {
					r.token(r.peer("bob", 101), broker.Want{})
					return
				}
				said := r.refused(r.peer("bob", 101), broker.Want{}, broker.ErrDenied)
				if why := r.Registrations()[1].Reason; strings.Contains(said.Sentence, "alice") || !strings.Contains(why, `in a cgroup of the server "" of main/"alice"`) {
					t.Errorf("said %q, and to the operator %q", said.Sentence, why)
				}
				r.attestor.Stop("jupyter-alice") // an end is an end
				synctest.Wait()
				r.attestor.Hint("jupyter-bob")
				synctest.Wait()
				r.token(r.peer("bob", 101), broker.Want{})
			}, forBoth)
		})
	}
}

// forBoth gives everybody a token.
func forBoth(c *broker.Config) { c.Rules[0].Roles = nil }

// registered registers a server whose container runs already.
func (r *rig) registered(user broker.UserID) {
	r.t.Helper()
	if _, err := r.Register(context.Background(), "main", broker.RegisterRequest{User: user, ContainerName: "jupyter-" + string(user)}); err != nil {
		r.t.Fatalf("Register: %v", err)
	}
	r.attestor.Hint("jupyter-" + string(user))
	synctest.Wait()
}

func TestConnectionsEndWithTheirContainer(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		asked := r.running("alice", 100)
		silent, next := r.peer("alice", 101), r.peer("alice", 102)
		bobs := r.peer("bob", 100)
		for _, p := range []*broker.Peer{asked, silent, next, bobs} {
			r.sockets.Connect(p)
		}
		r.token(asked, broker.Want{})
		r.attestor.End(101) // its descriptor is somebody else's now
		r.attestor.Stop("jupyter-alice")
		synctest.Wait()
		for _, tt := range []struct {
			why  string
			peer *broker.Peer
			open bool
		}{
			{"that asked", asked, false},
			{"whose maker is gone", silent, false},
			{"of the next run", next, true},
			{"to another server", bobs, true},
		} {
			if got := r.sockets.Connected(tt.peer); got != tt.open {
				t.Errorf("the connection %s: open is %t", tt.why, got)
			}
		}
	})
}

func TestANeighbourThatCouldForgeLowersTheLevel(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.token(p, broker.Want{})
		r.attestor.Forge("the container cadvisor could forge proofs")
		said := r.refused(p, broker.Want{}, broker.ErrDenied)
		if want := "needs attestation pidfd+ns or better; this server has pidfd, because of a container that runs on its host"; !strings.Contains(said.Sentence, want) {
			t.Errorf("said %q, want …%s", said.Sentence, want)
		}
		if told := said.Sentence + said.Next; strings.Contains(told, "cadvisor") || said.Next != "ask it@lab.example: the broker's log names that container" {
			t.Errorf("the user is told %q", told)
		}
		lines := r.audit.entries(t, "token")
		if got := lines[len(lines)-1]; got.Level != "pidfd" || !strings.HasSuffix(got.Reason, "on its host: the container cadvisor could forge proofs") {
			t.Errorf("the audit says level %q, %q", got.Level, got.Reason)
		}
		if log := r.log.String(); !strings.Contains(log, "cadvisor could forge proofs") {
			t.Errorf("log: %s", log)
		}
		if got := r.Status(context.Background()).Attestation; !got.OK || got.Detail != "pidfd, not pidfd+ns: the container cadvisor could forge proofs" {
			t.Errorf("Status: got %+v", got)
		}
		r.attestor.Forge("")
		r.token(p, broker.Want{})
		if got := r.Status(context.Background()).Attestation.Detail; got != "pidfd+ns" {
			t.Errorf("Status: got %q", got)
		}
	}, func(c *broker.Config) { c.Rules[0].RequireAttestation = "pidfd+ns" })
}

func TestLoweredIsTheLevelBelow(t *testing.T) {
	for level, want := range map[string]string{"pidfd+ns": "pidfd", "pidfd": "proc", "proc": "uid", "uid": "uid"} {
		if got := broker.Lowered(level); got != want {
			t.Errorf("Lowered(%q): got %q, want %q", level, got, want)
		}
	}
}
