package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"

	"github.com/spf13/cobra"

	"tokenbroker/broker"
)

func newServe() *cobra.Command {
	c := &cobra.Command{Use: "serve", Short: "Run the broker", Args: cobra.NoArgs}
	file := configFlag(c)
	c.RunE = action(func(c *cobra.Command, _ []string) error {
		cfg, err := loadConfig(*file)
		if err != nil {
			return err
		}
		log := slog.New(slog.NewJSONHandler(c.ErrOrStderr(), nil))
		return serve(c.Context(), cfg, c.OutOrStdout(), log, func(b *broker.Broker) {
			log.Info("serving", "version", versionText(), "deployment", cfg.Deployment, "host", cfg.Host,
				"hubs", len(cfg.Hubs), "servers", len(b.Registrations()))
			if err := notify("READY=1"); err != nil {
				log.Warn("systemd was not told that we are ready", "err", err)
			}
			go reportParts(c.Context(), b, log)
		})
	})
	return c
}

// reportParts logs what does not work at the start. The broker serves all the
// same: it answers what it can, and what is down may come up.
func reportParts(ctx context.Context, b *broker.Broker, log *slog.Logger) {
	s := b.Status(ctx)
	for _, p := range append(s.Providers, s.Store, s.Attestation) {
		if !p.OK && ctx.Err() == nil {
			log.Warn("a part does not work", "part", p.Name, "why", p.Detail)
		}
	}
	if s.Attestation.OK {
		log.Info("attestation works", "level", s.Attestation.Detail)
	}
}

// notify tells systemd how we do, if it asked to be told (sd_notify(3)).
func notify(state string) error {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("notify systemd: %w", err)
	}
	defer conn.Close()
	_, err = conn.Write([]byte(state))
	return err
}
