package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	pb "tokenbroker/proto/tokenbroker/v1"
)

// adminAction makes f the body of a command that asks a running broker.
func adminAction(c *cobra.Command, f func(*cobra.Command, []string, pb.AdminClient) error) {
	socket := c.Flags().String("socket", "/run/tokenbroker/admin.sock", "the broker's admin socket")
	c.RunE = action(func(c *cobra.Command, args []string) error {
		conn, err := grpc.NewClient("unix:"+*socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return fmt.Errorf("open %s: %w", *socket, err)
		}
		defer conn.Close()
		err = f(c, args, pb.NewAdminClient(conn))
		var known *failure
		if err == nil || errors.As(err, &known) {
			return err
		}
		return explain(*socket, err)
	})
}

// checkBroker asks a running broker; that none runs is no fault.
func checkBroker(ctx context.Context, cfg *Config) []finding {
	conn, err := grpc.NewClient("unix:"+cfg.Admin.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return []finding{found("broker", "", err)}
	}
	defer conn.Close()
	s, err := pb.NewAdminClient(conn).Status(ctx, &pb.StatusRequest{})
	if err != nil {
		return []finding{{"broker", "note", explain(cfg.Admin.Socket, err).Error()}}
	}
	return []finding{{"broker", "ok", "version " + s.GetVersion() + " runs since " + when(s.GetStartedAt())}}
}

// explain makes a failure of what a call of the admin service returned.
func explain(socket string, err error) error {
	st, ok := status.FromError(err)
	if !ok {
		return err
	}
	for _, d := range st.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			return &failure{exitOf(st.Code()), errors.New(st.Message()), info.GetMetadata()["next"]}
		}
	}
	if st.Code() == codes.Unavailable {
		return &failure{5, fmt.Errorf("no broker answers at %s", socket), "is it running, and are you root or its user?"}
	}
	return &failure{exitOf(st.Code()), errors.New(st.Message()), ""}
}

// exitOf is the exit code for an answer; see run.
func exitOf(c codes.Code) int {
	switch c {
	case codes.InvalidArgument:
		return 2
	case codes.PermissionDenied, codes.Unauthenticated:
		return 3
	case codes.Unavailable:
		return 5
	}
	return 1
}

func newStatus() *cobra.Command {
	c := &cobra.Command{Use: "status", Short: "How the broker and what it stands on are doing", Args: cobra.NoArgs}
	adminAction(c, func(c *cobra.Command, _ []string, a pb.AdminClient) error {
		s, err := a.Status(c.Context(), &pb.StatusRequest{})
		if err != nil {
			return err
		}
		if wantsJSON(c) {
			return printJSON(c.OutOrStdout(), protoJSON(s))
		}
		return printStatus(c.OutOrStdout(), s)
	})
	return c
}

func printStatus(w io.Writer, s *pb.StatusResponse) error {
	t := newTable(w)
	t.row("deployment", s.GetDeployment())
	t.row("host", s.GetHost())
	t.row("version", s.GetVersion())
	t.row("started", when(s.GetStartedAt())+", "+short(time.Since(s.GetStartedAt().AsTime()))+" ago")
	t.row("revision", strconv.FormatInt(s.GetRevision(), 10))
	t.row("store", partText(s.GetStore()))
	t.row("attestation", partText(s.GetAttestation()))
	for _, p := range s.GetProviders() {
		t.row("provider "+p.GetName(), partText(p))
	}
	var counts []string
	for _, state := range slices.Sorted(maps.Keys(s.GetRegistrations())) {
		counts = append(counts, fmt.Sprintf("%d %s", s.GetRegistrations()[state], state))
	}
	t.row("servers", strings.Join(counts, ", "))
	return t.Flush()
}

func partText(p *pb.PartStatus) string {
	switch {
	case !p.GetOk():
		return "FAILS  " + p.GetDetail()
	case p.GetDetail() == "ok":
		return "ok"
	}
	return "ok  " + p.GetDetail()
}
