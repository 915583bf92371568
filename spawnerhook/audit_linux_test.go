package spawnerhook_test

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
	"tokenbroker/broker/seal"
)

// An office is a broker whose attestor is a lab's, with alice's server running.
type office struct {
	*lab
	t     *testing.T
	b     *broker.Broker
	audit brokertest.Buffer
	first process // of alice's container
	id    string  // the container's
	level string
}

func newOffice(t *testing.T) *office {
	t.Helper()
	o := &office{t: t, lab: newLab(t)}
	keys, err := seal.New()
	o.check(err)
	o.b, err = broker.New(broker.Config{
		Deployment: "test", Host: "here", Contact: "it-help@lab.example",
		Hubs:      map[broker.HubID]broker.Hub{"main": {Login: "keycloak"}},
		Providers: []broker.Provider{brokertest.NewProvider("keycloak")},
		Rules:     []broker.Rule{{Provider: "keycloak", Audiences: []string{"storage"}}},
		Store:     brokertest.NewMemStore(), Keys: keys, Attestor: o.docker, Sockets: brokertest.NewSockets(),
		Audit: &o.audit, Log: slog.New(slog.DiscardHandler), Journal: t.TempDir() + "/journal",
	})
	o.check(err)
	o.check(o.b.Start(t.Context()))
	t.Cleanup(o.b.Close)
	o.first = o.running(t, nil)
	o.registers(alice)
	o.check(o.says(alice.Key, peer(t, o.first.pid)))
	o.id, o.level = o.boundTo(alice.Key)
	return o
}

func (o *office) check(err error) {
	o.t.Helper()
	if err != nil {
		o.t.Fatal(err)
	}
}

func (o *office) registers(r broker.Registration) {
	o.t.Helper()
	_, err := o.b.Register(context.Background(), "main", broker.RegisterRequest{User: r.Key.User, ContainerName: r.ContainerName})
	o.check(err)
}

// says asks a server's socket for what even a user without a grant is told.
func (o *office) says(k broker.ServerKey, p *broker.Peer) error {
	p.Server = k
	_, _, err := o.b.Providers(context.Background(), p)
	return err
}

func (o *office) boundTo(k broker.ServerKey) (container, level string) {
	o.t.Helper()
	all := o.b.Registrations()
	i := slices.IndexFunc(all, func(r broker.Registration) bool { return r.Key == k })
	if i < 0 || all[i].State != broker.Bound || len(all[i].Container) != 64 || all[i].Level == "" {
		o.t.Fatalf("%s is not bound: %+v", k, all)
	}
	return all[i].Container, all[i].Level
}

// line is the audit's of a ref.
func (o *office) line(ref string) broker.Entry {
	o.t.Helper()
	for line := range strings.Lines(o.audit.String()) {
		var e broker.Entry
		if o.check(json.Unmarshal([]byte(line), &e)); e.Ref == ref {
			return e
		}
	}
	o.t.Fatalf("ref %q finds no line", ref)
	return broker.Entry{}
}

// TestARefusalsLineHasWhatKernelAndDockerSaid: the line has it, with the server's
// container and the level of its proofs, and the caller is told nothing of it.
func TestARefusalsLineHasWhatKernelAndDockerSaid(t *testing.T) {
	o := newOffice(t)
	bobsID := o.engine.Create(t, "jupyter-bob", nil)
	bob := o.process(t, bobsID)
	o.engine.Start("jupyter-bob", bob.pid)
	carol := broker.ServerKey{Hub: "main", User: "carol"}
	o.registers(broker.Registration{Key: carol, ContainerName: "jupyter-carol"})
	dave := broker.ServerKey{Hub: "main", User: "dave"}
	othersID := strings.Repeat("c0ffee00", 8) // not bob's: equal refusals have one line

	for _, tt := range []struct {
		why   string
		at    broker.ServerKey
		who   func(p process) *broker.Peer
		code  broker.Code
		cause []string
	}{
		{"a host's process", alice.Key, func(p process) *broker.Peer {
			o.write(t, p.pid, "cgroup", "2:pids:/\n1:cpu:/\n0::/user.slice\n")
			return peer(t, p.pid)
		}, broker.UnknownPeer, []string{`the process is in cgroup "/`, `of hierarchy "`, `the container in "/docker/` + o.id}},
		{"in one other cgroup", alice.Key, func(p process) *broker.Peer {
			path := "/docker/" + o.id
			o.write(t, p.pid, "cgroup", "2:pids:"+path+"\n1:cpu:/docker/"+othersID+"\n0::"+path+"\n")
			return peer(t, p.pid)
		}, broker.UnknownPeer, []string{`in cgroup "/docker/` + othersID, `of hierarchy "cpu"`}},
		{"in another mount namespace", alice.Key, func(p process) *broker.Peer {
			o.namespaces(t, p.pid, 4026540001, 4026540009)
			return peer(t, p.pid)
		}, broker.UnknownPeer, []string{"the process is in mnt namespace 4026540009, the container in 4026540002"}},
		{"in another PID namespace", alice.Key, func(p process) *broker.Peer {
			o.namespaces(t, p.pid, 4026540009, 4026540002)
			return peer(t, p.pid)
		}, broker.UnknownPeer, []string{"the process is in pid namespace 4026540009, the container in 4026540001"}},
		{"ended before its first request", alice.Key, func(p process) *broker.Peer {
			caller := peer(t, p.pid)
			p.kill()
			return caller
		}, broker.UnknownPeer, []string{"peer: the process has ended"}},
		{"ended after it", alice.Key, func(p process) *broker.Peer {
			caller := peer(t, p.pid)
			o.check(o.says(alice.Key, caller))
			p.kill()
			return caller
		}, broker.UnknownPeer, []string{"the process that opened this connection has ended: the process has ended"}},
		{"of another server", alice.Key, func(process) *broker.Peer { return peer(t, bob.pid) },
			broker.UnknownPeer, []string{`in cgroup "/docker/` + bobsID, `the container in "/docker/` + o.id}},
		{"not bound", carol, func(p process) *broker.Peer { return peer(t, p.pid) },
			broker.Pending, []string{"not there yet", "jupyter-carol"}},
		{"not registered", dave, func(p process) *broker.Peer { return peer(t, p.pid) },
			broker.UnknownPeer, []string{"not registered"}},
		// The last one: it replaces alice's container.
		{"of a superseded generation", alice.Key, func(p process) *broker.Peer {
			caller := peer(t, p.pid)
			o.check(o.says(alice.Key, caller))
			o.engine.Die(alice.ContainerName)
			o.first.kill()
			o.engine.Remove(alice.ContainerName)
			o.registers(alice)
			next := o.running(t, nil)
			o.check(o.says(alice.Key, peer(t, next.pid)))
			was := o.id
			if o.id, _ = o.boundTo(alice.Key); o.id == was {
				t.Fatal("the server has its old container")
			}
			return caller
		}, broker.UnknownPeer, []string{`in cgroup "/docker/` + o.id}},
	} {
		t.Run(tt.why, func(t *testing.T) {
			caller := tt.who(o.process(t, o.id))
			var said *broker.Error
			if err := o.says(tt.at, caller); !errors.As(err, &said) || said.Code != tt.code {
				t.Fatalf("got %v, want %s", err, tt.code)
			}
			e := o.line(said.Ref)
			for _, want := range tt.cause {
				if !strings.Contains(e.Reason, want) {
					t.Errorf("the reason is %q, want %q in it", e.Reason, want)
				}
			}
			container, level := "", ""
			if tt.at == alice.Key {
				container, level = o.id, o.level
			}
			if e.Outcome != "refused" || e.Code != tt.code || e.Container != container || e.Level != level ||
				e.User != tt.at.User || e.PID != caller.PID || e.UID == nil {
				t.Errorf("got %+v, want container %q and level %q", e, container, level)
			}
			for _, secret := range []string{o.id, bobsID, "jupyter-", "/docker", "402654", "cgroup", "bob"} {
				if told := said.Sentence + said.Next; strings.Contains(told, secret) {
					t.Errorf("the caller is told %q, with %q in it", told, secret)
				}
			}
		})
	}
}
