package broker

import (
	"maps"
	"sync"
)

// An Outcome is what came of an action, as the audit has it, whoever it was for.
type Outcome struct {
	Action  string
	Outcome string // done or refused
	Code    Code   // of a refusal
}

// Counts says how often each outcome has been since the start, those that the
// audit counts as one line, too.
func (b *Broker) Counts() map[Outcome]int64 {
	b.counts.mu.Lock()
	defer b.counts.mu.Unlock()
	return maps.Clone(b.counts.all)
}

// counts are Outcomes; the zero value is ready.
type counts struct {
	mu  sync.Mutex // guards the map
	all map[Outcome]int64
}

func (c *counts) add(o Outcome) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.all == nil {
		c.all = make(map[Outcome]int64)
	}
	c.all[o]++
}
