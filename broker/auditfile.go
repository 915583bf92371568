package broker

import (
	"bytes"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"sync"
)

// auditTail is how much of a file's end is read for its last line: more than a
// line can be long.
const auditTail = 1 << 20

// An AuditFile is where audit lines go: a file that may be renamed and opened
// anew, or a stream. Beside it a file holds the last line once more. So a chain
// goes on when the stream can't be read or the file was renamed, and a file that
// lost its end is noticed.
type AuditFile struct {
	path string // empty: a stream
	log  *slog.Logger
	from AuditHead

	mu     sync.Mutex // guards what follows
	out    io.Writer
	file   *os.File // out, if it is a file
	head   *os.File
	behind bool // the file of the head could not be written
}

// OpenAudit opens the file at path, made if it is not there and for its owner
// only; or, without a path, writes to stream. The last line is kept in the file
// called head, which no two brokers may share.
func OpenAudit(path string, stream io.Writer, head string, mac hash.Hash, log *slog.Logger) (_ *AuditFile, err error) {
	f := &AuditFile{path: path, log: log, out: stream}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	if f.head, err = os.OpenFile(head, os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return nil, fmt.Errorf("open the audit's head: %w", err)
	}
	if path != "" {
		if err := f.open(); err != nil {
			return nil, err
		}
	}
	where, err := FindAuditHead(path, head, mac)
	f.from = where.Last
	if where.Missing > 0 {
		log.Error("the audit's file has lost its end, as a machine that crashed does, or somebody who cuts it; the chain shows the gap",
			"file", path, "lines", where.Missing, "last", where.Last.Ref)
	}
	return f, err
}

// open opens the file, behind whatever is in it.
func (f *AuditFile) open() error {
	file, err := os.OpenFile(f.path, os.O_RDWR|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("open the audit: %w", err)
	}
	if err := endLine(file); err != nil {
		file.Close()
		return fmt.Errorf("open the audit: %w", err)
	}
	f.file, f.out = file, file
	return nil
}

// endLine gives a line that a crash has cut short an end.
func endLine(f *os.File) error {
	info, err := f.Stat()
	if err != nil || info.Size() == 0 || !info.Mode().IsRegular() {
		return err
	}
	last := make([]byte, 1)
	if _, err := f.ReadAt(last, info.Size()-1); err != nil || last[0] == '\n' {
		return err
	}
	_, err = f.WriteString("\n")
	return err
}

// Head is where the chain stood when the file was opened.
func (f *AuditFile) Head() AuditHead { return f.from }

// Write writes one line.
func (f *AuditFile) Write(line []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, err := f.out.Write(line)
	if err != nil {
		return n, err
	}
	if _, err := f.head.WriteAt(bytes.TrimPrefix(line, []byte("\n")), 0); err != nil && !f.behind {
		f.behind = true
		f.log.Error("the audit's last line can't be kept beside it; if the broker is killed now, its audit may seem to lack lines", "err", err)
	}
	return n, nil
}

// Reopen opens the file anew, for it was renamed. If that fails the old one stays
// in use.
func (f *AuditFile) Reopen() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	old := f.file
	if old == nil {
		return nil // a stream
	}
	if err := f.open(); err != nil {
		return err
	}
	return old.Close()
}

// Close closes the files. A stream stays open.
func (f *AuditFile) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	var errs []error
	for _, c := range []*os.File{f.file, f.head} {
		if c != nil {
			errs = append(errs, c.Close())
		}
	}
	return errors.Join(errs...)
}

// An AuditEnd is where a chain ends.
type AuditEnd struct {
	Last    AuditHead // zero: there is no chain
	Missing int64     // lines that were written after the last one in the file
}

// FindAuditHead finds the end of the chain whose lines are in the file at path
// (empty: in none) and whose last line is in the file called head.
func FindAuditHead(path, head string, mac hash.Hash) (AuditEnd, error) {
	text, err := readPart(head, 0)
	if err != nil {
		return AuditEnd{}, err
	}
	line, _, _ := bytes.Cut(text, []byte("\n")) // what follows is the rest of longer ones
	noted, _ := HeadOf(line, mac)
	if path == "" {
		return AuditEnd{Last: noted}, nil
	}
	if text, err = readPart(path, auditTail); err != nil {
		return AuditEnd{}, err
	}
	there := lastHead(text, mac)
	switch {
	case noted.Seq <= there.Seq:
		return AuditEnd{Last: there}, nil
	case there.Seq == 0: // a new file, the old one was renamed
		return AuditEnd{Last: noted}, nil
	}
	return AuditEnd{noted, noted.Seq - there.Seq}, nil
}

// lastHead is the last authentic line of text.
func lastHead(text []byte, mac hash.Hash) AuditHead {
	for len(text) > 0 {
		i := bytes.LastIndexByte(text, '\n')
		if h, ok := HeadOf(text[i+1:], mac); ok {
			return h
		}
		text = text[:max(i, 0)]
	}
	return AuditHead{}
}

// readPart reads the last bytes of a file, or, for last 0, its first ones. A file
// that is not there is empty.
func readPart(path string, last int64) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the audit: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("read the audit: %w", err)
	}
	from := int64(0)
	if last > 0 {
		from = max(0, info.Size()-last)
	}
	text, err := io.ReadAll(io.NewSectionReader(f, from, auditTail))
	if err != nil {
		return nil, fmt.Errorf("read the audit: %w", err)
	}
	return text, nil
}
