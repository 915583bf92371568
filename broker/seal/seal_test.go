package seal_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"tokenbroker/broker/seal"
)

var place = seal.Place{"lab", "grant", "main", "keycloak", "alice", "7"}

func newKeyset(t testing.TB) *seal.Keyset {
	t.Helper()
	k, err := seal.New()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func sealed(t testing.TB, k *seal.Keyset, plain string, at seal.Place) []byte {
	t.Helper()
	box, err := k.Seal([]byte(plain), at)
	if err != nil {
		t.Fatal(err)
	}
	return box
}

func TestOpenReturnsWhatWasSealedAtThePlace(t *testing.T) {
	k := newKeyset(t)
	for _, plain := range []string{"", "x", "a refresh token", strings.Repeat("long", 1<<16)} {
		got, err := k.Open(sealed(t, k, plain, place), place)
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != plain {
			t.Errorf("Open: got %d bytes, want the %d that were sealed", len(got), len(plain))
		}
	}
}

func TestABoxHidesItsPlaintextAndIsNeverTheSameTwice(t *testing.T) {
	k := newKeyset(t)
	a, b := sealed(t, k, "a refresh token", place), sealed(t, k, "a refresh token", place)
	if bytes.Equal(a, b) {
		t.Error("two boxes of the same plaintext are equal")
	}
	if bytes.Contains(a, []byte("refresh")) {
		t.Error("the box shows its plaintext")
	}
}

func TestAMovedBoxDoesNotOpen(t *testing.T) {
	k := newKeyset(t)
	from := seal.Place{"grant", "a", "b"}
	box := sealed(t, k, "a refresh token", from)
	for _, to := range []seal.Place{
		nil,
		{},
		{""},
		{"grant"},
		{"grant", "a", "c"},
		{"grant", "b", "a"},
		{"grant", "ab"},
		{"grantab"},
		{"granta", "b"},
		{"grant", "a", "b", ""},
		{"", "grant", "a", "b"},
		{"grant", "a/b"},
		{"grant", "a\x00b"},
		{"grant", "a\x00\x00\x00\x00\x00\x00\x00\x01b"},
	} {
		_, err := k.Open(box, to)
		if !errors.Is(err, seal.ErrUnsealable) {
			t.Errorf("Open at %s: got %v, want ErrUnsealable", to, err)
		}
	}
}

func TestAChangedByteAnywhereIsAnErrorThatNamesTheRecord(t *testing.T) {
	k := newKeyset(t)
	box := sealed(t, k, "a refresh token", place)
	for i := range box {
		for _, flip := range []byte{0x01, 0x80, 0xff} {
			changed := bytes.Clone(box)
			changed[i] ^= flip
			_, err := k.Open(changed, place)
			if !errors.Is(err, seal.ErrUnsealable) {
				t.Fatalf("byte %d changed by %#x: got %v, want ErrUnsealable", i, flip, err)
			}
			if !strings.Contains(err.Error(), `"grant"/"main"/"keycloak"/"alice"/"7"`) {
				t.Fatalf("the error doesn't name the record: %v", err)
			}
		}
	}
}

func TestATruncatedOrExtendedBoxDoesNotOpen(t *testing.T) {
	k := newKeyset(t)
	box := sealed(t, k, "a refresh token", place)
	for n := range box {
		if _, err := k.Open(box[:n], place); !errors.Is(err, seal.ErrUnsealable) {
			t.Errorf("cut to %d bytes: got %v, want ErrUnsealable", n, err)
		}
	}
	if _, err := k.Open(append(bytes.Clone(box), 0), place); !errors.Is(err, seal.ErrUnsealable) {
		t.Errorf("one byte added: got %v, want ErrUnsealable", err)
	}
}

func TestAnotherKeysetOpensNothingAndTheErrorSaysSo(t *testing.T) {
	box := sealed(t, newKeyset(t), "a refresh token", place)
	_, err := newKeyset(t).Open(box, place)
	if !errors.Is(err, seal.ErrUnsealable) {
		t.Fatalf("got %v, want ErrUnsealable", err)
	}
	if want := "a key that is not in the keyset"; !strings.Contains(err.Error(), want) {
		t.Errorf("got %q, want it to say %q", err, want)
	}
}

func TestNothingIsSealedWithoutAPlace(t *testing.T) {
	k := newKeyset(t)
	for _, at := range []seal.Place{nil, {}} {
		if _, err := k.Seal([]byte("x"), at); err == nil {
			t.Errorf("Seal at %#v: got no error", at)
		}
	}
	// A part that is empty is still a part.
	box := sealed(t, k, "x", seal.Place{""})
	if _, err := k.Open(box, seal.Place{""}); err != nil {
		t.Error(err)
	}
}

func TestAKeysetWithoutKeysRefusesInsteadOfPanicking(t *testing.T) {
	for _, k := range []*seal.Keyset{nil, {}} {
		if _, err := k.Seal([]byte("x"), place); err == nil {
			t.Error("Seal: got no error")
		}
		if _, err := k.Open([]byte("\x01abcdefgh"), place); !errors.Is(err, seal.ErrUnsealable) {
			t.Errorf("Open: got %v, want ErrUnsealable", err)
		}
	}
}

func FuzzOpen(f *testing.F) {
	k := newKeyset(f)
	box := sealed(f, k, "a refresh token", seal.Place{"a", "b"})
	f.Add(box, "a", "b")
	f.Add(box[:5], "a", "b")
	f.Add([]byte{}, "", "")
	f.Add([]byte{1}, "a", "")
	f.Fuzz(func(t *testing.T, b []byte, x, y string) {
		_, err := k.Open(b, seal.Place{x, y})
		ours := bytes.Equal(b, box) && x == "a" && y == "b"
		if ours != (err == nil) {
			t.Errorf("Open(%x, %q, %q): %v", b, x, y, err)
		}
	})
}

func BenchmarkSeal(b *testing.B) {
	k := newKeyset(b)
	plain := bytes.Repeat([]byte("x"), 2048)
	b.SetBytes(int64(len(plain)))
	for b.Loop() {
		if _, err := k.Seal(plain, place); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkOpen(b *testing.B) {
	k := newKeyset(b)
	box := sealed(b, k, strings.Repeat("x", 2048), place)
	b.SetBytes(2048)
	for b.Loop() {
		if _, err := k.Open(box, place); err != nil {
			b.Fatal(err)
		}
	}
}
