//go:build linux

package attacks_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// Each line of the threat model's tables names what shows it, and that exists; or it
// says "not protected".
func TestEachLineOfTheThreatModelIsShown(t *testing.T) {
	text, err := os.ReadFile("../SECURITY.md")
	if err != nil {
		t.Fatal(err)
	}
	tests := allTests(t)
	attack := regexp.MustCompile("attack `([^`]+)`")
	test := regexp.MustCompile("`((?:Test|Fuzz|test_)[A-Za-z0-9_]+)`")
	lines := 0
	for line := range strings.Lines(string(text)) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		if len(cells) < 3 || strings.HasPrefix(cells[0], "-") || strings.Contains(line, "| shown by |") {
			continue
		}
		lines++
		shown := cells[len(cells)-1]
		names := 0
		for _, m := range attack.FindAllStringSubmatch(line, -1) {
			names++
			if beginning, _, _ := strings.Cut(m[1], ": "); !strings.Contains(tests, `"`+beginning) {
				t.Errorf("there is no attack %q", m[1])
			}
		}
		for _, m := range test.FindAllStringSubmatch(shown, -1) {
			names++
			if !strings.Contains(tests, "func "+m[1]+"(") && !strings.Contains(tests, "def "+m[1]+"(") {
				t.Errorf("there is no test %s", m[1])
			}
		}
		if names == 0 && !strings.Contains(shown, "not protected") {
			t.Errorf("nothing shows %s", cells[0])
		}
	}
	if lines < 30 {
		t.Errorf("%d lines were found, want all", lines)
	}
}

// allTests is the text of all tests of this repository.
func allTests(t *testing.T) string {
	t.Helper()
	var all strings.Builder
	err := filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		switch name := d.Name(); {
		case err != nil:
			return err
		case d.IsDir() && strings.HasPrefix(name, ".") && path != "../..":
			return fs.SkipDir
		case strings.HasSuffix(name, "_test.go"), strings.HasPrefix(name, "test_") && strings.HasSuffix(name, ".py"):
			text, err := os.ReadFile(path)
			all.Write(text)
			return err
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all.String()
}
