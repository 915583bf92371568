package broker

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash"
	"io"
	"sync"
	"time"
)

// The audit is a chain. Each line carries its number in the chain, seq, the MAC of
// the line before it, prev, and its own MAC under a key that only the brokers and
// their administrator have (seal.Keyset.AuditMAC). So nobody else can change a
// line, put one in or link the lines anew, and one that is gone or was moved leaves
// a hole. What no line can show is that the last ones were cut off, or that
// somebody who had the key has chained all of it again: that shows against a head,
// the place and the MAC of one line, which was kept elsewhere.
//
// Each broker has a chain of its own. It goes on over restarts and over files: the
// first line of a new file names the last one of the old.

// macSize is how much of an HMAC-SHA256 is kept, in bytes.
const macSize = 16

// The MAC is over all of a line that is before macBegins.
const (
	lineBegins = `{"seq":`
	macBegins  = `,"mac":"`
	macEnds    = `"}`
	macLength  = len(macBegins) + 2*macSize + len(macEnds)
)

// An AuditHead is the place of a line in a chain.
type AuditHead struct {
	Host HostID    `json:"host"`
	Seq  int64     `json:"seq"`
	Ref  string    `json:"ref"`
	Time time.Time `json:"time"`
	MAC  string    `json:"mac"`
}

// audit writes entries, one JSON line each, in the order of their refs.
type audit struct {
	mu   sync.Mutex // guards what follows
	w    io.Writer
	mac  hash.Hash
	head AuditHead     // of the chain; only Seq and MAC are kept up
	buf  bytes.Buffer  // holds one line at a time
	json *json.Encoder // into buf
	sum  [sha256.Size]byte
	torn bool   // a part of a line was written last
	run  string // tells this run's refs from another's
	n    int64

	// What is counted, see auditstorm.go.
	kinds   map[kind]*run
	details map[asker]int // of kinds
	runs    []*run        // those of kinds, in the order of their first lines
}

func newAudit(w io.Writer, mac hash.Hash, head AuditHead) *audit {
	a := &audit{w: w, mac: mac, head: head, run: rand.Text()[:8], kinds: make(map[kind]*run), details: make(map[asker]int)}
	a.json = json.NewEncoder(&a.buf)
	return a
}

// write gives e its place and writes it. Whoever acts for e must not go on if it
// fails: no record, no token.
func (a *audit) write(e *Entry) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.put(e)
}

// put is write; a.mu is held.
func (a *audit) put(e *Entry) error {
	a.n++
	e.Ref = fmt.Sprintf("%s-%d", a.run, a.n)
	e.Seq, e.Prev = a.head.Seq+1, a.head.MAC
	a.buf.Reset()
	if a.torn {
		a.buf.WriteByte('\n') // what was torn gets a line of its own
	}
	begins := a.buf.Len()
	if err := a.json.Encode(e); err != nil {
		return fmt.Errorf("write audit: %w", err)
	}
	a.buf.Truncate(a.buf.Len() - len("}\n"))
	mac := a.seal(a.buf.Bytes()[begins:])
	a.buf.WriteString(macBegins + mac + macEnds + "\n")
	n, err := a.w.Write(a.buf.Bytes())
	if n >= a.buf.Len()-1 { // only the line's end may be missing
		a.head.Seq, a.head.MAC = e.Seq, mac
	}
	a.torn = err != nil && (a.torn || n > 0)
	if err != nil {
		return fmt.Errorf("write audit: %w", err)
	}
	return nil
}

func (a *audit) seal(body []byte) string {
	a.mac.Reset()
	a.mac.Write(body)
	return hex.EncodeToString(a.mac.Sum(a.sum[:0])[:macSize])
}

// An auditLine is what the chain's links of a line say. Unless it is authentic
// anybody may have written it.
type auditLine struct {
	AuditHead
	Prev   string `json:"prev"`
	Action string `json:"action"`
	body   []byte
}

// parseAuditLine reads a line without its end; false: it has not the form of one.
func parseAuditLine(text []byte) (l auditLine, ok bool) {
	end := len(text) - macLength
	if end < 0 || !LooksLikeAudit(text) {
		return l, false
	}
	body, tail := text[:end], string(text[end:])
	if tail[:len(macBegins)] != macBegins || tail[len(tail)-len(macEnds):] != macEnds {
		return l, false
	}
	if err := json.Unmarshal(append(bytes.Clone(body), '}'), &l); err != nil {
		return l, false
	}
	l.MAC, l.body = tail[len(macBegins):len(macBegins)+2*macSize], body
	return l, l.Seq > 0
}

// authentic says whether l was written by who has mac's key.
func (l auditLine) authentic(mac hash.Hash) bool {
	mac.Reset()
	mac.Write(l.body)
	got, err := hex.DecodeString(l.MAC)
	return err == nil && hmac.Equal(got, mac.Sum(nil)[:macSize])
}

// HeadOf returns the place of an audit line; false: it is none, or mac's key is
// not the one that it was written with.
func HeadOf(line []byte, mac hash.Hash) (AuditHead, bool) {
	l, ok := parseAuditLine(line)
	return l.AuditHead, ok && l.authentic(mac)
}

// LooksLikeAudit says whether a line begins as those of an audit do.
func LooksLikeAudit(line []byte) bool { return bytes.HasPrefix(line, []byte(lineBegins)) }
