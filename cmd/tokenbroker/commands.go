package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
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
		return nil, &failure{1, fmt.Errorf("%s has %s:\n%w", path, count(len(wrong), "mistake"), wrong), ""}
	case err != nil:
		return nil, &failure{1, err, "name another file with --config"}
	}
	return cfg, nil
}

// count says how many there are of something.
func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func newConfig() *cobra.Command {
	check := &cobra.Command{Use: "check", Short: "Name everything that is wrong with a configuration file", Args: cobra.NoArgs}
	file := configFlag(check)
	check.RunE = action(func(c *cobra.Command, _ []string) error {
		if wantsJSON(c) {
			return checkJSON(c.OutOrStdout(), *file)
		}
		cfg, err := loadConfig(*file)
		if err != nil {
			return err
		}
		fmt.Fprintf(c.OutOrStdout(), "%s is right: %s, %s, %s\n", *file,
			count(len(cfg.Hubs), "hub"), count(len(cfg.Providers), "provider"), count(len(cfg.Policy), "rule"))
		return nil
	})
	return group("config", "The configuration file", check, newConfigPrint())
}

// checkJSON prints the mistakes for programs.
func checkJSON(w io.Writer, file string) error {
	_, err := load(file)
	var wrong Mistakes
	if err != nil && !errors.As(err, &wrong) {
		return err
	}
	answer := struct {
		File     string   `json:"file"`
		Mistakes Mistakes `json:"mistakes"`
	}{file, append(Mistakes{}, wrong...)}
	if err := printJSON(w, answer); err != nil || len(wrong) == 0 {
		return err
	}
	return fmt.Errorf("%s has %s", file, count(len(wrong), "mistake"))
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
