//go:build failpoints && linux

package faults_test

import (
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tokenbroker/broker"
	"tokenbroker/broker/oauthprovider"
)

// strangers runs a proof against each provider that none of us wrote.
func strangers(t *testing.T, prove func(t *testing.T, kind string)) {
	t.Parallel() // Keycloak starts meanwhile
	for _, kind := range []string{strictNPM, realKeycloak} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			prove(t, kind)
		})
	}
}

// asConfigured makes the brokers narrow as they would without being told.
func asConfigured(w *world) { w.setup.Narrowing = "" }

// Eight callers on two brokers, who are all there whenever the token ends, are one
// refresh each time, and the session lives on.
func TestStrangersAreAskedOncePerRotation(t *testing.T) {
	strangers(t, func(t *testing.T, kind string) {
		w := newWorld(t, kind, 2, asConfigured)
		w.login("user0")
		var all []func() Reply
		for i := range 8 {
			all = append(all, func() Reply { return w.ask(i%2, "Token", Call{User: "user0", Scopes: scopes}) })
		}
		w.untilRotated("at expiry", kind+", 8 callers on 2 brokers", 1, all)
	})
}

// The hub asks for a token for itself, and whether the session lives, at the same
// moments as the notebook: on both brokers.
func TestHubAndNotebookRefreshAtOnceAtAStranger(t *testing.T) {
	strangers(t, func(t *testing.T, kind string) {
		w := newWorld(t, kind, 2, asConfigured)
		handle := w.login("user0")
		var all []func() Reply
		for i := range 2 {
			for _, method := range []string{"Token", "Token", "Refresh", "Check"} {
				all = append(all, func() Reply { return w.ask(i, method, Call{User: "user0", Scopes: scopes, Handle: handle}) })
			}
		}
		targets := 1
		if kind == strictNPM {
			targets = 2 // without an exchange a narrower token is a refresh of its own
		}
		w.untilRotated("hub and notebook", kind+", on 2 brokers", targets, all)
	})
}

// ask is call with a broker that must not die.
func (w *world) ask(i int, method string, c Call) Reply {
	r, err := w.brokers[i].call(method, c)
	if err != nil {
		return Reply{Code: "died", Sentence: err.Error()}
	}
	return r
}

// untilRotated lets all ask at once, again and again, until the provider has
// rotated some times. They ask for so many targets: no more refreshes may come of
// one round.
func (w *world) untilRotated(proof, cell string, targets int, all []func() Reply) {
	w.t.Helper()
	w.idp.count()
	w.idp.setLatency(200 * time.Millisecond)
	r := row{proof: proof, cell: cell, runs: pick(20, 4)}
	said := Reply{Code: "nothing"}
	for deadline := time.Now().Add(time.Duration(r.runs) * 15 * time.Second); w.idp.peek() < r.runs || said.Code != ""; {
		before := w.idp.peek()
		if said = atOnce(all); said.lost() {
			r.lost++
			break
		}
		if n := w.idp.peek() - before; n > targets {
			w.t.Errorf("%s, %s: one round of callers was %d refreshes", proof, cell, n)
		}
		if time.Now().After(deadline) {
			w.t.Errorf("%s, %s: %d refreshes and no more, and last said: %+v", proof, cell, w.idp.peek(), said)
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	r.runs = w.idp.rotations()
	r.spent, r.most = w.idp.count()
	report.add(r)
	if r.lost > 0 || r.most != 1 || r.spent != r.runs {
		w.t.Errorf("%s, %s: %d rotations, %d requests, %d with one token; last said: %+v", proof, cell, r.runs, r.spent, r.most, said)
	}
}

// atOnce returns the worst of what all are told.
func atOnce(all []func() Reply) (worst Reply) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, ask := range all {
		wg.Go(func() {
			r := ask()
			mu.Lock()
			defer mu.Unlock()
			if r.lost() || worst.Code == "" {
				worst = r
			}
		})
	}
	wg.Wait()
	return worst
}

// A broker that is killed at any step and started again loses no session, but for
// the declared window, of which the user is told.
func TestKilledAtEachStepAStrangersSessionLives(t *testing.T) {
	var theirs []step
	for _, s := range steps {
		if !s.roles { // other roles are nothing that they can be told here
			theirs = append(theirs, s)
		}
	}
	strangers(t, func(t *testing.T, kind string) {
		k := &killing{world: newWorld(t, kind, 2), kind: kind, runs: pick(20, 1)}
		k.all(theirs)
	})
}

// An answer that is lost after the stranger has rotated is asked for once more.
// Then everybody is told, on each broker, what has happened and what to do, and
// nobody asks the stranger again. After a login all is well.
func TestLostAnswerOfAStrangerIsRetriedOnceAndTold(t *testing.T) {
	strangers(t, func(t *testing.T, kind string) {
		w := newWorld(t, kind, 2)
		r := row{proof: "lost answer", cell: kind + ", after the provider has rotated", runs: pick(20, 2), window: true}
		for n := range r.runs {
			handle := w.login("user0")
			w.idp.count()
			if w.loseAnswer(n, handle) {
				r.lost++
				r.reported++
			}
			all, most := w.idp.count()
			r.spent, r.most = r.spent+all, max(r.most, most)
			if all != 2 || most != 2 {
				t.Errorf("%s: %d requests, %d with one token, want 2 with the same", kind, all, most)
			}
		}
		w.login("user0")
		report.add(r)
	})
}

// loseAnswer loses the answer to one refresh, and reports whether everybody who
// asks from then on is told so.
func (w *world) loseAnswer(n int, handle string) bool {
	w.t.Helper()
	var lost atomic.Bool
	w.idp.when(nil, func() {
		if !lost.Swap(true) {
			panic(http.ErrAbortHandler)
		}
	})
	defer w.idp.when(nil, nil)
	c := Call{User: "user0", Scopes: subset(n), Handle: handle}
	told := w.ask(n%2, "Token", c) // in one go: the retry is not the caller's
	all := []Reply{told}
	for i := range 10 {
		c.Scopes = subset(n + i)
		all = append(all, w.ask(i%2, []string{"Token", "Token", "Refresh", "Check"}[i%4], c))
	}
	for _, r := range all {
		if !r.reported() {
			w.t.Errorf("a caller was told %+v, want that an answer was lost", r)
			return false
		}
	}
	if !strings.HasPrefix(told.Next, "log in to the hub again") {
		w.t.Errorf("the next step was said to be %q", told.Next)
	}
	return true
}

// A request that is lost before the stranger had it is as good as never sent: the
// retry saves the session, and the caller never hears of it.
func TestLostRequestToAStrangerIsRetriedAndSavesTheSession(t *testing.T) {
	strangers(t, func(t *testing.T, kind string) {
		w := newWorld(t, kind, 2)
		w.login("user0")
		w.idp.count()
		r := row{proof: "lost request", cell: kind + ", before the provider had it", runs: pick(20, 2)}
		for n := range r.runs {
			var dropped atomic.Bool
			w.idp.when(func() bool { return !dropped.Swap(true) }, nil)
			said := w.ask(n%2, "Token", Call{User: "user0", Scopes: subset(n)})
			if said.lost() {
				r.lost++
				w.login("user0")
			}
			if said.Code != "" {
				t.Errorf("%s: a caller was told %+v", kind, said)
			}
		}
		w.idp.when(nil, nil)
		r.spent, r.most = w.idp.count()
		report.add(r)
		if r.spent != 2*r.runs || r.most != 2 {
			t.Errorf("%s: %d requests in %d runs, %d with one token, want each sent twice", kind, r.spent, r.runs, r.most)
		}
	})
}

// The control: a hub and a notebook that each have the refresh token, as they have
// it without a broker. If no session were lost here, nothing above would be proved.
func TestTwoNaiveClientsLoseAStrangersSession(t *testing.T) {
	strangers(t, func(t *testing.T, kind string) {
		p := startIDP(t, kind)
		naive, err := oauthprovider.New(oauthprovider.Config{
			Name: "idp", Profile: p.profile, Issuer: p.url, ClientID: client, ClientSecret: broker.NewSecret(p.secret),
		})
		if err != nil {
			t.Fatal(err)
		}
		r := row{proof: "control: two at once", cell: kind, runs: pick(20, 5), note: "each with the refresh token"}
		for range r.runs {
			if !survives(t, p, naive) {
				r.lost++
			}
		}
		r.spent, r.most = p.count()
		report.add(r)
		if r.lost == 0 {
			t.Errorf("%s: nothing lost; this harness would not see it", kind)
		}
	})
}

// survives logs in, lets two clients refresh at once, and reports whether any
// refresh token that they have got is still good.
func survives(t *testing.T, p *idp, naive *oauthprovider.Provider) bool {
	t.Helper()
	code, verifier, err := p.code("user0", append([]string{"openid"}, scopes...)...)
	if err != nil {
		t.Fatal(err)
	}
	id, iss, err := naive.Login(t.Context(), broker.CodeGrant{Code: broker.NewSecret(code), Verifier: broker.NewSecret(verifier), RedirectURI: redirect})
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan broker.Secret, 2)
	for range 2 {
		go func() {
			_, iss, _ := naive.Refresh(t.Context(), iss.RefreshToken, id.Sub, nil)
			got <- iss.RefreshToken
		}()
	}
	good := 0
	for _, refresh := range []broker.Secret{<-got, <-got} {
		if refresh.IsZero() {
			continue
		}
		if _, _, err := naive.Refresh(t.Context(), refresh, id.Sub, nil); err == nil {
			good++
		}
	}
	return good > 0
}
