package httpserver

import "time"

// ShortenReads shortens readWithin until it is undone.
func ShortenReads(d time.Duration) (undo func()) {
	old := readWithin
	readWithin = d
	return func() { readWithin = old }
}
