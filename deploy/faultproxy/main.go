// Faultproxy stands in front of an identity provider in tests. It counts the
// calls that pass, remembers the refresh tokens it saw, and makes trouble on
// request: a delay, a status, a connection that breaks before or after the
// provider was asked.
//
// What it knows and does is asked for on a Unix socket that only its owner may
// open; see control.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "faultproxy: error:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("faultproxy", flag.ContinueOnError)
	listen := flags.String("listen", "127.0.0.1:0", "address that the provider's clients use")
	upstream := flags.String("upstream", "", "URL of the provider itself")
	socket := flags.String("control", "", "path of the Unix socket for the test")
	if err := flags.Parse(args); err != nil {
		return err
	}
	to, err := url.Parse(*upstream)
	if err != nil || to.Host == "" || *socket == "" {
		return errors.New("both -upstream and -control are needed")
	}
	front, err := net.Listen("tcp", *listen)
	if err != nil {
		return fmt.Errorf("listen for clients: %w", err)
	}
	back, err := listenPrivate(*socket)
	if err != nil {
		front.Close()
		return fmt.Errorf("listen for the test: %w", err)
	}
	p := newProxy(to)
	return serve(ctx, map[net.Listener]http.Handler{front: p, back: p.control()})
}

// listenPrivate listens on a Unix socket that only our own user may open.
func listenPrivate(path string) (net.Listener, error) {
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	return net.Listen("unix", path)
}

// serve runs one server per listener until ctx ends or one of them fails.
func serve(ctx context.Context, handlers map[net.Listener]http.Handler) error {
	failed := make(chan error, len(handlers))
	for l, h := range handlers {
		s := &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second}
		defer s.Close()
		go func() { failed <- s.Serve(l) }()
	}
	select {
	case <-ctx.Done():
		return nil
	case err := <-failed:
		return err
	}
}
