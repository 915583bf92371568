// Access-token is the helper inside a single-user server's container. It asks
// the token broker over the socket in /run/tokenbroker and prints an access
// token, and nothing else, on standard output:
//
//	curl -H "Authorization: Bearer $(access-token keycloak)" https://…
//
// It uses the standard library only, so that one static binary of a few
// megabytes runs in any image.
//
// Errors go to standard error as one sentence and one hint; the exit code says
// their class (see the usage text).
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const usage = `usage: access-token [PROVIDER] [flags]        print an access token
       access-token show [PROVIDER] [flags]   print what is in the token, without the token
       access-token list [flags]              print for which providers there are tokens

Without PROVIDER the token is one of the provider that the hub's users log in with.

  --audience NAME    whom the token is for
  --scope SCOPES     only these scopes, separated by spaces
  --min-ttl TIME     the token must be valid that much longer: 60, 90s, 10m
  --wait[=TIME]      wait while the broker or the provider is down, or until you
                     have logged in again, instead of failing

exit codes: 0 done · 1 something else · 2 wrong request · 3 refused, ask your administrator
            4 log in to the hub again · 5 try again later
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// run does what args say and returns the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	c, err := parse(args)
	if errors.Is(err, flag.ErrHelp) {
		fmt.Fprint(stdout, usage)
		return 0
	}
	if err == nil {
		err = c.run(ctx, stdout, stderr)
	}
	return report(stderr, err)
}

// report tells a person what went wrong, and returns the exit code.
func report(stderr io.Writer, err error) int {
	if err == nil {
		return 0
	}
	var r *refusal
	switch {
	case errors.Is(err, context.Canceled):
		r = &refusal{Sentence: "interrupted"}
	case !errors.As(err, &r):
		r = &refusal{Sentence: err.Error()}
	}
	fmt.Fprintf(stderr, "access-token: %s\n", r.Sentence)
	if hint := r.hint(); hint != "" {
		fmt.Fprintf(stderr, "access-token: hint: %s\n", hint)
	}
	return r.exit()
}

// A command is what one command line asks for.
type command struct {
	verb     string // token, show or list
	provider string
	audience string
	scope    string
	minTTL   seconds
	wait     wait
}

// parse reads a command line. Flags may stand before and after the words.
func parse(args []string) (command, error) {
	c := command{verb: "token"}
	flags := flag.NewFlagSet("access-token", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // report prints
	flags.StringVar(&c.audience, "audience", "", "")
	flags.StringVar(&c.scope, "scope", "", "")
	flags.Var(&c.minTTL, "min-ttl", "")
	flags.Var(&c.wait, "wait", "")
	var words []string
	for rest := args; ; {
		err := flags.Parse(rest)
		if errors.Is(err, flag.ErrHelp) {
			return c, err
		}
		if err != nil {
			return c, misuse(err.Error())
		}
		if flags.NArg() == 0 {
			break
		}
		words, rest = append(words, flags.Arg(0)), flags.Args()[1:]
	}
	return c.read(words)
}

// read takes the words of a command line: a verb, if there is one, and a
// provider.
func (c command) read(words []string) (command, error) {
	if len(words) > 0 && (words[0] == "list" || words[0] == "show") {
		c.verb, words = words[0], words[1:]
	}
	switch {
	case c.verb == "list" && len(words) > 0:
		return c, misuse("list takes no provider")
	case len(words) > 1:
		return c, misuse("one provider at a time, please: " + strconv.Quote(words[1]) + " is one too many")
	case len(words) == 1 && strings.Trim(words[0], ".") == "": // would be another path
		return c, misuse("that is no provider's name: " + strconv.Quote(words[0]))
	case len(words) == 1:
		c.provider = words[0]
	}
	return c, nil
}

// misuse is an error in the command line.
func misuse(sentence string) error {
	return &refusal{Code: "invalid", Sentence: sentence, Next: "access-token -h shows what there is"}
}

func (c command) run(ctx context.Context, stdout, stderr io.Writer) error {
	b := newBroker()
	switch c.verb {
	case "list":
		return c.list(ctx, b, stdout, stderr)
	case "show":
		return c.show(ctx, b, stdout, stderr)
	}
	t, err := c.token(ctx, b, stderr)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(stdout, t.AccessToken)
	return err
}

// seconds is a flag that takes 60 as well as 1m.
type seconds struct{ time.Duration }

// Set implements flag.Value.
func (s *seconds) Set(text string) error {
	d, err := parseTime(text)
	s.Duration = d
	return err
}

// wait is a flag that takes a time or, like a switch, none.
type wait struct {
	on bool
	seconds
}

// IsBoolFlag makes --wait without a value legal.
func (w *wait) IsBoolFlag() bool { return true }

// Set implements flag.Value.
func (w *wait) Set(text string) error {
	w.on = text != "false"
	if text == "true" || text == "false" {
		return nil
	}
	return w.seconds.Set(text)
}

func parseTime(text string) (time.Duration, error) {
	if n, err := strconv.ParseUint(text, 10, 31); err == nil {
		return time.Duration(n) * time.Second, nil
	}
	d, err := time.ParseDuration(text)
	if err != nil || d < 0 {
		return 0, errors.New("not a time like 60, 90s or 10m")
	}
	return d, nil
}
