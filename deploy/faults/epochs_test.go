//go:build failpoints && linux

package faults_test

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tokenbroker/broker"
)

// slack is what the clocks of two brokers, which both follow the store's, may
// differ by.
const slack = 20 * time.Millisecond

// racers are how many users are raced over side by side.
const racers = 16

// A race is one user's run of changes, one after the other.
type race struct {
	*world
	user string
	n    int // of the change
	got  *tally

	mu      sync.Mutex // guards served
	served  int
	windows []window
}

// A window is the time from which on a user should have got no token.
type window struct {
	user broker.UserID
	from time.Time
}

// racing runs f for all changes of all users, and adds up.
func racing(w *world, changes int, f func(*race)) (got *tally, served int, windows []window) {
	got = new(tally)
	var all sync.WaitGroup
	races := make([]*race, racers)
	for i := range races {
		r := &race{world: w, user: fmt.Sprintf("user%d", i), got: got}
		races[i] = r
		all.Go(func() {
			for r.n = i; r.n < changes; r.n += racers {
				f(r)
			}
		})
	}
	all.Wait()
	for _, r := range races {
		served += r.served
		windows = append(windows, r.windows...)
	}
	return got, served, windows
}

// want asks b for scopes. ok: a token is what the user should get.
func (r *race) want(b *process, scopes []string, ok bool) Reply {
	c := Call{User: r.user, Scopes: scopes}
	said := r.reply(b, "Token", c)
	for tries := 0; said.Code == string(broker.Unavailable) && tries < 20; tries++ {
		time.Sleep(50 * time.Millisecond) // as it is told
		said = r.reply(b, "Token", c)
	}
	switch {
	case ok && said.Code != "":
		r.got.add(said)
	case !ok && said.Code == "":
		r.mu.Lock()
		r.served++
		r.mu.Unlock()
	}
	return said
}

// during asks b while the user's rights change: what he is told is nothing to
// anybody, unless the grant is lost.
func (r *race) during(b *process, scopes []string) {
	if said := r.reply(b, "Token", Call{User: r.user, Scopes: scopes}); said.lost() {
		r.got.add(said)
	}
}

// A role that is gained or lost while a refresh is under way costs no session,
// and once the change has been answered, and a lease is over, counts everywhere:
// also if the refresh brought back what was true when it began.
func TestRoleChangesRacingRefreshes(t *testing.T) {
	t.Parallel()
	w := newWorld(t, strict, 2)
	for i := range racers {
		w.login(fmt.Sprintf("user%d", i))
	}
	w.idp.count()
	w.idp.setLatency(30 * time.Millisecond)
	runs := pick(1000, 64)
	got, served, _ := racing(w, runs, (*race).change)
	row := row{proof: "role change racing refreshes", cell: "2 brokers, provider 30ms", runs: runs, lost: got.lost, served: served + w.void()}
	row.spent, row.most = w.idp.count()
	report.add(row)
	if row.lost+row.served+got.failed > 0 || row.most != 1 {
		t.Errorf("%+v; %d calls failed, e.g. %+v", row, got.failed, got.example)
	}
}

// change has both brokers refresh, and one of them change the role meanwhile.
func (r *race) change() {
	roles, researcher := []string{"guest"}, r.n/racers%2 == 1
	if researcher {
		roles = []string{"researcher"}
	}
	var refreshes sync.WaitGroup
	for i, b := range r.brokers {
		refreshes.Go(func() { r.during(b, guests[i:i+1]) })
		refreshes.Go(func() { r.during(b, scopes) })
	}
	time.Sleep(rand.N(90 * time.Millisecond))
	r.setRoles(r.brokers[r.n%2], r.user, roles...)
	time.Sleep(lease)
	for _, b := range r.brokers {
		r.want(b, scopes, researcher)
		r.want(b, guests, true)
	}
	refreshes.Wait()
	for _, b := range r.brokers { // what those brought does not count either
		r.want(b, scopes, researcher)
	}
}

// void counts the tokens of an older epoch that the audit says were handed out
// later than a lease after the newer one was told.
func (w *world) void() (n int) {
	type raise struct {
		at    time.Time
		epoch int64
	}
	raises := map[broker.UserID][]raise{}
	all := w.audit()
	for _, e := range all {
		if e.Action == "roles" {
			raises[e.User] = append(raises[e.User], raise{e.Time, e.Epoch})
		}
	}
	for _, e := range all {
		for _, r := range raises[e.User] {
			if e.Action == "token" && e.Outcome == "done" && e.Epoch < r.epoch && e.Time.After(r.at.Add(lease+slack)) {
				n++
			}
		}
	}
	return n
}

// After a disconnect has been answered no broker issues a token, whatever was
// under way: not from a cache, and not by a refresh, whose new refresh token is
// revoked at the provider, like all others. It is looked for in what callers got,
// at the time and once all is over, and in the audit to its end.
func TestRevocationsRacingRefreshes(t *testing.T) {
	t.Parallel()
	w := newWorld(t, strict, 3)
	w.idp.setLatency(30 * time.Millisecond)
	w.idp.count()
	runs := pick(1000, 32)
	got, served, windows := racing(w, runs, (*race).revoke)
	row := row{
		proof: "disconnect racing refreshes and cached reads", cell: "3 brokers, provider 30ms", runs: runs,
		lost: got.lost, served: served,
	}
	time.Sleep(lease)
	row.served += w.stillServed(windows) + w.issuedIn(windows)
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		alive := w.idp.lives()
		if alive == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Errorf("%d refresh tokens still work at the provider", alive)
			break
		}
	}
	row.spent, row.most = w.idp.count()
	report.add(row)
	if row.lost+row.served+got.failed > 0 || row.most != 1 {
		t.Errorf("%+v; %d calls failed, e.g. %+v", row, got.failed, got.example)
	}
}

// revoke logs the user in, has all brokers asked for cached tokens and for new
// ones, and disconnects him.
func (r *race) revoke() {
	r.user = fmt.Sprintf("user%d", r.n) // a later login would end what is outstanding
	r.login(r.user)
	type call struct{ began, ended time.Time }
	var brought []call // a token
	var mu sync.Mutex
	over := make(chan struct{})
	var callers sync.WaitGroup
	for i, b := range r.brokers {
		for _, scopes := range [][]string{scopes, subset(3*r.n + i)} {
			callers.Go(func() {
				r.until(over, b, scopes, func(at time.Time) {
					mu.Lock()
					defer mu.Unlock()
					brought = append(brought, call{at, time.Now()})
				})
			})
		}
	}
	time.Sleep(rand.N(90 * time.Millisecond))
	said := r.reply(r.brokers[r.n%len(r.brokers)], "Disconnect", Call{User: r.user})
	nothingFrom := time.Now().Add(lease)
	if said.Code != "" || said.NotKept != "" {
		r.t.Errorf("disconnect: %+v", said)
	}
	for i, b := range r.brokers {
		r.want(b, scopes, false)
		r.want(b, subset(500+3*r.n+i), false)
	}
	close(over)
	callers.Wait()
	for _, c := range brought {
		if c.began.After(said.Stopped) || c.ended.After(nothingFrom) {
			r.served++
		}
	}
	r.windows = append(r.windows, window{broker.UserID(r.user), said.Stopped})
}

// issuedIn counts the tokens that the audit has in one of the windows.
func (w *world) issuedIn(windows []window) (n int) {
	from := map[broker.UserID]time.Time{}
	for _, x := range windows {
		from[x.user] = x.from
	}
	for _, e := range w.audit() {
		at, cut := from[e.User]
		if cut && (e.Action == "token" || e.Action == "watch") && e.Outcome == "done" && e.Time.After(at.Add(slack)) {
			n++
		}
	}
	return n
}

// stillServed counts the answers that bring those users a token now.
func (w *world) stillServed(windows []window) int {
	var served atomic.Int64
	var all sync.WaitGroup
	for _, b := range w.brokers {
		all.Go(func() {
			for _, x := range windows {
				if w.reply(b, "Token", Call{User: string(x.user), Scopes: scopes}).Code == "" {
					served.Add(1)
				}
			}
		})
	}
	all.Wait()
	return int(served.Load())
}

// until asks b again and again, and stops a moment after it was first told that
// the user is cut off, or when over is closed. token is told when each call began
// that brought a token.
func (r *race) until(over <-chan struct{}, b *process, scopes []string, token func(time.Time)) {
	for refusals := 0; refusals < 30; {
		at := time.Now()
		switch said := r.reply(b, "Token", Call{User: r.user, Scopes: scopes}); said.Code {
		case "":
			token(at)
		case string(broker.Revoked):
			refusals++
		case string(broker.Unavailable): // try again
		default:
			r.got.add(said)
		}
		select {
		case <-over:
			return
		case <-time.After(10 * time.Millisecond):
		}
	}
}
