// Command inside is all that the containers of the tests hold.
//
//	inside sleep SOCKET         waits, and asks the socket at each SIGUSR1
//	inside ask SOCKET           asks the socket and prints what it answers
//	inside forge PATH SOCKET    moves into the cgroups at PATH below /cg first
package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

func main() {
	err := errors.New("usage: inside sleep|ask|forge …")
	switch args := os.Args[1:]; {
	case len(args) == 2 && args[0] == "sleep":
		sleep(args[1])
	case len(args) == 2 && args[0] == "ask":
		err = ask(args[1])
	case len(args) == 3 && args[0] == "forge":
		err = errors.Join(forge(args[1]), ask(args[2]))
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

func sleep(socket string) {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGUSR1)
	for range signals {
		ask(socket)
	}
}

func ask(socket string) error {
	conn, err := net.DialTimeout("unix", socket, 10*time.Second)
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = io.Copy(os.Stdout, conn)
	return err
}

// forge moves this process into the cgroups of another container, in each
// hierarchy that is mounted below /cg.
func forge(path string) error {
	v1, _ := filepath.Glob("/cg/*" + path + "/cgroup.procs")
	v2, _ := filepath.Glob("/cg" + path + "/cgroup.procs")
	files := append(v1, v2...)
	if len(files) == 0 {
		return errors.New("there is no such cgroup")
	}
	for _, name := range files {
		if err := os.WriteFile(name, []byte("0"), 0); err != nil {
			return err
		}
	}
	return nil
}
