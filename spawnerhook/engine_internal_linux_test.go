package spawnerhook

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/moby/moby/api/types/container"
)

// Whatever an engine says of a container: it is an odd answer, or one that names a
// container by its full ID and can be judged, privileged ones as refused; and a command
// that can't be read counts as one that runs.
func FuzzInspect(f *testing.F) {
	captured, err := filepath.Glob("testdata/*-inspect-*.json")
	if err != nil || len(captured) == 0 {
		f.Fatalf("no captured answers: %v", err)
	}
	for _, name := range captured {
		text, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Add([]byte(`{"State":{},"HostConfig":{},"Config":{}}`))
	f.Add([]byte(`{"Running":`))
	f.Add([]byte(`{"Running":true,"ProcessConfig":{"entrypoint":"sh","arguments":["-c","ls"]}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		if command, running := execAnswer(bytes.NewReader(text)); command == "" && !running {
			t.Error("a command that can't be read is passed over")
		}
		var c container.InspectResponse
		if json.Unmarshal(text, &c) != nil {
			return
		}
		s, err := stateOf(c)
		if err != nil {
			return
		}
		if !fullID(s.ID) || s.Running && s.PID <= 0 {
			t.Errorf("taken for a container: %+v", s)
		}
		e := &evidence{posture: s.posture}
		if s.Privileged && refusal(e.findings(nil)) == "" {
			t.Errorf("a privileged container is not refused: %+v", s)
		}
	})
}
