package broker

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func openTestJournal(t *testing.T, path string) *journal {
	t.Helper()
	j, err := openJournal(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.close() })
	return j
}

func testEntry(sub string, version int64) journalEntry {
	return journalEntry{
		Key: GrantKey{"main", "keycloak", sub}, Version: version, Epoch: 7, Roles: []string{"keycloak:roles/researcher"},
		EndedAt: time.UnixMicro(42).UTC(), Box: []byte("box of " + sub),
	}
}

func writeEntry(j *journal, e journalEntry) error {
	return j.write(e.Key, func(old *journalEntry) bool { *old = e; return true })
}

func TestJournalRemembersTheNewest(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal")
	j := openTestJournal(t, path)
	for v := range int64(3) {
		for _, sub := range []string{"alice", "bob"} {
			if err := writeEntry(j, testEntry(sub, v+1)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := j.forget(testEntry("bob", 0).Key, 3); err != nil {
		t.Fatal(err)
	}
	j.close()
	j = openTestJournal(t, path)
	bob := testEntry("bob", 3)
	bob.Box = nil
	for _, want := range []journalEntry{testEntry("alice", 3), bob} {
		got, _ := j.get(want.Key)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	}
}

func TestJournalForgetsOnlyTheVersionThatIsSafe(t *testing.T) {
	j := openTestJournal(t, filepath.Join(t.TempDir(), "journal"))
	writeEntry(j, testEntry("alice", 2))
	j.forget(testEntry("alice", 0).Key, 1)
	if e, _ := j.get(testEntry("alice", 0).Key); e.Box == nil {
		t.Error("the box of version 2 went when version 1 was safe")
	}
}

func TestJournalSkipsATornTailAndGoesOnBeforeIt(t *testing.T) {
	whole := filepath.Join(t.TempDir(), "whole")
	j := openTestJournal(t, whole)
	writeEntry(j, testEntry("alice", 1))
	first := j.end
	writeEntry(j, testEntry("alice", 2))
	text, err := os.ReadFile(whole)
	if err != nil {
		t.Fatal(err)
	}
	last := j.end
	j.close()
	for cut := first; cut < last; cut += 17 {
		for _, tail := range [][]byte{nil, make([]byte, 4096), []byte("\xff\xff\n")} {
			path := filepath.Join(t.TempDir(), "torn")
			os.WriteFile(path, append(bytes.Clone(text[:cut]), tail...), 0o600)
			j := openTestJournal(t, path)
			if e, ok := j.get(testEntry("alice", 0).Key); !ok || e.Version != 1 {
				t.Fatalf("cut at %d: got %+v, want version 1", cut, e)
			}
			writeEntry(j, testEntry("alice", 3))
			j.close()
			j = openTestJournal(t, path)
			if e, _ := j.get(testEntry("alice", 0).Key); e.Version != 3 {
				t.Fatalf("cut at %d: after another write got version %d, want 3", cut, e.Version)
			}
			j.close()
		}
	}
}

func TestJournalIsForOneProcess(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal")
	openTestJournal(t, path)
	if _, err := openJournal(path); err == nil || !strings.Contains(err.Error(), "only one broker") {
		t.Errorf("the second got %v", err)
	}
}

func TestJournalStaysBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal")
	j := openTestJournal(t, path)
	e := testEntry("alice", 0)
	e.Box = bytes.Repeat([]byte{'x'}, 30<<10)
	for v := range int64(400) {
		e.Version = v + 1
		if err := writeEntry(j, e); err != nil {
			t.Fatal(err)
		}
		if err := j.forget(e.Key, e.Version); err != nil {
			t.Fatal(err)
		}
	}
	info, err := os.Stat(path)
	if err != nil || info.Size() > 2*journalSlack+journalRoom {
		t.Errorf("after 400 refreshes of one grant the file has %d bytes, %v", info.Size(), err)
	}
	if _, err := openJournal(path); err == nil {
		t.Error("the new file is not locked")
	}
	j.close()
	if e, _ := openTestJournal(t, path).get(e.Key); e.Version != 400 {
		t.Errorf("version %d, want 400", e.Version)
	}
}

func TestAnswerFitsWhereThereWasRoom(t *testing.T) {
	j := openTestJournal(t, filepath.Join(t.TempDir(), "journal"))
	if err := j.ready(); err != nil {
		t.Fatal(err)
	}
	if free := j.size - j.end; free < 8*journalLine {
		t.Errorf("%d bytes are free, want room for 8 answers at least", free)
	}
	size := j.size
	for v := range int64(8) {
		writeEntry(j, testEntry("alice", v+1))
	}
	if j.size != size {
		t.Error("writing grew the file; what is not there yet may not fit")
	}
}

func FuzzParseJournalLine(f *testing.F) {
	line, _ := testEntry("alice", 1).line()
	f.Add(line)
	f.Add([]byte("00000000 \n"))
	f.Fuzz(func(t *testing.T, line []byte) {
		if e, ok := parseJournalLine(line); ok {
			again, err := e.line()
			if err != nil {
				return
			}
			if _, ok := parseJournalLine(again); !ok {
				t.Fatalf("a line that was read can't be read when written again: %q", again)
			}
		}
	})
}
