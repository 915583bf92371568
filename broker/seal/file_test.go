package seal_test

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"tokenbroker/broker/seal"
)

// create makes both files in a directory of the test's own.
func create(t *testing.T) (keyset, kek string) {
	t.Helper()
	dir := t.TempDir()
	keyset, kek = filepath.Join(dir, "keyset.json"), filepath.Join(dir, "kek")
	if err := seal.Create(keyset, kek); err != nil {
		t.Fatal(err)
	}
	return keyset, kek
}

func load(t *testing.T, keyset, kek string) *seal.Keyset {
	t.Helper()
	k, err := seal.Load(keyset, kek)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// replace puts text where a file of mode 0400 may be.
func replace(t *testing.T, path string, text []byte) {
	t.Helper()
	os.Remove(path)
	if err := os.WriteFile(path, text, 0o400); err != nil {
		t.Fatal(err)
	}
}

func TestALoadedKeysetOpensWhatItSealedBeforeTheRestart(t *testing.T) {
	keyset, kek := create(t)
	box := sealed(t, load(t, keyset, kek), "a refresh token", place)
	got, err := load(t, keyset, kek).Open(box, place)
	if err != nil || string(got) != "a refresh token" {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestBothFilesAreForTheirOwnerOnlyAndTheKeysetShowsNoKey(t *testing.T) {
	keyset, kek := create(t)
	for _, path := range []string{keyset, kek} {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != 0o400 {
			t.Errorf("%s: got mode %04o, want 0400", path, info.Mode().Perm())
		}
	}
	key := bytes.TrimSpace(read(t, kek))
	if bytes.Contains(read(t, keyset), key) {
		t.Error("the keyset file holds the key-encryption key")
	}
}

func TestCreateOverwritesNothingAndLeavesNothingHalfDone(t *testing.T) {
	for _, there := range []string{"keyset.json", "kek"} {
		dir := t.TempDir()
		replace(t, filepath.Join(dir, there), []byte("precious"))
		err := seal.Create(filepath.Join(dir, "keyset.json"), filepath.Join(dir, "kek"))
		if err == nil || !strings.Contains(err.Error(), filepath.Join(dir, there)) {
			t.Errorf("%s there already: got %v, want an error that names it", there, err)
		}
		if got := read(t, filepath.Join(dir, there)); string(got) != "precious" {
			t.Errorf("%s was overwritten", there)
		}
		if left, _ := os.ReadDir(dir); len(left) != 1 {
			t.Errorf("%s there already: Create left %v", there, left)
		}
	}
}

func TestCreateIntoOneFileIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "both")
	if err := seal.Create(path, path); err == nil {
		t.Error("got no error")
	}
	if _, err := os.Stat(path); err == nil {
		t.Error("Create left a file")
	}
}

func TestLoadSaysWhichFileIsWrongAndWhatToDo(t *testing.T) {
	other := func(t *testing.T) []byte {
		_, kek := create(t)
		return read(t, kek)
	}
	for _, tt := range []struct {
		why    string
		spoil  func(t *testing.T, keyset, kek string)
		names  string // the file the error must name
		advice string
	}{
		{"no key-encryption key", func(t *testing.T, _, kek string) { os.Remove(kek) }, "kek", "tokenbroker keys create"},
		{"no keyset", func(t *testing.T, keyset, _ string) { os.Remove(keyset) }, "keyset.json", "tokenbroker keys create"},
		{"the group may read it", func(t *testing.T, _, kek string) { os.Chmod(kek, 0o440) }, "kek", "chmod 0400"},
		{"the world may read it", func(t *testing.T, _, kek string) { os.Chmod(kek, 0o404) }, "kek", "chmod 0400"},
		{"the group may write it", func(t *testing.T, _, kek string) { os.Chmod(kek, 0o420) }, "kek", "chmod 0400"},
		{"a directory", func(t *testing.T, _, kek string) { os.Remove(kek); os.Mkdir(kek, 0o700) }, "kek", "name the file itself"},
		{"a FIFO that nobody writes", func(t *testing.T, _, kek string) { os.Remove(kek); syscall.Mkfifo(kek, 0o600) }, "kek", "name the file itself"},
		{"a key that is too short", func(t *testing.T, _, kek string) { replace(t, kek, []byte("c2hvcnQ=\n")) }, "kek", "backup"},
		{"a key that is no base64", func(t *testing.T, _, kek string) { replace(t, kek, []byte("S3CRET not base64 \x00\xff")) }, "kek", "backup"},
		{"an empty key", func(t *testing.T, _, kek string) { replace(t, kek, nil) }, "kek", "backup"},
		{"a huge key", func(t *testing.T, _, kek string) { replace(t, kek, make([]byte, 2<<20)) }, "kek", "backup"},
		{"another key", func(t *testing.T, _, kek string) { replace(t, kek, other(t)) }, "kek", "same backup"},
		{"an empty keyset", func(t *testing.T, keyset, _ string) { replace(t, keyset, nil) }, "keyset.json", "backup"},
		{"JSON of something else", func(t *testing.T, keyset, _ string) { replace(t, keyset, []byte(`{"a":1}`)) }, "keyset.json", "backup"},
		{"a keyset cut short", func(t *testing.T, keyset, _ string) {
			text := read(t, keyset)
			replace(t, keyset, text[:len(text)/2])
		}, "keyset.json", "backup"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			keyset, kek := create(t)
			tt.spoil(t, keyset, kek)
			_, err := seal.Load(keyset, kek)
			if err == nil {
				t.Fatal("got no error")
			}
			if want := filepath.Join(filepath.Dir(kek), tt.names); !strings.Contains(err.Error(), want) {
				t.Errorf("got %q, want it to name %s", err, want)
			}
			if !strings.Contains(err.Error(), tt.advice) {
				t.Errorf("got %q, want it to say %q", err, tt.advice)
			}
			if strings.Contains(err.Error(), "S3CRET") {
				t.Errorf("the error shows what is in the file: %q", err)
			}
		})
	}
}

func TestADamagedKeysetFileIsNeverAKeyset(t *testing.T) {
	keyset, kek := create(t)
	text := read(t, keyset)
	box := sealed(t, load(t, keyset, kek), "x", place)
	for i := range text {
		changed := bytes.Clone(text)
		changed[i] ^= 0x01
		replace(t, keyset, changed)
		k, err := seal.Load(keyset, kek)
		if err != nil {
			continue // the rule
		}
		// Some bytes say nothing, white space or Tink's remark on the kind
		// of key: then it must be the same keyset still.
		if _, err := k.Open(box, place); err != nil {
			t.Errorf("byte %d (%q) changed: Load made another keyset of it", i, text[i])
		}
	}
}

func TestAnAdministratorMayMakeTheKeyHimselfAndKeepItInAFileOfMode0600(t *testing.T) {
	keyset, kek := create(t)
	if err := os.Chmod(kek, 0o600); err != nil {
		t.Fatal(err)
	}
	load(t, keyset, kek)

	noNewline := bytes.TrimSpace(read(t, kek))
	replace(t, kek, noNewline)
	load(t, keyset, kek)
	if key, err := base64.StdEncoding.DecodeString(string(noNewline)); err != nil || len(key) != 32 {
		t.Errorf("the key is not 32 bytes of base64: %d bytes, %v", len(key), err)
	}
}

func TestASystemdCredentialIsTakenBeforeAFileOfTheSameName(t *testing.T) {
	keyset, kek := create(t)
	creds := t.TempDir()
	t.Setenv("CREDENTIALS_DIRECTORY", creds)
	t.Chdir(filepath.Dir(kek))

	// No credential of that name: the file counts.
	load(t, keyset, "kek")

	// systemd's ACL for the service's user shows as group permission.
	credential := filepath.Join(creds, "kek")
	replace(t, credential, read(t, kek))
	os.Chmod(credential, 0o440)
	os.Remove(kek)
	load(t, keyset, "kek")
	load(t, keyset, credential)

	os.Chmod(credential, 0o444)
	_, err := seal.Load(keyset, "kek")
	if err == nil || !strings.Contains(err.Error(), credential) {
		t.Errorf("a credential that everybody may read: got %v, want an error that names it", err)
	}
}

func TestACredentialIsNeverLookedForOutsideItsDirectory(t *testing.T) {
	keyset, kek := create(t)
	dir := filepath.Dir(kek)
	creds := filepath.Join(dir, "creds")
	os.Mkdir(creds, 0o700)
	t.Setenv("CREDENTIALS_DIRECTORY", creds)
	t.Chdir(creds)
	os.Chmod(kek, 0o440) // good enough for a credential only
	for _, name := range []string{kek, "../kek"} {
		if _, err := seal.Load(keyset, name); err == nil {
			t.Errorf("%s was taken for a credential", name)
		}
	}
}

func TestAKeyThatBelongsToSomebodyElseIsRefused(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can give a file away")
	}
	keyset, kek := create(t)
	if err := os.Chown(kek, 12345, -1); err != nil {
		t.Fatal(err)
	}
	_, err := seal.Load(keyset, kek)
	if want := fmt.Sprintf("%s: it belongs to uid 12345", kek); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want %q", err, want)
	}
}

// An administrator asks as root, and the broker has a user of its own.
func TestRootMayUseTheKeysOfTheBroker(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can give a file away")
	}
	keyset, kek := create(t)
	for _, file := range []string{keyset, kek} {
		if err := os.Chown(file, 12345, -1); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := seal.Load(keyset, kek); err != nil {
		t.Error(err)
	}
}
