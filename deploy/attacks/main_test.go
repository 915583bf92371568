//go:build linux

package attacks_test

import (
	"cmp"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
)

var (
	tags   = flag.String("tags", "", "further build tags of the broker that is attacked")
	engine = flag.String("engine", "/var/run/docker.sock", "the Docker engine's socket")
)

// unit says that the broker is the unit of deploy/site, under systemd, on a machine
// that may be changed. The build tag unit sets it; deploy/site/try has such a machine.
var unit bool

func TestMain(m *testing.M) {
	flag.Parse()
	flag.Set("test.parallel", "8") // they mostly wait for Docker
	code := m.Run()
	theTable.print()
	os.Exit(code)
}

// A line is one attack of the list.
type line struct {
	kind, name string
	tried      string // what the attacker did
	answer     string // what he was told
	audit      string // and what the audit says of it
}

var theTable table

type table struct {
	mu    sync.Mutex // guards lines
	lines []line
}

func (t *table) add(l line) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.lines = append(t.lines, l)
}

// order is that of the kinds.
var order = []string{"unit", "processes", "mounts", "identity", "protocol", "hub", "policy", "by design", "not protected", "not run here"}

// print shows one line for each attack. It cuts what is too long for a line;
// the tests have looked at all of it.
func (t *table) print() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.lines) == 0 {
		return
	}
	slices.SortStableFunc(t.lines, func(a, b line) int {
		return cmp.Compare(slices.Index(order, a.kind), slices.Index(order, b.kind))
	})
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\nkind\tattack\twhat was tried\tanswer\twhat the audit says")
	for _, l := range t.lines {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", l.kind, l.name, l.tried, short(l.answer), short(l.audit))
	}
	w.Flush()
	fmt.Printf("%d lines\n", len(t.lines))
}

func short(s string) string {
	const most = 150
	s = strings.Join(strings.Fields(s), " ")
	if len(s) <= most {
		return s
	}
	return s[:most-1] + "…"
}
