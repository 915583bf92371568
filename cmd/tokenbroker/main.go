// Tokenbroker keeps the refresh tokens of a JupyterHub's users away from their
// notebooks, and gives the notebooks short-lived access tokens instead.
//
// `tokenbroker serve` is the service, `tokenbroker demo` shows what it does
// without anything else installed, and the other commands are the
// administrator's. Wire.go joins the parts; nothing else does.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

func main() {
	if err := hardenProcess(); err != nil {
		fmt.Fprintf(os.Stderr, "tokenbroker: %v\n", err)
		os.Exit(1)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// run does what args say and returns the exit code: 0 done, 1 failed, 2 wrong
// usage, 3 refused, 4 an audit is not what was written, 5 the broker can't be
// reached.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := newRoot()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return 0
	}
	var f *failure
	if !errors.As(err, &f) {
		// Errors that no command made are cobra's, about the command line.
		f = &failure{2, err, "see " + cmd.CommandPath() + " --help"}
	}
	fmt.Fprintf(stderr, "tokenbroker: %v\n", f.err)
	if f.hint != "" {
		fmt.Fprintf(stderr, "tokenbroker: hint: %s\n", f.hint)
	}
	return f.code
}

// A failure is an error of a command, with its exit code and the way out.
type failure struct {
	code int
	err  error
	hint string
}

// Error is the error without the hint.
func (f *failure) Error() string { return f.err.Error() }

// Unwrap returns the error.
func (f *failure) Unwrap() error { return f.err }

// newRoot returns the tree of commands.
func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:           "tokenbroker",
		Short:         "Access tokens for notebooks, refresh tokens for nobody",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.PersistentFlags().VarP(new(format), "output", "o", "table or json")
	root.AddCommand(newServe(), newConfig(), newPolicy(), newStatus(), newSessions(), newUsers(), newExplain(), newKeys(), newAudit(), newDoctor(), newVersion())
	addDemo(root)
	return root
}

// group is a command that only holds others.
func group(use, short string, commands ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, Args: cobra.NoArgs, RunE: func(c *cobra.Command, _ []string) error {
		return fmt.Errorf("%s wants one of its commands", c.CommandPath())
	}}
	c.AddCommand(commands...)
	return c
}

// action makes f a command's body. Whatever f returns is a failure with exit
// code 1 unless f knows better.
func action(f func(*cobra.Command, []string) error) func(*cobra.Command, []string) error {
	return func(c *cobra.Command, args []string) error {
		err := f(c, args)
		var known *failure
		if err == nil || errors.As(err, &known) {
			return err
		}
		return &failure{1, err, ""}
	}
}
