package broker

import (
	"os"
	"time"
)

// FillDisk makes every write to b's journal fail as on a full disk.
func (b *Broker) FillDisk() error {
	full, err := os.OpenFile("/dev/full", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	b.journal.mu.Lock()
	defer b.journal.mu.Unlock()
	b.journal.file.Close()
	b.journal.file, b.journal.size = full, b.journal.end
	return nil
}

// Boxes counts the grants that b's journal keeps until the store has them.
func (b *Broker) Boxes() (n int) {
	for _, e := range b.journal.entries() {
		if e.Box != nil {
			n++
		}
	}
	return n
}

// Moves is what something that is kept open waits for.
func (b *Broker) Moves() <-chan struct{} { return b.pulse.moves() }

// See takes note of a refresh token that was given life at now.
func (e *Ending) See(life time.Duration, now time.Time) { e.see(life, now) }

// ForgetJournal empties what b knows from its journal.
func (b *Broker) ForgetJournal() {
	b.journal.mu.Lock()
	defer b.journal.mu.Unlock()
	clear(b.journal.all)
}
