//go:build failpoints && linux

package faults_test

import (
	"fmt"
	"testing"
)

// A step is where a broker is killed.
type step struct {
	name string
	// sent says that the provider has got the refresh token by then, and lossy
	// that it has spent it and nobody but the dead process knew the new one.
	sent, lossy bool
	roles       bool // the user's roles change with this refresh
}

var steps = []step{
	{name: "before begin"},
	{name: "after begin"},
	{name: "before send"},
	{name: "connected"},
	{name: "request written"},
	{name: arrivedAt, sent: true},
	{name: spentAt, sent: true, lossy: true},
	{name: "answer begins", sent: true, lossy: true},
	{name: "answer read", sent: true, lossy: true},
	{name: "before journal", sent: true, lossy: true},
	{name: "journal written", sent: true},
	{name: "after journal", sent: true},
	{name: "after commit", sent: true},
	{name: "after commit", sent: true, roles: true},
	{name: "before keep", sent: true},
	{name: "after keep", sent: true},
	{name: "before answer", sent: true},
}

// Two steps that the provider sees and the broker doesn't.
const (
	arrivedAt = "the provider has the request"
	spentAt   = "the provider has spent the token"
)

func (s step) String() string {
	if s.roles {
		return s.name + ", other roles"
	}
	return s.name
}

// A broker that is killed at any step of a refresh, and started again, loses no
// grant: but for one that a strict provider has answered and the journal has not
// got yet, of which the user is told.
func TestKilledAtEachStepNoGrantIsLost(t *testing.T) {
	for _, kind := range []string{keeping, grace, strict} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			k := &killing{world: newWorld(t, kind, 2), kind: kind, runs: pick(20, 3)}
			k.all(steps)
		})
	}
}

type killing struct {
	*world
	kind, user string
	runs       int // of each step
	n          int // of the next token
}

// all kills at each of the steps, each time another user's broker.
func (k *killing) all(steps []step) {
	k.t.Helper()
	for i, s := range steps {
		k.user = fmt.Sprintf("user%d", i)
		k.cell(s)
	}
}

// window says whether a grant may be lost at s: where a provider has no mercy.
func (k *killing) window(s step) bool { return k.kind != keeping && k.kind != grace && s.lossy }

// cell kills at s some times over.
func (k *killing) cell(s step) {
	k.t.Helper()
	k.login(k.user)
	k.idp.count()
	r := row{proof: "SIGKILL", cell: k.kind + ", " + s.String(), runs: k.runs, window: k.window(s)}
	for i := range r.runs {
		said := k.kill(s, i)
		if said.lost() {
			r.lost++
			if said.reported() {
				r.reported++
			}
			k.login(k.user)
		}
	}
	r.spent, r.most = k.idp.count()
	report.add(r)
	switch {
	case !r.window && r.lost > 0:
		k.t.Errorf("%s: %d of %d grants lost", r.cell, r.lost, r.runs)
	case r.reported != r.lost:
		k.t.Errorf("%s: %d grants lost, but only %d said to be", r.cell, r.lost, r.reported)
	}
}

// kill kills the first broker at s. A container of the same user on the second
// host waits meanwhile; the first one comes back. It returns what either said
// first that wasn't a token.
func (k *killing) kill(s step, run int) Reply {
	k.t.Helper()
	k.n++
	want := Call{User: k.user, Scopes: subset(k.n)}
	first, second := k.brokers[0], k.brokers[1]
	k.arm(s)
	if s.roles {
		k.idp.SetRoles(k.user, "researcher", fmt.Sprintf("run%d", run))
	}
	before := k.idp.peek()
	if r, err := first.call("Token", want); err == nil {
		k.t.Fatalf("%s: the broker was not killed: %+v", s, r)
	}
	first.killed()
	k.idp.when(nil, nil)
	if after := k.idp.peek(); s.sent != (after > before) {
		k.t.Errorf("%s: the provider had got %d requests", s, after-before)
	}
	waiting := make(chan Reply)
	go func() {
		r, err := second.call("Token", want)
		if err != nil {
			r.Sentence = err.Error()
		}
		waiting <- r
	}()
	first.start()
	said, err := first.call("Token", want)
	if err != nil {
		k.t.Fatalf("%s: the broker died again: %v", s, err)
	}
	also := <-waiting
	k.n++
	next, err := first.call("Token", Call{User: k.user, Scopes: subset(k.n)}) // the grant lives
	if err != nil {
		k.t.Fatalf("%s: the broker died again: %v", s, err)
	}
	for _, r := range []Reply{said, also, next} {
		if r.Code != "" && !r.lost() {
			k.t.Errorf("%s: a caller was told %+v", s, r)
		}
	}
	for _, r := range []Reply{said, also, next} {
		if r.lost() {
			return r
		}
	}
	return Reply{}
}

// arm has the first broker killed at s.
func (k *killing) arm(s step) {
	k.t.Helper()
	kill := func() { k.brokers[0].cmd.Process.Kill() }
	switch s.name {
	case arrivedAt:
		k.idp.when(func() bool { kill(); return true }, nil)
	case spentAt:
		k.idp.when(nil, kill)
	default:
		if _, err := k.brokers[0].call("Arm", Call{Step: s.name}); err != nil {
			k.t.Fatal(err)
		}
	}
}

// A broker that is killed and stays away: another one takes over when the lease
// has run out. With a strict provider that loses what only the dead one knew,
// its journal included, and the user is told.
func TestKilledAndNotStartedAgain(t *testing.T) {
	for _, tt := range []struct {
		kind string
		step step
		real bool // the lease is as it is in production
		may  bool // lose
	}{
		{kind: strict, step: step{name: "after begin"}},
		{kind: strict, step: step{name: arrivedAt}},
		{kind: strict, step: step{name: "answer read"}, may: true},
		{kind: strict, step: step{name: "after journal"}, may: true},
		{kind: strict, step: step{name: "after commit"}},
		{kind: grace, step: step{name: "answer read"}},
		{kind: grace, step: step{name: "after journal"}},
		{kind: keeping, step: step{name: "answer read"}},
		// A grace that is shorter than the lease is over when it has run out.
		{kind: grace, step: step{name: "answer read"}, real: true, may: true},
	} {
		if tt.real && !*long {
			continue
		}
		t.Run(tt.kind+", "+tt.step.name, func(t *testing.T) {
			t.Parallel()
			k := &killing{kind: tt.kind, user: "user0", world: newWorld(t, tt.kind, 2, func(w *world) {
				if !tt.real {
					hurried(w)
				}
			})}
			r := row{proof: "SIGKILL, stays away", cell: tt.kind + ", " + tt.step.name, runs: pick(20, 1), window: tt.may, note: "lease of 3 s"}
			if tt.real {
				r.runs, r.note = 1, "lease of 45 s"
			}
			k.login(k.user)
			k.idp.count()
			for range r.runs {
				if said := k.takeOver(tt.step); said.lost() {
					r.lost++
					if said.reported() {
						r.reported++
					}
					k.login(k.user)
				}
			}
			r.spent, r.most = k.idp.count()
			report.add(r)
			if !tt.may && r.lost > 0 || r.reported != r.lost {
				t.Errorf("%s: %d of %d grants lost, %d said to be", r.cell, r.lost, r.runs, r.reported)
			}
		})
	}
}

// takeOver kills the first broker at s, and returns what the second one said that
// wasn't a token. Then the first one comes back.
func (k *killing) takeOver(s step) Reply {
	k.t.Helper()
	k.arm(s)
	k.n++
	want := Call{User: k.user, Scopes: subset(k.n)}
	if r, err := k.brokers[0].call("Token", want); err == nil {
		k.t.Fatalf("%s: the broker was not killed: %+v", s, r)
	}
	k.brokers[0].killed()
	k.idp.when(nil, nil)
	said, err := k.brokers[1].call("Token", want)
	if err != nil {
		k.t.Fatal(err)
	}
	k.brokers[0].start()
	for _, b := range k.brokers { // the grant lives, on both
		k.n++
		next, err := b.call("Token", Call{User: k.user, Scopes: subset(k.n)})
		switch {
		case err != nil:
			k.t.Fatal(err)
		case said.Code == "" && next.Code != "":
			said = next
		}
	}
	if said.Code != "" && !said.lost() {
		k.t.Errorf("%s: a caller was told %+v", s, said)
	}
	return said
}
