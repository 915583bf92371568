package brokertest

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// Main runs a package's tests, and fails if they leave a goroutine or an open
// file behind. Goroutines that known describes may stay.
func Main(m *testing.M, known ...goleak.Option) {
	before := openFiles()
	code := m.Run()
	if code == 0 {
		if err := nothingLeft(before, known); err != nil {
			fmt.Fprintln(os.Stderr, "the tests leave behind:", err)
			code = 1
		}
	}
	os.Exit(code)
}

// nothingLeft waits a while for what is just ending: go-redis looks once a second
// for a server that was away, and sees only then that its pool has been closed.
func nothingLeft(before map[string]int, known []goleak.Option) (err error) {
	for range 5 {
		if err = goleak.Find(known...); err != nil {
			continue // it has waited
		}
		more := more(openFiles(), before)
		if len(more) == 0 {
			return nil
		}
		err = fmt.Errorf("open files: %s", strings.Join(more, ", "))
		time.Sleep(100 * time.Millisecond)
	}
	return err
}

// openFiles says what this process has open, and how often. Where there is no
// /proc nothing is known.
func openFiles() map[string]int {
	open := make(map[string]int)
	names, _ := filepath.Glob("/proc/self/fd/*")
	for _, name := range names {
		what, err := os.Readlink(name)
		if err != nil {
			continue // the directory that was being read
		}
		kind, _, _ := strings.Cut(what, ":[") // sockets and pipes have numbers
		if strings.HasPrefix(what, "anon_inode:[event") {
			continue // of Go's own, made once
		}
		open[kind]++
	}
	return open
}

func more(now, before map[string]int) (list []string) {
	for _, what := range slices.Sorted(maps.Keys(now)) {
		if n := now[what] - before[what]; n > 0 {
			list = append(list, fmt.Sprintf("%d × %s", n, what))
		}
	}
	return list
}
