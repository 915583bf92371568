package spawnerhook

import (
	"context"
	"maps"
	"sync"

	"tokenbroker/broker"
)

// Docker tells of a command in a container when it begins. Of what began while
// nobody listened it remembers little: some events, and what has not ended yet. So
// each look at all containers also finds the commands that run in them.

// execs are the commands that run in containers, as far as they were told of.
type execs struct {
	mu      sync.Mutex // guards what follows
	tell    func(broker.Exec)
	running map[execKey]*execSeen
	look    int  // number of the look at all containers that is under way or was last
	looking bool // it is under way
}

// An execSeen is what is known of a command that was told of.
type execSeen struct {
	look  int  // the last one that it was seen in, or during
	found bool // no event has told of it yet
}

// watch has tell called from now on; nil: nobody.
func (x *execs) watch(tell func(broker.Exec)) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.tell = tell
	if x.running == nil {
		x.running = map[execKey]*execSeen{}
	}
}

// event tells of a command that Docker tells of, unless it was found before. By its
// number alone it is not taken for one that an event has told of: that number may
// be a label of the image's, the same for all commands.
func (x *execs) event(k execKey, e broker.Exec) {
	x.mu.Lock()
	defer x.mu.Unlock()
	seen := x.running[k]
	if seen == nil {
		seen = &execSeen{}
		x.running[k] = seen
	}
	seen.look = x.look
	if seen.found {
		seen.found = false
		return
	}
	x.tell(e)
}

// ended forgets a command, or all of a container's. A look that is under way may
// have seen it before it ended; then the next one forgets it.
func (x *execs) ended(k execKey) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if !x.looking {
		maps.DeleteFunc(x.running, func(other execKey, _ *execSeen) bool {
			return other == k || k.id == "" && other.container == k.container
		})
	}
}

// known says whether a command that is seen in a look was told of.
func (x *execs) known(k execKey) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	seen := x.running[k]
	if seen != nil {
		seen.look = x.look
	}
	return seen != nil
}

// find tells of a command that was found, unless an event just did.
func (x *execs) find(k execKey, e broker.Exec) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.running[k] == nil && x.tell != nil {
		x.running[k] = &execSeen{look: x.look, found: true}
		x.tell(e)
	}
}

// begin begins a look; they come one after the other.
func (x *execs) begin() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.look++
	x.looking = true
}

// end ends a look, and forgets the commands that are not there any more if it has
// seen all.
func (x *execs) end(all bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.looking = false
	if all {
		maps.DeleteFunc(x.running, func(_ execKey, seen *execSeen) bool { return seen.look < x.look })
	}
}

// findExecs tells of the commands that run in containers and were not told of.
func (d *Docker) findExecs(ctx context.Context, all []Container) error {
	for _, c := range all {
		for _, id := range c.execs {
			k := execKey{c.id, id}
			if !fullID(id) || d.execs.known(k) {
				continue
			}
			command, running, err := d.engine.exec(ctx, id)
			if err != nil {
				return unavailable(err)
			}
			if !running {
				continue // it has ended, or will be told of when it begins
			}
			e := execOf(c.id, c.Name, command)
			e.Afterwards = "it was found running when the broker looked; when it began is not known"
			d.execs.find(k, e)
		}
	}
	return nil
}
