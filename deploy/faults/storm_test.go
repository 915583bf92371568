//go:build failpoints && linux

package faults_test

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"
)

// callers is how many ask at once, over all brokers.
const callers = 100

// A storm is all callers asking for one user's token at the same moment. The
// token isn't there, so each round is one rotation.
type storm struct {
	*world
	latency time.Duration
	rounds  int
	abreast int  // rounds under way at once, each of another user
	hangUp  bool // a single caller asks, and hangs up at a random moment
}

// A tally is what came of rounds.
type tally struct {
	mu                     sync.Mutex // guards all below
	lost, reported, failed int
	example                Reply
}

func (t *tally) add(r Reply) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.example = r
	switch {
	case r.lost():
		t.lost++
		if r.reported() {
			t.reported++
		}
	default:
		t.failed++
	}
}

func (s *storm) run(proof, note string) row {
	s.t.Helper()
	s.idp.setLatency(0)
	for i := range s.abreast {
		s.login(fmt.Sprintf("user%d", i))
	}
	s.idp.count()
	s.idp.setLatency(s.latency)
	var got tally
	var users sync.WaitGroup
	for i := range s.abreast {
		users.Go(func() {
			for n := i; n < s.rounds; n += s.abreast {
				s.round(Call{User: fmt.Sprintf("user%d", i), Scopes: subset(n)}, &got)
			}
		})
	}
	users.Wait()
	r := row{
		proof: proof, cell: fmt.Sprintf("%d brokers, provider %s", len(s.brokers), s.latency),
		runs: s.rounds, lost: got.lost, reported: got.reported, note: note,
	}
	if got.failed > 0 {
		r.note += fmt.Sprintf(" %d rounds with another error: %s %s", got.failed, got.example.Code, got.example.Sentence)
	}
	r.spent, r.most = s.idp.count()
	report.add(r)
	return r
}

// round is one rotation. A lost grant counts once, and gets a new login.
func (s *storm) round(c Call, got *tally) {
	var worst Reply
	if s.hangUp {
		impatient := c
		impatient.Patience = 1 + rand.N(2*s.latency)
		s.ask(rand.IntN(len(s.brokers)), impatient) // and what he is told is nothing to anybody
		worst = s.ask(rand.IntN(len(s.brokers)), c)
	} else {
		worst = s.all(c)
	}
	if worst.Code == "" {
		return
	}
	got.add(worst)
	if worst.lost() {
		s.login(c.User)
	}
}

// all lets all callers ask at once, and returns the worst answer.
func (s *storm) all(c Call) (worst Reply) {
	var mu sync.Mutex
	var all sync.WaitGroup
	for i := range callers {
		all.Go(func() {
			r := s.ask(i%len(s.brokers), c)
			mu.Lock()
			defer mu.Unlock()
			if r.lost() || worst.Code == "" {
				worst = r
			}
		})
	}
	all.Wait()
	return worst
}

func (s *storm) ask(broker int, c Call) Reply {
	r, err := s.brokers[broker].call("Token", c)
	if err != nil {
		return Reply{Code: "died", Sentence: err.Error()}
	}
	return r
}

// Whoever asks at once, on however many brokers, and however long the provider
// takes: one refresh per rotation, and no grant is lost.
func TestStormIsOneRefreshPerRotation(t *testing.T) {
	latencies := []time.Duration{5 * time.Millisecond, 300 * time.Millisecond}
	if *long {
		latencies = append(latencies, 2500*time.Millisecond, 9*time.Second)
	}
	for _, n := range []int{2, 3} {
		w := newWorld(t, strict, n)
		for _, latency := range latencies {
			s := storm{world: w, latency: latency, rounds: pick(20, 4), abreast: 1}
			if latency > time.Second {
				s.abreast = 5
			}
			good(t, s.run("storm", ""))
		}
	}
}

// A provider that is slower than a common lock is held makes no difference.
func TestStormOnASlowProvider(t *testing.T) {
	if *long {
		t.Skip("TestStormIsOneRefreshPerRotation has it")
	}
	s := storm{world: newWorld(t, strict, 2), latency: 2500 * time.Millisecond, rounds: 2, abreast: 2}
	good(t, s.run("storm", ""))
}

// good fails unless r is without loss and with one request per rotation.
func good(t *testing.T, r row) {
	t.Helper()
	if r.lost != 0 || r.most != 1 || r.spent != r.runs || r.note != "" {
		t.Errorf("%s, %s: %d of %d lost, %d requests, %d with one token%s", r.proof, r.cell, r.lost, r.runs, r.spent, r.most, r.note)
	}
}

// A caller's hanging up, at whatever moment, is nothing to the grant.
func TestCallersWhoHangUpLoseNothing(t *testing.T) {
	s := storm{world: newWorld(t, strict, 2), latency: 300 * time.Millisecond, rounds: pick(1000, 60), abreast: 10, hangUp: true}
	good(t, s.run("hang up", ""))
}

// The control: the same storms on what refreshes the common way. If nothing were
// lost here, the proofs above would prove nothing.
func TestTheCommonWayLosesGrantsHere(t *testing.T) {
	w := newWorld(t, strict, 2, commonly)
	const note = "the common way"
	fast := storm{world: w, latency: 5 * time.Millisecond, rounds: pick(20, 4), abreast: 1}
	if r := fast.run("control: storm", note); r.lost != 0 {
		t.Errorf("%d of %d lost with a fast provider: the control is worse than what it stands for", r.lost, r.runs)
	}
	for _, s := range []storm{
		{world: w, latency: 2500 * time.Millisecond, rounds: pick(20, 2), abreast: pick(5, 2)},
		{world: w, latency: 300 * time.Millisecond, rounds: pick(100, 20), abreast: 10, hangUp: true},
	} {
		proof := "control: storm"
		if s.hangUp {
			proof = "control: hang up"
		}
		if r := s.run(proof, note); r.lost == 0 {
			t.Errorf("%s, %s: nothing lost; this harness would not see it", proof, r.cell)
		}
	}
}
