package seal

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/tink-crypto/tink-go/v2/aead"
	"github.com/tink-crypto/tink-go/v2/keyset"
	tinkpb "github.com/tink-crypto/tink-go/v2/proto/tink_go_proto"
)

// Rotation goes in steps, because a broker can't open what another one has
// sealed under a key that it doesn't have yet:
//
//	Add       a key that opens and does not seal; every broker gets the file
//	Promote   it seals; every broker gets the file
//	          what lies under the older keys is sealed anew
//	Disable   the older keys no longer open; Enable takes that back
//	Destroy   they are gone, except for their names
//
// Each writes the file anew, at once or not at all.

// A KeyID names a key of a keyset. A box begins with that of its own.
type KeyID uint32

// String is how people see it.
func (id KeyID) String() string { return fmt.Sprintf("%08x", uint32(id)) }

// A KeyState is what a key of a keyset does.
type KeyState string

const (
	Next     KeyState = "next"     // opens; is to seal one day
	Primary  KeyState = "primary"  // seals and opens
	Old      KeyState = "old"      // opens; has sealed once
	Disabled KeyState = "disabled" // does not open, but could again
	Gone     KeyState = "gone"     // only its name is left
)

// A Key is one of a keyset, as far as others may know it.
type Key struct {
	ID    KeyID
	State KeyState
	Since time.Time // of Disabled and Gone
}

// A retired is a key that no longer opens.
type retired struct {
	ID   KeyID     `json:"id"`
	At   time.Time `json:"at"`
	Gone bool      `json:"gone,omitempty"`
}

// keysOf lists a keyset's keys, from the oldest to the newest.
func keysOf(h *keyset.Handle, out []retired) (all []Key) {
	info := h.KeysetInfo()
	state := Old
	for _, k := range info.GetKeyInfo() {
		key := Key{ID: KeyID(k.GetKeyId()), State: state}
		switch {
		case k.GetKeyId() == info.GetPrimaryKeyId():
			key.State, state = Primary, Next
		case k.GetStatus() != tinkpb.KeyStatusType_ENABLED:
			key.State = Disabled
		}
		all = append(all, key)
	}
	for _, r := range out {
		i := slices.IndexFunc(all, func(k Key) bool { return k.ID == r.ID })
		if i >= 0 {
			all[i].Since = r.At
			continue
		}
		all = append([]Key{{ID: r.ID, State: Gone, Since: r.At}}, all...)
	}
	return all
}

// Add gives the keyset in a file a new key, which opens only.
func Add(keysetFile, kekFile string) (KeyID, error) {
	var id uint32
	err := change(keysetFile, kekFile, func(m *keyset.Manager, f *wrapped) (err error) {
		id, err = m.Add(aead.XChaCha20Poly1305KeyTemplate())
		return err
	})
	return KeyID(id), err
}

// Promote has a key of the keyset seal from now on.
func Promote(keysetFile, kekFile string, id KeyID) error {
	return change(keysetFile, kekFile, func(m *keyset.Manager, _ *wrapped) error { return m.SetPrimary(uint32(id)) })
}

// Disable takes a key out of use. It stays in the file, for Enable.
func Disable(keysetFile, kekFile string, id KeyID, at time.Time) error {
	return change(keysetFile, kekFile, func(m *keyset.Manager, f *wrapped) error {
		f.Retired = append(f.Retired, retired{ID: id, At: at.UTC().Truncate(time.Second)})
		return m.Disable(uint32(id))
	})
}

// Enable takes Disable back.
func Enable(keysetFile, kekFile string, id KeyID) error {
	return change(keysetFile, kekFile, func(m *keyset.Manager, f *wrapped) error {
		f.Retired = slices.DeleteFunc(f.Retired, func(r retired) bool { return r.ID == id })
		return m.Enable(uint32(id))
	})
}

// Destroy removes a key that Disable has taken out of use.
func Destroy(keysetFile, kekFile string, id KeyID) error {
	return change(keysetFile, kekFile, func(m *keyset.Manager, f *wrapped) error {
		i := slices.IndexFunc(f.Retired, func(r retired) bool { return r.ID == id && !r.Gone })
		if i < 0 {
			return fmt.Errorf("key %s is in use: disable it first", id)
		}
		f.Retired[i].Gone = true
		return m.Delete(uint32(id))
	})
}

// change writes the keyset anew after edit.
func change(keysetFile, kekFile string, edit func(*keyset.Manager, *wrapped) error) error {
	key, kekFile, err := loadKEK(keysetFile, kekFile)
	if err != nil {
		return err
	}
	f, h, err := openFile(keysetFile, kekFile, key)
	if err != nil {
		return err
	}
	m := keyset.NewManagerFromHandle(h)
	if err := edit(m, &f); err != nil {
		return fmt.Errorf("change the keyset in %s: %w", keysetFile, err)
	}
	if h, err = m.Handle(); err != nil {
		return fmt.Errorf("change the keyset in %s: %w", keysetFile, err)
	}
	return f.write(keysetFile, h, key)
}

// write puts the keyset, wrapped by keys, in the place of the file.
func (f wrapped) write(path string, h *keyset.Handle, keys ...kek) error {
	f.wrapping, f.Also = wrapping{}, nil
	for i, key := range keys {
		w, err := wrap(h, f.audit, key)
		if err != nil {
			return err
		}
		if i == 0 {
			f.wrapping = w
		} else {
			f.Also = append(f.Also, w)
		}
	}
	text, err := json.MarshalIndent(f, "", "  ")
	if err != nil {
		return err
	}
	return replaceFile(path, text)
}

// Rewrap has a new key-encryption key wrap the keyset, and puts it in the place
// of the old one. The keys in the keyset stay what they are, so brokers go on
// with what they have. Meanwhile the keyset is wrapped by both, so that the two
// files fit together at any moment, whatever ends us.
func Rewrap(keysetFile, kekFile string) error {
	if credential(kekFile) != "" {
		return fmt.Errorf("the key-encryption key %s is a credential of systemd's, which only systemd can replace", kekFile)
	}
	old, kekFile, err := loadKEK(keysetFile, kekFile)
	if err != nil {
		return err
	}
	f, h, err := openFile(keysetFile, kekFile, old)
	if err != nil {
		return err
	}
	next := make(kek, kekSize)
	rand.Read(next)
	if err := f.write(keysetFile, h, old, next); err != nil {
		return err
	}
	if err := replaceFile(kekFile, base64.StdEncoding.AppendEncode(nil, next)); err != nil {
		return err
	}
	return f.write(keysetFile, h, next)
}

// replaceFile puts a line in the place of a file, for the same owner, and
// returns when it is on the disk. Its name beside the file keeps another that
// does the same at that time from undoing it.
func replaceFile(path string, line []byte) (err error) {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	next := path + ".new"
	f, err := os.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o400)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s is there: somebody else changes %s right now; if not, a crash left it: remove it", next, path)
	}
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(next)
		}
	}()
	if st, ok := info.Sys().(*syscall.Stat_t); ok && os.Geteuid() == 0 { // it is the broker's
		err = f.Chown(int(st.Uid), int(st.Gid))
	}
	_, werr := f.Write(append(line, '\n'))
	if err = errors.Join(err, f.Chmod(info.Mode().Perm()), werr, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(next, path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}
