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
