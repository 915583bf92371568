// Command inside is all that the containers of the tests hold. It sleeps, or
// asks a socket and prints what it answers.
package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"time"
)

func main() {
	switch {
	case len(os.Args) == 2 && os.Args[1] == "sleep":
		time.Sleep(time.Hour)
	case len(os.Args) == 3 && os.Args[1] == "ask":
		if err := ask(os.Args[2]); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	default:
		os.Exit(2)
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
