//go:build !release

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"tokenbroker/broker/devidp"
	pb "tokenbroker/proto/tokenbroker/v1"
)

// The demo runs the main job on a machine that has nothing else: the identity
// provider (devidp) and Redis (miniredis) live in this process, the hub is
// played, and the rest is the real thing: configuration, broker, sockets, and
// the notebook, which is a process of its own.
//
//	demo.go           the story: what is done and what must hold
//	demo_world.go     provider, Redis, hub and broker
//	demo_notebook.go  the notebook
func addDemo(root *cobra.Command) {
	c := &cobra.Command{
		Use:   "demo",
		Short: "Show what the broker does, with nothing else installed",
		Args:  cobra.NoArgs,
	}
	stay := c.Flags().Bool("stay", false, "go on running afterwards, to try it by hand")
	notebook := c.Flags().Bool("notebook", false, "be the notebook of the demo")
	c.Flags().MarkHidden("notebook")
	c.RunE = action(func(c *cobra.Command, _ []string) error {
		if *notebook {
			return beNotebook(c.Context(), os.Stdin, c.OutOrStdout())
		}
		return demo(c.Context(), c.OutOrStdout(), c.ErrOrStderr(), *stay)
	})
	root.AddCommand(c)
}

// A story is the demo while it runs.
type story struct {
	*world
	out io.Writer
}

// demo tells the story. It fails if anything did not hold.
func demo(ctx context.Context, stdout, stderr io.Writer, stay bool) (err error) {
	w, err := newWorld(ctx, stderr)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	s := &story{world: w, out: stdout}
	s.say("Everything runs in this process and in one child: the identity provider (devidp, for")
	s.say("development only) and Redis (miniredis) stand in for real ones, the hub is played.")
	for _, step := range []struct {
		title string
		run   func(context.Context) error
	}{
		{"Alice logs in to the hub", s.login},
		{"What is stored", s.stored},
		{"Alice's server starts", s.spawn},
		{"Her notebook asks for a token", s.ask},
		{"Hub and notebook refresh at the same time", s.refreshTogether},
		{"The notebook asks for too much", s.refused},
		{"Alice loses her role at the provider", s.loseRole},
		{"An administrator disconnects Alice", s.disconnect},
		{"Where the refresh tokens have been", s.search},
	} {
		fmt.Fprintf(stdout, "\n%s\n", step.title)
		if err := step.run(ctx); err != nil {
			return fmt.Errorf("%s: %w", strings.ToLower(step.title), err)
		}
	}
	fmt.Fprintln(stdout, "\nAll of it held.")
	if stay {
		return s.stay(ctx)
	}
	return nil
}

func (s *story) say(format string, args ...any) { fmt.Fprintf(s.out, "  "+format+"\n", args...) }

// holds says what was checked, or fails.
func (s *story) holds(ok bool, format string, args ...any) error {
	if !ok {
		return fmt.Errorf("this does not hold: "+format, args...)
	}
	s.say("✓ "+format, args...)
	return nil
}

func (s *story) login(ctx context.Context) error {
	got, err := s.hub.login(ctx, "alice")
	if err != nil {
		return err
	}
	s.say("The hub sent the authorization code to the broker instead of the provider. It got")
	s.say("  access_token   %s", claimsText(claimsOf(got.AccessToken)))
	s.say("  refresh_token  %.12s…, a handle; the provider does not know it", got.RefreshToken)
	issued := s.idp.spied()
	if err := s.holds(len(issued) == 1 && got.RefreshToken != issued[0] && strings.HasPrefix(got.RefreshToken, "tbh_"),
		"the hub has no refresh token"); err != nil {
		return err
	}
	return s.hub.claim(ctx, "alice")
}

func (s *story) stored(context.Context) error {
	sealed, plain := s.redis.records()
	s.say("Redis holds these records, sealed under a key that it does not have:")
	for _, name := range slices.Sorted(maps.Keys(sealed)) {
		s.say("  %-7s %4d bytes  %x…", kindOf(name), len(sealed[name]), first(sealed[name], 12))
	}
	s.say("and in plain which grants there are, and one number for the deployment.")
	if err := s.holds(!leaks(sealed, "alice"), "not even a name can be read in a record"); err != nil {
		return err
	}
	return s.holds(!leaks(sealed, s.idp.spied()...) && !leaks(plain, s.idp.spied()...), "the refresh token can't be read anywhere")
}

func (s *story) spawn(ctx context.Context) error {
	dir, err := s.hub.register(ctx, "alice")
	if err != nil {
		return err
	}
	if err := s.startNotebook(dir); err != nil {
		return err
	}
	s.say("The hub registered the server. The broker keeps a directory with one socket for it,")
	s.say("  %s", dir)
	s.say("which a container would find at /run/tokenbroker. The notebook is process %d; all", s.notebook.pid())
	s.say("that it was given is TOKENBROKER_SOCKET.")
	return nil
}

func (s *story) ask(context.Context) error {
	answers, err := s.askNotebook(question{Via: "gRPC", Audience: "storage"}, question{Via: "JSON", Audience: "storage"})
	if err != nil {
		return err
	}
	for _, a := range answers {
		if a.Refused != nil {
			return a.Refused
		}
		s.say("by %s   %s", a.Via, claimsText(a.Claims))
	}
	grpc, json := answers[0], answers[1]
	err = s.holds(grpc.Claims["sub"] == "sub-alice" && audience(grpc.Claims) == "storage" && !slices.Contains(grpc.Scopes, "write"),
		"it is Alice's, for storage only, with %s, and ends in %d s", strings.Join(grpc.Scopes, " "), grpc.ExpiresIn)
	if err != nil {
		return err
	}
	return s.holds(grpc.Print == json.Print, "both ways lead to the same token")
}

func (s *story) refreshTogether(ctx context.Context) error {
	if err := s.waitForRenewal(ctx); err != nil {
		return err
	}
	before := s.idp.Requests()
	s.idp.Delay(200 * time.Millisecond) // so that all wait at the same time
	defer s.idp.Delay(0)
	hub := make(chan error, 1)
	go func() { hub <- s.hub.refresh(ctx) }()
	answers, err := s.askNotebook(question{Via: "gRPC", Audience: "storage"}, question{Via: "JSON", Audience: "storage"})
	if err := errors.Join(err, <-hub); err != nil {
		return err
	}
	for _, a := range answers {
		if a.Refused != nil {
			return a.Refused
		}
	}
	after := s.idp.Requests()
	s.say("This provider takes a refresh token once; a second use ends the session.")
	return s.holds(after[devidp.Refresh]-before[devidp.Refresh] == 1 && after[devidp.Exchange]-before[devidp.Exchange] == 1,
		"three asked, the provider saw one refresh and one exchange, and the session lives")
}

// waitForRenewal waits until the tokens are too old to be given out again.
func (s *story) waitForRenewal(ctx context.Context) error {
	answers, err := s.askNotebook(question{Via: "gRPC", Audience: "storage"})
	if err != nil {
		return err
	}
	left := time.Duration(answers[0].ExpiresIn) * time.Second
	s.say("The tokens of this provider live %s. Waiting for their end …", accessTTL)
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(left):
		return nil
	}
}

func (s *story) refused(context.Context) error {
	answers, err := s.askNotebook(question{Via: "JSON", Audience: "compute"})
	if err != nil {
		return err
	}
	no := answers[0].Refused
	if no == nil {
		return errors.New("the policy let it through")
	}
	s.say("%s", no.Sentence)
	s.say("what to do: %s (audit line %s)", no.Next, no.Ref)
	return s.holds(no.Code == "denied" && strings.Contains(no.Sentence, "admin") && no.Ref != "", "refused, and told why")
}

// loseRole takes Alice's role away while her notebook asks all the time, and
// another of its programs watches. The next refresh shows it here; a provider like
// Keycloak shows it without one.
func (s *story) loseRole(ctx context.Context) error {
	loop := s.notebook.send(question{Via: "gRPC", Audience: "storage", UntilRefused: true})
	watch := s.notebook.send(question{Via: "Watch", Audience: "storage"})
	if err := errors.Join(loop.started(), watch.started()); err != nil {
		return err
	}
	began := time.Now()
	if err := s.idp.SetRoles("alice", "student"); err != nil {
		return err
	}
	asked, err := loop.answer()
	told, err2 := watch.answer()
	if err := errors.Join(err, err2); err != nil {
		return err
	}
	if asked.Refused == nil || told.Refused == nil {
		return errors.New("it still gets tokens")
	}
	s.say("Her notebook asks in a loop, and watches:")
	s.sayEvents(map[time.Time]string{
		began: "she is a student, no researcher any more", asked.LastToken: "the last request that got a token",
		asked.At: "the first refusal came", told.At: "the watch was told " + told.Refused.Code,
	}, began)
	s.say("It says: %s.", asked.Refused.Sentence)
	err = s.holds(asked.Refused.Code == "denied" && strings.Contains(asked.Refused.Sentence, "researcher") && strings.Contains(asked.Refused.Sentence, "student"),
		"the next token is refused, and the reason says which role is missing")
	if err == nil {
		err = s.holds(told.Refused.Code == "role_lost" && told.Refused.Sentence == asked.Refused.Sentence, "who watches is told the same, without asking")
	}
	if err != nil {
		return err
	}
	return s.regainRole(ctx)
}

// regainRole gives the role back. A login shows it at once.
func (s *story) regainRole(ctx context.Context) error {
	if err := s.idp.SetRoles("alice", "researcher"); err != nil {
		return err
	}
	if err := s.loginAgain(ctx); err != nil {
		return err
	}
	answers, err := s.askNotebook(question{Via: "gRPC", Audience: "storage"})
	if err != nil {
		return err
	}
	return s.holds(answers[0].Refused == nil, "she is a researcher again, logs in, and the same notebook gets tokens")
}

func (s *story) loginAgain(ctx context.Context) error {
	if _, err := s.hub.login(ctx, "alice"); err != nil {
		return err
	}
	return s.hub.claim(ctx, "alice")
}

// disconnect cuts Alice off while her notebook asks all the time.
func (s *story) disconnect(ctx context.Context) error {
	watch := s.notebook.send(question{Via: "gRPC", Audience: "storage", UntilRefused: true})
	if err := watch.started(); err != nil {
		return err
	}
	began := time.Now()
	r, err := s.admin.Disconnect(ctx, &pb.DisconnectRequest{User: "alice"})
	if err != nil {
		return err
	}
	done := time.Now()
	a, err := watch.answer()
	if err != nil {
		return err
	}
	s.say("Her notebook was asking in a loop:")
	s.sayEvents(map[time.Time]string{
		began: "tokenbroker users disconnect alice", done: "the command returned",
		a.LastToken: "the last request that got a token", a.At: "the first refusal came",
	}, began)
	if a.Refused == nil {
		return errors.New("it still gets tokens")
	}
	s.say("It says: %s.", a.Refused.Sentence)
	until := r.GetDisconnected()[0].GetOutstandingUntil().AsTime()
	s.say("Tokens that were given out before end by themselves, the last one in %s.", time.Until(until).Round(time.Second))
	stopped := r.GetDisconnected()[0].GetIssuingStoppedAt().AsTime()
	if err := s.holds(a.Refused.Code == "revoked" && !a.LastToken.After(stopped), "nobody who asked after the time that the broker promised got a token"); err != nil {
		return err
	}
	active, err := s.hub.checkSession(ctx, "alice")
	if err != nil {
		return err
	}
	return s.holds(!active, "the hub was told, and asks her to log in again")
}

// search looks for every refresh token the provider ever gave, wherever one
// could have got to.
func (s *story) search(context.Context) error {
	places, err := s.places()
	if err != nil {
		return err
	}
	issued := s.idp.spied()
	if len(issued) < 2 {
		return fmt.Errorf("the provider gave %d refresh tokens, which is too few to search for", len(issued))
	}
	for _, name := range slices.Sorted(maps.Keys(places)) {
		if leaks(map[string][]byte{name: places[name]}, issued...) {
			return fmt.Errorf("a refresh token is in %s", name)
		}
	}
	return s.holds(true, "the provider gave %d; none is in %s", len(issued), strings.Join(slices.Sorted(maps.Keys(places)), ", "))
}

// stay waits for the end and says what there is to try.
func (s *story) stay(ctx context.Context) error {
	if err := s.loginAgain(ctx); err != nil {
		return err
	}
	admin := s.cfg.Admin.Socket
	fmt.Fprintf(s.out, `
Alice has logged in again, so her notebook gets tokens again. Try, in another terminal:

  curl --unix-socket %[1]s http://localhost/v1/token?audience=storage
  TOKENBROKER_SOCKET=%[1]s go run ./cmd/access-token show --audience storage
  go run ./cmd/tokenbroker status --socket %[2]s
  go run ./cmd/tokenbroker sessions list --socket %[2]s
  go run ./cmd/tokenbroker users disconnect alice --socket %[2]s
  tail -f %[3]s

The configuration is %[4]s. Ctrl-C ends it all.
`, s.notebook.socket, admin, s.cfg.Audit.File, s.configFile)
	<-ctx.Done()
	return nil
}

// claimsText writes the claims that matter.
func claimsText(c map[string]any) string {
	var parts []string
	for _, name := range []string{"sub", "aud", "scope", "roles"} {
		if v, ok := c[name]; ok {
			text, _ := json.Marshal(v)
			parts = append(parts, fmt.Sprintf("%s %s", name, strings.Trim(string(text), `"`)))
		}
	}
	return strings.Join(parts, ", ")
}

// audience is the aud claim if there is just one.
func audience(c map[string]any) any {
	if list, ok := c["aud"].([]any); ok && len(list) == 1 {
		return list[0]
	}
	return c["aud"]
}

// sayEvents says in order what happened when, counted from a beginning.
func (s *story) sayEvents(events map[time.Time]string, began time.Time) {
	for _, t := range slices.SortedFunc(maps.Keys(events), time.Time.Compare) {
		ms := float64(t.Sub(began)) / float64(time.Millisecond)
		s.say("  %+8.1f ms  %s", ms, events[t])
	}
}

func first(b []byte, n int) []byte { return b[:min(n, len(b))] }
