package oauthprovider_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
	"tokenbroker/broker/oauthprovider"
	"tokenbroker/broker/seal"
)

// A site is a broker in a bubble, on parts in memory but for the provider's client.
type site struct {
	*broker.Broker
	*world
	containers *brokertest.Attestor
}

func inSite(t *testing.T, f func(t *testing.T, s *site), change ...func(*oauthprovider.Config)) {
	t.Helper()
	inWorld(t, func(t *testing.T, w *world) {
		keys, err := seal.New()
		if err != nil {
			t.Fatal(err)
		}
		s := &site{world: w, containers: brokertest.NewAttestor()}
		s.Broker, err = broker.New(broker.Config{
			Deployment: "lab", Host: "host1", Contact: "it@lab.example",
			Hubs:      map[broker.HubID]broker.Hub{"main": {Login: "lab"}},
			Providers: []broker.Provider{w.Provider},
			Rules:     []broker.Rule{{Provider: "lab", Roles: []string{"researcher"}, Audiences: []string{"storage"}, Scopes: []string{"read"}}},
			Store:     brokertest.NewMemStore(), Keys: keys, Attestor: s.containers, Sockets: brokertest.NewSockets(),
			Audit: io.Discard, Log: slog.New(slog.DiscardHandler), Journal: filepath.Join(t.TempDir(), "journal"),
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Start(context.Background()); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		defer s.Broker.Close()
		f(t, s)
	}, change...)
}

// runs logs user in and returns a process in the user's container.
func (s *site) runs(t *testing.T, user string, pid int32) *broker.Peer {
	t.Helper()
	code := broker.CodeGrant{Code: broker.NewSecret(user), Verifier: broker.NewSecret("v"), RedirectURI: home}
	login, err := s.Broker.Login(context.Background(), "main", "lab", code)
	if err != nil {
		t.Fatalf("Login of %s: %v", user, err)
	}
	if _, err := s.Claim(context.Background(), "main", "lab", login.Handle, broker.UserID(user)); err != nil {
		t.Fatalf("Claim: %v", err)
	}
	_, err = s.Register(context.Background(), "main", broker.RegisterRequest{User: broker.UserID(user), ContainerName: user})
	if err != nil {
		t.Fatalf("Register: %v", err)
	}
	s.containers.Run(user, pid)
	return &broker.Peer{Server: broker.ServerKey{Hub: "main", User: broker.UserID(user)}, PID: pid}
}

// ask asks for a token of p's user.
func (s *site) ask(p *broker.Peer) (broker.Token, error) {
	return s.Token(context.Background(), p, broker.Want{})
}

// TestValidTokensAreServedWhileTheBreakerIsOpen: also those for which a new one
// would be due, and to their end.
func TestValidTokensAreServedWhileTheBreakerIsOpen(t *testing.T) {
	inSite(t, func(t *testing.T, s *site) {
		alice := s.runs(t, "alice", 100)
		synctest.Wait()
		first, err := s.ask(alice)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		s.status(503)
		s.fail(5)
		s.isHeldBack()
		for {
			got, err := s.ask(alice)
			if errors.Is(err, broker.ErrProviderDown) {
				break
			}
			if err != nil || !got.Access.Equal(first.Access) || got.ExpiresIn <= 0 {
				t.Fatalf("with %v left: %v", got.ExpiresIn, err)
			}
			time.Sleep(5 * time.Second)
		}
		if d := time.Until(first.ExpiresAt); d > 0 {
			t.Errorf("the token was not served for its last %v", d)
		}
		var said *broker.Error
		_, err = s.ask(alice)
		if !errors.As(err, &said) || !strings.Contains(said.Sentence, "has been in trouble for 4m") || said.RetryAfter <= 0 {
			t.Errorf("said %+v", said)
		}
		s.trouble(nil)
		time.Sleep(20 * time.Second)
		if _, err := s.ask(alice); err != nil {
			t.Errorf("with the provider back: %v", err)
		}
	})
}

// TestAnAnswerThatCannotBeReadLosesNoGrant has a provider that forgives a retry
// do what it is asked, and then spoils its answer, and each time once more.
func TestAnAnswerThatCannotBeReadLosesNoGrant(t *testing.T) {
	body := func(status int, text string) func(http.ResponseWriter) {
		return func(rw http.ResponseWriter) { rw.WriteHeader(status); io.WriteString(rw, text) }
	}
	raw := func(text string) func(http.ResponseWriter) {
		return func(rw http.ResponseWriter) {
			c := hijack(rw)
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"+text)
			c.Close()
		}
	}
	for _, tt := range []struct {
		why   string
		spoil func(http.ResponseWriter)
	}{
		{"500", body(500, `{"error":"server_error"}`)},
		{"500 with a dead token in it", body(500, `{"error":"invalid_grant"}`)},
		{"502", body(502, `<html>`)},
		{"503", body(503, `<html>`)},
		{"504", body(504, ``)},
		{"no answer", func(rw http.ResponseWriter) { hijack(rw).Close() }},
		{"the connection ends within the body", raw("Content-Length: 1000\r\n\r\n{\"access_token\":\"x")},
		{"the connection ends within a chunk", raw("Transfer-Encoding: chunked\r\n\r\n40\r\n{\"access_token\":\"x")},
		{"JSON that ends too early", body(200, `{"access_token":"x","refresh_token":"y`)},
		{"a slow body", func(rw http.ResponseWriter) {
			for http.NewResponseController(rw).Flush() == nil { // until the broker hangs up
				time.Sleep(time.Second)
				io.WriteString(rw, " ")
			}
		}},
		{"200 with a passing error", body(200, `{"error":"temporarily_unavailable"}`)},
		{"200 with an error nobody knows", body(200, `{"error":"teapot"}`)},
		{"HTML", body(200, `<html>`)},
		{"a list", body(200, `[{"access_token":"x"}]`)},
		{"a string", body(200, `"access_token"`)},
		{"a token that is a number", body(200, `{"access_token":7}`)},
		{"a token that is an object", body(200, `{"access_token":{}}`)},
		{"nothing", body(200, ``)},
		{"more than 1 MiB", body(200, `{"access_token":"x","padding":"`+strings.Repeat("x", 1<<20)+`"}`)},
		{"a redirect", func(rw http.ResponseWriter) { rw.Header().Set("Location", "/elsewhere"); rw.WriteHeader(307) }},
	} {
		t.Run(tt.why, func(t *testing.T) {
			inSite(t, func(t *testing.T, s *site) {
				alice := s.runs(t, "alice", 100)
				time.Sleep(6 * time.Minute)
				spoiled := 0
				s.trouble(func(x sent, rw http.ResponseWriter, r *http.Request) bool {
					if x.kind != "refresh_token" || spoiled == 2 {
						return false
					}
					spoiled++
					s.issue(x.who)
					tt.spoil(rw)
					return true
				})
				for range 20 { // whoever is told to come again does
					if _, err := s.ask(alice); err == nil {
						break
					} else if !errors.Is(err, broker.ErrProviderDown) {
						t.Fatalf("told %v", err)
					}
					time.Sleep(10 * time.Second)
				}
				if _, err := s.ask(alice); err != nil || spoiled != 2 {
					t.Errorf("after %d spoiled answers: %v", spoiled, err)
				}
				for _, x := range s.requests() {
					if x.kind == "elsewhere" {
						t.Error("a redirect was followed")
					}
				}
			})
		})
	}
}

// TestAnExpiryStormStaysWithinTheRate: the tokens of all end at once, all ask at
// once, and who is told to come again later does so.
func TestAnExpiryStormStaysWithinTheRate(t *testing.T) {
	const users, perSecond = 100, 10
	inSite(t, func(t *testing.T, s *site) {
		peers := make([]*broker.Peer, users)
		for i := range peers {
			peers[i] = s.runs(t, fmt.Sprint("user", i), int32(100+i))
		}
		time.Sleep(6 * time.Minute)
		before := len(s.requests())
		began := time.Now()
		var all sync.WaitGroup
		for _, p := range peers {
			all.Go(func() {
				for {
					_, err := s.ask(p)
					var said *broker.Error
					switch {
					case err == nil:
						return
					case !errors.Is(err, broker.ErrProviderDown) || !errors.As(err, &said) || said.RetryAfter <= 0:
						t.Errorf("%s: %v", p.Server.User, err)
						return
					}
					time.Sleep(said.RetryAfter)
				}
			})
		}
		all.Wait()
		t.Logf("%d users had their tokens after %v", users, time.Since(began))
		got := s.requests()[before:]
		if most := mostInASecond(got); most > perSecond {
			t.Errorf("%d requests in one second, want at most %d", most, perSecond)
		}
		count := make(map[string]int)
		for _, x := range got {
			count[x.who+" "+x.kind]++
		}
		for _, p := range peers {
			for _, kind := range []string{"refresh_token", "token-exchange"} {
				if n := count[string(p.Server.User)+" "+kind]; n != 1 {
					t.Errorf("%s: %d requests of type %s, want 1", p.Server.User, n, kind)
				}
			}
		}
	}, func(c *oauthprovider.Config) { c.Rate = perSecond })
}
