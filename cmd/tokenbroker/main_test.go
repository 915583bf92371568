package main

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"tokenbroker": main})
}

// The scripts are the description of the commands.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(e *testscript.Env) error {
			// A script's own directory is too deep for the path of a socket.
			dir, err := os.MkdirTemp("/tmp", "tb")
			if err != nil {
				return err
			}
			e.Defer(func() { os.RemoveAll(dir) })
			e.Setenv("SHORT", dir)
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"await":  await,
			"expand": expand,
		},
		Condition:           condition,
		RequireExplicitExec: true,
	})
}

// await FILE [TEXT] waits until there is a file, with a text in it.
func await(ts *testscript.TestScript, _ bool, args []string) {
	path, text := ts.MkAbs(args[0]), strings.Join(args[1:], " ")
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if _, err := os.Lstat(path); err == nil && (text == "" || strings.Contains(ts.ReadFile(path), text)) {
			return
		}
	}
	ts.Fatalf("%s did not come", strings.Join(args, ": "))
}

// expand FILE… replaces $SHORT in files.
func expand(ts *testscript.TestScript, _ bool, args []string) {
	for _, name := range args {
		text := strings.ReplaceAll(ts.ReadFile(name), "$SHORT", ts.Getenv("SHORT"))
		ts.Check(os.WriteFile(ts.MkAbs(name), []byte(text), 0o644))
	}
}

// condition knows the real parts that a script needs. A laptop may lack them,
// CI may not.
func condition(cond string) (bool, error) {
	if cond != "redis" {
		return false, fmt.Errorf("there is no condition %q", cond)
	}
	_, err := exec.LookPath("redis-server")
	if err != nil && os.Getenv("CI") == "true" {
		return false, err
	}
	return err == nil, nil
}

// A release must not hold a provider that lets everybody in, nor the parts of
// the demo.
func TestAReleaseHasNoDemo(t *testing.T) {
	if testing.Short() {
		t.Skip("asks the go command")
	}
	for _, tt := range []struct {
		tags string
		want bool
	}{{"release", false}, {"", true}} {
		out, err := exec.Command("go", "list", "-deps", "-tags", tt.tags, ".").Output()
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range []string{"tokenbroker/broker/devidp", "github.com/zitadel/oidc/v3/pkg/op", "github.com/alicebob/miniredis/v2"} {
			if got := strings.Contains(string(out), path+"\n"); got != tt.want {
				t.Errorf("tags %q: %s is linked: %t, want %t", tt.tags, path, got, tt.want)
			}
		}
	}
}
