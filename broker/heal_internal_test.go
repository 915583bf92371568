package broker

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// Whatever a grant's token is restored from, the roles are those of the newest
// epoch that is known.
func TestHealedGrantHasTheRolesOfTheNewestEpoch(t *testing.T) {
	old, now := []string{"keycloak:roles/researcher"}, []string{"keycloak:roles/guest"}
	login := time.UnixMicro(1)
	for _, tt := range []struct {
		name  string
		store Grant
		entry journalEntry
		own   *Grant // the box
	}{
		{"the journal knows of a newer epoch",
			Grant{Version: 5, Epoch: 1, Roles: old}, journalEntry{Version: 5, Epoch: 2, Roles: now}, nil},
		{"the store has a newer epoch and an older token",
			Grant{Version: 5, Epoch: 2, Roles: now}, journalEntry{Version: 6, Epoch: 1, Roles: old}, &Grant{Version: 6, Epoch: 1, Roles: old, LoginAt: login}},
		{"the roles changed after the box was closed",
			Grant{Version: 5, Epoch: 1, Roles: old}, journalEntry{Version: 6, Epoch: 2, Roles: now}, &Grant{Version: 6, Epoch: 1, Roles: old, LoginAt: login}},
		{"the token is lost",
			Grant{Version: 5, Epoch: 1, Roles: old}, journalEntry{Version: 6, Epoch: 2, Roles: now}, nil},
	} {
		var own Grant
		if tt.own != nil {
			own = *tt.own
			tt.entry.rights(&own)
		}
		got := new(Broker).heal(tt.store, tt.entry, own, tt.own != nil)
		if diff := cmp.Diff(now, got.Roles); diff != "" || got.Epoch < 2 {
			t.Errorf("%s: epoch %d, roles (-want +got):\n%s", tt.name, got.Epoch, diff)
		}
	}
}

// unsteady is a Store that settles as next says.
type unsteady struct {
	Store
	next func() error
}

func (s *unsteady) Settle(context.Context) error { return s.next() }

// A store says once that it is another one than before, to whoever asks first.
func TestSettledHeedsWhatTheStoreSaidToOthers(t *testing.T) {
	store := &unsteady{next: func() error { return errors.New("another took its place") }}
	s := &settler{store: store}
	since := s.failures()
	if err := s.settled(t.Context(), since); err == nil {
		t.Fatal("the store said no")
	}
	store.next = func() error { return nil }
	if err := s.settled(t.Context(), since); err == nil {
		t.Error("what was written to the old one counts as settled on the new one")
	}
	if err := s.settled(t.Context(), s.failures()); err != nil {
		t.Errorf("what was written since: %v", err)
	}
}

// A refresh that was under way while somebody changed the roles brings those from
// before: it can't undo what has been answered.
func TestCommitUnderANewerEpochKeepsItsRoles(t *testing.T) {
	began := Grant{Version: 5, Epoch: 1, Roles: []string{"keycloak:roles/researcher"}}
	next := began
	next.Version = 6
	g := began
	g.Epoch, g.Roles = 2, []string{"keycloak:roles/guest"}
	if err := g.follow(true, began, next); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"keycloak:roles/guest"}, g.Roles); diff != "" || g.Version != 6 || g.Epoch <= 2 {
		t.Errorf("version %d, epoch %d, roles (-want +got):\n%s", g.Version, g.Epoch, diff)
	}
}
