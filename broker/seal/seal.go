// Package seal seals records: AEAD under a keyset, bound to a place.
package seal

// A Place says where a box lies; a box opens at no other. Parts may hold any
// bytes.
type Place []string

// A Keyset seals and opens. It may be used from many goroutines at once.
type Keyset struct{}

// Create makes a new keyset, wrapped by a new key-encryption key, in two new
// files of mode 0400. It overwrites nothing.
func Create(keysetFile, kekFile string) error { panic("wip") }

// Load reads a keyset and the key-encryption key that opens it.
func Load(keysetFile, kekFile string) (*Keyset, error) { panic("wip") }

// New makes a keyset that lives in memory only, for tests and the demo.
func New() (*Keyset, error) { panic("wip") }

// Seal seals plain at a place.
func (k *Keyset) Seal(plain []byte, at Place) ([]byte, error) { panic("wip") }

// Open opens what Seal sealed at the same place, and nothing else.
func (k *Keyset) Open(box []byte, at Place) ([]byte, error) { panic("wip") }
