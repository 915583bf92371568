//go:build failpoints && linux

package faults_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

// soaking is rotation with a grace whose access tokens end soon, so that what is
// kept of them has to be let go again.
const soaking = "rotation with a grace, short access tokens"

// The soak: refreshes all the time on two brokers, callers who hang up, brokers
// that are killed and started again. When it is over, each broker holds what it
// held after it had warmed up, and every lease was given back.
func TestSoakLeavesNothingBehind(t *testing.T) {
	t.Parallel()
	s := &soak{world: newWorld(t, soaking, 2), every: 200 * time.Millisecond}
	if !*long {
		s.every = 50 * time.Millisecond
	}
	s.idp.setLatency(40 * time.Millisecond)
	for i := range soakers {
		s.login(fmt.Sprintf("user%d", i))
	}
	s.idp.count()
	whole := time.Duration(pick(600, 8)) * time.Second
	s.run(whole*4/10, pick(3, 1))
	warm := s.rest(nil)
	before := s.idp.peek()
	s.run(whole*6/10, 0)
	made := s.idp.peek() - before
	cold := s.rest(warm)
	if made < 100 {
		t.Errorf("%d refreshes after the warm-up are too few to show a leak", made)
	}
	r := row{proof: "soak", cell: fmt.Sprintf("%s, 2 brokers", whole), lost: s.got.lost, reported: s.got.reported}
	r.spent, r.most = s.idp.count()
	r.runs = r.spent
	for i := range cold {
		r.note += fmt.Sprintf("%s: %s; ", s.brokers[i].host, cold[i].since(warm[i]))
	}
	r.note = strings.TrimSuffix(r.note, "; ")
	report.add(r)
	if s.got.lost+s.got.failed > 0 {
		t.Errorf("%d grants lost, %d calls failed, the last with %+v", s.got.lost, s.got.failed, s.got.example)
	}
}

// soakers is how many users there are.
const soakers = 10

// A soak is a world in which all goes on for long.
type soak struct {
	*world
	every time.Duration // a refresh begins on each broker
	n     [2]int        // begun so far
	got   tally
}

// run goes on for a while; each broker is killed so many times meanwhile.
func (s *soak) run(d time.Duration, kills int) {
	var both sync.WaitGroup
	for i := range s.brokers {
		both.Go(func() { s.drive(i, d, kills) })
	}
	both.Wait()
}

// drive begins refreshes on one broker, whether or not those before are done.
func (s *soak) drive(i int, d time.Duration, kills int) {
	b := s.brokers[i]
	tick := time.NewTicker(s.every)
	defer tick.Stop()
	var calls sync.WaitGroup
	defer calls.Wait()
	for began, killed := time.Now(), 0; time.Since(began) < d; <-tick.C {
		s.n[i]++
		c := Call{User: fmt.Sprintf("user%d", s.n[i]%soakers), Scopes: subset(s.n[i]/soakers*2 + i)}
		if s.n[i]%4 == 0 {
			c.Patience = 20 * time.Millisecond // less than the provider takes
		}
		calls.Go(func() { s.ask(b, c) })
		if killed < kills && time.Since(began) > d*time.Duration(2*killed+i)/time.Duration(2*kills) {
			killed++
			time.Sleep(time.Duration(killed*17) * time.Millisecond) // amid what is under way
			b.end()
			calls.Wait() // they have heard that it died
			b.start()
		}
	}
}

// ask notes what is no token, unless the broker was killed or the caller hung up.
func (s *soak) ask(b *process, c Call) {
	r, err := b.call("Token", c)
	if err == nil && r.Code != "" && (c.Patience == 0 || r.lost()) {
		s.got.add(r)
	}
}

// Levels is what a broker holds.
type Levels struct {
	Goroutines, Files int
	Heap, Journal     int64
	Leases            int // grants with a lease, or with the mark of a use that nobody finished
}

// Levels tells what the process holds when what is garbage is gone.
func (s *Service) Levels(_ Call, l *Levels) error {
	grants, err := s.s.(*ours).Grants(context.Background(), "", "")
	if err != nil {
		return err
	}
	for _, g := range grants {
		if g.Lease.Holder != "" || g.Mark.Attempt != "" {
			l.Leases++
		}
	}
	runtime.GC()
	runtime.GC() // what pools keep is garbage only the second time
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	l.Goroutines, l.Heap = runtime.NumGoroutine(), int64(m.HeapAlloc)
	return nil
}

// levels are a process's, as it and the kernel tell them.
func (p *process) levels() (l Levels) {
	p.w.t.Helper()
	if err := p.rpc.Call("Service.Levels", Call{}, &l); err != nil {
		p.w.t.Fatalf("levels of %s: %v", p.host, err)
	}
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.cmd.Process.Pid))
	if err != nil {
		p.w.t.Fatal(err)
	}
	journal, err := os.Stat(filepath.Join(p.w.setup.Dir, p.host+".journal"))
	if err != nil {
		p.w.t.Fatal(err)
	}
	l.Files, l.Journal = len(files), journal.Size()
	return l
}

// rest waits until the brokers are at rest, and if there is a former level, back
// at it.
func (s *soak) rest(was []Levels) (now []Levels) {
	s.t.Helper()
	for _, b := range s.brokers {
		l := b.levels()
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
			before := l
			l = b.levels()
			done := l.Leases == 0 && l.Goroutines <= before.Goroutines && l.Files <= before.Files
			if was != nil {
				done = l.backAt(was[len(now)])
			}
			if done {
				break
			}
			if time.Now().After(deadline) {
				s.t.Errorf("%s does not come to rest: %+v, was %+v", b.host, l, was)
				break
			}
		}
		now = append(now, l)
	}
	return now
}

// What a broker may hold more than before: connections that are kept for the next
// use, to Redis and to the provider, of which each has two goroutines; the heap's
// own coming and going; and in the journal what is written anew only when it is
// worth it.
const (
	moreGoroutines = 10
	moreFiles      = 10
	moreHeap       = 4 << 20
	moreJournal    = 6 << 20
)

func (l Levels) backAt(was Levels) bool {
	return l.Leases == 0 && l.Goroutines <= was.Goroutines+moreGoroutines && l.Files <= was.Files+moreFiles &&
		l.Heap <= was.Heap+moreHeap && l.Journal <= was.Journal+moreJournal
}

func (l Levels) since(was Levels) string {
	const mib = 1 << 20
	return fmt.Sprintf("goroutines %d→%d, files %d→%d, heap %.1f→%.1f MiB, journal %.1f→%.1f MiB, leases %d",
		was.Goroutines, l.Goroutines, was.Files, l.Files, float64(was.Heap)/mib, float64(l.Heap)/mib,
		float64(was.Journal)/mib, float64(l.Journal)/mib, l.Leases)
}
