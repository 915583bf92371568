package broker_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// The house. A package imports packages of lower layers only, and none of its
// own. Where a new package goes is asked here, once, when it is made.
var layers = map[string]int{
	"broker/seal":          0,
	"proto":                0,
	"proto/tokenbroker/v1": 0,

	"broker": 1,

	"broker/redisstore":    2,
	"broker/oauthprovider": 2,
	"broker/rolewatch":     2,
	"broker/peersocket":    2,
	"broker/grpcserver":    2,
	"broker/httpserver":    2,
	"broker/devidp":        2,
	"spawnerhook":          2,
	"client":               2,

	"cmd/tokenbroker":   3,
	"cmd/access-token":  3,
	"deploy/e2e/ask":    3,
	"deploy/attacks":    3,
	"deploy/faultproxy": 3,
	"deploy/faults":     3,
}

// forTests may import anything up to the adapters, and is imported by tests only.
const forTests = "broker/brokertest"

// forbidden are imports that a package must not have, whatever its layer allows.
var forbidden = map[string][]string{
	"broker": {"net/http", "google.golang.org/", "github.com/", "tokenbroker/proto"},
	"client": {"tokenbroker/broker"},
	// Standard library only: it is mounted into images that we don't know.
	"cmd/access-token": {"tokenbroker/", "google.golang.org/", "golang.org/", "github.com/"},
	// The counting proxy stands for the provider; it must not share our code.
	"deploy/faultproxy": {"tokenbroker/"},
}

func TestLayers(t *testing.T) {
	for _, p := range packages(t) {
		name := strings.TrimPrefix(p.ImportPath, "tokenbroker/")
		layer, known := layers[name]
		if !known && name != forTests {
			t.Errorf("package %s is not in the table", name)
			continue
		}
		for _, imported := range p.Imports {
			if slices.ContainsFunc(forbidden[name], func(f string) bool { return strings.HasPrefix(imported, f) }) {
				t.Errorf("%s must not import %s", name, imported)
			}
			below, ours := strings.CutPrefix(imported, "tokenbroker/")
			switch {
			case !ours || name == forTests:
			case below == forTests:
				t.Errorf("%s imports %s outside its tests", name, forTests)
			case layers[below] >= layer:
				t.Errorf("%s (layer %d) imports %s (layer %d); arrows go down only", name, layer, below, layers[below])
			}
		}
	}
}

type goPackage struct {
	ImportPath string
	Imports    []string
}

func packages(t *testing.T) (all []goPackage) {
	t.Helper()
	list := exec.Command("go", "list", "-json=ImportPath,Imports", "tokenbroker/...")
	out, err := list.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p goPackage
		err := d.Decode(&p)
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatalf("go list: %v", err)
		}
		all = append(all, p)
	}
}
