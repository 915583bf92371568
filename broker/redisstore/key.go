package redisstore

import (
	"fmt"
	"strings"

	"tokenbroker/broker"
)

// record and set lie apart, so that a record and a set of one broker.Key don't
// meet; revision can't meet either.
func (s *Store) record(k broker.Key) string { return s.name("record", k) }
func (s *Store) set(k broker.Key) string    { return s.name("set", k) }
func (s *Store) revision() string           { return prefix(s.cfg.Deployment) + "revision" }
func (s *Store) channel() string            { return prefix(s.cfg.Deployment) + "notes" }

func prefix(deployment string) string { return "tokenbroker:" + escape(deployment) + ":" }

func (s *Store) name(what string, k broker.Key) string {
	var b strings.Builder
	b.WriteString(prefix(s.cfg.Deployment) + what + ":" + escape(k.Kind))
	for _, part := range k.Parts {
		b.WriteString(":" + escape(part)) // escaped parts hold no colon, so their number shows
	}
	return b.String()
}

// escape leaves what is readable and harmless and writes every other byte as
// %XX.
func escape(s string) string {
	var b strings.Builder
	for i := range len(s) {
		if harmless(s[i]) {
			b.WriteByte(s[i])
		} else {
			fmt.Fprintf(&b, "%%%02X", s[i])
		}
	}
	return b.String()
}

func harmless(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte("-_.@", c) >= 0
}
