package broker_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"tokenbroker/broker"
	"tokenbroker/broker/seal"
)

// A host's keys are its two files, and what its broker has read of them.
type hostKeys struct {
	t           *testing.T
	keyset, kek string
	*seal.Keyset
}

func newKeys(t *testing.T) *hostKeys {
	t.Helper()
	dir := t.TempDir()
	k := &hostKeys{t: t, keyset: filepath.Join(dir, "keyset.json"), kek: filepath.Join(dir, "kek")}
	if err := seal.Create(k.keyset, k.kek); err != nil {
		t.Fatal(err)
	}
	k.load()
	return k
}

func (k *hostKeys) load() {
	k.t.Helper()
	var err error
	if k.Keyset, err = seal.Load(k.keyset, k.kek); err != nil {
		k.t.Fatal(err)
	}
}

// copied is another host with the same keys.
func (k *hostKeys) copied() *hostKeys {
	k.t.Helper()
	dir := k.t.TempDir()
	c := &hostKeys{t: k.t, keyset: filepath.Join(dir, "keyset.json"), kek: filepath.Join(dir, "kek")}
	copyFile(k.t, k.kek, c.kek)
	copyFile(k.t, k.keyset, c.keyset)
	c.load()
	return c
}

// takes has k's broker read other's keyset.
func (k *hostKeys) takes(other *hostKeys) {
	k.t.Helper()
	if k != other {
		copyFile(k.t, other.keyset, k.keyset)
	}
	if _, err := k.Reload(); err != nil {
		k.t.Fatal(err)
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	text, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	os.Remove(to)
	if err := os.WriteFile(to, text, 0o400); err != nil {
		t.Fatal(err)
	}
}

// sealing is the key that seals.
func (k *hostKeys) sealing() seal.KeyID {
	for _, key := range k.Keys() {
		if key.State == seal.Primary {
			return key.ID
		}
	}
	return 0
}

// rotate adds a key and has it seal, at once.
func (k *hostKeys) rotate() (first, second seal.KeyID) {
	k.t.Helper()
	first = k.sealing()
	second, err := seal.Add(k.keyset, k.kek)
	if err == nil {
		err = seal.Promote(k.keyset, k.kek, second)
	}
	if err != nil {
		k.t.Fatal(err)
	}
	k.takes(k)
	return first, second
}

func (r *rig) keeper(k *hostKeys) broker.KeyKeeper {
	return broker.KeyKeeper{Deployment: r.cfg.Deployment, Store: r.store, Keys: k.Keyset}
}

func census(t *testing.T, k broker.KeyKeeper) broker.Census {
	t.Helper()
	c, err := k.Count(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// attending is what the brokers say once they have had time to.
func attending(t *testing.T, k broker.KeyKeeper, want int) []broker.BrokerKeys {
	t.Helper()
	time.Sleep(31 * time.Second) // of the bubble's time
	all, err := k.Brokers(context.Background())
	if err != nil || len(all) != want {
		t.Fatalf("Brokers: %v, %v; want %d", all, err, want)
	}
	for _, b := range all {
		if !b.Present {
			t.Errorf("the broker on %s was last seen at %s", b.Host, b.SeenAt)
		}
	}
	return all
}

func all(brokers []broker.BrokerKeys, f func(broker.BrokerKeys) bool) bool {
	return !slices.ContainsFunc(brokers, func(b broker.BrokerKeys) bool { return !f(b) })
}

func TestKeysAreRotatedUnderTwoBrokersWithoutAPause(t *testing.T) {
	one := newKeys(t)
	two := one.copied()
	inBubble(t, func(r *rig) {
		r.cfg.Keys = two.Keyset
		s := r.second()
		defer s.Close()
		r.provider.SetRoles("bob", "researcher")
		r.loggedIn("alice")
		s.loggedIn("bob")
		alice, bob := r.running("alice", 7), s.running("bob", 8)
		keeper := r.keeper(one)
		// Each broker renews its user's grant, and both read both users'.
		serving := func(when string) {
			t.Helper()
			time.Sleep(2 * time.Hour)
			r.token(alice, broker.Want{})
			s.token(bob, broker.Want{})
			for _, b := range []*rig{r, s} {
				if got, err := b.Grants(t.Context(), "", ""); err != nil || len(got) != 2 {
					t.Errorf("%s: the broker on %s sees %d grants: %v", when, b.cfg.Host, len(got), err)
				}
			}
		}
		serving("at first")

		first := one.sealing()
		second, err := seal.Add(one.keyset, one.kek)
		if err != nil {
			t.Fatal(err)
		}
		one.takes(one)
		brokers := attending(t, keeper, 2)
		if !brokers[0].Has(second) || brokers[1].Has(second) {
			t.Errorf("after one broker has the new key: %+v", brokers)
		}
		serving("while one broker has the new key")
		two.takes(one)
		if !all(attending(t, keeper, 2), func(b broker.BrokerKeys) bool { return b.Has(second) }) {
			t.Error("not all brokers say that they have the new key")
		}

		if err := seal.Promote(one.keyset, one.kek, second); err != nil {
			t.Fatal(err)
		}
		one.takes(one)
		serving("while one broker seals under the new key")
		brokers = attending(t, keeper, 2)
		if !brokers[0].SealsUnder(second) || !brokers[1].Needs(first) {
			t.Errorf("while one broker seals under the new key: %+v", brokers)
		}
		two.takes(one)
		serving("while both seal under the new key")
		if !all(attending(t, keeper, 2), func(b broker.BrokerKeys) bool { return b.SealsUnder(second) && !b.Needs(first) }) {
			t.Error("not all brokers seal under the new key")
		}

		versions := func() (all []int64) {
			grants, _ := r.Grants(t.Context(), "", "")
			for _, g := range grants {
				all = append(all, g.Version, g.Epoch)
			}
			return all
		}
		before, last := versions(), 0
		if census(t, keeper).Records[first] == 0 {
			t.Error("nothing is left to seal anew, so that nothing is shown")
		}
		strangers, err := keeper.Reseal(t.Context(), func(done, all int) { last = all - done })
		if err != nil || len(strangers) > 0 || last != 0 {
			t.Fatalf("Reseal: %v, %v, %d left", strangers, err, last)
		}
		if c := census(t, keeper); c.Records[first] != 0 || c.Records[second] == 0 || len(c.Strange) > 0 {
			t.Errorf("after Reseal: %+v", c)
		}
		if after := versions(); !slices.Equal(before, after) {
			t.Errorf("sealing anew moved versions or epochs: %v, before %v", after, before)
		}

		if err := seal.Disable(one.keyset, one.kek, first, time.Now()); err != nil {
			t.Fatal(err)
		}
		one.takes(one)
		two.takes(one)
		serving("without the old key")
		for _, u := range []broker.UserID{"alice", "bob"} {
			if g := s.grant(u); g.State != broker.Live {
				t.Errorf("%s's grant is %s", u, g.State)
			}
		}
	}, func(c *broker.Config) { c.Keys = one.Keyset })
}

// This is why the brokers are asked first.
func TestABrokerWithoutTheNewKeySaysThatItsKeysetIsOld(t *testing.T) {
	one := newKeys(t)
	two := one.copied()
	inBubble(t, func(r *rig) {
		r.cfg.Keys = two.Keyset
		s := r.second()
		defer s.Close()
		one.rotate()
		r.loggedIn("alice")
		_, err := s.Grants(t.Context(), "", "")
		if err == nil {
			t.Fatal("a broker reads what is sealed under a key that it doesn't have")
		}
		c := census(t, s.keeper(two))
		if len(c.Strange) == 0 || !strings.Contains(strings.Join(c.Strange, "\n"), "the keyset file is an older copy") {
			t.Errorf("Count: %q", c.Strange)
		}
	}, func(c *broker.Config) { c.Keys = one.Keyset })
}

// Whoever writes second finds that the record moved, and does its own on what it
// finds.
func first(reseal, _ func())   { reseal() }
func second(_, refresh func()) { refresh() }

func TestSealingAnewAndARefreshDoNotUndoEachOther(t *testing.T) {
	for _, tt := range []struct {
		why string
		// which of the two runs, and which comes before its first writes.
		run, race func(reseal, refresh func())
	}{
		{"sealed anew before the writes of the refresh", second, first},
		{"refreshed before the write that seals anew", first, second},
	} {
		t.Run(tt.why, func(t *testing.T) {
			keys := newKeys(t)
			inBubble(t, func(r *rig) {
				r.loggedIn("alice")
				alice := r.running("alice", 7)
				r.token(alice, broker.Want{})
				time.Sleep(2 * time.Hour)
				before, calls := r.grant("alice"), r.provider.Calls("refresh")
				keys.rotate()
				keeper := r.keeper(keys)
				reseal := func() {
					if _, err := keeper.Reseal(context.Background(), func(int, int) {}); err != nil {
						t.Error(err)
					}
					keys.rotate() // so that the next one has something to do
				}
				refresh := func() { r.token(alice, broker.Want{}) }
				busy, times := false, 0
				r.store.Before(func(method string, k broker.Key) error {
					if method == "Put" && k.Kind == "grant" && !busy && times < 3 {
						busy = true
						tt.race(reseal, refresh)
						busy = false
						times++
					}
					return nil
				})
				tt.run(reseal, refresh)
				r.store.Before(nil)
				if times == 0 {
					t.Fatal("nothing raced")
				}
				after := r.grant("alice")
				if after.Version != before.Version+1 || after.State != broker.Live || r.provider.Calls("refresh") != calls+1 {
					t.Errorf("version %d → %d, state %s, %d refreshes; want one more of each, live",
						before.Version, after.Version, after.State, r.provider.Calls("refresh")-calls)
				}
				time.Sleep(2 * time.Hour)
				r.token(alice, broker.Want{}) // the refresh token in the store is the newest
				if c := census(t, keeper); len(c.Strange) > 0 {
					t.Errorf("Count: %+v", c)
				}
			}, func(c *broker.Config) { c.Keys = keys.Keyset })
		})
	}
}

func TestWhatDoesNotOpenIsToldApart(t *testing.T) {
	keys := newKeys(t)
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		k := broker.Key{Kind: "grant", Parts: []string{"main", "keycloak", "alice"}}
		old, err := r.store.Get(t.Context(), k)
		if err != nil {
			t.Fatal(err)
		}
		keeper := r.keeper(keys)
		first, _ := keys.rotate()
		if _, err := keeper.Reseal(t.Context(), func(int, int) {}); err != nil {
			t.Fatal(err)
		}
		if err := seal.Disable(keys.keyset, keys.kek, first, time.Now()); err != nil {
			t.Fatal(err)
		}
		keys.takes(keys)
		whole, err := r.store.Get(t.Context(), k)
		if err != nil {
			t.Fatal(err)
		}
		lost, err := newKeys(t).Seal([]byte("{}"), seal.Place{"lab"})
		if err != nil {
			t.Fatal(err)
		}
		damaged := slices.Clone(whole.Box)
		damaged[len(damaged)-1] ^= 1
		for _, tt := range []struct {
			why  string
			box  []byte
			want string
		}{
			{"put back from an older backup", old.Box, `grant["main" "keycloak" "alice"]: it was sealed under ` + first.String() + ", which was retired"},
			{"under a key that nobody has", lost, "nor ever was"},
			{"damaged", damaged, "it was changed"},
			{"overwritten", []byte("hello"), "no sealed record"},
		} {
			r.store.Tamper(k, tt.box)
			c := census(t, keeper)
			if len(c.Strange) != 1 || !strings.Contains(c.Strange[0], tt.want) {
				t.Errorf("%s: got %q, want it to say %q", tt.why, c.Strange, tt.want)
			}
			if strangers, err := keeper.Reseal(t.Context(), func(int, int) {}); err != nil || tt.why != "damaged" && len(strangers) != 1 {
				t.Errorf("%s: Reseal: %q, %v; want that it goes on, and says so", tt.why, strangers, err)
			}
		}
		r.store.Tamper(k, whole.Box)
	}, func(c *broker.Config) { c.Keys = keys.Keyset })
}

func TestABrokerSaysThatItsJournalNeedsAKey(t *testing.T) {
	keys := newKeys(t)
	inBubble(t, func(r *rig) {
		r.store.Before(func(method string, _ broker.Key) error {
			if method == "Settle" {
				return errors.New("not on the disk yet")
			}
			return nil
		})
		r.loggedIn("alice")
		first, second := keys.rotate()
		keeper := r.keeper(keys)
		if b := attending(t, keeper, 1)[0]; !b.Needs(first) || !b.SealsUnder(second) {
			t.Errorf("while the store has not settled: %+v", b)
		}
		r.store.Before(nil)
		if b := attending(t, keeper, 1)[0]; b.Needs(first) {
			t.Errorf("after the store has settled: %+v", b)
		}
	}, func(c *broker.Config) { c.Keys = keys.Keyset })
}

func TestABrokerThatIsGoneIsMissedUntilItIsForgotten(t *testing.T) {
	keys := newKeys(t)
	inBubble(t, func(r *rig) {
		keeper := r.keeper(keys)
		s := r.second()
		attending(t, keeper, 2)
		s.Close()
		time.Sleep(2 * time.Minute)
		brokers, err := keeper.Brokers(t.Context())
		if err != nil || len(brokers) != 2 || !brokers[0].Present || brokers[1].Present || brokers[1].SeenAt.IsZero() {
			t.Errorf("Brokers after one is gone: %+v, %v", brokers, err)
		}
		if err := keeper.Forget(t.Context(), "host2"); err != nil {
			t.Fatal(err)
		}
		attending(t, keeper, 1)
	}, func(c *broker.Config) { c.Keys = keys.Keyset })
}
