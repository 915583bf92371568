package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"tokenbroker/broker"
	"tokenbroker/spawnerhook"
)

// A forecast is what would become of a container that runs now.
type forecast struct {
	Container string                `json:"container"`
	Would     string                `json:"would"`            // refuse, report or ok for a server; else neighbour
	Lowers    string                `json:"lowers,omitempty"` // why attestation on this host is worth less
	Findings  []spawnerhook.Finding `json:"findings,omitempty"`
}

// printDryRun says what would become of the containers that run. They needn't
// mount anything of ours yet.
func printDryRun(c *cobra.Command, cfg *Config, servers string) error {
	if _, err := path.Match(servers, ""); err != nil {
		return &failure{2, fmt.Errorf("--servers %q is not a pattern like jupyter-*", servers), ""}
	}
	if cfg.Servers.Attestation != "docker" {
		return &failure{2, errors.New("servers.attestation is process: there are no containers to look at"), ""}
	}
	ctx, cancel := context.WithTimeout(c.Context(), doctorTime)
	defer cancel()
	nowhere := func(broker.ServerKey) (string, error) { return "", errors.New("a doctor binds nothing") }
	d, err := openDocker(cfg, nowhere, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	defer d.Close()
	if _, err := d.Check(ctx); err != nil {
		return err
	}
	running, err := d.Containers(ctx)
	if err != nil {
		return err
	}
	all := forecasts(running, cfg.Servers.Docker.Trusted, servers)
	if err := printForecasts(c, all); err != nil {
		return err
	}
	return refusals(all)
}

// forecasts goes through what runs. Of the containers that are no servers only
// those count that could pass for one.
func forecasts(running []spawnerhook.Container, trusted []string, servers string) []forecast {
	all := []forecast{}
	for _, c := range running {
		f := forecast{Container: c.Name, Would: "neighbour", Findings: c.Findings}
		if !slices.Contains(trusted, c.Name) {
			f.Lowers = c.Forges()
		}
		named, _ := path.Match(servers, c.Name) // the pattern has been tried before
		switch server := named || c.Server; {
		case server && c.Refused():
			f.Would = string(spawnerhook.Refuse)
		case server && slices.ContainsFunc(c.Findings, func(f spawnerhook.Finding) bool { return f.Verdict == spawnerhook.Report }):
			f.Would = string(spawnerhook.Report)
		case server:
			f.Would = "ok"
		case f.Lowers == "":
			continue
		}
		all = append(all, f)
	}
	return all
}

func printForecasts(c *cobra.Command, all []forecast) error {
	if wantsJSON(c) {
		return printJSON(c.OutOrStdout(), all)
	}
	t := newTable(c.OutOrStdout(), "WOULD", "CONTAINER", "FINDING", "SAYS")
	for _, f := range all {
		if f.Would == "neighbour" {
			t.row(f.Would, f.Container, "lowers the level", f.Lowers)
			continue
		}
		if len(f.Findings) == 0 {
			t.row(f.Would, f.Container, "", "")
		}
		for _, found := range f.Findings {
			t.row(string(found.Verdict), f.Container, found.Name, found.Says)
		}
	}
	return t.Flush()
}

// refusals is the error if any server would get no tokens.
func refusals(all []forecast) error {
	keys, n := map[string]bool{}, 0
	for _, f := range all {
		if f.Would != string(spawnerhook.Refuse) {
			continue
		}
		n++
		for _, found := range f.Findings {
			if found.Verdict == spawnerhook.Refuse {
				keys[found.Name+": allow"] = true
			}
		}
	}
	if n == 0 {
		return nil
	}
	return &failure{1, fmt.Errorf("%s would get no tokens", count(n, "server")),
		fmt.Sprintf("start them without, or set servers.docker.posture: {%s}", strings.Join(slices.Sorted(maps.Keys(keys)), ", "))}
}
