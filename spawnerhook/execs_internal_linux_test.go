package spawnerhook

import (
	"strings"
	"testing"

	"tokenbroker/broker"
)

// Whichever comes first, the event or the look, and whatever ends meanwhile: each
// command is told of once, and forgotten when it has ended.
func TestAnEventAndALookTellOfACommandOnce(t *testing.T) {
	k, other := execKey{"c", "1"}, execKey{"d", "1"}
	for _, tt := range []struct {
		steps string
		told  int
		left  int // what is remembered in the end
	}{
		{"event find", 1, 1},
		{"find event", 1, 1},
		{"find event event", 2, 1}, // a number that is a label of the image's
		{"event event", 2, 1},
		{"find end-look find", 1, 1},
		{"event ended", 1, 0},
		{"begin event ended find end-look", 1, 1}, // the look had seen it before it ended
		{"begin event ended find end-look begin end-look", 1, 0},
		{"event begin known end-look", 1, 1},
		{"event begin end-look", 1, 0},
		{"event begin broken-look", 1, 1},
		{"event stopped", 1, 0},
		{"event other stopped", 2, 1},
		{"unwatched find", 0, 0},
	} {
		told := 0
		var x execs
		tell := func(broker.Exec) { told++ }
		x.watch(tell)
		for _, step := range strings.Fields(tt.steps) {
			switch step {
			case "event":
				x.event(k, broker.Exec{})
			case "other":
				x.event(other, broker.Exec{})
			case "find":
				x.find(k, broker.Exec{})
			case "known":
				if !x.known(k) {
					t.Errorf("%s: it is not known", tt.steps)
				}
			case "ended":
				x.ended(k)
			case "stopped":
				x.ended(execKey{container: "c"})
			case "begin":
				x.begin()
			case "end-look":
				x.end(true)
			case "broken-look":
				x.end(false)
			case "unwatched":
				x.watch(nil)
			}
		}
		if told != tt.told || len(x.running) != tt.left {
			t.Errorf("%s: told %d times, %d remembered; want %d and %d", tt.steps, told, len(x.running), tt.told, tt.left)
		}
	}
}
