//go:build failpoints && linux

package faults_test

import (
	"cmp"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
)

var long = flag.Bool("long", false, "all runs of each proof, with the lease as it is in production")

func TestMain(m *testing.M) {
	if os.Getenv(envChild) != "" {
		child()
		return
	}
	flag.Parse()
	flag.Set("test.parallel", "12")                // they mostly wait
	slog.SetDefault(slog.New(slog.DiscardHandler)) // zitadel/oidc says there what it refused
	if only := flag.Lookup("test.run").Value.String(); only == "" || strings.Contains(only, "Stranger") {
		go theKeycloak.up()
	}
	code := m.Run()
	theKeycloak.stop()
	report.print()
	os.Exit(code)
}

// pick is the number of runs of the long form, or of the short one.
func pick(inLong, inShort int) int {
	if *long {
		return inLong
	}
	return inShort
}

// A row is what one cell of a proof measured.
type row struct {
	proof, cell string // the cell begins with what is summed up, and a comma
	runs        int
	lost        int  // grants that needed a new login
	reported    int  // of these, said to be lost_response
	spent       int  // refresh requests that reached the provider
	most        int  // of these, the most with one refresh token
	served      int  // users who got a token that was not theirs any more
	window      bool // a grant may be lost here, and is then said to be
	note        string
}

func (r row) kind() string { k, _, _ := strings.Cut(r.cell, ","); return k }

var report table

type table struct {
	mu   sync.Mutex // guards rows
	rows []row
}

func (t *table) add(r row) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rows = append(t.rows, r)
}

// print shows all rows, and then their sums.
func (t *table) print() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.rows) == 0 {
		return
	}
	slices.SortStableFunc(t.rows, func(a, b row) int {
		return cmp.Or(cmp.Compare(a.proof, b.proof), cmp.Compare(a.kind(), b.kind()))
	})
	var sums []row
	for _, r := range t.rows {
		i := slices.IndexFunc(sums, func(s row) bool {
			return s.proof == r.proof && s.cell == r.kind() && s.window == r.window && s.note == r.note
		})
		if i < 0 {
			i = len(sums)
			sums = append(sums, row{proof: r.proof, cell: r.kind(), window: r.window, note: r.note})
		}
		s := &sums[i]
		s.runs, s.lost, s.reported, s.spent, s.most = s.runs+r.runs, s.lost+r.lost, s.reported+r.reported, s.spent+r.spent, max(s.most, r.most)
		s.served += r.served
	}
	show(t.rows)
	fmt.Println()
	show(sums)
}

func show(rows []row) {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "proof\tcell\truns\tlost\tsaid lost_response\trequests\tmost per token\tserved\t")
	for _, r := range rows {
		if r.window {
			r.note = strings.TrimSuffix("declared window, "+r.note, ", ")
		}
		fmt.Fprintf(w, "%s\t%s\t%d\t%d\t%d\t%d\t%d\t%d\t%s\n", r.proof, r.cell, r.runs, r.lost, r.reported, r.spent, r.most, r.served, r.note)
	}
	w.Flush()
}
