package oauthprovider_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"tokenbroker/broker"
	"tokenbroker/broker/oauthprovider"
)

// fail has users fail; five are enough for the provider to be in trouble.
func (w *world) fail(users int) {
	w.t.Helper()
	for i := range users {
		if err := w.refresh(fmt.Sprint("user", i)); err == nil {
			w.t.Fatal("the provider should be in trouble")
		}
	}
}

// isHeldBack fails unless a refresh is not even sent.
func (w *world) isHeldBack() *broker.ProviderError {
	w.t.Helper()
	before := len(w.requests())
	e := wantClass(w.t, w.refresh("alice"), broker.TryLater, "circuit_open")
	if after := len(w.requests()); after != before {
		w.t.Errorf("the provider got %d requests", after-before)
	}
	return e
}

func TestAProviderInTroubleIsLeftAloneAndAskedAgain(t *testing.T) {
	for why, set := range map[string]func(w *world, down bool){
		"nobody listens": (*world).refuse,
		"503": func(w *world, down bool) {
			if w.trouble(nil); down {
				w.status(503)
			}
		},
	} {
		t.Run(why, func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				set(w, true)
				began := time.Now()
				w.fail(5)
				e := w.isHeldBack()
				if e.RetryAfter < time.Second || e.RetryAfter > w.Rests()+time.Second || !e.Since.Equal(began) || e.Status != 0 {
					t.Errorf("to be asked again in %v, failing since %v, status %d", e.RetryAfter, e.Since.Sub(began), e.Status)
				}
				wantClass(t, w.Revoke(t.Context(), broker.NewSecret("x"), broker.RefreshToken), broker.TryLater, "circuit_open")

				time.Sleep(e.RetryAfter + time.Millisecond)
				refreshes := len(w.requests("refresh_token"))
				if e := wantClass(t, w.refresh("alice"), broker.TryLater, "circuit_open"); !e.Since.Equal(began) {
					t.Errorf("failing since %v", e.Since.Sub(began))
				}
				if n := len(w.requests("refresh_token")); n != refreshes {
					t.Errorf("%d refresh tokens found out that the provider is still away", n-refreshes)
				}
				w.isHeldBack()

				set(w, false)
				time.Sleep(w.Rests() + time.Millisecond)
				for _, who := range []string{"alice", "bob", "carol"} {
					if err := w.refresh(who); err != nil {
						t.Errorf("%s, with the provider back: %v", who, err)
					}
				}
			})
		})
	}
}

// TestWhatCountsAsTheProvidersTrouble has ten users get the same answer.
func TestWhatCountsAsTheProvidersTrouble(t *testing.T) {
	answer := func(status int, body string) func(sent, http.ResponseWriter, *http.Request) bool {
		return func(_ sent, rw http.ResponseWriter, _ *http.Request) bool {
			rw.Header().Set("Location", "/elsewhere")
			rw.WriteHeader(status)
			io.WriteString(rw, body)
			return true
		}
	}
	cut := func(_ sent, rw http.ResponseWriter, _ *http.Request) bool { hijack(rw).Close(); return true }
	hang := func(_ sent, _ http.ResponseWriter, r *http.Request) bool { <-r.Context().Done(); return true }
	for _, tt := range []struct {
		why     string
		answer  func(sent, http.ResponseWriter, *http.Request) bool
		within  time.Duration // for which the caller waits; 0: however long it takes
		trouble bool
	}{
		{"500 in its own words", answer(500, `{"error":"server_error"}`), 0, true},
		{"502 of a gateway", answer(502, `<html>`), 0, true},
		{"503", answer(503, `<html>`), 0, true},
		{"429", answer(429, `{}`), 0, true},
		{"busy in its own words", answer(400, `{"error":"temporarily_unavailable"}`), 0, true},
		{"a page in the place of an answer", answer(200, `<html>`), 0, true},
		{"the connection is cut", cut, 0, true},
		{"no answer", hang, 0, true},
		{"no answer for 10 s", hang, 10 * time.Second, true},

		{"no answer for as long as a look may take", hang, 3 * time.Second, false},
		{"a dead session", answer(400, grant("Session not active")), 0, false},
		{"a disabled account", answer(400, grant("User disabled")), 0, false},
		{"something that the user has to do", answer(400, `{"error":"interaction_required"}`), 0, false},
		{"a scope that can't be had", answer(400, `{"error":"invalid_scope"}`), 0, false},
		{"our own credentials", answer(401, `{"error":"invalid_client"}`), 0, false},
		{"something unknown", answer(400, `{"error":"teapot"}`), 0, false},
		{"a firewall's page", answer(403, `<html>`), 0, false},
		{"a redirect", answer(302, ``), 0, false},
	} {
		t.Run(tt.why, func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				w.trouble(tt.answer)
				for i := range 10 {
					ctx, cancel := context.WithCancel(t.Context())
					if tt.within > 0 {
						ctx, cancel = context.WithTimeout(t.Context(), tt.within)
					}
					if _, _, err := w.Refresh(ctx, broker.NewSecret("rt"), fmt.Sprint("user", i), nil); err == nil {
						t.Fatal("got no error")
					}
					cancel()
				}
				w.trouble(nil)
				err := w.refresh("alice")
				if tt.trouble {
					wantClass(t, err, broker.TryLater, "circuit_open")
				} else if err != nil {
					t.Errorf("got %v", err)
				}
			})
		})
	}
}

func TestATroubleThatConcernsNobodyInParticularIsTheProviders(t *testing.T) {
	for why, set := range map[string]func(*world){
		"nobody listens":                func(w *world) { w.refuse(true) },
		"discovery has had too much":    func(w *world) { w.status(429) },
		"discovery finds a broken site": func(w *world) { w.status(500) },
	} {
		t.Run(why, func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				set(w)
				for range 5 {
					w.refresh("alice")
				}
				w.isHeldBack()
				if err := w.login("bob"); err == nil || w.isHeldBack() == nil {
					t.Error("a login at a provider that is away")
				}
				gets := len(w.requests("GET", ".well-known/openid-configuration"))
				w.login("bob")
				if now := len(w.requests("GET", ".well-known/openid-configuration")); now == gets && why != "nobody listens" {
					t.Error("a login did not even ask")
				}
			}, func(c *oauthprovider.Config) { c.Endpoints = oauthprovider.Endpoints{} })
		})
	}
}

func TestCallersWhoGoAwayAreNoTroubleOfTheProvider(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.trouble(func(_ sent, _ http.ResponseWriter, r *http.Request) bool { <-r.Context().Done(); return true })
		for i := range 10 {
			ctx, cancel := context.WithCancel(t.Context())
			go func() { time.Sleep(10 * time.Second); cancel() }()
			_, _, err := w.Refresh(ctx, broker.NewSecret("rt"), fmt.Sprint("user", i), nil)
			wantClass(t, err, broker.Lost, "no_answer")
		}
		w.trouble(nil)
		if err := w.refresh("alice"); err != nil {
			t.Errorf("got %v", err)
		}
	})
}

func TestOneUsersTroubleIsNotTheProviders(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.trouble(func(s sent, rw http.ResponseWriter, _ *http.Request) bool {
			if s.who == "alice" {
				rw.WriteHeader(500)
			}
			return s.who == "alice"
		})
		w.refuse(true)
		w.fail(4)
		w.refuse(false)
		if err := w.refresh("bob"); err != nil { // and what was before is over
			t.Fatal(err)
		}
		for range 20 {
			e := wantClass(t, w.refresh("alice"), broker.Lost, "unreadable_answer")
			if e.Since.IsZero() {
				t.Error("the error does not say since when")
			}
			access := broker.NewSecret(w.token("alice", "", ""))
			_, err := w.Exchange(t.Context(), access, broker.Target{Audience: "storage"})
			wantClass(t, err, broker.TryLater, "unreadable_answer")
		}
		if err := w.refresh("bob"); err != nil {
			t.Errorf("bob: %v", err)
		}
	})
}

func TestAProviderThatHangsForOneUserDoesNotSlowAnother(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.trouble(func(s sent, _ http.ResponseWriter, r *http.Request) bool {
			if s.who == "alice" {
				<-r.Context().Done()
			}
			return s.who == "alice"
		})
		var all sync.WaitGroup
		for range 50 {
			all.Go(func() { w.refresh("alice") })
		}
		synctest.Wait()
		for range 12 { // for as long as hers hang, and when they have been given up
			time.Sleep(3 * time.Second)
			began := time.Now()
			for _, who := range []string{"bob", "carol"} {
				if err := errors.Join(w.refresh(who), w.login(who)); err != nil {
					t.Errorf("%s: %v", who, err)
				}
			}
			if d := time.Since(began); d > 0 {
				t.Errorf("two others had to wait for %v", d)
			}
		}
		all.Wait()
	})
}

func TestALoginPassesAndWhatItShowsCounts(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.status(503)
		w.fail(5)
		w.isHeldBack()
		if err := w.login("bob"); err == nil || len(w.requests("authorization_code")) != 1 {
			t.Errorf("the login was not sent: %v", err)
		}
		w.trouble(nil)
		if err := w.login("bob"); err != nil {
			t.Errorf("a login at a provider that is back: %v", err)
		}
		w.isHeldBack()
		time.Sleep(w.Rests() + time.Millisecond)
		if err := w.login("carol"); err != nil {
			t.Errorf("got %v", err)
		}
		gets := len(w.requests("GET"))
		if err := w.refresh("alice"); err != nil || len(w.requests("GET")) != gets {
			t.Errorf("after a login that went well the provider was asked again whether it is there; error %v", err)
		}
	})
}

// TestOneHangingProbeDoesNotKeepTheOthersOut: the one whose request finds out
// whether the provider is back may be the one for whom it hangs.
func TestOneHangingProbeDoesNotKeepTheOthersOut(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.status(503)
		w.fail(5)
		w.trouble(func(s sent, _ http.ResponseWriter, r *http.Request) bool {
			if s.who == "alice" {
				<-r.Context().Done()
			}
			return s.who == "alice"
		})
		time.Sleep(w.Rests() + time.Millisecond)
		hung := make(chan error, 1)
		go func() { hung <- w.refresh("alice") }()
		synctest.Wait()
		wantClass(t, w.refresh("bob"), broker.TryLater, "circuit_open")
		time.Sleep(8*time.Second + time.Millisecond)
		if err := w.refresh("bob"); err != nil {
			t.Errorf("bob: %v", err)
		}
		wantClass(t, <-hung, broker.Lost, "no_answer")
	})
}

func TestARetryAfterIsKeptToByAll(t *testing.T) {
	for _, status := range []int{429, 503} {
		inWorld(t, func(t *testing.T, w *world) {
			w.status(status, "Retry-After", "20")
			wantClass(t, w.refresh("bob"), broker.TryLater, "busy") // one is enough
			w.trouble(nil)
			if e := w.isHeldBack(); e.RetryAfter < 20*time.Second || e.RetryAfter > 26*time.Second {
				t.Errorf("%d: to be asked again in %v", status, e.RetryAfter)
			}
			if err := w.login("carol"); err != nil {
				t.Errorf("%d: a login: %v", status, err)
			}
			time.Sleep(20 * time.Second)
			w.isHeldBack() // not in step with other brokers
			time.Sleep(6 * time.Second)
			if err := w.refresh("alice"); err != nil {
				t.Errorf("%d: afterwards: %v", status, err)
			}
		})
	}
}

func TestARetryAfterConcernsThoseWhoStandInLine(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.refresh("bob")
		w.status(503, "Retry-After", "20")
		first := make(chan error, 1)
		go func() { first <- w.refresh("bob") }()
		synctest.Wait()
		err := w.refresh("alice")
		wantClass(t, <-first, broker.TryLater, "busy")
		wantClass(t, err, broker.TryLater, "circuit_open")
		if n := len(w.requests()); n != 2 {
			t.Errorf("%d requests were sent, want 2", n)
		}
	}, func(c *oauthprovider.Config) { c.Rate = 1 })
}

func TestARetryAfterSwitchesNoProviderOff(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.status(503, "Retry-After", "999999999")
		w.refresh("bob")
		w.trouble(nil)
		time.Sleep(time.Minute)
		w.isHeldBack()
		time.Sleep(16 * time.Second)
		if err := w.refresh("alice"); err != nil {
			t.Errorf("got %v", err)
		}
	})
}

func TestTheUserinfoEndpointSpeaksForItsUserOnly(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.trouble(func(s sent, rw http.ResponseWriter, _ *http.Request) bool {
			if s.kind == "userinfo" {
				rw.Header().Set("Retry-After", "60")
				rw.WriteHeader(429)
			}
			return s.kind == "userinfo"
		})
		for i := range 10 {
			if err := w.login(fmt.Sprint("user", i)); err == nil {
				t.Fatal("a login without a subject")
			}
		}
		if err := w.refresh("alice"); err != nil {
			t.Errorf("got %v", err)
		}
	})
}

func TestBrokersDoNotComeBackInStep(t *testing.T) {
	rests := make(map[time.Duration]bool)
	for range 10 {
		rest := plainProvider(t, "generic", "http://127.0.0.1:1").Rests()
		if rest < 3*time.Second || rest >= 6*time.Second {
			t.Errorf("it leaves the provider alone for %v", rest)
		}
		rests[rest] = true
	}
	if len(rests) < 2 {
		t.Error("ten brokers come back at the same moment")
	}
}

func TestTheRateIsNeverExceeded(t *testing.T) {
	for _, perSecond := range []int{1, 10, 50, 100} {
		t.Run(fmt.Sprint(perSecond), func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				began := time.Now()
				var mu sync.Mutex
				var all sync.WaitGroup
				turned := 0
				for i := range 1000 {
					all.Go(func() {
						err := w.refresh(fmt.Sprint("user", i))
						if err == nil {
							return
						}
						if e := wantClass(t, err, broker.TryLater, "rate_limited"); e.RetryAfter < 5*time.Second || e.RetryAfter > 10*time.Second {
							t.Errorf("told to come again in %v", e.RetryAfter)
						}
						mu.Lock()
						defer mu.Unlock()
						turned++
					})
				}
				all.Wait()
				if d := time.Since(began); d > 5*time.Second {
					t.Errorf("somebody waited for %v", d)
				}
				got := w.requests()
				if len(got)+turned != 1000 {
					t.Errorf("%d were sent and %d turned away, of 1000", len(got), turned)
				}
				if most := mostInASecond(got); most > perSecond {
					t.Errorf("%d requests in one second, want at most %d", most, perSecond)
				}
				if least := 4 * perSecond; len(got) < least {
					t.Errorf("%d requests in 5 s, want at least %d", len(got), least)
				}
			}, func(c *oauthprovider.Config) { c.Rate = perSecond })
		})
	}
}

func TestALoginWaitsForItsTurnAsLongAsItsCaller(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		var all sync.WaitGroup
		for range 100 {
			all.Go(func() { w.refresh("alice") })
		}
		synctest.Wait()
		began := time.Now()
		wantClass(t, w.refresh("alice"), broker.TryLater, "rate_limited")
		if d := time.Since(began); d > 0 {
			t.Errorf("somebody stood in line for %v, for nothing", d)
		}
		if err := w.login("bob"); err != nil {
			t.Errorf("got %v", err)
		}
		all.Wait()
		if most := mostInASecond(w.requests("refresh_token", "authorization_code")); most > 10 {
			t.Errorf("%d requests in one second, want at most 10", most)
		}
	}, func(c *oauthprovider.Config) { c.Rate = 10 })
}

// TestWhatFollowsAnAnswerIsCountedButNotHeldUp: each login asks for userinfo, too.
func TestWhatFollowsAnAnswerIsCountedButNotHeldUp(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		began := time.Now()
		var all sync.WaitGroup
		for i := range 40 {
			all.Go(func() {
				if err := w.login(fmt.Sprint("user", i)); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		at := make(map[string]time.Time)
		for _, s := range w.requests() {
			if was, ok := at[s.who]; ok && !s.at.Equal(was) {
				t.Errorf("%s's answer waited for %v", s.who, s.at.Sub(was))
			}
			at[s.who] = s.at
		}
		if d := time.Since(began); d < 7*time.Second || d > 8*time.Second {
			t.Errorf("80 requests at 10 a second took %v", d)
		}
	}, func(c *oauthprovider.Config) { c.Rate = 10 })
}

func TestACallerWhoLeavesTheLineSendsNothing(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		w.refresh("alice")
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(100*time.Millisecond, cancel)
		_, _, err := w.Refresh(ctx, broker.NewSecret("rt"), "bob", nil)
		if e := wantClass(t, err, broker.TryLater, "unreachable"); !errors.Is(e, context.Canceled) || len(w.requests()) != 1 {
			t.Errorf("got %v after %d requests", e, len(w.requests()))
		}
	}, func(c *oauthprovider.Config) { c.Rate = 1 })
}

func TestCheckSaysSinceWhenAProviderIsInTrouble(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		if err := w.Check(t.Context()); err != nil {
			t.Fatal(err)
		}
		since := time.Now().UTC().Format("since 2006-01-02 15:04:05 MST")
		w.trouble(func(s sent, rw http.ResponseWriter, _ *http.Request) bool { // it is there, but of no use
			if s.kind != "GET" {
				rw.WriteHeader(500)
			}
			return s.kind != "GET"
		})
		w.fail(5)
		for range 3 {
			err := w.Check(t.Context())
			if e := wantClass(t, err, broker.TryLater, "circuit_open"); !strings.Contains(e.Error(), since) || !strings.Contains(e.Error(), "nothing is sent to it for another") {
				t.Errorf("said %q", e)
			}
			time.Sleep(time.Minute)
		}
		w.status(503)
		err := w.Check(t.Context())
		if e := wantClass(t, err, broker.TryLater, "provider_error"); !strings.Contains(e.Error(), since) {
			t.Errorf("said %q", e)
		}
	})
}
