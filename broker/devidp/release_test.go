package devidp_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestReleaseBuildsHaveNoneOfThis(t *testing.T) {
	files, err := filepath.Glob("*.go")
	if err != nil || len(files) < 2 {
		t.Fatalf("found %d files, error %v", len(files), err)
	}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if f != "release_test.go" && !strings.HasPrefix(string(text), "//go:build !release\n") {
			t.Errorf("%s lacks the line //go:build !release", f)
		}
	}
}
