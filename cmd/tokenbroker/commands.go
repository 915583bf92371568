package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"tokenbroker/broker/seal"
)

// configFlag adds --config.
func configFlag(c *cobra.Command) *string {
	return c.Flags().StringP("config", "c", defaultConfigFile, "the configuration file")
}

// loadConfig reads a configuration file; all its mistakes are one failure.
func loadConfig(path string) (*Config, error) {
	cfg, err := load(path)
	var wrong Mistakes
	switch {
	case errors.As(err, &wrong):
		return nil, mistaken(path, wrong)
	case err != nil:
		return nil, &failure{1, err, "name another file with --config"}
	}
	return cfg, nil
}

// mistaken is what is wrong with a file.
func mistaken(file string, wrong Mistakes) error {
	return &failure{1, fmt.Errorf("%s has %s:\n%w", file, count(len(wrong), "mistake"), wrong), ""}
}

// count says how many there are of something.
func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func newConfig() *cobra.Command {
	check := &cobra.Command{
		Use:   "check",
		Short: "Name everything that is wrong with a configuration file, and what in it can have no effect",
		Args:  cobra.NoArgs,
	}
	file := configFlag(check)
	online := check.Flags().Bool("online", false, "also ask the providers which scopes they know")
	strict := check.Flags().Bool("strict", false, "fail for a warning, too")
	check.RunE = action(func(c *cobra.Command, _ []string) error {
		r, err := review(c.Context(), *file, *online)
		if err != nil {
			return err
		}
		if err := r.print(c); err != nil {
			return err
		}
		if n := len(r.Warnings); *strict && n > 0 {
			return fmt.Errorf("%s has %s", *file, count(n, "warning"))
		}
		return nil
	})
	return group("config", "The configuration file", check, newConfigPrint())
}

// A configReview is what config check finds.
type configReview struct {
	File     string   `json:"file"`
	Mistakes Mistakes `json:"mistakes"` // then nothing else was looked at
	Warnings Mistakes `json:"warnings"`
	cfg      *Config
}

func review(ctx context.Context, file string, online bool) (*configReview, error) {
	r := &configReview{File: file, Mistakes: Mistakes{}, Warnings: Mistakes{}}
	cfg, d, err := read(file)
	switch {
	case errors.As(err, &r.Mistakes):
		return r, nil
	case err != nil:
		return nil, &failure{1, err, "name another file with --config"}
	}
	r.cfg = cfg
	r.Warnings = append(r.Warnings, lint(cfg, d)...)
	if online {
		r.Warnings = append(r.Warnings, lintOnline(ctx, cfg, d)...)
	}
	r.Warnings.sort()
	return r, nil
}

// print prints r, and returns an error if there are mistakes.
func (r *configReview) print(c *cobra.Command) error {
	wrong := len(r.Mistakes)
	if wantsJSON(c) {
		if err := printJSON(c.OutOrStdout(), r); err != nil || wrong == 0 {
			return err
		}
		return fmt.Errorf("%s has %s", r.File, count(wrong, "mistake"))
	}
	if wrong > 0 {
		return mistaken(r.File, r.Mistakes)
	}
	w := c.OutOrStdout()
	for _, m := range r.Warnings {
		fmt.Fprintf(w, "warning: %v\n", Mistakes{m})
	}
	_, err := fmt.Fprintf(w, "%s is right: %s, %s, %s\n", r.File,
		count(len(r.cfg.Hubs), "hub"), count(len(r.cfg.Providers), "provider"), count(len(r.cfg.Policy), "rule"))
	return err
}

func newConfigPrint() *cobra.Command {
	c := &cobra.Command{Use: "print", Short: "Print the configuration with all defaults and paths, as the broker would use it", Args: cobra.NoArgs}
	file := configFlag(c)
	c.RunE = action(func(c *cobra.Command, _ []string) error {
		cfg, err := loadConfig(*file)
		if err != nil {
			return err
		}
		e := yaml.NewEncoder(c.OutOrStdout())
		e.SetIndent(2)
		if err := e.Encode(cfg); err != nil {
			return err
		}
		return e.Close()
	})
	return c
}

func newKeys() *cobra.Command {
	c := &cobra.Command{
		Use:   "create",
		Short: "Make the keyset and the key that opens it, where the configuration file expects them",
		Args:  cobra.NoArgs,
	}
	file := configFlag(c)
	c.RunE = action(func(c *cobra.Command, _ []string) error {
		path, err := filepath.Abs(*file)
		if err != nil {
			return fmt.Errorf("create keys: %w", err)
		}
		keyset, kek := keyFiles(path)
		if err := seal.Create(keyset, kek); err != nil {
			return fmt.Errorf("create keys: %w", err)
		}
		fmt.Fprintf(c.OutOrStdout(), "%s holds the keyset\n%s holds the key that opens it\n", keyset, kek)
		fmt.Fprintln(c.OutOrStdout(), "Back both up, each apart from the other and from Redis: without them everybody logs in again.")
		return nil
	})
	return group("keys", "The keys that seal the records", c, newKeysStatus(), newKeysRotate(), newKeysRetire(), newKeysRewrap())
}

// keyFiles says where a configuration file expects its keys. The keys are made
// before the rest is right, so mistakes don't matter here, nor that there is
// no file yet.
func keyFiles(file string) (keyset, kek string) {
	cfg := &Config{}
	cfg.fill()
	if data, err := os.ReadFile(file); err == nil {
		cfg, _ = parse(data)
	}
	beside := files{filepath.Dir(file)}
	return beside.find(cfg.Keys.Keyset), beside.find(cfg.Keys.KEKFile)
}

// version is set when a release is built.
var version string

// versionText names the version, or else the commit.
func versionText() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return cmp.Or(version, "unknown")
	}
	commit := ""
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			commit = s.Value[:min(12, len(s.Value))]
		}
	}
	return cmp.Or(version, commit, info.Main.Version, "unknown")
}

func newVersion() *cobra.Command {
	return &cobra.Command{Use: "version", Short: "Print the version", Args: cobra.NoArgs, RunE: action(func(c *cobra.Command, _ []string) error {
		if wantsJSON(c) {
			return printJSON(c.OutOrStdout(), map[string]string{"version": versionText(), "go": runtime.Version()})
		}
		_, err := fmt.Fprintf(c.OutOrStdout(), "tokenbroker %s, %s\n", versionText(), runtime.Version())
		return err
	})}
}
