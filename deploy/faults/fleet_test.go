//go:build failpoints && linux

package faults_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
)

// What a fleet has to keep; README says so.
const (
	cutWithin  = time.Second     // from the command to the last old answer to a request
	tellWithin = 5 * time.Second // from the command to the word on the last open stream
)

// A fleet is three brokers with many users, each with a server on one of them.
type fleet struct {
	*world
	redis *brokertest.Redis
	users []string
	used  int // of these, how many were taken for disconnects
	got   tally
	cuts  []*cutoff
}

// Three brokers and a site's worth of servers. One test, because that many logins
// take their time; each part stands for itself.
func TestFleet(t *testing.T) {
	t.Parallel()
	f := newFleet(t, pick(2100, 90))
	part := func(name string, run func()) {
		t.Run(name, func(t *testing.T) {
			defer func(whole *testing.T) { f.t = whole }(f.t)
			f.t = t
			run()
		})
	}
	part("the confirmation costs the same for any number of users", func() {
		for _, users := range []int{1, pick(105, 6), len(f.users)} {
			f.confirm(users)
		}
	})
	part("a disconnect counts everywhere within a second", func() {
		for _, how := range []manner{
			{name: "notes arrive"},
			{name: "notes lost", deaf: true},
			{name: "notes lost and nobody asks", deaf: true, quiet: true},
		} {
			f.disconnect(how, pick(200, 3))
		}
	})
	part("outstanding_until is when the last token ends", f.outstanding)
	part("nothing is issued after a disconnect", f.nothingLeft)
}

func newFleet(t *testing.T, users int) *fleet {
	t.Helper()
	f := &fleet{redis: brokertest.StartRedis(t)}
	f.world = newWorld(t, strict, 3, func(w *world) { w.setup.Redis = f.redis.Socket })
	errs := make(chan error, users)
	var logins sync.WaitGroup
	for i := range 8 {
		logins.Go(func() {
			for n := i; n < users; n += 8 {
				_, err := f.loginAt(f.home(n), name(n))
				errs <- err
			}
		})
	}
	logins.Wait()
	for n := range users {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
		f.users = append(f.users, name(n))
	}
	return f
}

func name(n int) string { return fmt.Sprintf("user%d", n) }

// home is the broker that has the nth user's server.
func (f *fleet) home(n int) *process { return f.brokers[n%len(f.brokers)] }

// take returns n users to whom nothing has happened yet.
func (f *fleet) take(n int) []string {
	f.used += n
	return f.users[f.used-n : f.used]
}

// The rate at which each broker is asked for tokens, however many users there are.
const askEvery = 5 * time.Millisecond

// ask has users ask for the tokens they have, one after the other at each broker,
// until it is stopped. asked is how many got one, by broker.
func (f *fleet) ask(users []string) (stop func() (asked []int64)) {
	asked := make([]int64, len(f.brokers))
	over := make(chan struct{})
	var all sync.WaitGroup
	for i, b := range f.brokers {
		all.Go(func() {
			tick := time.NewTicker(askEvery)
			defer tick.Stop()
			for n := i; ; n += len(f.brokers) {
				if f.reply(b, "Token", Call{User: users[n%len(users)], Scopes: scopes}).Code == "" {
					asked[i]++
				}
				select {
				case <-tick.C:
				case <-over:
					return
				}
			}
		})
	}
	return func() []int64 {
		close(over)
		all.Wait()
		return asked
	}
}

// confirm counts what so many users, who ask for nothing but the tokens they have,
// cost in reads of the store. However many they are, and however often they ask, a
// broker reads the revision once per lease. What it knows of a user is read again
// once per viewFor, and then the revision once more.
func (f *fleet) confirm(users int) {
	const viewFor = 30 * time.Second                // of broker/match.go
	some := f.users[:users]                         // one, whose servers are everywhere, or so many on each broker
	for n := range max(len(some), len(f.brokers)) { // everybody has a token, and the views are of now
		f.knows(f.home(n), some[n%len(some)])
	}
	began := time.Now()
	was, evals, gets := f.reads(), f.calls("evalsha"), f.calls("hmget")
	stop := f.ask(some)
	time.Sleep(time.Duration(pick(40, 1)) * time.Second)
	asked := stop()
	is, took := f.reads(), time.Since(began)
	evals, gets = f.calls("evalsha")-evals, f.calls("hmget")-gets

	var answers, pulses, views int64
	for i := range is {
		p, v := is[i].Pulses-was[i].Pulses, is[i].Links-was[i].Links
		answers, pulses, views = answers+asked[i], pulses+p, views+v
		here := int64(max(1, len(some)/len(f.brokers)))
		if most := here * (1 + int64(took/viewFor)); v > most {
			f.t.Errorf("%d users: %s read their records %d times in %s, want %d at most", users, f.brokers[i].host, v, took, most)
		}
		if most := 4 + int64(took/lease) + v; p > most {
			f.t.Errorf("%d users: %s read the revision %d times in %s, want %d at most", users, f.brokers[i].host, p, took, most)
		}
		if asked[i] == 0 {
			f.t.Errorf("%d users: %s answered nobody", users, f.brokers[i].host)
		}
	}
	rate := func(n int64) float64 { return float64(n) / took.Seconds() }
	n := int64(len(f.brokers))
	report.add(row{proof: "fleet: cost of the confirmation", cell: fmt.Sprintf("%d users", users), runs: int(answers), note: fmt.Sprintf(
		"per broker and second: %.0f answers, the revision read %.1f times for requests and %.1f for users' records; Redis in all: %.0f EVALSHA, %.0f HMGET",
		rate(answers)/float64(n), rate(pulses-views)/float64(n), rate(views)/float64(n), rate(evals), rate(gets))})
}

// calls is how often Redis was given a command.
func (f *fleet) calls(command string) (n int64) {
	f.t.Helper()
	for line := range strings.Lines(must(f.t, f.redis, "INFO", "commandstats")) {
		if rest, ok := strings.CutPrefix(line, "cmdstat_"+command+":calls="); ok {
			fmt.Sscan(strings.ReplaceAll(rest, ",", " "), &n)
		}
	}
	return n
}

// reads is what each broker has read so far.
func (f *fleet) reads() []Reads {
	f.t.Helper()
	all := make([]Reads, len(f.brokers))
	for i, b := range f.brokers {
		if err := b.rpc.Call("Service.Reads", Call{}, &all[i]); err != nil {
			f.t.Fatal(err)
		}
	}
	return all
}

// A manner is in what circumstances users are disconnected.
type manner struct {
	name  string
	deaf  bool // notes of other brokers don't arrive
	quiet bool // nobody asks for anything but the open streams
}

// callersEach is how many ask on each broker for a user who is cut off, each 10 ms.
const callersEach = 4

// A cutoff is one disconnect, of a user with a server on each broker.
type cutoff struct {
	user  string
	given time.Time // when the command was
	said  chan Reply

	mu    sync.Mutex  // guards what follows
	began []time.Time // when the calls began that brought a token
	last  time.Time   // when the last of them had brought it
	told  time.Time   // when the last open stream had said that it is over
}

func (c *cutoff) token(began time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.began, c.last = append(c.began, began), time.Now()
}

func (c *cutoff) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.told = time.Now()
}

// disconnect cuts so many users off, and measures from when the command was given,
// which is what an administrator counts from. A command answers later, when Redis
// has it for sure, and the next user's turn does not wait for that.
func (f *fleet) disconnect(how manner, runs int) {
	for _, b := range f.brokers {
		if err := b.rpc.Call("Service.Deafen", how.deaf, &Reply{}); err != nil {
			f.t.Fatal(err)
		}
	}
	stop := func() []int64 { return nil }
	if !how.quiet {
		stop = f.ask(f.users[len(f.users)-len(f.users)/3:])
	}
	var requests, streams []time.Duration
	for n, user := range f.take(runs) {
		c := f.cut(how, user, f.home(n))
		f.cuts = append(f.cuts, c)
		requests, streams = append(requests, max(0, c.last.Sub(c.given))), append(streams, c.told.Sub(c.given))
	}
	stop()
	note := "the command → the word on the last of 3 streams: " + spread(streams)
	if !how.quiet {
		note = "the command → the last old answer of 3 brokers: " + spread(requests) + "; " + note
	}
	report.add(row{proof: "fleet: disconnect", cell: how.name + fmt.Sprintf(", %d users", len(f.users)), runs: runs, lost: f.got.lost, note: note})
	if f.got.lost+f.got.failed > 0 {
		f.t.Errorf("%d calls failed, the last with %+v", f.got.lost+f.got.failed, f.got.example)
	}
	if !*long {
		return // how fast a machine is that does much else proves nothing
	}
	if p99 := percentile(requests, 99); !how.quiet && p99 >= cutWithin {
		f.t.Errorf("%s: the last old answer comes up to %s after the command (p99), want less than %s", how.name, p99, cutWithin)
	}
	if p99 := percentile(streams, 99); p99 >= tellWithin {
		f.t.Errorf("%s: the last stream is told %s after the command (p99), want less than %s", how.name, p99, tellWithin)
	}
}

// cut disconnects user by one broker, while his servers on all of them ask and
// watch. It returns when all of them have been told.
func (f *fleet) cut(how manner, user string, by *process) *cutoff {
	c := &cutoff{user: user, said: make(chan Reply, 1)}
	for _, b := range f.brokers {
		f.knows(b, user)
		if r := f.reply(b, "Watch", Call{User: user, Scopes: scopes}); r.Code != "" {
			f.t.Errorf("%s: watch: %+v", b.host, r)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	asker := &race{world: f.world, user: user, got: &f.got}
	var servers sync.WaitGroup
	for _, b := range f.brokers {
		for range callersEach {
			if !how.quiet {
				servers.Go(func() { asker.until(ctx.Done(), b, scopes, c.token) })
			}
		}
		servers.Go(func() {
			if r := f.reply(b, "Told", Call{User: user}); r.Code != string(broker.Revoked) {
				f.t.Errorf("%s: the stream of %s told %q", b.host, user, r.Code)
			}
			c.end()
		})
	}
	phase := lease
	if how.quiet {
		phase = time.Second // that often a broker looks whether anybody asks or not
	}
	time.Sleep(rand.N(phase))
	c.given = time.Now()
	go func() { // it may answer when this part of the test is over
		said, err := by.call("Disconnect", Call{User: user})
		if err != nil {
			said.Code = err.Error()
		}
		c.said <- said
	}()
	servers.Wait()
	return c
}

// nothingLeft looks what was answered to whom after he was cut off.
func (f *fleet) nothingLeft() {
	served := 0
	var windows []window
	for _, c := range f.cuts {
		said := <-c.said
		if said.Code != "" || said.NotKept != "" {
			f.t.Errorf("disconnect %s: %+v", c.user, said)
		}
		for _, began := range c.began {
			if began.After(said.Stopped) {
				served++
			}
		}
		windows = append(windows, window{broker.UserID(c.user), said.Stopped})
	}
	time.Sleep(lease)
	served += f.stillServed(windows)
	if issued := f.issuedIn(windows); served+issued > 0 {
		f.t.Errorf("%d answers to servers of users who were cut off brought a token, and the audit has %d", served, issued)
	}
}

// outstanding gives users tokens that end at different times, on one broker after
// the other, disconnects half of them, restarts a broker, and disconnects the
// others.
func (f *fleet) outstanding() {
	var all []*issued
	for n, user := range f.take(pick(60, 6)) {
		all = append(all, &issued{user: user, n: n})
	}
	for round := range f.brokers {
		if round > 0 {
			time.Sleep(1500 * time.Millisecond) // so that the ends differ by more than they may be off
		}
		for _, i := range all {
			f.issue(i, f.home(i.n+round), subset(200*round+i.n))
		}
	}
	half := pick(len(all)/2, 0)
	if half > 0 {
		f.compare("all brokers up since", all[:half])
	}
	f.brokers[2].end()
	f.brokers[2].start()
	f.compare("a broker restarted", all[half:])
}

// An issued is what a user's servers got.
type issued struct {
	user string
	n    int
	ends time.Time     // of the token that ends last
	took time.Duration // until it was there
}

func (f *fleet) issue(i *issued, b *process, scopes []string) {
	f.knows(b, i.user)
	began := time.Now()
	said := f.reply(b, "Ends", Call{User: i.user, Scopes: scopes})
	if said.Code != "" || said.Ends.IsZero() {
		f.t.Errorf("%s: a token for %s: %+v", b.host, i.user, said)
	}
	if said.Ends.After(i.ends) {
		i.ends, i.took = said.Ends, time.Since(began)
	}
}

// compare disconnects users, by one broker and another, and compares what is said
// to be outstanding with what they got. A provider cuts a token's end down to the
// second, and the broker counts from when the answer came: so it is late by a
// second and what the call took at the most, and never early.
func (f *fleet) compare(when string, all []*issued) {
	off := make([]time.Duration, len(all))
	var users sync.WaitGroup
	for k, i := range all {
		users.Go(func() {
			said := f.reply(f.home(k), "Disconnect", Call{User: i.user})
			off[k] = said.Until.Sub(i.ends)
			if said.Code != "" || off[k] < -slack-i.took || off[k] > time.Second+i.took+slack {
				f.t.Errorf("%s: outstanding until %s, and %s's last token ends %s (it took %s): %+v", when, said.Until, i.user, i.ends, i.took, said)
			}
		})
	}
	users.Wait()
	report.add(row{proof: "fleet: outstanding_until", cell: when, runs: len(all), note: fmt.Sprintf(
		"later than the end of the last token by %d to %d ms", slices.Min(off).Milliseconds(), slices.Max(off).Milliseconds())})
}

// percentile is the smallest of all that p of a hundred don't exceed.
func percentile(all []time.Duration, p int) time.Duration {
	all = slices.Sorted(slices.Values(all))
	return all[(len(all)*p+99)/100-1]
}

func spread(all []time.Duration) string {
	return fmt.Sprintf("p50 %d, p99 %d, max %d ms", percentile(all, 50).Milliseconds(), percentile(all, 99).Milliseconds(), slices.Max(all).Milliseconds())
}

// What follows runs in the broker processes.

// A tapped is a Store whose reads are counted, and whose notes can be lost.
type tapped struct {
	broker.Store
	pulses, links atomic.Int64
	deaf          atomic.Bool
}

func (s *tapped) Pulse(ctx context.Context) (broker.Pulse, error) {
	s.pulses.Add(1)
	return s.Store.Pulse(ctx)
}

func (s *tapped) Get(ctx context.Context, k broker.Key) (broker.Record, error) {
	if k.Kind == "link" { // where a look at a user's records begins
		s.links.Add(1)
	}
	return s.Store.Get(ctx, k)
}

func (s *tapped) Listen(ctx context.Context, heard func(string)) error {
	return s.Store.Listen(ctx, func(note string) {
		if !s.deaf.Load() {
			heard(note)
		}
	})
}

// Reads is what a broker has asked its store.
type Reads struct{ Pulses, Links int64 }

// Reads tells what the process has read so far.
func (s *Service) Reads(_ Call, r *Reads) error {
	tap := s.s.(*ours).store
	r.Pulses, r.Links = tap.pulses.Load(), tap.links.Load()
	return nil
}

// Deafen has the notes of other brokers get lost, or not.
func (s *Service) Deafen(deaf bool, _ *Reply) error {
	s.s.(*ours).store.deaf.Store(deaf)
	return nil
}

// Ends gets the user's container a token, and tells when that ends.
func (s *Service) Ends(c Call, r *Reply) error {
	t, err := s.s.(*ours).get(context.Background(), c)
	if err == nil {
		r.Ends, err = expiry(t.Access.Reveal())
	}
	return r.of(err)
}

// expiry is when a token ends by its own word, which services go by.
func expiry(jwt string) (time.Time, error) {
	var claims struct{ Exp int64 }
	parts := strings.Split(jwt, ".")
	if len(parts) != 3 {
		return time.Time{}, errors.New("the token can't be read")
	}
	text, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err == nil {
		err = json.Unmarshal(text, &claims)
	}
	return time.Unix(claims.Exp, 0), err
}

// A stream is what an open Watch has told and nobody has heard yet.
type stream struct{ events chan string }

// Watch opens one for the user's container, and tells what it told first.
func (s *Service) Watch(c Call, r *Reply) error {
	o := s.s.(*ours)
	st := &stream{make(chan string, 16)}
	o.mu.Lock()
	o.watches[c.User] = st
	o.mu.Unlock()
	go func() {
		defer close(st.events)
		_ = o.Broker.Watch(context.Background(), o.peer(c.User), broker.Want{Scopes: c.Scopes}, func(u broker.Update) error {
			st.events <- u.Event
			if u.Event != tokenEvent {
				return errors.New("it has told what the test waits for")
			}
			return nil
		})
	}()
	r.Code = st.next()
	if r.Code == tokenEvent {
		r.Code = ""
	}
	return nil
}

// Told waits for what the user's Watch tells that is no token.
func (s *Service) Told(c Call, r *Reply) error {
	o := s.s.(*ours)
	o.mu.Lock()
	st := o.watches[c.User]
	o.mu.Unlock()
	for r.Code = tokenEvent; r.Code == tokenEvent; {
		r.Code = st.next()
	}
	return nil
}

const tokenEvent = "token"

func (s *stream) next() string {
	select {
	case e, ok := <-s.events:
		if ok {
			return e
		}
		return "closed"
	case <-time.After(time.Minute):
		return "nothing"
	}
}
