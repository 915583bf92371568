package main

import (
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"tokenbroker/broker"
	"tokenbroker/broker/seal"
	"tokenbroker/spawnerhook"
)

// A finding is one line of doctor's report.
type finding struct {
	Part   string `json:"part"`
	Result string `json:"result"` // ok, FAILS or note
	Detail string `json:"detail"`
}

func found(part, fine string, err error) finding {
	if err != nil {
		return finding{part, "FAILS", err.Error()}
	}
	return finding{part, "ok", fine}
}

// doctorTime bounds each question to a part.
const doctorTime = 10 * time.Second

func newDoctor() *cobra.Command {
	c := &cobra.Command{
		Use:   "doctor",
		Short: "Ask everything that the broker stands on whether it works, without the broker",
		Args:  cobra.NoArgs,
	}
	file := configFlag(c)
	dryRun := c.Flags().Bool("dry-run", false, "say instead what would become of the containers that run now, were they servers under this configuration")
	names := c.Flags().String("servers", "jupyter-*", "with --dry-run: which containers are servers, besides those that mount a socket already")
	c.RunE = action(func(c *cobra.Command, _ []string) error {
		cfg, err := loadConfig(*file)
		if err != nil {
			return err
		}
		if *dryRun {
			return printDryRun(c, cfg, *names)
		}
		all := examine(c.Context(), cfg)
		if err := printFindings(c, all); err != nil {
			return err
		}
		bad := slices.DeleteFunc(all, func(f finding) bool { return f.Result != "FAILS" })
		if len(bad) > 0 {
			return fmt.Errorf("%s to mend", count(len(bad), "thing"))
		}
		return nil
	})
	return c
}

func printFindings(c *cobra.Command, all []finding) error {
	if wantsJSON(c) {
		return printJSON(c.OutOrStdout(), all)
	}
	t := newTable(c.OutOrStdout())
	for _, f := range all {
		t.row(f.Result, f.Part, f.Detail)
	}
	return t.Flush()
}

// examine asks all parts at once.
func examine(ctx context.Context, cfg *Config) []finding {
	ctx, cancel := context.WithTimeout(ctx, doctorTime)
	defer cancel()
	checks := []func(context.Context, *Config) []finding{
		func(context.Context, *Config) []finding { return []finding{{"configuration", "ok", "no mistakes"}} },
		checkKeys, checkStore, checkAttestation, checkServers, checkHelper, checkListeners, checkProviders, checkBroker,
	}
	results := make([][]finding, len(checks))
	var asked sync.WaitGroup
	for i, check := range checks {
		asked.Go(func() { results[i] = check(ctx, cfg) })
	}
	asked.Wait()
	return slices.Concat(results...)
}

func checkKeys(_ context.Context, cfg *Config) []finding {
	_, err := seal.Load(cfg.Keys.Keyset, cfg.Keys.KEKFile)
	return []finding{found("keys", "the keyset opens", err)}
}

func checkStore(ctx context.Context, cfg *Config) []finding {
	s, err := openStore(cfg)
	if err == nil {
		defer s.Close()
		err = s.Check(ctx)
	}
	return []finding{found("store", "reachable, writable, persistent, protected", err)}
}

func checkAttestation(ctx context.Context, cfg *Config) []finding {
	nowhere := func(broker.ServerKey) (string, error) { return "", errors.New("a doctor binds nothing") }
	a, err := openAttestor(cfg, nowhere, slog.New(slog.DiscardHandler))
	if err != nil {
		return []finding{found("attestation", "", err)}
	}
	defer a.Close()
	level, err := a.Check(ctx)
	all := []finding{found("attestation", cfg.Servers.Attestation+", level "+level, err)}
	if d, ok := a.(*spawnerhook.Docker); ok && err == nil {
		all = append(all, checkNeighbours(ctx, cfg, d)...)
	}
	return all
}

// checkNeighbours looks for containers that make attestation worth less.
func checkNeighbours(ctx context.Context, cfg *Config, d *spawnerhook.Docker) []finding {
	running, err := d.Containers(ctx)
	if err != nil {
		return []finding{found("containers", "", err)}
	}
	var all []finding
	for _, c := range running {
		if by := c.Forges(); by != "" && !slices.Contains(cfg.Servers.Docker.Trusted, c.Name) {
			all = append(all, finding{"containers", "note", c.Name + " could forge proofs, which lowers the level by one: " + by + "; " + spawnerhook.TrustOption(c.Name)})
		}
	}
	return all
}

// checkServers looks at the directory of the servers' sockets without making it.
func checkServers(_ context.Context, cfg *Config) []finding {
	dir := cfg.Servers.Directory
	info, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return []finding{{"servers", "note", dir + " does not exist yet; the broker makes it"}}
	case err == nil && !info.IsDir():
		err = fmt.Errorf("%s is not a directory", dir)
	}
	return []finding{found("servers", dir, err)}
}

// checkHelper looks whether the helper runs in any image.
func checkHelper(_ context.Context, cfg *Config) []finding {
	path := cfg.Helper
	if path == "" {
		return []finding{{"helper", "note", "there is none to mount into containers: put access-token beside this program, or name it as helper"}}
	}
	info, err := os.Stat(path)
	if err == nil && info.Mode().Perm()&0o005 != 0o005 {
		err = fmt.Errorf("%s can't be run by others (mode %04o): chmod 0755 %s", path, info.Mode().Perm(), path)
	}
	if err == nil {
		err = checkStatic(path)
	}
	return []finding{found("helper", path, err)}
}

// checkStatic refuses a binary that wants a loader that an image may not have.
func checkStatic(path string) error {
	f, err := elf.Open(path)
	var format *elf.FormatError
	if errors.As(err, &format) || errors.Is(err, io.EOF) {
		return fmt.Errorf("%s is not a Linux program", path)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }) {
		return fmt.Errorf("%s is not static: build it with CGO_ENABLED=0", path)
	}
	return nil
}

// checkListeners says under which names the TCP listeners are asked.
func checkListeners(_ context.Context, cfg *Config) []finding {
	var all []finding
	listeners := cfg.listeners()
	for _, key := range slices.Sorted(maps.Keys(listeners)) {
		l := listeners[key]
		cert, err := l.certificate()
		if err == nil && cert != nil && time.Now().After(cert.Leaf.NotAfter) {
			err = fmt.Errorf("the certificate in %s ended on %s", l.TLSCertFile, cert.Leaf.NotAfter.Format(time.DateOnly))
		}
		all = append(all, found(key, fmt.Sprintf("%s may be asked as %s", l.Address, l.hosts(cert)), err))
	}
	return all
}

func checkProviders(ctx context.Context, cfg *Config) []finding {
	names := slices.Sorted(maps.Keys(cfg.Providers))
	all := make([]finding, len(names))
	var asked sync.WaitGroup
	for i, name := range names {
		asked.Go(func() {
			p, err := openProvider(name, cfg.Providers[name], slog.New(slog.DiscardHandler))
			if err == nil {
				err = p.Check(ctx)
			}
			all[i] = found("provider "+string(name), cfg.Providers[name].Issuer, err)
		})
	}
	asked.Wait()
	return all
}
