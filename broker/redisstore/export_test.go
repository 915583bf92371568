package redisstore

import "time"

// SetQuiet has s doubt a connection that is silent for d.
func (s *Store) SetQuiet(d time.Duration) { s.quiet = d }
