package grpcserver

import "time"

// ShortenSends shortens sendWithin until it is undone.
func ShortenSends(d time.Duration) (undo func()) {
	old := sendWithin
	sendWithin = d
	return func() { sendWithin = old }
}
