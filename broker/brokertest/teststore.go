package brokertest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"tokenbroker/broker"
)

// TestStore tells whether a Store keeps its contract, sentence by sentence.
// open returns an empty and healthy store each time; it uses t.Cleanup to close
// it.
func TestStore(t *testing.T, open func(t *testing.T) broker.Store) {
	for _, tt := range []struct {
		name string
		test func(t *testing.T, s broker.Store)
	}{
		{"a healthy store passes its check", testCheck},
		{"an absent record is ErrAbsent", testAbsent},
		{"each put moves the revision by one", testPut},
		{"a stale put or delete changes nothing", testStale},
		{"a deleted record is absent and may be made anew", testDelete},
		{"a box may hold any bytes", testBoxes},
		{"a box belongs to its caller", testOwnership},
		{"a record lives as long as its last put says", testLife},
		{"a put may leave a record's end where it is", testKeepLife},
		{"keys with any parts never meet", testKeys},
		{"all records can be listed, by any keys", testRecords},
		{"sets", testSets},
		{"sets with any keys and members never meet", testSetKeys},
		{"of concurrent puts exactly one wins", testConcurrentPuts},
		{"concurrent changes of a set are all kept", testConcurrentSets},
		{"the revision only rises, and is above the time", testMove},
		{"no two moves return the same revision", testConcurrentMoves},
		{"a pulse tells revision and time", testPulse},
		{"a note is heard by all who listen", testNotes},
		{"a note may hold any bytes", testOddNotes},
		{"whoever listens begins with an empty note and ends with its context", testListen},
		{"a cancelled call changes nothing", testCancelled},
		{"any sequence of calls does what the model does", testModel},
	} {
		t.Run(tt.name, func(t *testing.T) { tt.test(t, open(t)) })
	}
}

func key(parts ...string) broker.Key { return broker.Key{Kind: "test", Parts: parts} }

func put(t testing.TB, s broker.Store, k broker.Key, was int64, box string, life time.Duration) {
	t.Helper()
	if err := s.Put(t.Context(), k, was, []byte(box), life); err != nil {
		t.Fatalf("Put %v over revision %d: %v", k, was, err)
	}
}

// holds checks what is at k; revision 0: nothing.
func holds(t testing.TB, s broker.Store, k broker.Key, revision int64, box string) {
	t.Helper()
	got, err := s.Get(t.Context(), k)
	if revision == 0 {
		if !errors.Is(err, broker.ErrAbsent) {
			t.Errorf("Get %v: got revision %d and error %v, want ErrAbsent", k, got.Revision, err)
		}
		return
	}
	if err != nil {
		t.Errorf("Get %v: %v", k, err)
		return
	}
	if got.Revision != revision || string(got.Box) != box {
		t.Errorf("Get %v: got revision %d, %d bytes; want revision %d, %d bytes", k, got.Revision, len(got.Box), revision, len(box))
	}
}

func isStale(t testing.TB, what string, err error) {
	t.Helper()
	if !errors.Is(err, broker.ErrStale) {
		t.Errorf("%s: got %v, want ErrStale", what, err)
	}
}

func testCheck(t *testing.T, s broker.Store) {
	if err := s.Check(t.Context()); err != nil {
		t.Error(err)
	}
	// It may be asked again, also at the same time: brokers share a store.
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if err := s.Check(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

func testAbsent(t *testing.T, s broker.Store) {
	holds(t, s, key("nobody"), 0, "")
	put(t, s, key("somebody"), 0, "x", 0)
	holds(t, s, key("nobody"), 0, "")
}

func testPut(t *testing.T, s broker.Store) {
	for was := range int64(5) {
		box := fmt.Sprint("box ", was)
		put(t, s, key("a"), was, box, 0)
		holds(t, s, key("a"), was+1, box)
	}
}

func testStale(t *testing.T, s broker.Store) {
	ctx, k := t.Context(), key("a")
	isStale(t, "Put over revision 1 of an absent record", s.Put(ctx, k, 1, []byte("x"), 0))
	isStale(t, "Put over revision -1 of an absent record", s.Put(ctx, k, -1, []byte("x"), 0))
	holds(t, s, k, 0, "")

	put(t, s, k, 0, "one", 0)
	put(t, s, k, 1, "two", 0)
	for _, was := range []int64{-1, 0, 1, 3, 20, 1 << 62} {
		isStale(t, fmt.Sprintf("Put over revision %d", was), s.Put(ctx, k, was, []byte("x"), time.Nanosecond))
		isStale(t, fmt.Sprintf("Delete of revision %d", was), s.Delete(ctx, k, was))
		holds(t, s, k, 2, "two")
	}
}

func testDelete(t *testing.T, s broker.Store) {
	ctx, k := t.Context(), key("a")
	for _, was := range []int64{0, 1, 7} {
		if err := s.Delete(ctx, k, was); err != nil {
			t.Errorf("Delete of an absent record at revision %d: %v", was, err)
		}
	}
	put(t, s, k, 0, "one", 0)
	put(t, s, k, 1, "two", 0)
	if err := s.Delete(ctx, k, 2); err != nil {
		t.Fatal(err)
	}
	holds(t, s, k, 0, "")
	if err := s.Delete(ctx, k, 2); err != nil {
		t.Errorf("Delete twice: %v", err)
	}
	isStale(t, "Put over the deleted revision", s.Put(ctx, k, 2, []byte("x"), 0))
	put(t, s, k, 0, "anew", 0)
	holds(t, s, k, 1, "anew")
}

func testBoxes(t *testing.T, s broker.Store) {
	all := make([]byte, 256)
	for i := range all {
		all[i] = byte(i)
	}
	for i, box := range []string{"", "\x00", "\r\n", "$-1\r\n", string(all), "\xff\xfe", "0", strings.Repeat("long", 1<<18)} {
		k := key("box", fmt.Sprint(i))
		put(t, s, k, 0, box, 0)
		holds(t, s, k, 1, box)
	}
}

func testOwnership(t *testing.T, s broker.Store) {
	box := []byte("mine")
	if err := s.Put(t.Context(), key("a"), 0, box, 0); err != nil {
		t.Fatal(err)
	}
	box[0] = 'X'
	holds(t, s, key("a"), 1, "mine")

	got, err := s.Get(t.Context(), key("a"))
	if err != nil {
		t.Fatal(err)
	}
	got.Box[0] = 'X'
	holds(t, s, key("a"), 1, "mine")
}

// testLife waits for a record to end that was put after the others, so that
// those others would have ended too if they had kept their first life.
func testLife(t *testing.T, s broker.Store) {
	life := 200 * time.Millisecond
	forEver, long, short := key("for ever"), key("long"), key("short")
	// Under load a record may end before its second put; then once more, slower.
	for !renewed(t, s, forEver, life, 0) || !renewed(t, s, long, life, time.Hour) {
		life *= 2
	}
	put(t, s, short, 0, "for ever at first", 0)
	put(t, s, short, 1, "short", life)
	put(t, s, key("shortest"), 0, "x", time.Nanosecond)
	ended(t, s, short)
	ended(t, s, key("shortest"))

	holds(t, s, forEver, 2, "second")
	holds(t, s, long, 2, "second")
	// What ended was never there.
	isStale(t, "Put over an ended record", s.Put(t.Context(), short, 2, []byte("x"), 0))
	if err := s.Delete(t.Context(), short, 9); err != nil {
		t.Errorf("Delete of an ended record: %v", err)
	}
	put(t, s, short, 0, "anew", 0)
	holds(t, s, short, 1, "anew")
}

// testKeepLife waits for the end of a record that was put again.
func testKeepLife(t *testing.T, s broker.Store) {
	life := 200 * time.Millisecond
	for !renewed(t, s, key("short"), life, broker.KeepLife) {
		life *= 2
	}
	put(t, s, key("for ever"), 0, "x", broker.KeepLife)
	put(t, s, key("for ever"), 1, "second", broker.KeepLife)
	ended(t, s, key("short"))
	holds(t, s, key("for ever"), 2, "second")
}

// renewed puts a record with a life and again with another one, and reports
// whether it was still there then.
func renewed(t *testing.T, s broker.Store, k broker.Key, life, then time.Duration) bool {
	t.Helper()
	if r, err := s.Get(t.Context(), k); err == nil {
		if err := s.Delete(t.Context(), k, r.Revision); err != nil {
			t.Fatal(err)
		}
	}
	put(t, s, k, 0, "first", life)
	err := s.Put(t.Context(), k, 1, []byte("second"), then)
	if err != nil && !errors.Is(err, broker.ErrStale) {
		t.Fatal(err)
	}
	return err == nil
}

// ended waits until there is nothing at k.
func ended(t *testing.T, s broker.Store, k broker.Key) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		_, err := s.Get(ctx, k)
		if errors.Is(err, broker.ErrAbsent) {
			return
		}
		if err != nil {
			t.Fatalf("wait for the end of %v: %v", k, err)
		}
		<-tick.C
	}
}

// oddKeys would meet if a store joined the parts in any simple way.
func oddKeys() []broker.Key {
	keys := []broker.Key{
		{},
		{Kind: ""},
		{Kind: "a"},
		{Kind: "b"},
		{Kind: "revision"},
		{Kind: "a:b"},
		{Kind: "a/b"},
		{Kind: "a", Parts: []string{""}},
		{Kind: "a", Parts: []string{"", ""}},
		{Kind: "", Parts: []string{"a"}},
		{Kind: "", Parts: []string{"a", ""}},
	}
	for _, part := range []string{
		"b", "B", ":b", "b:", "::", "%3A", "%", "%00", "\x00", "\x00\x00", "/", "//", "a/b", "../b", "\\", "b c", " b", "b ", "\n", "\r\n",
		"{b}", "}{", "{}", "*", "?", "[b]", "\xff", "\xc3", "ä", "a\u0308", "名前", "👩‍🔬", "1:b", "b1", "alice@lab.example", "-", "_", "~", "+", "=", "b==",
		strings.Repeat("x", 255), strings.Repeat("x", 254), strings.Repeat("界", 255),
	} {
		keys = append(keys, broker.Key{Kind: "a", Parts: []string{part}}, broker.Key{Kind: "a", Parts: []string{part, "b"}}, broker.Key{Kind: "a", Parts: []string{"b", part}})
	}
	for _, parts := range [][]string{
		{"b", "c", "d"},
		{"bc", "d"},
		{"b", "cd"},
		{"bcd"},
		{"b:c", "d"},
		{"b", "c:d"},
		{"b/c", "d"},
		{"b", "c/d"},
		{"b\x00c", "d"},
		{"b", "c\x00d"},
		{"b", "", "c"},
		{"b", "c", ""},
		{"", "b", "c"},
		{"1:b", "1:c"},
		{"1:b1:c"},
	} {
		keys = append(keys, broker.Key{Kind: "a", Parts: parts})
	}
	// Written down twice, by two of the rules above: leave one.
	slices.SortFunc(keys, func(a, b broker.Key) int { return strings.Compare(fmt.Sprintf("%#v", a), fmt.Sprintf("%#v", b)) })
	return slices.CompactFunc(keys, func(a, b broker.Key) bool { return a.Kind == b.Kind && slices.Equal(a.Parts, b.Parts) })
}

func testKeys(t *testing.T, s broker.Store) {
	keys := oddKeys()
	for i, k := range keys {
		put(t, s, k, 0, fmt.Sprint(i), 0)
	}
	for i, k := range keys {
		holds(t, s, k, 1, fmt.Sprint(i))
	}
	for i, k := range keys {
		if i%2 == 0 {
			if err := s.Delete(t.Context(), k, 1); err != nil {
				t.Errorf("Delete %v: %v", k, err)
			}
		}
	}
	for i, k := range keys {
		holds(t, s, k, int64(i%2), fmt.Sprint(i))
	}
}

func testRecords(t *testing.T, s broker.Store) {
	want := make(map[string]bool)
	keys := append(oddKeys(), key("b"))
	for i := range 1200 { // more than come at once
		keys = append(keys, key(fmt.Sprint(i)))
	}
	for _, k := range keys {
		put(t, s, k, 0, "x", 0)
		want[fmt.Sprintf("%q", k.Kind)+fmt.Sprintf("%q", k.Parts)] = true
	}
	change(t, s.Add, key("a set"), "is no record")
	if err := s.Delete(t.Context(), key("b"), 1); err != nil {
		t.Fatal(err)
	}
	delete(want, `"test"["b"]`)
	got := make(map[string]bool)
	err := s.Records(t.Context(), func(k broker.Key) error {
		got[fmt.Sprintf("%q", k.Kind)+fmt.Sprintf("%q", k.Parts)] = true
		return nil
	})
	if err != nil || !maps.Equal(got, want) {
		t.Errorf("Records: got %d keys and %v, want the %d that are there", len(got), err, len(want))
	}
	enough := errors.New("enough")
	if err := s.Records(t.Context(), func(broker.Key) error { return enough }); !errors.Is(err, enough) {
		t.Errorf("Records: got %v, want the function's own error", err)
	}
}

func members(t testing.TB, s broker.Store, k broker.Key, want ...string) {
	t.Helper()
	got, err := s.Members(t.Context(), k)
	if err != nil {
		t.Errorf("Members of %v: %v", k, err)
		return
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("Members of %v: got %q, want %q", k, got, want)
	}
}

func change(t testing.TB, f func(context.Context, broker.Key, string) error, k broker.Key, member string) {
	t.Helper()
	if err := f(t.Context(), k, member); err != nil {
		t.Errorf("change the set %v: %v", k, err)
	}
}

func testSets(t *testing.T, s broker.Store) {
	k := key("set")
	members(t, s, k)
	change(t, s.Remove, k, "a")
	members(t, s, k)

	change(t, s.Add, k, "a")
	change(t, s.Add, k, "b")
	change(t, s.Add, k, "a")
	members(t, s, k, "a", "b")

	change(t, s.Remove, k, "a")
	change(t, s.Remove, k, "a")
	members(t, s, k, "b")
	change(t, s.Remove, k, "b")
	members(t, s, k)
	change(t, s.Add, k, "a")
	members(t, s, k, "a")
}

func testSetKeys(t *testing.T, s broker.Store) {
	keys := oddKeys()
	for i, k := range keys {
		change(t, s.Add, k, fmt.Sprint(i))
	}
	for i, k := range keys {
		members(t, s, k, fmt.Sprint(i))
	}
	odd := []string{"", "\x00", "a", "A", " a", "a\n", "\xff", "名前", strings.Repeat("x", 4096)}
	for _, member := range odd {
		change(t, s.Add, key("odd members"), member)
	}
	members(t, s, key("odd members"), odd...)
}

const crowd = 16

func testConcurrentPuts(t *testing.T, s broker.Store) {
	const rounds = 20
	for was := range int64(rounds) {
		var mu sync.Mutex // guards won
		var won []string
		var wg sync.WaitGroup
		for i := range crowd {
			wg.Go(func() {
				box := fmt.Sprintf("%d by %d", was, i)
				err := s.Put(t.Context(), key("one"), was, []byte(box), 0)
				if err != nil && !errors.Is(err, broker.ErrStale) {
					t.Error(err)
				}
				if err == nil {
					mu.Lock()
					won = append(won, box)
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		if len(won) != 1 {
			t.Fatalf("revision %d: %d of %d won, want 1", was+1, len(won), crowd)
		}
		holds(t, s, key("one"), was+1, won[0])
	}
}

func testConcurrentSets(t *testing.T, s broker.Store) {
	var want []string
	var wg sync.WaitGroup
	for i := range crowd {
		stays, goes := fmt.Sprint("stays ", i), fmt.Sprint("goes ", i)
		want = append(want, stays)
		wg.Go(func() {
			change(t, s.Add, key("set"), goes)
			change(t, s.Add, key("set"), stays)
			change(t, s.Remove, key("set"), goes)
		})
	}
	wg.Wait()
	members(t, s, key("set"), want...)
}

func pulse(t testing.TB, s broker.Store) broker.Pulse {
	t.Helper()
	p, err := s.Pulse(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func testMove(t *testing.T, s broker.Store) {
	last := int64(0)
	for range 200 {
		before := pulse(t, s)
		got, err := s.Move(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if got <= last {
			t.Fatalf("Move: got %d after %d", got, last)
		}
		if now := before.Now.UnixMicro(); got < now {
			t.Fatalf("Move: got %d, below the store's time %d", got, now)
		}
		if p := pulse(t, s); p.Revision != got {
			t.Fatalf("Pulse after Move: got revision %d, want %d", p.Revision, got)
		}
		last = got
	}
}

func testConcurrentMoves(t *testing.T, s broker.Store) {
	const each = 20
	got := make([][]int64, crowd)
	var wg sync.WaitGroup
	for i := range crowd {
		wg.Go(func() {
			for range each {
				revision, err := s.Move(t.Context())
				if err != nil {
					t.Error(err)
				}
				got[i] = append(got[i], revision)
			}
		})
	}
	wg.Wait()
	for i, revisions := range got {
		if !slices.IsSorted(revisions) {
			t.Errorf("goroutine %d saw the revision fall: %v", i, revisions)
		}
	}
	all := slices.Sorted(slices.Values(slices.Concat(got...)))
	if n := len(slices.Compact(slices.Clone(all))); n != crowd*each {
		t.Errorf("got %d different revisions of %d moves", n, crowd*each)
	}
	if p := pulse(t, s); p.Revision != all[len(all)-1] {
		t.Errorf("Pulse: got revision %d, want the highest that Move returned, %d", p.Revision, all[len(all)-1])
	}
}

func testPulse(t *testing.T, s broker.Store) {
	if a, b := pulse(t, s), pulse(t, s); a.Server != b.Server {
		t.Errorf("two pulses of one store are of servers %q and %q", a.Server, b.Server)
	}
	first := pulse(t, s)
	if first.Revision != 0 {
		t.Errorf("got revision %d of a deployment that never moved, want 0", first.Revision)
	}
	// Only against a mistaken unit; clocks differ.
	if off := time.Since(first.Now).Abs(); off > 24*time.Hour {
		t.Errorf("the store's time is %v, %v away from ours", first.Now, off)
	}
	put(t, s, key("a"), 0, "x", 0)
	if p := pulse(t, s); p.Revision != 0 || p.Now.Before(first.Now) {
		t.Errorf("got %+v after %+v: writing a record moves no revision, and time doesn't fall", p, first)
	}
}

// listen returns what is heard at s from now on, and what ends that.
func listen(t *testing.T, s broker.Store) (notes <-chan string, end func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	heard, ended := make(chan string, 1000), make(chan error, 1)
	go func() { ended <- s.Listen(ctx, func(note string) { heard <- note }) }()
	end = sync.OnceValue(func() error { cancel(); return <-ended })
	t.Cleanup(func() { end() })
	if got := hears(t, heard); got != "" {
		t.Errorf("Listen began with the note %q, want the empty one", got)
	}
	return heard, end
}

func hears(t *testing.T, notes <-chan string) string {
	t.Helper()
	select {
	case note := <-notes:
		return note
	case <-time.After(30 * time.Second):
		t.Fatal("nothing was heard within 30 s")
		return ""
	}
}

func tell(t *testing.T, s broker.Store, note string) {
	t.Helper()
	if err := s.Tell(t.Context(), note); err != nil {
		t.Fatalf("Tell %q: %v", note, err)
	}
}

func testNotes(t *testing.T, s broker.Store) {
	const early = "to nobody"
	tell(t, s, early)
	one, _ := listen(t, s)
	two, _ := listen(t, s)
	for i := range 20 {
		want := fmt.Sprint("note ", i)
		tell(t, s, want)
		for _, notes := range []<-chan string{one, two} {
			got := hears(t, notes)
			if got == early { // a cluster's nodes pass it on, and one may be late
				got = hears(t, notes)
			}
			if got != want {
				t.Fatalf("heard %q, want %q", got, want)
			}
		}
	}
}

func testOddNotes(t *testing.T, s broker.Store) {
	notes, _ := listen(t, s)
	tell(t, s, "") // is none
	for _, want := range []string{"\x00", "\r\n", "$-1\r\n", "\xff\xfe", " ", "名前", strings.Repeat("long", 1<<10)} {
		tell(t, s, want)
		if got := hears(t, notes); got != want {
			t.Errorf("heard %d bytes %.20q, want %d bytes %.20q", len(got), got, len(want), want)
		}
	}
}

func testListen(t *testing.T, s broker.Store) {
	_, end := listen(t, s)
	notes, _ := listen(t, s)
	if err := end(); !errors.Is(err, context.Canceled) {
		t.Errorf("Listen ended with %v, want its context's error", err)
	}
	tell(t, s, "to the other")
	if got := hears(t, notes); got != "to the other" {
		t.Errorf("heard %q of one who goes on listening", got)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Listen(ctx, func(note string) { t.Errorf("heard %q after the end", note) }); !errors.Is(err, context.Canceled) {
		t.Errorf("Listen after its end: got %v, want its context's error", err)
	}
}

func testCancelled(t *testing.T, s broker.Store) {
	put(t, s, key("a"), 0, "x", 0)
	change(t, s.Add, key("set"), "a")

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, get := s.Get(ctx, key("a"))
	_, list := s.Members(ctx, key("set"))
	_, move := s.Move(ctx)
	_, beat := s.Pulse(ctx)
	for method, err := range map[string]error{
		"Get": get, "Members": list, "Move": move, "Pulse": beat,
		"Put":     s.Put(ctx, key("a"), 1, []byte("y"), 0),
		"Delete":  s.Delete(ctx, key("a"), 1),
		"Add":     s.Add(ctx, key("set"), "b"),
		"Remove":  s.Remove(ctx, key("set"), "a"),
		"Check":   s.Check(ctx),
		"Tell":    s.Tell(ctx, "note"),
		"Records": s.Records(ctx, func(broker.Key) error { return nil }),
	} {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s: got %v, want context.Canceled", method, err)
		}
		if errors.Is(err, broker.ErrAbsent) || errors.Is(err, broker.ErrStale) {
			t.Errorf("%s: got %v, which is an answer", method, err)
		}
	}
	holds(t, s, key("a"), 1, "x")
	members(t, s, key("set"), "a")
	if p := pulse(t, s); p.Revision != 0 {
		t.Errorf("got revision %d, want 0", p.Revision)
	}
}

// A model is a store so simple that it can be believed. It is compared with a
// real one, which keeps its records under keys that begin with run.
type model struct {
	store   broker.Store
	run     string
	records map[string]broker.Record
	sets    map[string]map[string]bool
}

// names are few, so that calls meet.
var names = rapid.SampledFrom([]string{"", "a", "b", "a:b"})

// testModel runs drawn sequences of calls against the store and the model.
func testModel(t *testing.T, s broker.Store) {
	run := 0
	rapid.Check(t, func(rt *rapid.T) {
		run++
		m := model{store: s, run: fmt.Sprint(run), records: make(map[string]broker.Record), sets: make(map[string]map[string]bool)}
		rt.Repeat(map[string]func(*rapid.T){
			"Put": m.testPut, "Delete": m.testDelete, "Get": m.testGet,
			"Add": m.testAdd, "Remove": m.testRemove, "Members": m.testMembers,
		})
	})
}

func (m *model) key(kind, part string) broker.Key {
	return broker.Key{Kind: kind, Parts: []string{m.run, part}}
}

func (m *model) testPut(t *rapid.T) {
	part, was := names.Draw(t, "part"), rapid.Int64Range(0, 3).Draw(t, "was")
	box := rapid.SliceOfN(rapid.Byte(), 0, 40).Draw(t, "box")
	agree(t, m.store.Put(t.Context(), m.key("record", part), was, box, 0), m.put(part, was, box))
}

func (m *model) testDelete(t *rapid.T) {
	part, was := names.Draw(t, "part"), rapid.Int64Range(0, 3).Draw(t, "was")
	agree(t, m.store.Delete(t.Context(), m.key("record", part), was), m.delete(part, was))
}

func (m *model) testGet(t *rapid.T) {
	part := names.Draw(t, "part")
	got, err := m.store.Get(t.Context(), m.key("record", part))
	want, ok := m.records[part]
	if ok != (err == nil) || got.Revision != want.Revision || !bytes.Equal(got.Box, want.Box) {
		t.Fatalf("Get: got %v, %v; want %v, %v", got, err, want, ok)
	}
}

func (m *model) testAdd(t *rapid.T) {
	part, member := names.Draw(t, "part"), names.Draw(t, "member")
	if m.sets[part] == nil {
		m.sets[part] = make(map[string]bool)
	}
	m.sets[part][member] = true
	agree(t, m.store.Add(t.Context(), m.key("set", part), member), nil)
}

func (m *model) testRemove(t *rapid.T) {
	part, member := names.Draw(t, "part"), names.Draw(t, "member")
	delete(m.sets[part], member)
	agree(t, m.store.Remove(t.Context(), m.key("set", part), member), nil)
}

func (m *model) testMembers(t *rapid.T) {
	part := names.Draw(t, "part")
	got, err := m.store.Members(t.Context(), m.key("set", part))
	agree(t, err, nil)
	slices.Sort(got)
	want := slices.Sorted(maps.Keys(m.sets[part]))
	if !slices.Equal(got, want) {
		t.Fatalf("Members: got %q, want %q", got, want)
	}
}

func (m *model) put(part string, was int64, box []byte) error {
	if m.records[part].Revision != was {
		return broker.ErrStale
	}
	m.records[part] = broker.Record{Revision: was + 1, Box: box}
	return nil
}

func (m *model) delete(part string, was int64) error {
	r, ok := m.records[part]
	if ok && r.Revision != was {
		return broker.ErrStale
	}
	delete(m.records, part)
	return nil
}

func agree(t *rapid.T, got, want error) {
	t.Helper()
	if !errors.Is(got, want) {
		t.Fatalf("got %v, want %v", got, want)
	}
}
