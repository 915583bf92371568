package broker

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
)

// A Secret is a string that prints as "[hidden]" wherever it turns up: in any
// verb of fmt, in slog, in JSON, inside other structs. It holds a func because
// fmt looks through unexported fields, past our methods, and would print bytes.
//
// Reveal is the word to look for in a review. It belongs where a secret is
// sealed, put into a form for a provider, or answered to its owner.
type Secret struct{ reveal func() string }

// NewSecret hides s.
func NewSecret(s string) Secret {
	if s == "" {
		return Secret{}
	}
	return Secret{func() string { return s }}
}

// Reveal returns the hidden string.
func (s Secret) Reveal() string {
	if s.reveal == nil {
		return ""
	}
	return s.reveal()
}

// IsZero reports whether there is nothing to hide.
func (s Secret) IsZero() bool { return s.reveal == nil }

// Equal compares in a time that doesn't depend on where the two differ.
func (s Secret) Equal(t Secret) bool {
	return subtle.ConstantTimeCompare([]byte(s.Reveal()), []byte(t.Reveal())) == 1
}

// Fingerprint is the lower-case hex of the SHA-256 of the secret; it can be
// logged and compared. The fingerprint of nothing is empty.
func (s Secret) Fingerprint() string {
	if s.IsZero() {
		return ""
	}
	var sum [sha256.Size]byte
	Erasing(func() { sum = sha256.Sum256([]byte(s.Reveal())) }) // the conversion copies
	return hex.EncodeToString(sum[:])
}

const hidden = "[hidden]"

// Format prints that there is something, for every verb.
func (s Secret) Format(w fmt.State, _ rune) { io.WriteString(w, hidden) }

// String implements fmt.Stringer.
func (s Secret) String() string { return hidden }

// GoString implements fmt.GoStringer.
func (s Secret) GoString() string { return hidden }

// MarshalText implements encoding.TextMarshaler, and so json.Marshal.
func (s Secret) MarshalText() ([]byte, error) { return []byte(hidden), nil }

// LogValue implements slog.LogValuer.
func (s Secret) LogValue() slog.Value { return slog.StringValue(hidden) }
