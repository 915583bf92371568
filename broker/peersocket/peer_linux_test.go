package peersocket_test

import (
	"os"
	"testing"

	"tokenbroker/broker/peersocket"
)

func FuzzStartTime(f *testing.F) {
	f.Add([]byte("1 (a) S 0 1 1 0 -1 4194560 1 1 1 1 1 1 1 1 20 0 1 0 4242 1 1"))
	f.Add([]byte("1 (a b) c) S 0 1 1 0 -1 4194560 1 1 1 1 1 1 1 1 20 0 1 0 7"))
	f.Add([]byte("1 ((((("))
	f.Fuzz(func(t *testing.T, stat []byte) {
		got, err := peersocket.ParseStart(stat)
		if err != nil && got != 0 {
			t.Errorf("ParseStart: %d with %v", got, err)
		}
	})
}

func TestTheStartTimeTellsTwoProcessesApart(t *testing.T) {
	ours, err := peersocket.StartTime(int32(os.Getpid()))
	if err != nil || ours == 0 {
		t.Fatalf("StartTime of our own: %d, %v", ours, err)
	}
	first, err := peersocket.StartTime(1)
	if err != nil || first >= ours {
		t.Errorf("StartTime of the first process: %d, %v, want less than %d", first, err, ours)
	}
	if _, err := peersocket.StartTime(1 << 30); err == nil {
		t.Error("StartTime of nobody: no error")
	}
}

func TestTheStartTimeIsReadPastAnyName(t *testing.T) {
	const tail = " S 0 1 1 0 -1 4194560 1 1 1 1 1 1 1 1 20 0 1 0 4242 1 1"
	for _, name := range []string{"(sh)", "(a b)", "(a) S 1 2 3)", "())"} {
		got, err := peersocket.ParseStart([]byte("17 " + name + tail))
		if err != nil || got != 4242 {
			t.Errorf("ParseStart of %s: %d, %v, want 4242", name, got, err)
		}
	}
	for _, bad := range []string{"", "17 sh S", "17 (sh) S 0 1", "17 (sh)" + " S 0 1 1 0 -1 4194560 1 1 1 1 1 1 1 1 20 0 1 0 x"} {
		if got, err := peersocket.ParseStart([]byte(bad)); err == nil {
			t.Errorf("ParseStart(%q): %d, want an error", bad, got)
		}
	}
}
