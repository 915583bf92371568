package peersocket

import "time"

var (
	Protocol      = protocol
	DirectoryName = directoryName
)

// Limit changes what the servers' callers may hold.
func (s *Servers) Limit(conns int, hello time.Duration) {
	s.limits.conns, s.limits.hello = conns, hello
}

// LimitReads changes for how long a reader may take nothing.
func (s *Servers) LimitReads(d time.Duration) { s.limits.read = d }
