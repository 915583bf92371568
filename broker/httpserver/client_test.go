package httpserver_test

import (
	"errors"
	"iter"
	"testing"
	"time"

	"tokenbroker/client"
)

// The Go client's Watch against the real edges; what it does about streams that end
// is in its own tests.
func TestTheGoClientIsToldWhatChanges(t *testing.T) {
	s := newStack(t, setup{})
	s.ready()
	c, err := client.NewAt(s.sock(alice))
	check(t, err)
	defer c.Close()
	next, stop := iter.Pull2(c.Watch(t.Context(), client.Audience("storage")))
	defer stop()
	expect := func(want error) {
		t.Helper()
		tok, err, ok := next()
		if !ok || !errors.Is(err, want) || (err == nil) != (want == nil) {
			t.Fatalf("Watch: got %v (goes on: %t), want %v", err, ok, want)
		}
		var said *client.Error
		if errors.As(err, &said) && (said.Sentence == "" || said.Next == "" || said.Ref == "") {
			t.Errorf("sentence, next step and ref must be there: %+v", *said)
		}
		if err == nil && (tok.AccessToken == "" || tok.Audience != "storage" || !tok.ExpiresAt.After(time.Now())) {
			t.Errorf("got %v", tok)
		}
	}
	expect(nil)
	_, err = s.b.SetShared(t.Context(), "main", "alice", "", true)
	check(t, err)
	expect(client.ErrRoleLost)
	_, err = s.b.SetShared(t.Context(), "main", "alice", "", false)
	check(t, err)
	expect(nil)
	s.disconnect()
	expect(client.ErrRevoked)
	time.Sleep(time.Millisecond) // logins are told apart by their time
	s.login()
	expect(nil)
}
