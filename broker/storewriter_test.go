package broker_test

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"tokenbroker/broker"
)

// Somebody who can write to the store, but has not the keys, is none of our users:
// what he changes there gives nobody another's token. Each test begins with two
// users who have all kinds of records, and then asks a broker that has nothing in
// memory.

// twoUsers are alice and bob, each with a running server and a token.
func (r *rig) twoUsers() (handles map[broker.UserID]broker.Secret) {
	r.t.Helper()
	handles = map[broker.UserID]broker.Secret{}
	r.provider.SetRoles("bob", "researcher")
	for i, user := range []broker.UserID{"alice", "bob"} {
		handles[user] = r.loggedIn(user)
		r.token(r.running(user, int32(100*(i+1))), broker.Want{})
	}
	return handles
}

// records are the store's, by name.
func (r *rig) records() map[string]broker.Key {
	all := make(map[string]broker.Key)
	r.store.Each(func(k broker.Key, _ broker.Record) { all[k.String()] = k })
	return all
}

func (r *rig) record(k broker.Key) broker.Record {
	r.t.Helper()
	rec, err := r.store.Get(context.Background(), k)
	if err != nil {
		r.t.Fatal(err)
	}
	return rec
}

// ownOrNone asks for a token for each user and fails if one of them gets another's.
// It returns what those were told who get none.
func (r *rig) ownOrNone() (refusals map[broker.UserID]string) {
	r.t.Helper()
	refusals = map[broker.UserID]string{}
	for i, user := range []broker.UserID{"alice", "bob"} {
		got, err := r.Token(context.Background(), r.peer(user, int32(100*(i+1))), broker.Want{})
		switch {
		case err != nil:
			refusals[user] = err.Error()
		case !strings.HasPrefix(got.Access.Reveal(), "access-"+string(user)+"-"):
			r.t.Errorf("%s got a token that is not hers", user)
		}
	}
	return refusals
}

// named fails unless the log or the audit names the record at k.
func (r *rig) named(k broker.Key, why string) {
	r.t.Helper()
	said := r.log.String() + r.audit.String()
	said = strings.NewReplacer(`\\\"`, `"`, `\"`, `"`).Replace(said)
	if !strings.Contains(said, k.String()) {
		r.t.Errorf("%s: nothing says which record it was: %s", why, k)
	}
}

func TestChangedRecordGivesNoToken(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.twoUsers()
		for name, k := range r.records() {
			whole := r.record(k)
			for at := 0; at < len(whole.Box); at += max(1, len(whole.Box)/7) {
				changed := slices.Clone(whole.Box)
				changed[at] ^= 0x20
				r.Close()
				r.store.Tamper(k, changed)
				r.start()
				refusals := r.ownOrNone()
				if k.Kind == "grant" || k.Kind == "link" || k.Kind == "registration" {
					if len(refusals) != 1 {
						t.Errorf("%s, changed at byte %d: refused are %v, want the one whose it is", name, at, refusals)
					}
					r.named(k, "changed")
				}
				r.Close()
				r.store.PutBack(k, whole)
				r.start()
			}
		}
		if refusals := r.ownOrNone(); len(refusals) != 0 {
			t.Errorf("all is as it was, and %v", refusals)
		}
	})
}

func TestSwappedRecordsGiveNoToken(t *testing.T) {
	inBubble(t, func(r *rig) {
		handles := r.twoUsers()
		all := r.records()
		for _, name := range slices.Sorted(maps.Keys(all)) {
			a, b := all[name], all[strings.ReplaceAll(name, "alice", "bob")]
			if !strings.Contains(name, "alice") || a.Kind == "issued" {
				continue
			}
			undo := r.swapped(a, b)
			r.ownOrNone()
			if a.Kind == "whole" {
				if got, err := r.RefreshHub(context.Background(), "main", "keycloak", handles["alice"]); err == nil && !strings.HasPrefix(got.Access.Reveal(), "access-alice-") {
					t.Error("the hub got another user's token for alice's handle")
				}
			}
			r.named(a, "swapped")
			undo()
		}
		time.Sleep(time.Second)
		issued := "issued[\"main\" \"keycloak\" \"%s\"]"
		r.swapped(all[fmt.Sprintf(issued, "alice")], all[fmt.Sprintf(issued, "bob")])
		_, _, err := r.Disconnect(context.Background(), "uid 0", "main", "alice", "")
		if refusals := r.ownOrNone(); refusals["alice"] == "" {
			t.Errorf("Disconnect with a swapped list of tokens: %v; alice gets a token", err)
		}
		r.named(all[fmt.Sprintf(issued, "alice")], "swapped")
	})
}

// swapped puts two records in each other's place, and starts a broker on that.
func (r *rig) swapped(a, b broker.Key) (undo func()) {
	recordA, recordB := r.record(a), r.record(b)
	put := func(atA, atB broker.Record) {
		r.Close()
		r.store.PutBack(a, atA)
		r.store.PutBack(b, atB)
		r.start()
	}
	put(recordB, recordA)
	return func() { put(recordA, recordB) }
}

func TestOldRecordsPutBackGiveNoToken(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.twoUsers()
		old := map[string]broker.Record{}
		all := r.records()
		for name, k := range all {
			old[name] = r.record(k)
		}
		time.Sleep(time.Second)
		if _, _, err := r.Disconnect(context.Background(), "uid 0", "main", "alice", ""); err != nil {
			t.Fatal(err)
		}
		for _, together := range [][]string{{"grant"}, {"grant", "token", "whole"}, {"link"}, {"registration"}, slices.Collect(maps.Keys(kinds(all)))} {
			r.Close()
			for name, k := range all {
				if slices.Contains(together, k.Kind) {
					r.store.PutBack(k, old[name])
				}
			}
			r.start()
			if refusals := r.ownOrNone(); refusals["alice"] == "" {
				t.Errorf("%v put back as before the disconnect: alice gets a token again", together)
			}
		}
	})
}

func kinds(all map[string]broker.Key) map[string]bool {
	kinds := map[string]bool{}
	for _, k := range all {
		kinds[k.Kind] = true
	}
	return kinds
}
