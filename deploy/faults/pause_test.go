//go:build failpoints && linux

package faults_test

import (
	"fmt"
	"syscall"
	"testing"
)

// A broker that is stopped in the middle of a refresh, for longer than its lease,
// and then goes on, changes nothing any more: another one has refreshed meanwhile.
// But for one that is stopped with the only copy of a strict provider's answer, no
// grant is lost, and of that the user is told.
func TestPausedLeaseHolderChangesNothing(t *testing.T) {
	for _, p := range []pause{
		{kind: strict, step: "after begin"}, // it finds itself too late, and sends nothing
		{kind: strict, step: "before send"}, // likewise, although it had looked
		{kind: strict, step: "after commit"},
		{kind: keeping, step: spentAt},
		{kind: grace, step: spentAt}, // its answer comes to a grant that has moved on
		{kind: grace, step: "before journal"},
		{kind: grace, step: "after journal"},
		{kind: strict, step: spentAt, lossy: true},
		{kind: strict, step: "after journal", lossy: true},
		{kind: strict, step: "after begin", real: true},
	} {
		if p.real && !*long {
			continue
		}
		t.Run(p.kind+", "+p.step, func(t *testing.T) {
			t.Parallel()
			p.world = newWorld(t, p.kind, 2, func(w *world) {
				if !p.real {
					hurried(w)
				}
			})
			p.cell()
		})
	}
}

type pause struct {
	*world
	kind, step string
	lossy      bool
	real       bool // the lease is as it is in production
}

func (p *pause) cell() {
	r := row{proof: "SIGSTOP", cell: p.kind + ", " + p.step, runs: pick(20, 1), window: p.lossy, note: "lease of 3 s"}
	if p.real {
		r.runs, r.note = 1, "lease of 45 s"
	}
	requests := 0
	for i := range r.runs {
		user := fmt.Sprintf("user%d", i)
		p.login(user)
		p.idp.count()
		said := p.run(user)
		if said.lost() {
			r.lost++
			if said.reported() {
				r.reported++
			}
		}
		if p.kind == grace && p.idp.used(0) != 0 {
			p.t.Errorf("%s: what the broker wrote after its pause was taken", r.cell)
		}
		all, most := p.idp.count()
		requests, r.most = requests+all, max(r.most, most)
	}
	r.spent = requests
	report.add(r)
	switch {
	case !p.lossy && r.lost > 0, r.reported != r.lost:
		p.t.Errorf("%s: %d of %d grants lost, %d said to be", r.cell, r.lost, r.runs, r.reported)
	case p.kind == strict && !p.lossy && r.most != 1:
		p.t.Errorf("%s: a refresh token was sent %d times", r.cell, r.most)
	}
}

// run stops the first broker at the step, lets the second one ask until it has an
// answer, and lets the first one go on. It returns what was said of a lost grant.
func (p *pause) run(user string) (lost Reply) {
	p.t.Helper()
	first, second := p.brokers[0], p.brokers[1]
	p.arm()
	paused := make(chan Reply)
	go func() { paused <- p.ask(first, user, 1) }()
	first.stopped()
	p.idp.when(nil, nil)
	said := []Reply{p.ask(second, user, 1)}
	first.signal(syscall.SIGCONT)
	<-paused // whatever it says
	for n := range 3 {
		said = append(said, p.ask(p.brokers[n%2], user, 2+n)) // the grant lives
	}
	for _, r := range said {
		switch {
		case r.lost():
			return r
		case r.Code != "":
			p.t.Errorf("%s: a caller was told %+v", p.step, r)
		}
	}
	return Reply{}
}

func (p *pause) ask(b *process, user string, n int) Reply {
	r, err := b.call("Token", Call{User: user, Scopes: subset(n)})
	if err != nil {
		return Reply{Code: "died", Sentence: err.Error()}
	}
	return r
}

// arm has the first broker stopped at the step.
func (p *pause) arm() {
	p.t.Helper()
	if p.step == spentAt {
		p.idp.when(nil, p.brokers[0].stop)
		return
	}
	if _, err := p.brokers[0].call("Arm", Call{Step: p.step, Stop: true}); err != nil {
		p.t.Fatal(err)
	}
}
