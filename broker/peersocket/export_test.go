package peersocket

import "time"

var (
	Protocol      = protocol
	DirectoryName = directoryName
)

// Limit changes what the servers' callers may hold.
func (s *Servers) Limit(conns int, hello time.Duration) { s.limits = limits{conns, hello} }
