package seal_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tokenbroker/broker/seal"
)

// A keyset file opens if it is the one that was sealed under the KEK, and its error
// names the file and holds nothing of the KEK.
func FuzzKeyset(f *testing.F) {
	dir := f.TempDir()
	keyset, kek := filepath.Join(dir, "keyset.json"), filepath.Join(dir, "kek")
	if err := seal.Create(keyset, kek); err != nil {
		f.Fatal(err)
	}
	whole, err := os.ReadFile(keyset)
	if err != nil {
		f.Fatal(err)
	}
	key, err := os.ReadFile(kek)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole)
	f.Add(bytes.ToUpper(whole))
	f.Add(whole[:len(whole)/2])
	f.Add(append(bytes.Clone(whole), whole...))
	for _, seed := range []string{"", "{}", "null", "[]", `{"kek":1}`, "\xff"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		changed := filepath.Join(t.TempDir(), "keyset.json")
		if err := os.WriteFile(changed, text, 0o400); err != nil {
			t.Fatal(err)
		}
		k, err := seal.Load(changed, kek)
		switch {
		case err != nil && strings.Contains(err.Error(), string(bytes.TrimSpace(key))):
			t.Error("the error holds the KEK")
		case err != nil && !strings.Contains(err.Error(), "keyset"):
			t.Errorf("the error does not name the keyset: %v", err)
		case err == nil:
			if _, err := k.Seal([]byte("x"), seal.Place{"a"}); err != nil {
				t.Errorf("a keyset that was taken can't seal: %v", err)
			}
		}
	})
}
