package peersocket_test

import (
	"bytes"
	"testing"

	"tokenbroker/broker/peersocket"
)

func FuzzProtocol(f *testing.F) {
	for _, s := range []string{"", "P", "PRI", "PRI ", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "PRIVATE / HTTP/1.1", "GET /", "\x00", "PRi "} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		grpc, clear := peersocket.Protocol(b)
		if grpc != bytes.HasPrefix(b, []byte("PRI ")) {
			t.Errorf("Protocol(%q): gRPC %v", b, grpc)
		}
		if clear == bytes.HasPrefix([]byte("PRI"), b) {
			t.Errorf("Protocol(%q): clear %v", b, clear)
		}
		if !clear {
			return
		}
		for n := range b { // what is clear once stays so
			if early, clear := peersocket.Protocol(b[:n]); clear && early != grpc {
				t.Errorf("Protocol(%q): gRPC %v, later %v", b[:n], early, grpc)
			}
		}
	})
}

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
