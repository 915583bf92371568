package broker_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
	"tokenbroker/broker/seal"
)

// An auditLab is a chain in a file, as brokers with one key write it.
type auditLab struct {
	t          testing.TB
	keys       *seal.Keyset
	path, head string
	log        brokertest.Buffer
}

func newAuditLab(t testing.TB) *auditLab {
	keys, err := seal.New()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	return &auditLab{t: t, keys: keys, path: filepath.Join(dir, "audit.jsonl"), head: filepath.Join(dir, "head")}
}

func (l *auditLab) open(path string, stream io.Writer) *broker.AuditFile {
	l.t.Helper()
	f, err := broker.OpenAudit(path, stream, l.head, l.keys.AuditMAC(), slog.New(slog.NewTextHandler(&l.log, nil)))
	if err != nil {
		l.t.Fatal(err)
	}
	return f
}

// run lets a broker live that registers servers of these users.
func (l *auditLab) run(f *broker.AuditFile, users ...string) {
	l.t.Helper()
	r := newRig(l.t, func(c *broker.Config) { c.Keys, c.Audit, c.AuditHead = l.keys, f, f.Head() })
	r.start()
	for _, u := range users {
		r.running(broker.UserID(u), 100)
	}
	r.Close()
	if err := f.Close(); err != nil {
		l.t.Fatal(err)
	}
}

// lines are those of a chain of two runs: start, register and bind of each, stop.
func (l *auditLab) lines() []string {
	l.t.Helper()
	l.run(l.open(l.path, nil), "alice", "bob")
	l.run(l.open(l.path, nil), "carol")
	return strings.Split(strings.TrimSpace(l.read(l.path)), "\n")
}

func (l *auditLab) read(path string) string {
	l.t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		l.t.Fatal(err)
	}
	return string(text)
}

func (l *auditLab) headOf(line string) broker.AuditHead {
	l.t.Helper()
	h, ok := broker.HeadOf([]byte(line), l.keys.AuditMAC())
	if !ok {
		l.t.Fatalf("not authentic: %s", line)
	}
	return h
}

func (l *auditLab) verify(lines []string, heads ...broker.AuditHead) broker.AuditReport {
	v := broker.NewAuditVerifier(l.keys.AuditMAC(), heads)
	for i, line := range lines {
		v.Line("audit", i+1, []byte(line))
	}
	return v.End()
}

func TestEachWayToChangeAnAuditIsFoundAndTheLineIsNamed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newAuditLab(t)
		all := l.lines()
		if len(all) != 10 {
			t.Fatalf("the chain has %d lines, want 10", len(all))
		}
		whole := l.verify(all, l.headOf(all[9]), l.headOf(all[4]))
		if len(whole.Wrong)+len(whole.Notes) > 0 || whole.Lines != 10 || whole.First.Seq != 1 || whole.Last != l.headOf(all[9]) {
			t.Errorf("of an audit that is whole it says %+v", whole)
		}
		other := newAuditLab(t)
		foreign := other.lines()
		edit := func(line, from, to string) string {
			if !strings.Contains(line, from) {
				t.Fatalf("%q is not in %s", from, line)
			}
			return strings.Replace(line, from, to, 1)
		}
		ref := func(i int) string { return l.headOf(all[i]).Ref }
		last := l.headOf(all[9])
		for _, tt := range []struct {
			why   string
			lines []string
			want  []string // of each fault
		}{
			{"a line is removed", slices.Delete(slices.Clone(all), 3, 4), []string{"audit:4: before line " + ref(4) + " (number 5) a line is missing, of number 4"}},
			{"three lines are removed", slices.Delete(slices.Clone(all), 3, 6), []string{"audit:4: before line " + ref(6) + " (number 7) 3 lines are missing, of number 4 to 6"}},
			{"a line is changed", with(all, 3, edit(all[3], "bob", "eve")), []string{"audit:4: this line, which calls itself \"" + ref(3) + "\", was changed"}},
			{"a MAC is changed", with(all, 3, all[3][:len(all[3])-34]+strings.Repeat("0", 32)+`"}`), []string{"audit:4: this line, which calls itself \"" + ref(3) + "\", was changed"}},
			{"a line is made to be none", with(all, 3, "{}"), []string{"audit:4: this line, which has not the form of one, was changed"}},
			{"one is changed and the next removed", slices.Delete(with(all, 3, edit(all[3], "bob", "eve")), 4, 5), []string{"audit:4: this line", "audit:5: before line " + ref(5) + " (number 6) a line is missing, among the numbers 4 to 5"}},
			{"a line is put in", slices.Insert(slices.Clone(all), 3, foreign[5]), []string{"audit:4: this line, which calls itself \"" + other.headOf(foreign[5]).Ref + "\", was put in"}},
			{"two are put in", slices.Insert(slices.Clone(all), 3, foreign[5], "x"), []string{"and 1 after it were put in"}},
			{"a line is copied", slices.Insert(slices.Clone(all), 6, all[2]), []string{"audit:7: line " + ref(2) + " (number 3) stands here a second time"}},
			{"two lines change places", swap(all, 3, 4), []string{"audit:5: line " + ref(3) + " (number 4) was moved: its place is before line " + ref(4)}},
			{"a line is moved far", append(slices.Delete(slices.Clone(all), 2, 3), all[2]), []string{"audit:10: line " + ref(2) + " (number 3) was moved"}},
			{"the end is cut off", all[:7], []string{"audit:7: after line " + ref(6) + " (number 7) 3 lines are missing, if not more: on 2000-01-01 00:00:00 the audit went on to line " + ref(9) + " (number 10)"}},
			{"all of it is another's", foreign, []string{"there is no line of a chained audit of this deployment", "this line, which calls itself"}},
			{"nothing is left", nil, []string{"there is no line of a chained audit"}},
		} {
			got := l.verify(tt.lines, last)
			for _, want := range tt.want {
				if !slices.ContainsFunc(got.Wrong, func(f broker.AuditFinding) bool { return strings.Contains(f.String(), want) }) {
					t.Errorf("%s: got %q, want %q", tt.why, got.Wrong, want)
				}
			}
			// The line that was exported may be one of those that are gone.
			if n := len(got.Wrong); n > len(tt.want)+1 || n > len(tt.want) && len(tt.lines) > 0 && tt.lines[len(tt.lines)-1] == all[9] {
				t.Errorf("%s: got %q, and want no more than %q", tt.why, got.Wrong, tt.want)
			}
		}
	})
}

func with(lines []string, i int, line string) []string {
	lines = slices.Clone(lines)
	lines[i] = line
	return lines
}

func swap(lines []string, i, j int) []string { return with(with(lines, i, lines[j]), j, lines[i]) }

// Who has the key can chain an audit again; the head that was exported stays.
func TestAChainThatWasMadeAgainIsFoundAgainstAHead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newAuditLab(t)
		head := l.headOf(l.lines()[4])
		again := newAuditLab(t)
		again.keys = l.keys
		forged := again.lines()
		if got := l.verify(forged); len(got.Wrong) > 0 {
			t.Fatalf("the forged chain is not one: %q", got.Wrong)
		}
		got := l.verify(forged, head)
		if len(got.Wrong) != 1 || !strings.Contains(got.Wrong[0].String(), "audit:5: line "+l.headOf(forged[4]).Ref+" (number 5) is not the line that was exported as "+head.Ref) {
			t.Errorf("got %q", got.Wrong)
		}
		// A piece of the one in the place of the same piece of the other.
		true_ := strings.Split(strings.TrimSpace(l.read(l.path)), "\n")
		mixed := slices.Concat(true_[:3], forged[3:5], true_[5:])
		if got := l.verify(mixed); len(got.Wrong) != 2 || !strings.Contains(got.Wrong[0].Text, "does not follow the line before it") {
			t.Errorf("a forged piece: got %q", got.Wrong)
		}
	})
}

func TestALineThatWasCutShortIsNamedAndTheChainGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newAuditLab(t)
		all := l.lines()
		// A crash in the middle of a line.
		if err := os.WriteFile(l.path, []byte(strings.Join(all[:6], "\n")+"\n"+all[6][:50]), 0o600); err != nil {
			t.Fatal(err)
		}
		os.WriteFile(l.head, []byte(all[5]+"\n"), 0o600)
		l.run(l.open(l.path, nil))
		lines := strings.Split(strings.TrimSpace(l.read(l.path)), "\n")
		got := l.verify(lines)
		if len(got.Wrong) > 0 || len(got.Notes) != 1 || !strings.Contains(got.Notes[0].String(), "audit:7: this line was cut short") || got.Lines != 8 {
			t.Errorf("got %+v", got)
		}
		if log := l.log.String(); log != "" {
			t.Errorf("log: %s", log)
		}
	})
}

func TestAFileThatLostItsEndWhileNoBrokerRanIsNoticed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newAuditLab(t)
		all := l.lines()
		os.WriteFile(l.path, []byte(strings.Join(all[:7], "\n")+"\n"), 0o600)
		end, err := broker.FindAuditHead(l.path, l.head, l.keys.AuditMAC())
		if err != nil || end.Missing != 3 || end.Last.Seq != 10 {
			t.Errorf("FindAuditHead: %+v, %v", end, err)
		}
		l.run(l.open(l.path, nil))
		if log := l.log.String(); !strings.Contains(log, "has lost its end") || !strings.Contains(log, "lines=3") {
			t.Errorf("log: %s", log)
		}
		got := l.verify(strings.Split(strings.TrimSpace(l.read(l.path)), "\n"))
		if len(got.Wrong) != 1 || !strings.Contains(got.Wrong[0].Text, "3 lines are missing, of number 8 to 10") {
			t.Errorf("got %q", got.Wrong)
		}
	})
}

// A stream can't be read again, and a file may be renamed while no broker runs.
func TestAChainGoesOnWhereItsLinesCanNotBeRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newAuditLab(t)
		var out bytes.Buffer
		l.run(l.open("", &out), "alice")
		l.run(l.open("", &out), "bob")
		if got := l.verify(strings.Split(strings.TrimSpace(out.String()), "\n")); len(got.Wrong)+len(got.Notes) > 0 || got.Lines != 8 {
			t.Errorf("a stream: got %+v", got)
		}

		l = newAuditLab(t)
		l.run(l.open(l.path, nil), "alice")
		old := l.read(l.path)
		if err := os.Rename(l.path, l.path+".1"); err != nil {
			t.Fatal(err)
		}
		l.run(l.open(l.path, nil), "bob")
		if got := l.verify(strings.Split(strings.TrimSpace(old+l.read(l.path)), "\n")); len(got.Wrong)+len(got.Notes) > 0 || got.Lines != 8 {
			t.Errorf("a renamed file: got %+v", got)
		}
	})
}

func TestAChainThatBeginsAnewOrInTheMiddleIsSaid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newAuditLab(t)
		all := l.lines()
		if got := l.verify(all[4:]); len(got.Wrong) > 0 || len(got.Notes) != 1 || !strings.Contains(got.Notes[0].Text, "is verified from line") {
			t.Errorf("without the older files: got %+v", got)
		}
		before := append([]string{`{"ref":"AAAAAAAA-1","time":"2026-01-01T00:00:00Z"}`}, all...)
		if got := l.verify(before); len(got.Wrong) > 0 || len(got.Notes) != 1 || !strings.Contains(got.Notes[0].Text, "before it a line is from before audits were chained") {
			t.Errorf("with lines from before: got %+v", got)
		}
		os.Remove(l.path)
		os.Remove(l.head)
		l.run(l.open(l.path, nil))
		anew := append(slices.Clone(all), strings.Split(strings.TrimSpace(l.read(l.path)), "\n")...)
		if got := l.verify(anew); len(got.Wrong) != 1 || !strings.Contains(got.Wrong[0].String(), "audit:11: ") || !strings.Contains(got.Wrong[0].Text, "begins a new chain") {
			t.Errorf("anew: got %q", got.Wrong)
		}
	})
}

// On a full disk a part of a line may be written. Nobody was answered for it, and
// the next line does not hang on to it.
func TestTheChainOutlivesAFullDisk(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		r.audit.fail(errors.New("no space left on device"), 30)
		r.refused(p, broker.Want{}, broker.ErrUnavailable)
		r.refused(p, broker.Want{}, broker.ErrUnavailable)
		r.audit.fail(nil, 0)
		r.token(p, broker.Want{})
		r.token(p, broker.Want{})
		v := broker.NewAuditVerifier(r.cfg.Keys.AuditMAC(), nil)
		n := 0
		for line := range strings.Lines(r.audit.String()) {
			n++
			v.Line("audit", n, []byte(strings.TrimSuffix(line, "\n")))
		}
		got := v.End()
		if len(got.Wrong) > 0 || len(got.Notes) == 0 || !strings.Contains(got.Notes[0].Text, "full disk") {
			t.Errorf("got %+v of\n%s", got, r.audit)
		}
	})
}

func TestALineOfTheAuditIsNotTakenFromTheLog(t *testing.T) {
	if broker.LooksLikeAudit([]byte(`{"time":"2026-11-25T20:17:04Z","level":"INFO","msg":"serving"}`)) {
		t.Error("a line of the log looks like one of the audit")
	}
}

// Whatever is read is either none or says what its MAC is over; and what nobody
// has written with the key is never authentic.
func FuzzAuditLine(f *testing.F) {
	keys, err := seal.New()
	if err != nil {
		f.Fatal(err)
	}
	for _, seed := range []string{
		"", "{}", `{"seq":1,"mac":""}`, `{"seq":1,"ref":"A-1","prev":"00"`,
		`{"seq":1,"ref":"A-1","mac":"00000000000000000000000000000000"}`,
		`{"seq":1,"seq":2,"ref":"A-1","mac":"0000000000000000000000000000000g"}`,
		`{"seq":-1,"mac":"00000000000000000000000000000000"}`, `{"seq":9e99,"mac":"00000000000000000000000000000000"}`,
		`{"seq":1,"time":"x","mac":"00000000000000000000000000000000"}`, `,"mac":"00000000000000000000000000000000"}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		was := bytes.Clone(line)
		if h, ok := broker.HeadOf(line, keys.AuditMAC()); ok {
			t.Fatalf("%q passes for %+v", line, h)
		}
		v := broker.NewAuditVerifier(keys.AuditMAC(), []broker.AuditHead{{Seq: 1, MAC: "00"}})
		for i := range 3 {
			v.Line("audit", i, line)
		}
		if r := v.End(); len(r.Wrong) == 0 || r.Lines != 0 {
			t.Fatalf("%q is verified: %+v", line, r)
		}
		if !bytes.Equal(was, line) {
			t.Fatal("what was read was changed")
		}
	})
}

func TestAStormOfEqualRefusalsIsCounted(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		stranger := r.peer("alice", 7)
		refs := map[string]bool{}
		for i := range 1000 {
			stranger.PID = int32(i + 200)
			refs[r.refused(stranger, broker.Want{}, broker.ErrUnknownPeer).Ref] = true
		}
		for range 3 {
			r.token(p, broker.Want{})
		}
		all := r.audit.entries(t, "token")
		if len(all) != 4 || len(refs) != 1 || !refs[all[0].Ref] {
			t.Fatalf("1000 equal refusals and 3 tokens are %d lines, of refs %v", len(all), refs)
		}
		if n := strings.Count(r.log.String(), "this process is not in the server's container"); n > 2 {
			t.Errorf("the log says so %d times", n)
		}
		time.Sleep(90 * time.Second)
		all = r.audit.entries(t, "token")[4:]
		if len(all) != 1 || all[0].Count != 999 || all[0].User != "alice" || all[0].Code != broker.UnknownPeer || !refs[all[0].Like] ||
			all[0].First.After(*all[0].Last) || !strings.Contains(all[0].Reason, "not in the server's container") {
			t.Errorf("the count is %+v", all)
		}
		ref := r.refused(stranger, broker.Want{}, broker.ErrUnknownPeer).Ref
		if refs[ref] {
			t.Error("the next window has no line of its own")
		}
		r.refused(stranger, broker.Want{}, broker.ErrUnknownPeer)
		r.Close()
		lines := strings.Split(strings.TrimSpace(r.audit.String()), "\n")
		if !strings.Contains(lines[len(lines)-2], `"count":1,"like":"`+ref) || !strings.Contains(lines[len(lines)-1], `"action":"stop"`) {
			t.Errorf("at the end what was counted is not written: %q", lines[len(lines)-2:])
		}
		r.start() // for the bubble to close
	})
}

// Whoever asks in ever new ways is not better off.
func TestAStormOfEverNewRefusalsIsCountedToo(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.loggedIn("alice")
		p := r.running("alice", 100)
		other := r.running("bob", 101)
		for i := range 1000 {
			said := r.refused(p, broker.Want{Audience: "x" + strings.Repeat("y", i%100) + strings.Repeat("z", i/100)}, broker.ErrDenied)
			if !strings.Contains(r.audit.String(), `"ref":"`+said.Ref+`"`) {
				t.Fatalf("ref %s finds no line", said.Ref)
			}
		}
		if n := len(r.audit.entries(t, "token")); n > 20 {
			t.Errorf("1000 refusals are %d lines", n)
		}
		if ref := r.refused(other, broker.Want{}, broker.ErrLoginRequired).Ref; !strings.Contains(r.audit.String(), `"ref":"`+ref+`"`) {
			t.Error("another user's refusal has no line")
		}
		time.Sleep(90 * time.Second)
		counted := 0
		for _, e := range r.audit.entries(t, "token") {
			counted += max(1, e.Count)
		}
		if counted != 1001 {
			t.Errorf("%d are counted, want 1001", counted)
		}
	})
}

// Strangers at a hub's socket, or the administrator's, each time another process
// and a few times another uid.
func TestAStormOfStrangersIsCounted(t *testing.T) {
	inBubble(t, func(r *rig) {
		for i := range 1000 {
			for _, hub := range []broker.HubID{"main", ""} {
				p := &broker.Peer{Hub: hub, PID: int32(i + 1), UID: 65000 + uint32(i%100)}
				r.Stranger(p, "/run/"+string(hub)+".sock", fmt.Errorf("uid %d may not use it", p.UID))
			}
		}
		all := r.audit.entries(t, "connect")
		if len(all) != 2*17 || *all[2].UID != 65001 || all[2].PID != 2 || all[2].Hub != "main" || all[2].Socket != "/run/main.sock" || all[2].By != "" {
			t.Fatalf("2000 attempts are %d lines, want 34: %+v", len(all), all)
		}
		if n := strings.Count(r.log.String(), "may not use it"); n > len(all) {
			t.Errorf("the log says so %d times", n)
		}
		time.Sleep(90 * time.Second)
		tried := make(map[broker.HubID]int)
		for _, e := range r.audit.entries(t, "connect") {
			tried[e.Hub] += max(1, e.Count)
			if e.Code != broker.UnknownPeer || !strings.Contains(e.Reason, "may not use it") {
				t.Errorf("got %+v", e)
			}
		}
		if tried["main"] != 1000 || tried[""] != 1000 {
			t.Errorf("counted are %v, want 1000 each", tried)
		}
	})
}

func TestRefusalsAreCountedOnWhileTheAuditCanNotBeWritten(t *testing.T) {
	inBubble(t, func(r *rig) {
		stranger := r.peer("alice", 7)
		r.refused(stranger, broker.Want{}, broker.ErrUnknownPeer)
		r.refused(stranger, broker.Want{}, broker.ErrUnknownPeer)
		r.audit.fail(errors.New("disk full"), 0)
		time.Sleep(5 * time.Minute)
		r.refused(stranger, broker.Want{}, broker.ErrUnknownPeer)
		r.audit.fail(nil, 0)
		time.Sleep(time.Minute)
		all := r.audit.entries(t, "token")
		if len(all) != 2 || all[1].Count != 2 {
			t.Errorf("got %+v", all)
		}
	})
}

func TestDockerExecIsInTheAudit(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.running("alice", 100)
		id := fmt.Sprintf("%064x", 100)
		for range 1000 { // a health check
			r.attestor.Exec(broker.Exec{Container: id, Name: "jupyter-alice", Command: "sh", Alike: "1"})
		}
		r.attestor.Exec(broker.Exec{Container: id, Name: "jupyter-alice", Command: "sh", Alike: "2"})
		r.attestor.Exec(broker.Exec{Container: "else", Name: "postgres", Command: "psql", Alike: "3"})
		all := r.audit.entries(t, "exec")
		late := broker.Exec{Container: id, Name: "jupyter-alice", Command: "sh", Alike: "1", Afterwards: "it was found running"}
		r.attestor.Exec(late)
		r.attestor.Exec(late)
		if got := r.audit.entries(t, "exec"); len(got) != 3 || got[2].Reason != late.Afterwards || got[2].Container != id || got[2].User != "alice" {
			t.Errorf("of one that began unseen: got %+v", got)
		}
		if len(all) != 2 || all[0].Reason != "" || all[0].Container != id || all[0].User != "alice" || all[0].Command != "sh" || all[1].Command != "sh" || all[1].Count != 0 {
			t.Errorf("got %+v", all)
		}
		time.Sleep(61 * time.Minute)
		if all = r.audit.entries(t, "exec")[3:]; len(all) != 2 || all[0].Count != 999 || all[0].Container != id || all[0].Command != "sh" {
			t.Errorf("got %+v", all)
		}
	})
}

func TestAnAdministratorWhoLooksAgainAndAgainIsCounted(t *testing.T) {
	inBubble(t, func(r *rig) {
		for pid := range int32(100) {
			r.Looked(&broker.Peer{PID: pid + 1, UID: 0}, "status", "", "")
		}
		r.Looked(&broker.Peer{PID: 1, UID: 0}, "user", "main", "alice")
		r.audit.fail(errors.New("disk full"), 0)
		r.Looked(&broker.Peer{PID: 1, UID: 0}, "user", "main", "bob")
		r.audit.fail(nil, 0)
		time.Sleep(90 * time.Second)
		all := r.audit.entries(t, "status")
		if len(all) != 2 || all[0].By != "uid 0 (root), pid 1" || all[1].Count != 99 || all[1].By != "uid 0" {
			t.Errorf("got %+v", all)
		}
		if n := len(r.audit.entries(t, "user")); n != 1 {
			t.Errorf("%d lines of looks at users, want 1", n)
		}
		if s := r.Status(context.Background()); !s.Store.OK {
			t.Errorf("status: %+v", s)
		}
	})
}

// Docker is asked for what it remembers of commands since the last line, by its own
// clock: the store's, by which lines are dated, may be another.
func TestCommandsAreAskedForSinceTheLastLine(t *testing.T) {
	inBubble(t, func(r *rig) {
		if got := r.attestor.Since(); !got.IsZero() {
			t.Errorf("a first broker asks for commands since %v", got)
		}
		r.store.Advance(time.Hour)
		time.Sleep(time.Minute) // it is noticed
		r.Close()
		stop := r.audit.entries(t, "stop")
		r.cfg.AuditHead = broker.AuditHead{Time: stop[0].Time}
		want := time.Now()
		time.Sleep(10 * time.Minute)
		r.start()
		if got := r.attestor.Since().Sub(want); got.Abs() > time.Second {
			t.Errorf("commands are asked for from %v after the last line on", got)
		}
	})
}
