package seal_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"tokenbroker/broker/seal"
)

var retiredAt = time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// rotated is a keyset of two keys, of which the second one seals, and a box of
// the first.
func rotated(t *testing.T) (keyset, kek string, first, second seal.KeyID, box []byte) {
	t.Helper()
	keyset, kek = create(t)
	box = sealed(t, load(t, keyset, kek), "old", place)
	first, _ = seal.KeyOf(box)
	second, err := seal.Add(keyset, kek)
	must(t, err)
	must(t, seal.Promote(keyset, kek, second))
	return keyset, kek, first, second, box
}

func states(k *seal.Keyset) string {
	var all []string
	for _, key := range k.Keys() {
		all = append(all, string(key.State))
	}
	return strings.Join(all, " ")
}

func opens(t *testing.T, k *seal.Keyset, box []byte, want string) {
	t.Helper()
	plain, err := k.Open(box, place)
	if want == "" {
		must(t, err)
		return
	}
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("Open: got %q, %v; want an error that says %q", plain, err, want)
	}
}

func TestARotationGoesStepByStep(t *testing.T) {
	keyset, kek := create(t)
	k := load(t, keyset, kek)
	box := sealed(t, k, "old", place)
	first, _ := seal.KeyOf(box)
	step := func(what string, err error, want string) {
		t.Helper()
		must(t, err)
		if changed, err := k.Reload(); err != nil || !changed {
			t.Fatalf("%s: Reload: %v, %v", what, changed, err)
		}
		if got := states(k); got != want {
			t.Errorf("%s: got keys %s, want %s", what, got, want)
		}
	}
	second, err := seal.Add(keyset, kek)
	step("Add", err, "primary next")
	if id, _ := seal.KeyOf(sealed(t, k, "x", place)); id != first {
		t.Error("a key that was added seals at once")
	}
	step("Promote", seal.Promote(keyset, kek, second), "old primary")
	if id, _ := seal.KeyOf(sealed(t, k, "x", place)); id != second {
		t.Error("a key that was promoted does not seal")
	}
	opens(t, k, box, "")
	step("Disable", seal.Disable(keyset, kek, first, retiredAt), "disabled primary")
	opens(t, k, box, "was retired on 2026-11-25: it comes from an older backup of the store; \"tokenbroker keys retire --undo\"")
	step("Enable", seal.Enable(keyset, kek, first), "old primary")
	opens(t, k, box, "")
	if err := seal.Destroy(keyset, kek, first); err == nil {
		t.Error("a key in use was destroyed")
	}
	step("Disable", seal.Disable(keyset, kek, first, retiredAt), "disabled primary")
	step("Destroy", seal.Destroy(keyset, kek, first), "gone primary")
	opens(t, k, box, "destroyed since")
	if changed, err := k.Reload(); changed || err != nil {
		t.Errorf("Reload of the same: %v, %v", changed, err)
	}
}

// The three things that keep a record from opening are told apart.
func TestAnOldBackupAMissingKeyAndADamagedRecordAreToldApart(t *testing.T) {
	keyset, kek, first, _, box := rotated(t)
	before := read(t, keyset)
	third, err := seal.Add(keyset, kek)
	must(t, err)
	must(t, seal.Promote(keyset, kek, third))
	must(t, seal.Disable(keyset, kek, first, retiredAt))
	k := load(t, keyset, kek)
	newest := sealed(t, k, "new", place)

	opens(t, k, box, "older backup of the store")
	damaged := append([]byte(nil), newest...)
	damaged[len(damaged)-1] ^= 1
	opens(t, k, damaged, "it was changed")
	replace(t, keyset, before)
	opens(t, load(t, keyset, kek), newest, "the keyset file is an older copy")
}

func TestReloadKeepsWhatItHasWhenTheFilesAreNotRight(t *testing.T) {
	keyset, kek := create(t)
	k := load(t, keyset, kek)
	box := sealed(t, k, "x", place)
	whole := read(t, keyset)
	replace(t, keyset, whole[:len(whole)/2]) // somebody copies it just now
	if _, err := k.Reload(); err == nil {
		t.Error("Reload of half a file: no error")
	}
	opens(t, k, box, "")
	replace(t, keyset, whole)
	if changed, err := k.Reload(); changed || err != nil {
		t.Errorf("Reload of the whole file: %v, %v", changed, err)
	}
}

// A backup of the keyset that is put in place of it would take keys away from a
// broker that runs.
func TestReloadTakesNoOlderCopy(t *testing.T) {
	keyset, kek := create(t)
	before := read(t, keyset)
	second, err := seal.Add(keyset, kek)
	must(t, err)
	must(t, seal.Promote(keyset, kek, second))
	k := load(t, keyset, kek)
	box := sealed(t, k, "x", place)
	replace(t, keyset, before)
	if _, err := k.Reload(); err == nil || !strings.Contains(err.Error(), "lacks key "+second.String()+", which is in use: it is an older copy") {
		t.Errorf("Reload of an older copy: %v", err)
	}
	opens(t, k, box, "")
}

func TestAChangeKeepsTheFilesOwnerAndModeAndLeavesNothingBeside(t *testing.T) {
	keyset, kek := create(t)
	if os.Geteuid() == 0 {
		must(t, os.Chown(keyset, 4711, 4712))
		must(t, os.Chmod(keyset, 0o440))
	}
	want, err := os.Stat(keyset)
	must(t, err)
	_, err = seal.Add(keyset, kek)
	must(t, err)
	got, err := os.Stat(keyset)
	must(t, err)
	if owner(got) != owner(want) || got.Mode() != want.Mode() {
		t.Errorf("owner %s mode %v, want %s %v", owner(got), got.Mode(), owner(want), want.Mode())
	}
	if all, _ := os.ReadDir(filepath.Dir(keyset)); len(all) != 2 {
		t.Errorf("got files %v, want two", all)
	}
}

func TestTwoDoNotChangeAKeysetAtOnce(t *testing.T) {
	keyset, kek := create(t)
	before := read(t, keyset)
	must(t, os.WriteFile(keyset+".new", nil, 0o400))
	if _, err := seal.Add(keyset, kek); err == nil || !strings.Contains(err.Error(), "somebody else changes") {
		t.Errorf("Add while another is at it: %v", err)
	}
	if string(read(t, keyset)) != string(before) {
		t.Error("the keyset was changed")
	}
}

func TestRewrapReplacesTheKeyEncryptionKeyAndNothingElse(t *testing.T) {
	keyset, kek, _, _, box := rotated(t)
	k := load(t, keyset, kek)
	oldKeyset, oldKEK := read(t, keyset), read(t, kek)
	must(t, seal.Rewrap(keyset, kek))
	if changed, err := k.Reload(); changed || err != nil {
		t.Errorf("Reload: %v, %v; want the same keys", changed, err)
	}
	opens(t, load(t, keyset, kek), box, "")
	if strings.Contains(string(read(t, keyset)), `"also"`) {
		t.Error("the keyset is still wrapped by the old key, too")
	}
	newKEK := read(t, kek)
	replace(t, kek, oldKEK)
	if _, err := seal.Load(keyset, kek); err == nil {
		t.Error("the old key opens the new file")
	}
	replace(t, kek, newKEK)
	replace(t, keyset, oldKeyset)
	if _, err := seal.Load(keyset, kek); err == nil {
		t.Error("the new key opens the old file")
	}
}

// The file beside the key is what a crash leaves, in this order: the keyset was
// written for both keys.
func TestARewrapThatWasCutShortLeavesAKeysetThatOpens(t *testing.T) {
	keyset, kek, _, _, box := rotated(t)
	must(t, os.WriteFile(kek+".new", nil, 0o400))
	if err := seal.Rewrap(keyset, kek); err == nil {
		t.Fatal("Rewrap with a file in the way: no error")
	}
	opens(t, load(t, keyset, kek), box, "")
	if !strings.Contains(string(read(t, keyset)), `"also"`) {
		t.Error("the keyset was not wrapped by both keys before the key was replaced")
	}
	must(t, os.Remove(kek+".new"))
	must(t, seal.Rewrap(keyset, kek))
	opens(t, load(t, keyset, kek), box, "")
}

func TestACredentialOfSystemdIsNotReplaced(t *testing.T) {
	keyset, kek := create(t)
	t.Setenv("CREDENTIALS_DIRECTORY", filepath.Dir(kek))
	if err := seal.Rewrap(keyset, kek); err == nil || !strings.Contains(err.Error(), "only systemd") {
		t.Errorf("Rewrap: %v", err)
	}
}

func owner(info os.FileInfo) string {
	st := info.Sys().(*syscall.Stat_t)
	return fmt.Sprint(st.Uid, ":", st.Gid)
}

// An audit of years ago must still be verified: whatever becomes of the keys, what
// chains it stays.
func TestTheAuditsKeyOutlivesAllOthers(t *testing.T) {
	mac := func(k *seal.Keyset) string {
		h := k.AuditMAC()
		h.Write([]byte("a line"))
		return string(h.Sum(nil))
	}
	keyset, kek := create(t)
	from := map[string]func(){
		"made by create": func() {},
		"from before audits were chained": func() {
			var f map[string]json.RawMessage
			must(t, json.Unmarshal(read(t, keyset), &f))
			delete(f, "audit")
			text, err := json.Marshal(f)
			must(t, err)
			replace(t, keyset, text)
		},
	}
	for _, why := range slices.Sorted(maps.Keys(from)) {
		from[why]()
		k := load(t, keyset, kek)
		want := mac(k)
		first := k.Keys()[0].ID
		next, err := seal.Add(keyset, kek)
		must(t, err)
		for i, step := range []func() error{
			func() error { return seal.Promote(keyset, kek, next) },
			func() error { return seal.Rewrap(keyset, kek) },
			func() error { return seal.Disable(keyset, kek, first, time.Now()) },
			func() error { return seal.Destroy(keyset, kek, first) },
			func() error { return seal.Rewrap(keyset, kek) },
		} {
			must(t, step())
			if got := mac(load(t, keyset, kek)); got != want {
				t.Fatalf("a keyset %s: after step %d the audit's key is another", why, i)
			}
		}
		keyset, kek = create(t)
	}
	one, two := load(t, keyset, kek), mac(load(t, keyset, kek))
	if other, err := seal.New(); err != nil || mac(other) == mac(one) || mac(one) != two {
		t.Errorf("two keysets have one key: %v", err)
	}
}
