// Package seal seals records: AEAD under a keyset, bound to a place.
//
// Whoever can write to the store can lose a sealed record, but can neither
// read, make nor change one, nor move one to another place. The keyset lies in
// a file, wrapped by a key-encryption key that lies somewhere else, so that
// neither file alone, nor a backup that holds only one of them, opens anything.
package seal

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/tink-crypto/tink-go/v2/aead"
	"github.com/tink-crypto/tink-go/v2/keyset"
	"github.com/tink-crypto/tink-go/v2/tink"
)

// ErrUnsealable is what Open's errors wrap: the bytes are not what this keyset
// sealed at that place. Trying again doesn't help.
var ErrUnsealable = errors.New("the sealed record does not open")

// A Place says where a box lies; a box opens at no other. Parts may hold any
// bytes. A place without parts is none: Seal refuses it, because a box sealed
// there could be moved anywhere.
type Place []string

// String is for errors; it shows every part as it is.
func (p Place) String() string {
	quoted := make([]string, len(p))
	for i, part := range p {
		quoted[i] = fmt.Sprintf("%q", part)
	}
	return strings.Join(quoted, "/")
}

// bytes is the associated data: each part behind its length, so that no two
// places have the same bytes.
func (p Place) bytes() []byte {
	var b []byte
	for _, part := range p {
		b = binary.BigEndian.AppendUint64(b, uint64(len(part)))
		b = append(b, part...)
	}
	return b
}

// A Keyset seals and opens. It may be used from many goroutines at once, also
// while it is read anew. One of its keys seals; all of them open, so that keys
// can be rotated.
type Keyset struct {
	keysetFile, kekFile string // empty: it lives in memory only
	state               atomic.Pointer[state]
}

// A state is what a Keyset is until it is read anew.
type state struct {
	aead  tink.AEAD
	keys  []Key
	audit []byte
}

// New makes a keyset that lives in memory only, for tests and the demo.
func New() (*Keyset, error) {
	h, err := newHandle()
	if err != nil {
		return nil, err
	}
	s, err := stateOf(h, newAuditKey(), nil)
	if err != nil {
		return nil, err
	}
	k := new(Keyset)
	k.state.Store(s)
	return k, nil
}

// newHandle makes a keyset of one key. XChaCha20 because its nonces are long
// enough to be drawn at random for ever.
func newHandle() (*keyset.Handle, error) {
	h, err := keyset.NewHandle(aead.XChaCha20Poly1305KeyTemplate())
	if err != nil {
		return nil, fmt.Errorf("make a keyset: %w", err)
	}
	return h, nil
}

func stateOf(h *keyset.Handle, audit []byte, out []retired) (*state, error) {
	a, err := aead.New(h)
	if err != nil {
		return nil, fmt.Errorf("use the keyset: %w", err)
	}
	return &state{aead: a, keys: keysOf(h, out), audit: audit}, nil
}

// now returns what k is; a keyset that was never made has no keys.
func (k *Keyset) now() *state {
	if k != nil {
		if s := k.state.Load(); s != nil {
			return s
		}
	}
	return new(state)
}

// Keys lists the keys, from the oldest to the newest.
func (k *Keyset) Keys() []Key { return slices.Clone(k.now().keys) }

// AuditMAC is an HMAC-SHA256 for the audit's chain. Its key is the same as long as
// there is a keyset, whatever becomes of the keys in it and of the one that wraps
// it, so that an audit of years ago can be verified.
func (k *Keyset) AuditMAC() hash.Hash { return hmac.New(sha256.New, k.now().audit) }

// prefix is how long what a box begins with is: a byte 1, then the id of its key.
const prefix = 5

// KeyOf returns which key a box was sealed under; false: it is no box.
func KeyOf(box []byte) (KeyID, bool) {
	if len(box) < prefix || box[0] != 1 {
		return 0, false
	}
	return KeyID(binary.BigEndian.Uint32(box[1:prefix])), true
}

// Seal seals plain at a place.
func (k *Keyset) Seal(plain []byte, at Place) ([]byte, error) {
	if len(at) == 0 {
		return nil, errors.New("seal a record: it has no place")
	}
	now := k.now()
	if now.aead == nil {
		return nil, errors.New("seal a record: the keyset holds no key")
	}
	box, err := now.aead.Encrypt(plain, at.bytes())
	if err != nil {
		return nil, fmt.Errorf("seal the record at %s: %w", at, err)
	}
	return box, nil
}

// Open opens what Seal sealed at the same place, and nothing else. Its error
// wraps ErrUnsealable, names the place and holds no byte of the box.
func (k *Keyset) Open(box []byte, at Place) ([]byte, error) {
	now := k.now()
	why := now.refuse(box, at)
	if why == "" {
		plain, err := now.aead.Decrypt(box, at.bytes())
		if err == nil {
			return plain, nil
		}
		why = "it was changed, or sealed for another place"
	}
	return nil, fmt.Errorf("open the record at %s: %w: %s", at, ErrUnsealable, why)
}

// refuse says what is wrong with a box before its key is tried, so that an
// operator can tell an old backup of the store and a lost key from a changed
// record; empty: nothing.
func (s *state) refuse(box []byte, at Place) string {
	if len(at) == 0 {
		return "it has no place"
	}
	if s.aead == nil {
		return "the keyset holds no key"
	}
	id, ok := KeyOf(box)
	if !ok {
		return "these bytes are no sealed record"
	}
	i := slices.IndexFunc(s.keys, func(k Key) bool { return k.ID == id })
	if i < 0 {
		return fmt.Sprintf("it was sealed under %s, a key that is not in the keyset, nor ever was: the keyset file is an older copy, or another deployment's", id)
	}
	switch key := s.keys[i]; key.State {
	case Disabled:
		return fmt.Sprintf("it was sealed under %s, which was retired on %s: it comes from an older backup of the store; \"tokenbroker keys retire --undo\" makes it readable again", id, key.Since.Format(time.DateOnly))
	case Gone:
		return fmt.Sprintf("it was sealed under %s, which was retired on %s and destroyed since: it comes from an older backup of the store, and nothing opens it any more", id, key.Since.Format(time.DateOnly))
	}
	return ""
}
