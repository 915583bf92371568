package grpcserver

import "time"

// ShortenSends shortens sendWithin until it is undone.
func ShortenSends(d time.Duration) (undo func()) {
	old := sendWithin
	sendWithin = d
	return func() { sendWithin = old }
}

// ShortenAges replaces ages until it is undone.
func ShortenAges(idle, age, grace time.Duration) (undo func()) {
	old := ages
	ages.MaxConnectionIdle, ages.MaxConnectionAge, ages.MaxConnectionAgeGrace = idle, age, grace
	return func() { ages = old }
}
