//go:build failpoints && linux

package faults_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/redis/go-redis/v9"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
	"tokenbroker/broker/seal"
)

var seed = flag.Uint64("seed", 0, "of a random schedule to run again; 0: new ones")

// A stamp says of an access token which of the provider's refreshes brought it,
// and which was the first that brought the roles it carries. Those from before
// that one are void.
type stamp struct{ n, first int }

// A wish is what a caller wants: any token that is good, or one that nobody has
// asked for before and that therefore costs a refresh.
type wish struct{ refresh bool }

// heard is the model, a register: what the callers of one grant have been told.
// Whoever asks after others were answered, at whatever broker,
//
//   - gets no token from before the roles that one of them got, and
//   - if he makes a refresh, gets a later one than all of them: no generation of
//     the refresh token is used twice.
//
// A broker goes by what it has read up to 250 ms ago. So a read may be answered as
// of a lease before its call; record has it begin then. A caller who gets no
// answer is told nothing; what the provider did for him shows as a number that is
// left out.
type heard struct{ newest, first int }

var model = porcupine.Model{
	Init: func() any { return heard{} },
	Step: func(state, input, output any) (bool, any) {
		h, s := state.(heard), output.(stamp)
		if s.n < h.first || input.(wish).refresh && s.n <= h.newest {
			return false, h
		}
		return true, heard{max(h.newest, s.n), max(h.first, s.first)}
	},
}

func linearizable(history []porcupine.Operation) porcupine.CheckResult {
	return porcupine.CheckOperationsTimeout(model, history, time.Minute)
}

// record is an answer as the model sees it.
func record(refresh bool, s stamp, called, answered time.Duration) porcupine.Operation {
	if !refresh {
		called -= lease
	}
	return porcupine.Operation{Input: wish{refresh}, Output: s, Call: int64(called), Return: int64(answered)}
}

// The model tells a bad history from a good one; else it would prove nothing.
func TestHistoriesThatTheModelAcceptsAndRefuses(t *testing.T) {
	const ms = time.Millisecond
	forced := record(true, stamp{7, 7}, 0, 100*ms) // brings other roles
	for _, tt := range []struct {
		name    string
		history []porcupine.Operation
		want    porcupine.CheckResult
	}{
		{"one refresh after another", []porcupine.Operation{forced, record(true, stamp{8, 7}, 200*ms, 300*ms)}, porcupine.Ok},
		{"a refresh that nobody was told of between them", []porcupine.Operation{forced, record(true, stamp{9, 7}, 200*ms, 300*ms)}, porcupine.Ok},
		{"two at once", []porcupine.Operation{forced, record(true, stamp{6, 3}, 50*ms, 150*ms)}, porcupine.Ok},
		{"a cached token of the same roles", []porcupine.Operation{forced, record(true, stamp{9, 7}, 200*ms, 300*ms), record(false, stamp{7, 7}, 900*ms, 901*ms)}, porcupine.Ok},
		{"a token of the old roles within the lease", []porcupine.Operation{forced, record(false, stamp{6, 3}, 349*ms, 400*ms)}, porcupine.Ok},
		{"a token of the old roles after it", []porcupine.Operation{forced, record(false, stamp{6, 3}, 351*ms, 400*ms)}, porcupine.Illegal},
		{"new roles that are old again", []porcupine.Operation{record(false, stamp{7, 7}, 0, ms), record(false, stamp{6, 3}, 300*ms, 301*ms)}, porcupine.Illegal},
		{"one generation for two refreshes", []porcupine.Operation{forced, record(true, stamp{7, 7}, 50*ms, 150*ms)}, porcupine.Illegal},
		{"a generation that goes back", []porcupine.Operation{forced, record(true, stamp{6, 3}, 200*ms, 300*ms)}, porcupine.Illegal},
	} {
		if got := linearizable(tt.history); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.name, got, tt.want)
		}
	}
}

// Random troubles of two brokers and of a primary with a replica, while callers
// read and refresh: the answers fit the model, every version that a promotion
// lost is found and put right, and no grant is lost but for one that a broker held
// that was killed between the provider's answer and its journal.
func TestRandomSchedules(t *testing.T) {
	t.Parallel()
	seeds := []uint64{*seed}
	if *seed == 0 {
		seeds = nil
		for range pick(100, 6) {
			seeds = append(seeds, 1+rand.Uint64N(1<<32))
		}
	}
	var all outcome
	t.Run("seed", func(t *testing.T) {
		slots := make(chan struct{}, 6)
		for _, seed := range seeds {
			t.Run(fmt.Sprint(seed), func(t *testing.T) {
				t.Parallel()
				slots <- struct{}{}
				defer func() { <-slots }()
				s := newSchedule(t, seed)
				s.run()
				s.check()
				all.add(&s.outcome)
				if t.Failed() {
					t.Logf("again with -args -seed %d", seed)
				}
			})
		}
	})
	all.report(len(seeds))
}

// An outcome is what schedules brought about.
type outcome struct {
	mu                    sync.Mutex // guards all below
	kills, cuts, slows    int        // of brokers, and of their ways to Redis
	restarts, promotions  int        // of Redis
	stale, versions       int        // promotions that lost something; new refresh tokens that they lost
	found, underway       int        // of these, told in a log; still being written
	answers, refused      int
	lost, reported, inWin int
	spent, most           int
}

func (o *outcome) add(s *outcome) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.kills, o.cuts, o.slows = o.kills+s.kills, o.cuts+s.cuts, o.slows+s.slows
	o.restarts, o.promotions = o.restarts+s.restarts, o.promotions+s.promotions
	o.stale, o.versions = o.stale+s.stale, o.versions+s.versions
	o.found, o.underway = o.found+s.found, o.underway+s.underway
	o.answers, o.refused = o.answers+s.answers, o.refused+s.refused
	o.lost, o.reported, o.inWin = o.lost+s.lost, o.reported+s.reported, o.inWin+s.inWin
	o.spent, o.most = o.spent+s.spent, max(o.most, s.most)
}

// count changes one of the numbers.
func (o *outcome) count(n *int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	*n++
}

func (o *outcome) report(runs int) {
	report.add(row{
		proof: "schedules", cell: "random", runs: runs, lost: o.lost - o.inWin, spent: o.spent, most: o.most,
		note: fmt.Sprintf("%d SIGKILL, %d partitions, %d latencies, %d restarts of Redis, %d promotions; %d tokens, %d refusals",
			o.kills, o.cuts, o.slows, o.restarts, o.promotions, o.answers, o.refused),
	})
	report.add(row{
		proof: "schedules", cell: "stale promotions", runs: o.stale,
		note: fmt.Sprintf("lost %d new refresh tokens: %d found by their broker, %d not answered yet", o.versions, o.found, o.underway),
	})
	report.add(row{proof: "schedules", cell: "SIGKILL between answer and journal", runs: o.kills, lost: o.inWin, reported: o.reported, window: true})
}

// A ledger knows what the provider has given: what the numbers in the model mean.
type ledger struct {
	mu     sync.Mutex // guards all below
	n      int        // refreshes so far
	stamps map[string]stamp
	first  map[string]int       // user and roles → the first refresh that brought them
	last   map[string]time.Time // user → his last refresh
}

// write enters an access token that a refresh has brought.
func (l *ledger) write(access string) {
	var claims struct {
		User  string   `json:"preferred_username"`
		Roles []string `json:"roles"`
	}
	payload, err := base64.RawURLEncoding.DecodeString(strings.Split(access, ".")[1])
	if err == nil {
		err = json.Unmarshal(payload, &claims)
	}
	if err != nil {
		panic(err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.n++
	of := fmt.Sprint(claims.User, claims.Roles)
	if l.first[of] == 0 {
		l.first[of] = l.n
	}
	l.stamps[broker.NewSecret(access).Fingerprint()] = stamp{l.n, l.first[of]}
	l.last[claims.User] = time.Now()
}

func (l *ledger) stamp(print string) (stamp, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s, ok := l.stamps[print]
	return s, ok
}

const (
	// scheduleFor is how long the troubles of one schedule go on.
	scheduleFor = 8 * time.Second
	// users and callers of one schedule: each user has so many.
	scheduleUsers, scheduleCallers = 2, 4
	// patience is a caller's.
	patience = 1500 * time.Millisecond
)

// A schedule is one deployment in random trouble.
type schedule struct {
	*world
	outcome
	seed  uint64
	pair  *pair
	seats []*atomic.Pointer[process] // the brokers, as they come and go
	users []*caller
	ledger
	began time.Time
	gone  []version // that promotions lost
	ends  []time.Time
}

// A caller is a user, who asks in several places at once.
type caller struct {
	name string
	dead atomic.Bool // he was told to log in

	mu      sync.Mutex // guards all below
	n       int        // of the next token that nobody has asked for
	roles   int        // how often they changed
	history []porcupine.Operation
	told    Reply // when he had to log in
}

// A version is a generation of a subject's refresh token in Redis.
type version struct {
	sub string
	n   int64
}

func newSchedule(t *testing.T, seed uint64) *schedule {
	s := &schedule{seed: seed, began: time.Now()}
	s.ledger = ledger{stamps: map[string]stamp{}, first: map[string]int{}, last: map[string]time.Time{}}
	s.world = newWorld(t, strict, 2, func(w *world) {
		w.hurry, w.setup.Timeout = 5, 4*time.Second // a lease of 9 s
		s.pair = newPair(t, "min-replicas-to-write 1")
		w.wired(2, s.pair.primary().Socket)
	})
	s.idp.gives = s.write
	for i := range scheduleUsers {
		u := &caller{name: fmt.Sprintf("user%d", i)}
		s.login(u.name)
		s.users = append(s.users, u)
	}
	s.idp.setLatency(4 * time.Millisecond)
	for _, b := range s.brokers {
		p := new(atomic.Pointer[process])
		p.Store(b)
		s.seats = append(s.seats, p)
	}
	s.pair.settled()
	return s
}

// random is a source of its own for each of the things that happen at once.
func (s *schedule) random(n int) *rand.Rand { return rand.New(rand.NewPCG(s.seed, uint64(n))) }

func upTo(r *rand.Rand, d time.Duration) time.Duration { return time.Duration(r.Int64N(int64(d))) }

// run lets trouble and callers go on at once, and then waits until all is well.
func (s *schedule) run() {
	until := time.Now().Add(scheduleFor)
	var all sync.WaitGroup
	all.Go(func() { s.troubleBrokers(s.random(1), until) })
	for i, u := range s.users {
		for j := range scheduleCallers {
			all.Go(func() { s.asks(u, s.random(10+i*scheduleCallers+j), until) })
		}
	}
	s.troubleRedis(s.random(2), until)
	all.Wait()
	for _, w := range s.wires {
		w.mend()
	}
	for i, b := range s.seats {
		s.brokers[i] = b.Load()
	}
}

func (s *schedule) troubleBrokers(r *rand.Rand, until time.Time) {
	for time.Now().Before(until) {
		time.Sleep(300*time.Millisecond + upTo(r, time.Second))
		i := r.IntN(len(s.wires))
		w := s.wires[i]
		switch r.IntN(4) {
		case 0:
			s.kill(i, upTo(r, 300*time.Millisecond))
			continue
		case 1:
			s.count(&s.cuts)
			w.cut()
		case 2:
			s.count(&s.cuts)
			w.hold()
		default:
			s.count(&s.slows)
			w.slow(upTo(r, 200*time.Millisecond))
		}
		time.Sleep(upTo(r, 700*time.Millisecond))
		w.mend()
	}
}

// kill kills a broker and starts it again after a while, as often as it takes:
// it does not start without Redis.
func (s *schedule) kill(i int, away time.Duration) {
	s.count(&s.kills)
	s.ends = append(s.ends, time.Now())
	s.seats[i].Load().end()
	time.Sleep(away)
	log, err := os.OpenFile(filepath.Join(s.setup.Dir, s.brokers[i].host+".log"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		s.t.Error(err)
		return
	}
	defer log.Close()
	for deadline := time.Now().Add(time.Minute); ; {
		p := &process{w: s.world, host: s.brokers[i].host, redis: s.brokers[i].redis, errors: log}
		err := p.launch()
		if err == nil {
			s.seats[i].Store(p)
			return
		}
		if time.Now().After(deadline) {
			s.t.Errorf("%s does not start: %v", p.host, err)
			return
		}
	}
}

func (s *schedule) troubleRedis(r *rand.Rand, until time.Time) {
	for time.Now().Before(until) {
		time.Sleep(300*time.Millisecond + upTo(r, 1500*time.Millisecond))
		switch r.IntN(4) {
		case 0:
			s.count(&s.restarts)
			s.pair.primary().Kill()
			time.Sleep(upTo(r, 300*time.Millisecond))
			s.pair.primary().Start()
			s.pair.settled()
		case 1:
			s.count(&s.cuts)
			s.pair.link().cut()
			time.Sleep(upTo(r, time.Second))
			s.pair.link().mend()
			s.pair.settled()
		default:
			if r.IntN(4) > 0 {
				s.pair.link().hold()
				time.Sleep(upTo(r, 800*time.Millisecond))
			}
			s.promote()
		}
	}
}

// promote puts the replica in the primary's place, and notes what that loses.
func (s *schedule) promote() {
	s.count(&s.promotions)
	s.pair.promote()
	has := s.versions(s.pair.primary())
	for _, w := range s.wires {
		w.lead(s.pair.primary().Socket)
	}
	s.pair.replica().Start() // by itself: nobody is led to it any more
	stale := false
	for sub, n := range s.versions(s.pair.replica()) {
		if n > has[sub] {
			s.gone = append(s.gone, version{sub, n})
			stale = true
		}
	}
	if stale {
		s.count(&s.stale)
	}
	s.pair.follow()
}

// versions opens all grants in a Redis, by their subjects.
func (s *schedule) versions(at *brokertest.Redis) map[string]int64 {
	keys, err := seal.Load(filepath.Join(s.setup.Dir, "keyset"), filepath.Join(s.setup.Dir, "kek"))
	if err != nil {
		s.t.Fatal(err)
	}
	c := redis.NewClient(&redis.Options{Network: "unix", Addr: at.Socket})
	defer c.Close()
	ctx := context.Background()
	const prefix = "tokenbroker:faults:record:"
	all := map[string]int64{}
	for _, name := range c.Keys(ctx, prefix+"grant:*").Val() {
		lies := c.HGetAll(ctx, name).Val()
		place := append(seal.Place{"faults"}, strings.Split(strings.TrimPrefix(name, prefix), ":")...)
		plain, err := keys.Open([]byte(lies["b"]), append(place, lies["r"]))
		var g struct {
			Key     broker.GrantKey
			Version int64
		}
		if err == nil {
			err = json.Unmarshal(plain, &g)
		}
		if err != nil {
			s.t.Errorf("a grant in Redis can't be opened: %v", err)
		}
		all[g.Key.Sub] = g.Version
	}
	return all
}

// asks lets a user ask in one place until then.
func (s *schedule) asks(u *caller, r *rand.Rand, until time.Time) {
	for time.Now().Before(until) && !u.dead.Load() {
		time.Sleep(upTo(r, 60*time.Millisecond))
		b := s.seats[r.IntN(len(s.seats))]
		switch n := r.IntN(10); {
		case n < 5:
			s.ask(u, b, false, patience)
		case n < 8:
			s.ask(u, b, true, patience)
		default:
			u.changeRoles(s.idp)
			s.ask(u, b, true, patience)
		}
	}
}

// changeRoles makes all tokens that there are void, once a refresh has seen it.
func (u *caller) changeRoles(p *idp) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.roles++
	p.SetRoles(u.name, "researcher", "change"+strconv.Itoa(u.roles))
}

// ask asks a broker once and writes the answer into the history.
func (s *schedule) ask(u *caller, at *atomic.Pointer[process], refresh bool, patience time.Duration) Reply {
	want := Call{User: u.name, Scopes: scopes, Patience: patience}
	if refresh {
		u.mu.Lock()
		want.Scopes = subset(u.n)
		u.n++
		u.mu.Unlock()
	}
	called := time.Since(s.began)
	said, err := at.Load().call("Token", want)
	answered := time.Since(s.began)
	if err != nil {
		said.Code = "died"
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	switch said.Code {
	case "":
		stamp, ok := s.stamp(said.Print)
		if !ok {
			s.t.Errorf("%s got a token that no refresh has brought", u.name)
		}
		u.history = append(u.history, record(refresh, stamp, called, answered))
	case string(broker.LoginRequired):
		u.told = said
		u.dead.Store(true)
	case "died", string(broker.Unavailable), string(broker.ProviderDown):
		s.count(&s.refused)
	default:
		s.t.Errorf("%s was told %+v", u.name, said)
	}
	return said
}

// check lets each user ask each broker once more, and looks at what there is.
func (s *schedule) check() {
	for _, u := range s.users {
		for _, b := range s.seats {
			for _, refresh := range []bool{false, true} {
				await(s.t, "the grant lives, or is lost", func() bool {
					return u.dead.Load() || s.ask(u, b, refresh, 0).Code == ""
				})
			}
		}
		s.answers += len(u.history)
		if got := linearizable(u.history); got != porcupine.Ok {
			s.t.Errorf("%s: the history of %d answers is %s", u.name, len(u.history), got)
			s.dump(u)
		}
		if u.dead.Load() {
			s.mourn(u)
		}
	}
	s.spent, s.most = s.idp.count()
	switch {
	case s.lost > 0:
		s.most = 0 // it says nothing: a lost answer is tried again, once
	case s.most != 1:
		s.t.Errorf("a refresh token was sent %d times", s.most)
	}
	s.foundAll()
}

// mourn looks whether a grant was lost in the one window there is: a broker was
// killed around the last refresh, and no journal has what that one brought.
func (s *schedule) mourn(u *caller) {
	s.lost++
	last, sub := s.last[u.name], s.idp.Sub(u.name)
	const around = 250 * time.Millisecond // a refresh takes a few ms, but the machine is busy
	killed := slices.ContainsFunc(s.ends, func(end time.Time) bool { return last.Sub(end).Abs() < around })
	if u.told.reported() && killed && s.journaled(sub) <= s.versions(s.pair.primary())[sub] {
		s.inWin++
		s.reported++
		return
	}
	s.t.Errorf("%s lost his grant: %s", u.name, u.told.Sentence)
}

// journaled is the newest version of a subject's refresh token that any of the
// journals knows.
func (s *schedule) journaled(sub string) (newest int64) {
	for _, b := range s.brokers {
		text, err := os.ReadFile(filepath.Join(s.setup.Dir, b.host+".journal"))
		if err != nil {
			s.t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			var e struct {
				Key     broker.GrantKey
				Version int64
			}
			_, body, _ := strings.Cut(line, " ")
			if json.Unmarshal([]byte(body), &e) == nil && e.Key.Sub == sub {
				newest = max(newest, e.Version)
			}
		}
	}
	return newest
}

// foundAll looks whether each version that a promotion lost is there again, and
// was found by the broker that had written it, or was about to.
func (s *schedule) foundAll() {
	var lines []string
	for _, b := range s.brokers {
		text, err := os.ReadFile(filepath.Join(s.setup.Dir, b.host+".log"))
		if err != nil {
			s.t.Fatal(err)
		}
		lines = append(lines, strings.Split(string(text), "\n")...)
	}
	said := func(words ...string) bool {
		return slices.ContainsFunc(lines, func(line string) bool {
			return !slices.ContainsFunc(words, func(word string) bool { return !strings.Contains(line, word) })
		})
	}
	now := s.versions(s.pair.primary())
	for _, v := range s.gone {
		s.outcome.versions++
		switch {
		case now[v.sub] < v.n:
			s.t.Errorf("version %d of %s was lost and is not back", v.n, v.sub)
		case said("the store fell back", v.sub, fmt.Sprintf("known_version=%d ", v.n)):
			s.found++
		case said("a new refresh token can't be stored", v.sub):
			s.underway++
		default:
			s.t.Errorf("version %d of %s was lost, and no broker noticed", v.n, v.sub)
		}
	}
}

// dump writes a history that does not fit the model where it can be looked at.
func (s *schedule) dump(u *caller) {
	f, err := os.CreateTemp("", "history-*.html")
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	_, info := porcupine.CheckOperationsVerbose(model, u.history, time.Minute)
	s.t.Logf("%s: the history is in %s (%v)", u.name, f.Name(), porcupine.Visualize(model, info, f))
}
