package main

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	pb "tokenbroker/proto/tokenbroker/v1"
)

func newSessions() *cobra.Command {
	return group("sessions", "What the broker holds", newSessionsList(), newSessionsShow())
}

func newSessionsList() *cobra.Command {
	c := &cobra.Command{Use: "list", Short: "The users' grants, and the servers on this host", Args: cobra.NoArgs}
	hub := c.Flags().String("hub", "", "only this hub")
	user := c.Flags().String("user", "", "only this user of the hub")
	adminAction(c, func(c *cobra.Command, _ []string, a pb.AdminClient) error {
		grants, err := a.ListGrants(c.Context(), &pb.ListGrantsRequest{Hub: *hub, User: *user})
		if err != nil {
			return err
		}
		servers, err := a.ListRegistrations(c.Context(), &pb.ListRegistrationsRequest{})
		if err != nil {
			return err
		}
		servers.Registrations = slices.DeleteFunc(servers.Registrations, func(r *pb.Registration) bool {
			return *hub != "" && r.GetHub() != *hub || *user != "" && r.GetUser() != *user
		})
		if wantsJSON(c) {
			return printSessionsJSON(c.OutOrStdout(), grants, servers)
		}
		return printSessions(c.OutOrStdout(), grants.GetGrants(), servers.GetRegistrations())
	})
	return c
}

func printSessionsJSON(w io.Writer, grants *pb.ListGrantsResponse, servers *pb.ListRegistrationsResponse) error {
	all := map[string]json.RawMessage{}
	for _, part := range []json.RawMessage{protoJSON(grants), protoJSON(servers)} {
		if err := json.Unmarshal(part, &all); err != nil {
			return err
		}
	}
	return printJSON(w, all)
}

func printSessions(w io.Writer, grants []*pb.Grant, servers []*pb.Registration) error {
	t := newTable(w, "HUB", "USER", "PROVIDER", "GRANT", "WHY", "NEXT", "ROLES", "REFRESHED", "BY", "ENDS", "TOKENS LIVE UNTIL")
	for _, g := range grants {
		t.row(g.GetHub(), g.GetUser(), g.GetProvider(), stateText(g.GetState()), g.GetReason(), nextText(g), strings.Join(g.GetRoles(), " "),
			when(g.GetRefreshedAt()), g.GetRefreshedBy(), endText(g), when(g.GetOutstandingUntil()))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(w)
	return printServers(w, servers)
}

func printServers(w io.Writer, servers []*pb.Registration) error {
	t := newTable(w, "HUB", "USER", "SERVER", "HOST", "STATE", "WHY", "CONTAINER", "LEVEL")
	for _, r := range servers {
		t.row(r.GetHub(), r.GetUser(), r.GetServer(), r.GetHost(), r.GetState(), r.GetReason(), r.GetContainerName(), r.GetLevel())
	}
	return t.Flush()
}

// stateText is a grant's state as the documents write it.
func stateText(s pb.GrantState) string {
	return strings.ToLower(strings.TrimPrefix(s.String(), "GRANT_STATE_"))
}

// nextText is what happens next, in short.
func nextText(g *pb.Grant) string {
	return strings.TrimSpace(g.GetNext() + " " + when(g.GetNextAt()))
}

// endText is when a grant ends, and whether a refresh can move that.
func endText(g *pb.Grant) string {
	if g.GetEndFixed() {
		return when(g.GetExpiresAt()) + " (fixed)"
	}
	return when(g.GetExpiresAt())
}

func newSessionsShow() *cobra.Command {
	c := &cobra.Command{
		Use:   "show USER",
		Short: "A user's grants: how they are, why, and what happens next",
		Args:  cobra.ExactArgs(1),
	}
	hub := c.Flags().String("hub", "", "only at this hub")
	provider := c.Flags().String("provider", "", "only the grant at this provider")
	adminAction(c, func(c *cobra.Command, args []string, a pb.AdminClient) error {
		if args[0] == "" { // which would ask for all users
			return &failure{2, fmt.Errorf("USER is empty"), "tokenbroker sessions list shows all"}
		}
		r, err := a.ListGrants(c.Context(), &pb.ListGrantsRequest{Hub: *hub, User: args[0], Provider: *provider})
		switch {
		case err != nil:
			return err
		case len(r.GetGrants()) == 0:
			return &failure{1, fmt.Errorf("no grant is linked to a user %q there", args[0]), "tokenbroker sessions list shows who has one"}
		case wantsJSON(c):
			return printJSON(c.OutOrStdout(), protoJSON(r))
		}
		for i, g := range r.GetGrants() {
			if i > 0 {
				fmt.Fprintln(c.OutOrStdout())
			}
			if err := printGrant(c.OutOrStdout(), g); err != nil {
				return err
			}
		}
		return nil
	})
	return c
}

func printGrant(w io.Writer, g *pb.Grant) error {
	t := newTable(w)
	t.row("user", g.GetUser()+", hub "+g.GetHub())
	t.row("account", accountText(g.GetProvider(), g.GetSub(), g.GetUsername()))
	t.row("grant", stateText(g.GetState())+": "+g.GetWhy())
	t.row("next", g.GetNextText())
	t.row("refreshed", byText(when(g.GetRefreshedAt()), g.GetRefreshedBy()))
	t.row("ends", endText(g))
	t.row("tokens live until", when(g.GetOutstandingUntil()))
	t.row("revoked there", g.GetProviderRevocation())
	t.row("roles", strings.Join(g.GetRoles(), " "))
	t.row("servers run on", strings.Join(g.GetRunningOn(), ", "))
	if l := g.GetLease(); l != nil {
		t.row("lease", l.GetHost()+" until "+when(l.GetUntil()))
	} else {
		t.row("lease", "")
	}
	t.row("mark", g.GetMark())
	t.row("version", strconv.FormatInt(g.GetVersion(), 10))
	t.row("epoch", strconv.FormatInt(g.GetEpoch(), 10))
	return t.Flush()
}

func byText(at, host string) string {
	if host == "" {
		return at
	}
	return at + " by " + host
}

func accountText(provider, sub, username string) string {
	text := provider + ", sub " + sub
	if username != "" && username != sub {
		text += " (" + username + ")"
	}
	return text
}
