package spawnerhook_test

import (
	"os"
	"slices"
	"strings"
	"testing"

	"tokenbroker/spawnerhook"
)

// An administrator looks there.
func TestTheREADMEListsAllFindings(t *testing.T) {
	text, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := map[spawnerhook.Verdict]string{spawnerhook.Refuse: "| refused", spawnerhook.Report: "| reported", spawnerhook.Allow: "| allowed"}
	lines := strings.Split(string(text), "\n")
	for name, verdict := range spawnerhook.Defaults() {
		i := slices.IndexFunc(lines, func(l string) bool { return strings.HasPrefix(l, rows[verdict]) })
		if i < 0 || !strings.Contains(lines[i], "`"+name+"`") {
			t.Errorf("README: %s is not among those that are %s", name, rows[verdict][2:])
		}
	}
}
