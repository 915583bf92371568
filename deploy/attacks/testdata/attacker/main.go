// Command attacker is all that the containers of the tests hold. Each of its
// subcommands is one way to get at a token; it prints what it was answered, one
// JSON object a line.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"time"
)

// The main goroutine stays on the main thread, whose namespaces are what /proc
// shows as the process's.
func init() { runtime.LockOSThread() }

var commands = map[string]func(args []string) error{
	"sleep": func([]string) error { time.Sleep(time.Hour); return nil },

	// conn.go
	"ask":   func(a []string) error { return ask(a[0], a[1:]...) },
	"raw":   func(a []string) error { return raw(a[0]) },
	"hold":  func(a []string) error { return hold(a[0], number(a[1])) },
	"half":  func(a []string) error { return half(a[0], number(a[1])) },
	"relay": func(a []string) error { return relay(a[0], a[1]) },
	"fake":  func(a []string) error { return fake(a[0]) },
	"pass":  func(a []string) error { return pass(a[0], a[1]) },
	"take":  func(a []string) error { return take(a[0], a[1]) },

	// place.go
	"forge":   func(a []string) error { return then(forge("/cg", a[1], number(a[2])), a[0]) },
	"mount":   func(a []string) error { return then(mountAndForge(a[1]), a[0]) },
	"nest":    func(a []string) error { return then(nest("/cg", a[1]), a[0]) },
	"child":   func(a []string) error { return child(a[0], a[1]) },
	"child2":  func(a []string) error { return then(childCgroup(a[1]), a[0]) },
	"become":  func(a []string) error { return become(a[0], a[1], number(a[2])) },
	"outlive": func(a []string) error { return outlive(a[0], a[1], a[2]) },
	"linger":  func(a []string) error { return linger(a[0], a[1], a[2]) },
	"plant":   func(a []string) error { return plant(a[0], a[1]) },
	"fork":    func([]string) error { return fork() },
	"own":     func(a []string) error { return own(a[0]) },
}

func main() {
	err := errors.New("usage: attacker COMMAND …")
	if len(os.Args) > 1 && commands[os.Args[1]] != nil {
		err = commands[os.Args[1]](os.Args[2:])
	}
	if err != nil {
		say(map[string]any{"error": err.Error()})
		os.Exit(1)
	}
}

func say(v map[string]any) {
	b, _ := json.Marshal(v)
	fmt.Println(string(b))
}

func number(s string) int { n, _ := strconv.Atoi(s); return n }

// then asks, if what came before worked.
func then(err error, socket string) error {
	if err != nil {
		return err
	}
	return ask(socket)
}
