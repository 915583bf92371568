package seal

import (
	"bytes"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/tink-crypto/tink-go/v2/aead/subtle"
	"github.com/tink-crypto/tink-go/v2/keyset"
)

const (
	kekSize   = 32      // bytes
	auditSize = 32      // bytes
	maxFile   = 1 << 20 // bytes; a keyset of many keys is a few KiB
)

// These say what was encrypted under the key-encryption key, so that nothing
// passes for something else.
var (
	keysetAD = []byte("tokenbroker keyset 1")
	auditAD  = []byte("tokenbroker audit key 1")
)

// A wrapped is the keyset file.
type wrapped struct {
	wrapping
	// Also is the same keyset under another key-encryption key, while the one is
	// replaced by the other.
	Also []wrapping `json:"also,omitempty"`
	// Retired names the keys that no longer open, so that what lies under one can
	// be told from what lies under a key that nobody has ever had.
	Retired []retired `json:"retired,omitempty"`

	audit []byte // the key of AuditMAC, in the clear
}

// A wrapping is a keyset under a key-encryption key.
type wrapping struct {
	// KEK identifies the key-encryption key, without telling anything about it.
	// So a wrong key can be told from a damaged file.
	KEK    string          `json:"kek"`
	Keyset json.RawMessage `json:"keyset"` // Tink's JSON of an encrypted keyset
	// Audit is the encrypted key of AuditMAC. It is none of the keyset, whose keys
	// come and go: what chains the audit must be known as long as an audit is.
	Audit []byte `json:"audit,omitempty"`
}

// A kek is a key-encryption key.
type kek []byte

func (k kek) id() string {
	mac := hmac.New(sha256.New, k)
	mac.Write([]byte("tokenbroker key-encryption key id"))
	return hex.EncodeToString(mac.Sum(nil)[:8])
}

// Create makes a new keyset, wrapped by a new key-encryption key, in two new
// files of mode 0400. It overwrites nothing.
//
// The key-encryption key is a line of base64, as "openssl rand -base64 32"
// prints it.
func Create(keysetFile, kekFile string) error {
	h, err := newHandle()
	if err != nil {
		return err
	}
	key := make(kek, kekSize)
	rand.Read(key)
	w, err := wrap(h, newAuditKey(), key)
	if err != nil {
		return err
	}
	text, err := json.MarshalIndent(wrapped{wrapping: w}, "", "  ")
	if err != nil {
		return err
	}

	if err := writeNew(kekFile, base64.StdEncoding.AppendEncode(nil, key)); err != nil {
		return fmt.Errorf("create the key-encryption key: %w", err)
	}
	if err := writeNew(keysetFile, text); err != nil {
		os.Remove(kekFile) // it opens nothing, and would be in the way of the next attempt
		return fmt.Errorf("create the keyset: %w", err)
	}
	return nil
}

func newAuditKey() []byte {
	key := make([]byte, auditSize)
	rand.Read(key)
	return key
}

func wrap(h *keyset.Handle, audit []byte, key kek) (wrapping, error) {
	a, err := subtle.NewXChaCha20Poly1305(key)
	if err != nil {
		return wrapping{}, fmt.Errorf("use the key-encryption key: %w", err)
	}
	var buf bytes.Buffer
	if err := h.WriteWithAssociatedData(keyset.NewJSONWriter(&buf), a, keysetAD); err != nil {
		return wrapping{}, fmt.Errorf("wrap the keyset: %w", err)
	}
	box, err := a.Encrypt(audit, auditAD)
	if err != nil {
		return wrapping{}, fmt.Errorf("wrap the audit's key: %w", err)
	}
	return wrapping{KEK: key.id(), Keyset: buf.Bytes(), Audit: box}, nil
}

// writeNew writes a line to a file that wasn't there, and returns when it is
// on the disk: records are sealed under it from now on.
func writeNew(path string, line []byte) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o400)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s is there already, and without it everyone would have to log in again: move it away if that is what you want", path)
	}
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, f.Close())
		if err != nil {
			os.Remove(path)
		}
	}()
	if _, err := f.Write(append(line, '\n')); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// Load reads a keyset and the key-encryption key that opens it.
//
// If systemd handed us a credential of the name kekFile, that is the key; so it
// is if kekFile is its path. Otherwise it is a file which only its owner may
// read.
//
// Its errors are sentences for the administrator: which file, what is wrong
// with it, and what to do.
func Load(keysetFile, kekFile string) (*Keyset, error) {
	k := &Keyset{keysetFile: keysetFile, kekFile: kekFile}
	if _, err := k.Reload(); err != nil {
		return nil, err
	}
	return k, nil
}

// Reload reads the files that k was loaded from anew, and says whether they hold
// other keys than k. If they are not right, k stays what it is, and the error is
// Load's.
func (k *Keyset) Reload() (changed bool, err error) {
	key, kekFile, err := loadKEK(k.keysetFile, k.kekFile)
	if err != nil {
		return false, err
	}
	f, h, err := openFile(k.keysetFile, kekFile, key)
	if err != nil {
		return false, err
	}
	next, err := stateOf(h, f.audit, f.Retired)
	if err != nil {
		return false, err
	}
	was := k.now()
	if id, lost := lostKey(was.keys, next.keys); lost {
		return false, fmt.Errorf("the keyset in %s lacks key %s, which is in use: it is an older copy; put the newest one back", k.keysetFile, id)
	}
	k.state.Store(next)
	return !slices.Equal(was.keys, next.keys), nil
}

// lostKey finds a key that opens and that the next keyset knows nothing of, not
// even that it was retired.
func lostKey(was, next []Key) (KeyID, bool) {
	for _, k := range was {
		known := slices.ContainsFunc(next, func(n Key) bool { return n.ID == k.ID })
		if !known && k.State != Disabled && k.State != Gone {
			return k.ID, true
		}
	}
	return 0, false
}

// openFile reads the keyset file.
func openFile(keysetFile, kekFile string, key kek) (f wrapped, _ *keyset.Handle, _ error) {
	text, err := readRegular(keysetFile, func(fs.FileInfo) error { return nil })
	if errors.Is(err, fs.ErrNotExist) {
		return f, nil, fmt.Errorf("there is no keyset at %s: restore it from its backup, or, in a new installation, run \"tokenbroker keys create\"", keysetFile)
	}
	if err != nil {
		return f, nil, fmt.Errorf("read the keyset: %w", err)
	}

	damaged := func(err error) error {
		return fmt.Errorf("the keyset in %s is damaged: restore it from its backup (%w)", keysetFile, err)
	}
	if err := json.Unmarshal(text, &f); err != nil {
		return f, nil, damaged(err)
	}
	if len(f.Keyset) == 0 || f.KEK == "" {
		return f, nil, damaged(errors.New("it is JSON, but not what \"tokenbroker keys create\" writes"))
	}
	for _, w := range append([]wrapping{f.wrapping}, f.Also...) {
		if w.KEK != key.id() {
			continue
		}
		var h *keyset.Handle
		if h, f.audit, err = w.open(key); err != nil {
			return f, nil, damaged(err)
		}
		return f, h, nil
	}
	return f, nil, fmt.Errorf("the key-encryption key in %s (%s) is not the one that the keyset in %s was wrapped by (%s): restore the two files from the same backup", kekFile, key.id(), keysetFile, f.KEK)
}

func (w wrapping) open(key kek) (h *keyset.Handle, audit []byte, err error) {
	a, err := subtle.NewXChaCha20Poly1305(key)
	if err != nil {
		return nil, nil, err
	}
	if h, err = keyset.ReadWithAssociatedData(keyset.NewJSONReader(bytes.NewReader(w.Keyset)), a, keysetAD); err != nil {
		return nil, nil, err
	}
	if w.Audit == nil {
		// The file is from before audits were chained. Whoever writes it next, be it
		// for another key-encryption key, keeps what this one gives.
		audit, err = hkdf.Key(sha256.New, key, nil, string(auditAD), auditSize)
		return h, audit, err
	}
	audit, err = a.Decrypt(w.Audit, auditAD)
	return h, audit, err
}

// loadKEK loads the key that opens a keyset, and also returns the path it found
// the key at.
func loadKEK(keysetFile, name string) (kek, string, error) {
	path, private := name, onlyOwner(keysetFile)
	if cred := credential(name); cred != "" {
		path, private = cred, notWorld
	}
	text, err := readRegular(path, private)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, path, fmt.Errorf("there is no key-encryption key at %s: restore it from its backup, or, in a new installation, run \"tokenbroker keys create\"", path)
	}
	if err != nil {
		return nil, path, fmt.Errorf("read the key-encryption key: %w", err)
	}
	key := make(kek, base64.StdEncoding.DecodedLen(len(text)))
	n, err := base64.StdEncoding.Decode(key, bytes.TrimSpace(text))
	if err != nil || n != kekSize {
		// Not the decoder's error: it may quote the key.
		return nil, path, fmt.Errorf("the key-encryption key in %s is not a line of base64 for %d bytes: restore it from its backup", path, kekSize)
	}
	return key[:n], path, nil
}

// credential returns the path of the systemd credential called name, or "". An
// absolute name may be the path of one, too.
func credential(name string) string {
	dir := os.Getenv("CREDENTIALS_DIRECTORY")
	if dir == "" {
		return ""
	}
	if filepath.IsAbs(name) {
		if filepath.Dir(name) == filepath.Clean(dir) {
			return name
		}
		return ""
	}
	path := filepath.Join(dir, name)
	if _, err := os.Lstat(path); err != nil || !filepath.IsLocal(name) {
		return ""
	}
	return path
}

// onlyOwner refuses a secret that others than we, or root, may read. To root, who
// runs the administrator's commands, the keyset's owner is the broker.
func onlyOwner(keysetFile string) func(fs.FileInfo) error {
	return func(info fs.FileInfo) error {
		if info.Mode().Perm()&0o077 != 0 {
			return fmt.Errorf("others may use it (mode %04o): run chmod 0400, and think of who may have read it", info.Mode().Perm())
		}
		of, us := owner(info), os.Geteuid()
		if us == 0 {
			if keyset, err := os.Stat(keysetFile); err == nil {
				us = owner(keyset)
			}
		}
		if of != 0 && of != us {
			return fmt.Errorf("it belongs to uid %d, but the broker runs as uid %d: run chown", of, us)
		}
		return nil
	}
}

// owner is the uid that a file belongs to.
func owner(info fs.FileInfo) int {
	return int(info.Sys().(*syscall.Stat_t).Uid)
}

// notWorld is for systemd's credentials: systemd gives the service's user
// access by an ACL, whose mask shows as group permission, and their directory
// is closed to everybody else.
func notWorld(info fs.FileInfo) error {
	if info.Mode().Perm()&0o007 != 0 {
		return fmt.Errorf("everybody may use it (mode %04o): let systemd make it (LoadCredential=)", info.Mode().Perm())
	}
	return nil
}

// readRegular reads a small regular file whose metadata ok accepts. It looks
// at the open file, so that what was checked is what is read.
func readRegular(path string, ok func(fs.FileInfo) error) ([]byte, error) {
	// Without O_NONBLOCK a FIFO would hold us up for ever.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrPermission) {
		return nil, fmt.Errorf("%w: give it to uid %d, which the broker runs as, by chown", err, os.Geteuid())
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a file: name the file itself", path)
	}
	if err := ok(info); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxFile {
		return nil, fmt.Errorf("%s is larger than %d bytes: restore it from its backup", path, maxFile)
	}
	return text, nil
}
