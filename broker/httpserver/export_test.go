package httpserver

import "time"

// ShortenReads shortens readWithin until it is undone.
func ShortenReads(d time.Duration) (undo func()) {
	old := readWithin
	readWithin = d
	return func() { readWithin = old }
}

// ShortenAge shortens maxAge until it is undone.
func ShortenAge(d time.Duration) (undo func()) {
	old := maxAge
	maxAge = d
	return func() { maxAge = old }
}

// MaxConns is maxConns.
const MaxConns = maxConns
