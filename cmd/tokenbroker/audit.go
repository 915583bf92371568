package main

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"syscall"

	"github.com/spf13/cobra"

	"tokenbroker/broker"
	"tokenbroker/broker/seal"
)

// reopenAudit opens the audit's file anew at each SIGHUP, until ctx ends.
func reopenAudit(ctx context.Context, audit *broker.AuditFile, log *slog.Logger) {
	renamed := make(chan os.Signal, 1)
	signal.Notify(renamed, syscall.SIGHUP)
	defer signal.Stop(renamed)
	for {
		select {
		case <-ctx.Done():
			return
		case <-renamed:
		}
		if err := audit.Reopen(); err != nil {
			log.Error("the audit can't be opened anew; its lines go on into the file that was renamed", "err", err)
			continue
		}
		log.Info("the audit was opened anew")
	}
}

func newAudit() *cobra.Command {
	return group("audit", "The audit and its chain", newAuditVerify(), newAuditHead())
}

func newAuditHead() *cobra.Command {
	c := &cobra.Command{
		Use:   "head",
		Short: "Print where the audit stands, to be kept where this machine's root can't reach",
		Long: `Each line of the audit names the one before it, so that a hole shows. That the
last lines were cut off shows against a head from before only. Append it, daily
say, to a file on another machine:

	tokenbroker audit head | ssh elsewhere 'cat >> audit-heads'

and give that file to tokenbroker audit verify --head. It needs no running broker.`,
		Args: cobra.NoArgs,
	}
	file := configFlag(c)
	c.RunE = action(func(c *cobra.Command, _ []string) error {
		cfg, keys, err := loadKeys(*file)
		if err != nil {
			return err
		}
		end, err := broker.FindAuditHead(cfg.auditFile(), cfg.auditHead(), keys.AuditMAC())
		switch {
		case err != nil:
			return err
		case end.Last.Seq == 0:
			return fmt.Errorf("there is no audit yet: neither in %s nor in %s", cfg.Audit.File, cfg.auditHead())
		case end.Missing > 0:
			return &failure{4, fmt.Errorf("%s has lost its last %s: line %s was the last", cfg.Audit.File, count(int(end.Missing), "line"), end.Last.Ref),
				"a machine that crashed does that, or somebody who cuts it"}
		}
		return json.NewEncoder(c.OutOrStdout()).Encode(end.Last)
	})
	return c
}

func newAuditVerify() *cobra.Command {
	c := &cobra.Command{
		Use:   "verify FILE…",
		Short: "Find what was changed, removed, put in or moved in an audit since it was written",
		Long: `Give it all files of one broker, in any order, compressed or not; - is standard
input, of which it passes over what is no audit line. It needs the keyset and the
key that opens it, as the configuration names them, and no running broker.

Exit code 0: each line is as it was written, and where. 4: it is not; each fault is
named by file and line.`,
		Args: cobra.MinimumNArgs(1),
	}
	file := configFlag(c)
	heads := c.Flags().String("head", "", "a file of what tokenbroker audit head has printed: without it nothing shows that the last lines were cut off")
	c.RunE = action(func(c *cobra.Command, args []string) error {
		keyset, kek := keyFiles(*file)
		keys, err := seal.Load(keyset, kek)
		if err != nil {
			return err
		}
		exported, err := readHeads(*heads)
		if err != nil {
			return err
		}
		r, err := verifyAudit(args, c.InOrStdin(), keys.AuditMAC(), exported)
		if err != nil {
			return err
		}
		return printAudit(c, r, *heads)
	})
	return c
}

// readHeads reads what audit head has printed, line by line.
func readHeads(path string) (heads []broker.AuditHead, err error) {
	if path == "" {
		return nil, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read heads: %w", err)
	}
	defer f.Close()
	for d := json.NewDecoder(f); ; {
		var h broker.AuditHead
		switch err := d.Decode(&h); {
		case errors.Is(err, io.EOF) && len(heads) > 0:
			return heads, nil
		case err != nil || h.Seq <= 0 || h.MAC == "":
			return nil, fmt.Errorf("%s holds something else than lines of tokenbroker audit head", path)
		}
		heads = append(heads, h)
	}
}

// verifyAudit reads the files from the oldest to the newest.
func verifyAudit(files []string, stdin io.Reader, mac hash.Hash, heads []broker.AuditHead) (broker.AuditReport, error) {
	if err := oldestFirst(files, mac); err != nil {
		return broker.AuditReport{}, err
	}
	v := broker.NewAuditVerifier(mac, heads)
	for _, file := range files {
		if err := auditLines(file, stdin, func(n int, line []byte) bool { v.Line(file, n, line); return true }); err != nil {
			return broker.AuditReport{}, err
		}
	}
	return v.End(), nil
}

// oldestFirst sorts files by the first line that tells its place in the chain.
// Those without one may be from before there was a chain.
func oldestFirst(files []string, mac hash.Hash) error {
	first := make(map[string]int64)
	for _, file := range files {
		if len(files) == 1 {
			break // it may be standard input, which can be read once
		}
		err := auditLines(file, bytes.NewReader(nil), func(_ int, line []byte) bool {
			h, ok := broker.HeadOf(line, mac)
			first[file] = h.Seq
			return !ok
		})
		if err != nil {
			return err
		}
	}
	slices.SortStableFunc(files, func(a, b string) int { return cmp.Compare(first[a], first[b]) })
	return nil
}

// auditLines calls f with each line of a file until f returns false.
func auditLines(file string, stdin io.Reader, f func(n int, line []byte) bool) error {
	in := stdin
	if file != "-" {
		open, err := os.Open(file)
		if err != nil {
			return err
		}
		defer open.Close()
		in = open
	}
	r := bufio.NewReader(in)
	if magic, _ := r.Peek(2); string(magic) == "\x1f\x8b" {
		z, err := gzip.NewReader(r)
		if err != nil {
			return fmt.Errorf("read %s: %w", file, err)
		}
		r = bufio.NewReader(z)
	}
	for n := 1; ; n++ {
		line, err := r.ReadBytes('\n')
		line = bytes.TrimSuffix(line, []byte("\n"))
		if (file != "-" || broker.LooksLikeAudit(line)) && len(line) > 0 && !f(n, line) {
			return nil
		}
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("read %s: %w", file, err)
		}
	}
}

// printAudit prints r, and returns an error if something is wrong.
func printAudit(c *cobra.Command, r broker.AuditReport, heads string) error {
	var err error
	if wrong := len(r.Wrong); wrong > 0 {
		err = &failure{4, fmt.Errorf("the audit is not what was written: %s", count(wrong, "fault")), ""}
	}
	w := c.OutOrStdout()
	if wantsJSON(c) {
		return cmp.Or(printJSON(w, r), err)
	}
	for _, f := range r.Notes {
		fmt.Fprintf(w, "note: %v\n", f)
	}
	for _, f := range r.Wrong {
		fmt.Fprintf(w, "WRONG: %v\n", f)
	}
	if r.More > 0 {
		fmt.Fprintf(w, "and %d more\n", r.More)
	}
	if heads == "" {
		fmt.Fprintln(w, "note: without --head nothing shows whether lines after the last one were cut off")
	}
	if r.Lines > 0 {
		fmt.Fprintf(w, "%s of host %s in their places, from %s (%s) to %s (%s)\n", count(r.Lines, "line"), r.Last.Host,
			r.First.Ref, r.First.Time.UTC().Format("2006-01-02 15:04:05Z"), r.Last.Ref, r.Last.Time.UTC().Format("2006-01-02 15:04:05Z"))
	}
	return err
}
