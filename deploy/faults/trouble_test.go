//go:build failpoints && linux

package faults_test

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
)

// lease is for how long a broker goes by what it has read in Redis last.
const lease = 250 * time.Millisecond

// A trouble is a way in which Redis takes no changes. While it lasts no refresh
// token is spent; afterwards every session goes on.
type trouble struct {
	name     string
	settings []string // of redis.conf
	replica  bool     // there is one
	// reads says that what is in Redis can be read all the same. Tokens that are
	// cached are then served on; else for the lease, and no longer.
	reads bool
	// writes says that changes are taken all the same, but late.
	writes     bool
	begin, end func(s *stage)
}

var troubles = []trouble{
	{
		name: "NOREPLICAS", settings: []string{"min-replicas-to-write 1"}, replica: true, reads: true,
		begin: func(s *stage) {
			s.pair.replica().Kill()
			s.refuses("NOREPLICAS")
		},
		end: func(s *stage) { s.pair.rejoin() },
	},
	{
		name: "OOM", reads: true,
		begin: func(s *stage) {
			must(s.t, s.redis, "CONFIG", "SET", "maxmemory", "1") // noeviction is how it starts
			s.refuses("OOM")
		},
		end: func(s *stage) { must(s.t, s.redis, "CONFIG", "SET", "maxmemory", "0") },
	},
	{
		name: "READONLY", reads: true, // of one that is gone
		begin: func(s *stage) {
			must(s.t, s.redis, "REPLICAOF", "127.0.0.1", "1")
			s.refuses("READONLY")
		},
		end: func(s *stage) { must(s.t, s.redis, "REPLICAOF", "NO", "ONE") },
	},
	{
		// It waits at each key, and sees its clients after so many bytes.
		name: "LOADING", settings: []string{"key-load-delay 20000", "loading-process-events-interval-bytes 1024", "rdbcompression no"},
		begin: func(s *stage) {
			for i := range 2000 {
				must(s.t, s.redis, "SET", fmt.Sprint("bulk", i), strings.Repeat("x", 2048))
			}
			must(s.t, s.redis, "BGREWRITEAOF")
			await(s.t, "the dump is written", func() bool {
				return says(s.redis, "aof_rewrite_in_progress:0\r\naof_rewrite_scheduled:0", "INFO", "persistence")
			})
			s.redis.Kill()
			s.redis.Launch()
			s.refuses("LOADING")
		},
		end: func(s *stage) {
			await(s.t, "loading goes on without delay", func() bool {
				_, err := s.redis.Ask("", "CONFIG", "SET", "key-load-delay", "0")
				return err == nil
			})
			s.redis.Ready()
		},
	},
	{
		name:  "partition: refused",
		begin: func(s *stage) { s.all((*wire).cut) },
		end:   func(s *stage) { s.all((*wire).mend) },
	},
	{
		name:  "partition: silent",
		begin: func(s *stage) { s.all((*wire).hold) },
		end:   func(s *stage) { s.all((*wire).mend) },
	},
	{
		name: "2 s latency", writes: true,
		begin: func(s *stage) { s.all(func(w *wire) { w.slow(2 * time.Second) }) },
		end:   func(s *stage) { s.all((*wire).mend) },
	},
	{
		name:  "killed and restarted",
		begin: func(s *stage) { s.redis.Kill() },
		end:   func(s *stage) { s.redis.Start() },
	},
}

// A stage is two brokers on a Redis that gets into trouble, and a user who has a
// token cached on both.
type stage struct {
	*world
	trouble
	redis *brokertest.Redis
	pair  *pair // nil: there is no replica
	user  string
	users int        // so far
	asked []*process // in this order when the trouble is over
	n     int        // of the next token
	good  int        // tokens that were refreshed for
	row   row
}

func newStage(t *testing.T, tr trouble, edit ...func(*world)) *stage {
	t.Helper()
	s := &stage{trouble: tr}
	s.world = newWorld(t, strict, 2, append(edit, func(w *world) {
		if tr.replica {
			s.pair = newPair(t, tr.settings...)
			s.redis = s.pair.primary()
		} else {
			s.redis = brokertest.StartRedis(t, tr.settings...)
		}
		w.wired(2, s.redis.Socket)
	})...)
	s.asked = s.brokers
	return s
}

// enter logs another user in.
func (s *stage) enter() {
	s.t.Helper()
	s.user, s.good = fmt.Sprintf("user%d", s.users), 0
	s.users++
	s.login(s.user)
	s.idp.count()
}

func (s *stage) all(f func(*wire)) {
	for _, w := range s.wires {
		f(w)
	}
}

// refuses waits until Redis takes no changes.
func (s *stage) refuses(word string) {
	s.t.Helper()
	await(s.t, "Redis says "+word, func() bool { return says(s.redis, word, "SET", "anything", "1") })
}

// fresh is a wish for a token that costs a refresh.
func (s *stage) fresh() Call {
	s.n++
	return Call{User: s.user, Scopes: subset(s.n)}
}

// cached asks for the token that both have from the login on.
func (s *stage) cached(b *process) Reply { return s.ask(b, Call{User: s.user, Scopes: scopes}) }

func (s *stage) ask(b *process, c Call) Reply {
	r, err := b.call("Token", c)
	if err != nil {
		return Reply{Code: "died", Sentence: err.Error()}
	}
	return r
}

func (r Reply) unavailable() bool { return r.Code == string(broker.Unavailable) }

// recovers asks each broker in turn until it gives a new token.
func (s *stage) recovers() {
	s.t.Helper()
	for _, b := range s.asked {
		s.count(s.settles(b))
	}
}

// settles asks b for new tokens until it gives one, or says that the grant is lost.
func (s *stage) settles(b *process) (r Reply) {
	s.t.Helper()
	await(s.t, b.host+" gives a new token", func() bool {
		r = s.ask(b, s.fresh())
		return r.Code == "" || r.lost()
	})
	return r
}

// count counts the token that somebody got, or the grant that is lost, which then
// gets a new login.
func (s *stage) count(r Reply) {
	s.t.Helper()
	if r.Code == "" {
		s.good++
		return
	}
	s.t.Logf("%s: %s", s.row.cell, r.Sentence)
	s.row.lost++
	if r.reported() {
		s.row.reported++
	}
	s.login(s.user)
}

// cell runs one of the ways in which a trouble meets a broker some times over. In
// a window a grant may be lost, and is said to be.
func (s *stage) cell(proof, what string, window bool, run func()) {
	s.t.Helper()
	s.row = row{proof: proof, cell: s.name + ", " + what, runs: pick(5, 1), window: window}
	for range s.row.runs {
		s.enter()
		run()
		s.all((*wire).mend)
		s.recovers()
		all, most := s.idp.count()
		s.row.spent, s.row.most = s.row.spent+all, max(s.row.most, most)
		if all != s.good && !window {
			s.t.Errorf("%s: %d refreshes for %d tokens", s.row.cell, all, s.good)
		}
	}
	report.add(s.row)
	switch {
	case window && s.row.lost != s.row.reported:
		s.t.Errorf("%s: %d grants lost, but only %d said to be", s.row.cell, s.row.lost, s.row.reported)
	case !window && (s.row.lost > 0 || s.row.most != 1):
		s.t.Errorf("%s: %d of %d grants lost, a refresh token was sent %d times", s.row.cell, s.row.lost, s.row.runs, s.row.most)
	}
}

// While Redis takes no changes, no refresh token is spent: who asks for a new
// token is told that the store can't be reached. A cached one is served as long as
// Redis, or the lease of what was read there, says that the rights are the same.
// Whatever a refresh meets, the grant lives afterwards without a login.
func TestStoreTrouble(t *testing.T) {
	t.Parallel()
	for _, tr := range troubles {
		for _, cell := range []struct {
			name string
			run  func(*stage)
		}{
			{"at rest", (*stage).atRest},
			{"during a refresh", (*stage).duringARefresh},
			{"and the broker is killed", (*stage).killedWithTheAnswer},
		} {
			t.Run(tr.name+", "+cell.name, func(t *testing.T) {
				t.Parallel()
				s := newStage(t, tr)
				s.cell("store trouble", cell.name, false, func() { cell.run(s) })
			})
		}
	}
}

func (s *stage) atRest() {
	s.t.Helper()
	began := s.starts()
	if s.writes {
		time.Sleep(lease) // who asks before that is served, late
	}
	var all sync.WaitGroup
	for _, b := range s.brokers {
		wish := s.fresh()
		all.Go(func() {
			if r := s.ask(b, wish); !r.unavailable() {
				s.t.Errorf("%s: asked for a new token, %s says %+v", s.name, b.host, r)
			}
		})
		all.Go(func() { s.serves(b, began) })
	}
	all.Wait()
	if n := s.idp.peek(); n != 0 {
		s.t.Errorf("%s: %d refresh tokens were spent meanwhile", s.name, n)
	}
	s.end(s)
}

// starts lets the trouble begin right after both brokers have read in Redis, and
// returns when that was so.
func (s *stage) starts() time.Time {
	s.t.Helper()
	for _, b := range s.brokers {
		if r := s.cached(b); r.Code != "" {
			s.t.Fatalf("before any trouble %s says %+v", b.host, r)
		}
	}
	s.begin(s)
	return time.Now()
}

// serves checks what becomes of a cached token in trouble that began then.
func (s *stage) serves(b *process, began time.Time) {
	for range 3 {
		late := time.Since(began) > lease
		switch r := s.cached(b); {
		case r.Code != "" && !r.unavailable():
			s.t.Errorf("%s: asked for a cached token, %s says %+v", s.name, b.host, r)
		case s.reads && r.Code != "":
			s.t.Errorf("%s: Redis can be read, but %s says %+v", s.name, b.host, r)
		case !s.reads && late && r.Code == "":
			s.t.Errorf("%s: %s served a token although what it had read was older than %s", s.name, b.host, lease)
		}
	}
}

// inARefresh lets something happen while the provider works for the first broker.
// It returns when the provider has answered, and what the caller will be told.
func (s *stage) inARefresh(happens func()) (told <-chan Reply) {
	s.t.Helper()
	arrived, goOn, spent, never := make(chan struct{}), make(chan struct{}), make(chan struct{}), make(chan Reply)
	s.idp.when(func() bool { close(arrived); <-goOn; return false }, func() { close(spent) })
	said, wish := make(chan Reply, 1), s.fresh()
	go func() {
		for { // a machine that is overrun may be too slow for a short lease
			r := s.ask(s.brokers[0], wish)
			select {
			case <-arrived:
				said <- r
				return
			default:
			}
			if !r.unavailable() {
				never <- r
			}
		}
	}()
	select {
	case <-arrived:
	case r := <-never:
		s.t.Fatalf("%s: before any trouble a caller was told %+v", s.row.cell, r)
	}
	s.idp.when(nil, nil)
	happens()
	close(goOn)
	<-spent
	s.good++
	return said
}

// duringARefresh: the answer is kept until Redis takes it, and nobody has it
// before.
func (s *stage) duringARefresh() {
	s.t.Helper()
	told := s.inARefresh(func() { s.begin(s) })
	if !s.writes {
		s.insists()
		select {
		case r := <-told:
			s.t.Errorf("%s: the caller was told %+v before Redis had the refresh token", s.name, r)
		default:
		}
		s.end(s)
	}
	if r := <-told; r.Code != "" && !r.unavailable() {
		s.t.Errorf("%s: the caller was told %+v", s.name, r)
	}
}

// insists waits until the first broker has tried to store an answer.
func (s *stage) insists() {
	s.t.Helper()
	const line = "a new refresh token can't be stored"
	before := s.logged("host1", line)
	await(s.t, "the broker tries to store the answer", func() bool { return s.logged("host1", line) > before })
}

// killedWithTheAnswer: what only its journal has comes back with the broker.
func (s *stage) killedWithTheAnswer() {
	s.t.Helper()
	if s.writes { // it would not be seen to try
		s.arm("after journal")
	}
	told := s.inARefresh(func() { s.begin(s) })
	if s.writes {
		<-told
	} else {
		s.insists()
	}
	s.brokers[0].end()
	s.end(s)
	s.brokers[0].start()
}

// arm has the first broker killed at a step.
func (s *stage) arm(step string) {
	s.t.Helper()
	if _, err := s.brokers[0].call("Arm", Call{Step: step}); err != nil {
		s.t.Fatal(err)
	}
}

// A Redis that keeps nothing on its disk comes back empty, and then it is as
// promised: no refresh token is sent that is spent, users are told to log in, and
// a login serves the running container. The brokers' logs say what happened.
func TestRedisThatForgetsEverything(t *testing.T) {
	t.Parallel()
	s := newStage(t, trouble{name: "restarted without persistence", settings: []string{"appendonly no"}})
	r := row{proof: "store trouble", cell: s.name + ", at rest", runs: pick(5, 1), window: true, note: "nothing else can be"}
	for range r.runs {
		s.enter()
		if said := s.ask(s.brokers[0], s.fresh()); said.Code != "" { // so it is in the journal
			t.Fatalf("before any trouble: %+v", said)
		}
		s.idp.count()
		before := s.logged("host1", "the store has lost a grant")
		s.redis.Kill()
		s.redis.Start()
		time.Sleep(lease)
		for _, b := range s.brokers {
			if said := s.ask(b, s.fresh()); !said.lost() {
				t.Errorf("%s says %+v", b.host, said)
			}
		}
		if n := s.idp.peek(); n != 0 {
			t.Errorf("%d refresh tokens were sent for a user who has to log in", n)
		}
		if s.logged("host1", "the store has lost a grant") == before {
			t.Error("the log does not say that the store has lost anything")
		}
		r.lost++
		s.login(s.user)
		s.recovers()
		all, most := s.idp.count()
		r.spent, r.most = r.spent+all, max(r.most, most)
	}
	report.add(r)
}

// A replica that lags takes the primary's place, and has none of what was written
// meanwhile. A broker sends a refresh token only once the replica has its lease,
// so the promoted copy shows that lease, others leave the grant alone, and the
// broker that has the newer token puts it there: even if all others ask first.
// New rights are told once the replica has them, and don't go back.
func TestStalePromotion(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		window bool
		run    func(s *stage)
	}{
		{"lags before the refresh", false, (*stage).lagsBefore},
		{"lags from the middle of a refresh", false, func(s *stage) { s.lagsDuring("") }},
		{"and the broker that refreshed was killed", false, func(s *stage) {
			s.lagsDuring("after commit")
			s.brokers[0].start()
		}},
		{"and it is not started again", true, func(s *stage) {
			s.lagsDuring("after commit")
			r := s.settles(s.brokers[1])
			s.brokers[0].start()
			s.count(r)
		}},
		{"lags while roles change", false, (*stage).lagsWithRoles},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := newStage(t, trouble{name: "stale promotion", replica: true}, func(w *world) {
				if tt.window { // the lease must run out
					w.hurry, w.setup.Timeout = 5, 4*time.Second
				}
			})
			s.asked = []*process{s.brokers[1], s.brokers[0]} // who does not know asks first
			s.cell("stale promotion", tt.name, tt.window, func() {
				tt.run(s)
				s.pair.rejoin()
			})
		})
	}
}

// lagsBefore: the replica has not got the lease, and no token is spent.
func (s *stage) lagsBefore() {
	s.t.Helper()
	s.pair.link().hold()
	if r := s.ask(s.brokers[0], s.fresh()); !r.unavailable() {
		s.t.Errorf("with a replica that lags the broker says %+v", r)
	}
	if n := s.idp.peek(); n != 0 {
		s.t.Errorf("%d refresh tokens were spent, which the replica does not know of", n)
	}
	s.pair.promote(s.wires...)
}

// lagsDuring: the replica has the lease, and not what came of it. Step is where
// the broker is killed; empty: it lives.
func (s *stage) lagsDuring(step string) {
	s.t.Helper()
	if step != "" {
		s.arm(step)
	}
	before := s.logged("host1", "the store fell back")
	told := <-s.inARefresh(s.pair.link().hold)
	switch {
	case step != "":
		s.brokers[0].killed()
	case told.Code != "":
		s.t.Errorf("the caller was told %+v", told)
	}
	s.pair.promote(s.wires...)
	if step == "" {
		await(s.t, "the broker puts Redis right by itself", func() bool { return s.logged("host1", "the store fell back") > before })
	}
}

// lagsWithRoles: the replica has the lease, and not the role that came or went.
func (s *stage) lagsWithRoles() {
	s.t.Helper()
	told := <-s.inARefresh(func() {
		s.idp.SetRoles(s.user, "researcher", "another")
		s.pair.link().hold()
	})
	if !told.unavailable() {
		s.t.Errorf("with a replica that has not got the new rights the caller was told %+v", told)
	}
	s.pair.promote(s.wires...)
}
