package broker

import (
	"bytes"
	"fmt"
	"hash"
	"slices"
	"time"
)

// maxFindings is of how many findings is told.
const maxFindings = 1000

// recentLines is how many lines back a copy of a line is recognised as one.
const recentLines = 4096

// An AuditFinding is something about a line of an audit.
type AuditFinding struct {
	File string `json:"file"`
	Line int    `json:"line"`
	Text string `json:"text"`
	nth  int    // of all lines
}

// String is how an administrator reads it.
func (f AuditFinding) String() string { return fmt.Sprintf("%s:%d: %s", f.File, f.Line, f.Text) }

// An AuditReport is what an AuditVerifier has found.
type AuditReport struct {
	Lines int            `json:"lines"` // of the chain, in their places
	First AuditHead      `json:"first"`
	Last  AuditHead      `json:"last"`
	Wrong []AuditFinding `json:"wrong"` // none: all is as it was written
	Notes []AuditFinding `json:"notes"` // what is no fault and should be known
	More  int            `json:"more"`  // of either, which there are beside these
}

// An AuditVerifier reads the lines of one broker's audit, from the oldest to the
// newest, and finds what was changed, removed, put in or moved since.
type AuditVerifier struct {
	mac    hash.Hash
	heads  map[int64][]AuditHead // that were exported, by seq; taken out when they are found
	hosts  map[HostID]bool
	report AuditReport

	last   placedLine       // of the chain, in its place
	end    place            // of the line that was read last
	recent map[int64]string // MACs of the last lines in their places
	bad    badLines         // since last
	old    int              // lines before the chain
	holes  []hole
}

type place struct {
	file string
	line int
	nth  int
}

type placedLine struct {
	auditLine
	place
}

func (p placedLine) String() string { return fmt.Sprintf("line %s (number %d)", p.Ref, p.Seq) }

// badLines are lines in a row that nobody who has the key has written so.
type badLines struct {
	n     int64
	first place
	ref   string // of the first, as it says
	shape bool   // the first looks like an audit line
}

// A verdict is what became of lines.
type verdict struct{ one, many string }

var (
	changed   = verdict{"was changed", "were changed"}
	putIn     = verdict{"was put in", "were put in"}
	tampering = verdict{"was changed or put in", "were changed or put in"}
)

// A hole is where lines are missing.
type hole struct {
	before  placedLine
	missing []int64 // numbers from, to, from, to, …
	changed int64   // so many of them are there, but changed
}

// NewAuditVerifier verifies lines that were chained with mac's key. heads were
// exported once; they show what is missing at the end.
func NewAuditVerifier(mac hash.Hash, heads []AuditHead) *AuditVerifier {
	v := &AuditVerifier{
		mac: mac, heads: make(map[int64][]AuditHead), hosts: make(map[HostID]bool), recent: make(map[int64]string),
		report: AuditReport{Wrong: []AuditFinding{}, Notes: []AuditFinding{}},
	}
	for _, h := range heads {
		v.heads[h.Seq] = append(v.heads[h.Seq], h)
	}
	return v
}

// Line takes the next line, without its end.
func (v *AuditVerifier) Line(file string, line int, text []byte) {
	at := place{file, line, v.end.nth + 1}
	v.end = at
	l, whole := parseAuditLine(text)
	switch begun := v.last.Seq > 0 || v.bad.n > 0; {
	case len(text) == 0:
	case whole && l.authentic(v.mac):
		l.body = nil // the reader's
		v.take(placedLine{l, at})
	case !whole && LooksLikeAudit(text):
		v.note(at, "this line was cut short by a crash or a full disk; nobody was answered for it, and the chain goes on without it")
	case !whole && !begun && bytes.HasPrefix(text, []byte("{")):
		v.old++
	default:
		if v.bad.n == 0 {
			v.bad = badLines{first: at, ref: l.Ref, shape: whole}
		}
		v.bad.n++
	}
}

// take takes an authentic line.
func (v *AuditVerifier) take(l placedLine) {
	v.hosts[l.Host] = true
	between := l.Seq - v.last.Seq - 1
	switch {
	case v.last.Seq == 0:
		v.begin(l)
	case l.Seq == 1 && l.Prev == "":
		v.blame(tampering)
		v.wrong(l.place, "%s begins a new chain: the broker found neither its audit nor the file with its last line; what was written between %s and here can't be known", l, v.last)
	case l.Seq <= v.last.Seq:
		if !v.outOfPlace(l) {
			return
		}
	case between > 0:
		v.jump(l, between)
	case l.Prev != v.last.MAC:
		v.blame(putIn)
		v.wrong(l.place, "%s does not follow the line before it, whose number fits: what is before it was chained again, or comes from a copy that went another way", l)
	default:
		v.blame(putIn)
	}
	v.settle(l)
}

// begin takes the first line.
func (v *AuditVerifier) begin(l placedLine) {
	v.report.First = l.AuditHead
	v.blame(tampering)
	if v.old > 0 {
		v.note(l.place, "the chain begins here; before it %s from before audits were chained, of which nothing can be said", linesAre(int64(v.old)))
	} else if l.Seq > 1 {
		v.note(l.place, "the chain is verified from %s on; what was before it is not in these files", l)
	}
}

// settle makes l the last line in its place, and compares it with what was exported.
func (v *AuditVerifier) settle(l placedLine) {
	v.last = l
	v.report.Lines++
	v.recent[l.Seq] = l.MAC
	delete(v.recent, l.Seq-recentLines)
	v.heads[l.Seq] = slices.DeleteFunc(v.heads[l.Seq], func(h AuditHead) bool {
		if h.Host == l.Host && h.MAC != l.MAC {
			v.wrong(l.place, "%s is not the line that was exported as %s on %s: the audit up to here was chained again", l, h.Ref, h.Time.Format(time.DateTime))
		}
		return h.Host == l.Host
	})
}

// jump takes a line whose number is higher than the next.
func (v *AuditVerifier) jump(l placedLine, between int64) {
	h := hole{before: l, missing: []int64{v.last.Seq + 1, l.Seq - 1}, changed: min(between, v.bad.n)}
	if v.bad.n <= between {
		v.blame(changed)
	} else {
		v.blame(tampering)
	}
	if h.changed < between {
		v.holes = append(v.holes, h)
	}
}

// outOfPlace takes an authentic line whose number has passed, and reports whether
// the chain goes on from it.
func (v *AuditVerifier) outOfPlace(l placedLine) (goesOn bool) {
	switch {
	case v.recent[l.Seq] == l.MAC:
		v.wrong(l.place, "%s stands here a second time: it was copied", l)
	case v.moved(l.Seq):
		v.wrong(l.place, "%s was moved: its place is before %s", l, v.last)
	case l.Action == "start" && v.recent[l.Seq-1] == l.Prev:
		v.note(l.place, "the broker started here without knowing of the %d lines before, which were written just before it, or its machine, crashed", v.last.Seq-l.Seq+1)
		return true
	default:
		v.wrong(l.place, "%s is out of place: lines before it are of a higher number", l)
	}
	return false
}

// moved takes seq out of the missing numbers.
func (v *AuditVerifier) moved(seq int64) bool {
	for i := range v.holes {
		m := v.holes[i].missing
		for j := 0; j < len(m); j += 2 {
			if m[j] <= seq && seq <= m[j+1] {
				v.holes[i].missing = slices.Replace(m, j, j+2, without(m[j], m[j+1], seq)...)
				return true
			}
		}
	}
	return false
}

func without(from, to, seq int64) (rest []int64) {
	if from < seq {
		rest = append(rest, from, seq-1)
	}
	if seq < to {
		rest = append(rest, seq+1, to)
	}
	return rest
}

// blame says what became of the lines since the last that are not authentic.
func (v *AuditVerifier) blame(what verdict) {
	b := v.bad
	v.bad = badLines{}
	name := "this line, which has not the form of one,"
	if b.shape {
		name = fmt.Sprintf("this line, which calls itself %.40q,", b.ref)
	}
	switch {
	case b.n == 1:
		v.wrong(b.first, "%s %s: nobody wrote it so with this deployment's key", name, what.one)
	case b.n > 1:
		v.wrong(b.first, "%s and %d after it %s: nobody wrote them so with this deployment's key", name, b.n-1, what.many)
	}
}

// End says what was found.
func (v *AuditVerifier) End() AuditReport {
	v.blame(tampering)
	for _, h := range v.holes {
		v.missing(h)
	}
	r := &v.report
	r.Last = v.last.AuditHead
	if v.last.Seq == 0 {
		v.wrong(v.end, "there is no line of a chained audit of this deployment")
		return *r
	}
	for _, heads := range v.heads {
		for _, h := range heads {
			v.unseen(h)
		}
	}
	slices.SortStableFunc(r.Wrong, func(a, b AuditFinding) int { return a.nth - b.nth })
	return *r
}

func (v *AuditVerifier) missing(h hole) {
	n := -h.changed
	numbers := ""
	for i := 0; i < len(h.missing); i += 2 {
		from, to := h.missing[i], h.missing[i+1]
		n += to - from + 1
		if numbers != "" {
			numbers += ", "
		}
		numbers += fmt.Sprint(from)
		if to > from {
			numbers += fmt.Sprintf(" to %d", to)
		}
	}
	switch {
	case n <= 0: // all were found elsewhere
	case h.changed > 0:
		v.wrong(h.before.place, "before %s %s missing, among the numbers %s", h.before, linesAre(n), numbers)
	default:
		v.wrong(h.before.place, "before %s %s missing, of number %s", h.before, linesAre(n), numbers)
	}
}

func linesAre(n int64) string {
	if n == 1 {
		return "a line is"
	}
	return fmt.Sprintf("%d lines are", n)
}

// unseen says what it means that the line of an exported head was not found.
func (v *AuditVerifier) unseen(h AuditHead) {
	at := v.last.place
	switch {
	case !v.hosts[h.Host]:
		v.note(at, "head %s is of another host, %s", h.Ref, h.Host)
	case h.Seq < v.report.First.Seq:
		v.note(at, "head %s is older than the first line in these files", h.Ref)
	case h.Seq > v.last.Seq:
		v.wrong(at, "after %s %s missing, if not more: on %s the audit went on to line %s (number %d)", v.last, linesAre(h.Seq-v.last.Seq), h.Time.Format(time.DateTime), h.Ref, h.Seq)
	default:
		v.wrong(at, "line %s (number %d), which was exported on %s, is not in its place", h.Ref, h.Seq, h.Time.Format(time.DateTime))
	}
}

func (v *AuditVerifier) wrong(at place, text string, args ...any) {
	v.add(&v.report.Wrong, at, fmt.Sprintf(text, args...))
}

func (v *AuditVerifier) note(at place, text string, args ...any) {
	v.add(&v.report.Notes, at, fmt.Sprintf(text, args...))
}

func (v *AuditVerifier) add(to *[]AuditFinding, at place, text string) {
	if len(*to) >= maxFindings {
		v.report.More++
		return
	}
	*to = append(*to, AuditFinding{at.file, at.line, text, at.nth})
}
