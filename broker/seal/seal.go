// Package seal seals records: AEAD under a keyset, bound to a place.
//
// Whoever can write to the store can lose a sealed record, but can neither
// read, make nor change one, nor move one to another place. The keyset lies in
// a file, wrapped by a key-encryption key that lies somewhere else, so that
// neither file alone, nor a backup that holds only one of them, opens anything.
package seal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

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

// A Keyset seals and opens. It may be used from many goroutines at once. One
// of its keys seals; all of them open, so that keys can be rotated.
type Keyset struct {
	aead tink.AEAD
	ids  map[uint32]bool // of the keys; a box begins with the id of its own
}

// New makes a keyset that lives in memory only, for tests and the demo.
func New() (*Keyset, error) {
	h, err := newHandle()
	if err != nil {
		return nil, err
	}
	return fromHandle(h)
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

func fromHandle(h *keyset.Handle) (*Keyset, error) {
	a, err := aead.New(h)
	if err != nil {
		return nil, fmt.Errorf("use the keyset: %w", err)
	}
	k := &Keyset{aead: a, ids: make(map[uint32]bool)}
	for _, info := range h.KeysetInfo().GetKeyInfo() {
		k.ids[info.GetKeyId()] = true
	}
	return k, nil
}

// Seal seals plain at a place.
func (k *Keyset) Seal(plain []byte, at Place) ([]byte, error) {
	if len(at) == 0 {
		return nil, errors.New("seal a record: it has no place")
	}
	if k == nil || k.aead == nil {
		return nil, errors.New("seal a record: the keyset holds no key")
	}
	box, err := k.aead.Encrypt(plain, at.bytes())
	if err != nil {
		return nil, fmt.Errorf("seal the record at %s: %w", at, err)
	}
	return box, nil
}

// Open opens what Seal sealed at the same place, and nothing else. Its error
// wraps ErrUnsealable, names the place and holds no byte of the box.
func (k *Keyset) Open(box []byte, at Place) ([]byte, error) {
	why := k.refuse(box, at)
	if why == "" {
		plain, err := k.aead.Decrypt(box, at.bytes())
		if err == nil {
			return plain, nil
		}
		why = "it was changed, or sealed for another place"
	}
	return nil, fmt.Errorf("open the record at %s: %w: %s", at, ErrUnsealable, why)
}

// refuse says what is wrong with a box before its key is tried, so that an
// operator can tell a lost keyset from a changed record; empty: nothing.
func (k *Keyset) refuse(box []byte, at Place) string {
	const prefix = 5 // Tink: a byte 1, then the id of the key
	switch {
	case len(at) == 0:
		return "it has no place"
	case k == nil || k.aead == nil:
		return "the keyset holds no key"
	case len(box) < prefix || box[0] != 1:
		return "these bytes are no sealed record"
	case !k.ids[binary.BigEndian.Uint32(box[1:prefix])]:
		return "it was sealed under a key that is not in the keyset"
	}
	return ""
}
