package broker

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"
)

// The journal is a local file with, per grant that this broker renewed, the
// newest state it knows. A provider's answer is synced to it before the store is
// asked to take it, so that a crash, a store that is away, or one that falls back
// to an older copy of itself loses no refresh token.
//
// A line is a CRC, a space and JSON; the grant in it is sealed. Beyond the last
// line the file holds zeros: room that is on the disk already, so that an answer
// still fits when the disk is full. A line that was cut short by a crash was
// never acted upon and is skipped.
const (
	// journalRoom is what is kept free at the end for the answers to come. A
	// refresh token is sent only while there is room for what it may bring.
	journalRoom = 1 << 20
	// journalLine is the most that one line may take.
	journalLine = 64 << 10
	// journalSlack is how much the file may outgrow what it must hold before it
	// is written anew.
	journalSlack = 4 << 20
)

// errJournalFull says that the journal can't take an answer now.
var errJournalFull = errors.New("the journal has no room")

// A journalEntry is what the journal knows of one grant.
type journalEntry struct {
	Key     GrantKey
	Version int64     // the highest that this broker has written
	Epoch   int64     // the highest that it has written or read
	Roles   []string  // as of Epoch; none are known: none
	EndedAt time.Time // of the last disconnect or logout that it has written or read
	// End says how that was, if it was seen before a login came after it.
	End endedAs
	// Box is the sealed grant at Version, until the store has it for sure.
	Box []byte `json:",omitempty"`
}

// endedAs is what a grant says of its end.
type endedAs struct {
	State      GrantState
	Reason     string
	Revocation Revocation
}

type journal struct {
	path string
	id   string     // of the file; it is its first entry, which is of no grant
	mu   sync.Mutex // guards all below, and the file
	file *os.File
	end  int64 // of the last line
	size int64 // of the file, with its room
	look int64 // the end at which compact looks again
	all  map[GrantKey]journalEntry
}

// openJournal opens or makes the journal at path. No two processes may have it
// open at once: they would each know half of what was written.
func openJournal(path string) (*journal, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open journal: %w", err)
	}
	if err := lockFile(f); err != nil {
		f.Close()
		return nil, fmt.Errorf("the journal %s is in use by another process; only one broker may run on it: %w", path, err)
	}
	j := &journal{path: path, file: f, all: make(map[GrantKey]journalEntry)}
	if err := j.read(); err != nil {
		f.Close()
		return nil, fmt.Errorf("read journal %s: %w", path, err)
	}
	if err := j.name(); err != nil {
		f.Close()
		return nil, err
	}
	return j, nil
}

// name reads the journal's id, or gives it one.
func (j *journal) name() error {
	err := j.write(GrantKey{}, func(e *journalEntry) bool {
		fresh := e.Box == nil
		if fresh {
			e.Box = []byte(rand.Text())
		}
		j.id = string(e.Box)
		return fresh
	})
	return err
}

// read takes in the lines up to the first that is not whole.
func (j *journal) read() error {
	info, err := j.file.Stat()
	if err != nil {
		return err
	}
	j.size = info.Size()
	r := bufio.NewReaderSize(j.file, journalLine)
	for {
		line, err := r.ReadSlice('\n')
		if errors.Is(err, io.EOF) || errors.Is(err, bufio.ErrBufferFull) {
			return nil
		}
		if err != nil {
			return err
		}
		e, ok := parseJournalLine(line)
		if !ok {
			return nil
		}
		j.all[e.Key] = e
		j.end += int64(len(line))
	}
}

func parseJournalLine(line []byte) (e journalEntry, ok bool) {
	sum, body, found := bytes.Cut(bytes.TrimSuffix(line, []byte("\n")), []byte(" "))
	if !found {
		return e, false
	}
	want, err := strconv.ParseUint(string(sum), 16, 32)
	if err != nil || uint32(want) != crc32.ChecksumIEEE(body) {
		return e, false
	}
	return e, json.Unmarshal(body, &e) == nil
}

func (e journalEntry) line() ([]byte, error) {
	body, err := json.Marshal(e)
	if err != nil {
		return nil, err
	}
	line := fmt.Appendf(nil, "%08x %s\n", crc32.ChecksumIEEE(body), body)
	if len(line) > journalLine {
		return nil, fmt.Errorf("a grant of %d bytes is too large for the journal", len(line))
	}
	return line, nil
}

// get returns what the journal knows of k.
func (j *journal) get(k GrantKey) (journalEntry, bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	e, ok := j.all[k]
	return e, ok
}

// entries returns all that the journal knows of grants.
func (j *journal) entries() []journalEntry {
	j.mu.Lock()
	defer j.mu.Unlock()
	all := make([]journalEntry, 0, len(j.all))
	for k, e := range j.all {
		if k != (GrantKey{}) {
			all = append(all, e)
		}
	}
	return all
}

// ready makes sure that the answers to come have room on the disk.
func (j *journal) ready() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.grow()
}

// grow keeps half of the room free at least. The zeros are written, not just
// counted: only what was written is sure to be on the disk.
func (j *journal) grow() error {
	if j.size-j.end >= journalRoom/2 {
		return nil
	}
	want := j.end + journalRoom
	if _, err := j.file.WriteAt(make([]byte, want-j.size), j.size); err != nil {
		return fmt.Errorf("%w: %w", errJournalFull, err)
	}
	if err := j.file.Sync(); err != nil {
		return fmt.Errorf("%w: %w", errJournalFull, err)
	}
	j.size = want
	return nil
}

// write lets change alter what the journal knows of k, unless it returns false.
// Nobody comes between: two flows may learn of one grant at once. When write
// returns nil, a crash doesn't lose what was written.
func (j *journal) write(k GrantKey, change func(e *journalEntry) bool) error {
	return j.append(k, change, func() error {
		failpoint("journal written")
		if err := j.file.Sync(); err != nil {
			return fmt.Errorf("sync journal: %w", err)
		}
		return nil
	})
}

// add is write that does not wait for the disk: a machine that dies may lose it.
func (j *journal) add(k GrantKey, change func(e *journalEntry) bool) error {
	return j.append(k, change, func() error { return nil })
}

func (j *journal) append(k GrantKey, change func(e *journalEntry) bool, sync func() error) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	e := j.all[k]
	e.Key = k
	if !change(&e) {
		return nil
	}
	line, err := e.line()
	if err != nil {
		return err
	}
	if _, err := j.file.WriteAt(line, j.end); err != nil {
		return fmt.Errorf("write journal: %w", err)
	}
	if err := sync(); err != nil {
		return err
	}
	j.end += int64(len(line))
	j.size = max(j.size, j.end)
	j.all[k] = e
	return nil
}

// forget drops the box of k if it still is the one at version: the store has it
// for sure. What was the highest stays known.
func (j *journal) forget(k GrantKey, version int64) error {
	err := j.write(k, func(e *journalEntry) bool {
		had := e.Version == version && e.Box != nil
		e.Box = nil
		return had
	})
	if err != nil {
		return err
	}
	return j.compact()
}

// compact writes the file anew once most of it is history. It does not measure
// that each time: with thousands of grants it costs more than a write.
func (j *journal) compact() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.end < j.look {
		return nil
	}
	j.look = j.end + journalSlack/16
	var text bytes.Buffer
	for _, e := range j.all {
		line, err := e.line()
		if err != nil {
			return err
		}
		text.Write(line)
	}
	if j.end < int64(2*text.Len()+journalSlack) {
		return nil
	}
	return j.replace(text.Bytes())
}

// replace puts a new file in the place of the old one. The lock is taken on the
// new one before it has the name, so that nobody comes between.
func (j *journal) replace(text []byte) error {
	next, err := os.OpenFile(j.path+".new", os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("compact journal: %w", err)
	}
	err = errors.Join(lockFile(next), writeAll(next, text), os.Rename(next.Name(), j.path), syncDirectory(filepath.Dir(j.path)))
	if err != nil {
		next.Close()
		return fmt.Errorf("compact journal: %w", err)
	}
	j.file.Close()
	j.file, j.end, j.size, j.look = next, int64(len(text)), int64(len(text)), 0
	return j.grow()
}

func writeAll(f *os.File, text []byte) error {
	if _, err := f.Write(text); err != nil {
		return err
	}
	return f.Sync()
}

func syncDirectory(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

func (j *journal) close() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.file.Close()
}
