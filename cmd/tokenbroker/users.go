package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "tokenbroker/proto/tokenbroker/v1"
)

func newUsers() *cobra.Command {
	return group("users", "Who users are, and what is done to them", newUsersShow(), newUsersDisconnect(), newUsersRebind())
}

func newUsersDisconnect() *cobra.Command {
	c := &cobra.Command{
		Use:   "disconnect USER",
		Short: "End a user's grants: no broker of the deployment gives tokens for them from then on",
		Args:  cobra.ExactArgs(1),
	}
	hub := c.Flags().String("hub", "", "the hub; not needed if there is only one")
	provider := c.Flags().String("provider", "", "only the grant at this provider")
	adminAction(c, func(c *cobra.Command, args []string, a pb.AdminClient) error {
		r, err := a.Disconnect(c.Context(), &pb.DisconnectRequest{Hub: *hub, User: args[0], Provider: *provider})
		if err != nil {
			return err
		}
		if wantsJSON(c) {
			return printJSON(c.OutOrStdout(), protoJSON(r))
		}
		return printDisconnected(c.OutOrStdout(), r)
	})
	return c
}

func printDisconnected(w io.Writer, r *pb.DisconnectResponse) error {
	if err := printEnded(w, r.GetDisconnected()); err != nil {
		return err
	}
	if d := r.GetDisconnected(); len(d) > 0 && d[0].GetNotKept() != "" {
		fmt.Fprintf(w, "note: %s\n", d[0].GetNotKept())
	}
	_, err := fmt.Fprintf(w, "ref %s\n", r.GetRef())
	return err
}

func printEnded(w io.Writer, ended []*pb.Disconnected) error {
	t := newTable(w, "PROVIDER", "SUBJECT", "NO NEW TOKENS SINCE", "OLD TOKENS LIVE UNTIL", "REVOKED AT PROVIDER")
	for _, d := range ended {
		t.row(d.GetProvider(), d.GetSub(), when(d.GetIssuingStoppedAt()), when(d.GetOutstandingUntil()), d.GetProviderRevocation())
	}
	return t.Flush()
}

func newUsersShow() *cobra.Command {
	c := &cobra.Command{
		Use:   "show USER",
		Short: "Who a user is at each provider, and what he has",
		Args:  cobra.ExactArgs(1),
	}
	hub := c.Flags().String("hub", "", "the hub; not needed if there is only one")
	adminAction(c, func(c *cobra.Command, args []string, a pb.AdminClient) error {
		u, err := a.ShowUser(c.Context(), &pb.ShowUserRequest{Hub: *hub, User: args[0]})
		if err != nil {
			return err
		}
		if wantsJSON(c) {
			return printJSON(c.OutOrStdout(), protoJSON(u))
		}
		return printUser(c.OutOrStdout(), u)
	})
	return c
}

func printUser(w io.Writer, u *pb.ShowUserResponse) error {
	t := newTable(w)
	t.row("user", u.GetUser()+", hub "+u.GetHub())
	t.row("groups at the hub", strings.Join(u.GetGroups(), ", "))
	t.row("tokens live until", when(u.GetOutstandingUntil()))
	if u.GetReboundAt() != nil {
		t.row("name given anew", when(u.GetReboundAt()))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(w)
	t = newTable(w, "PROVIDER", "SUBJECT", "NAME THERE", "GRANT", "NEXT", "ROLES")
	for _, a := range u.GetAccounts() {
		g, state := a.GetGrant(), "none"
		if g != nil {
			state = stateText(g.GetState())
		}
		t.row(a.GetProvider(), a.GetSub(), g.GetUsername(), state, g.GetNextText(), strings.Join(g.GetRoles(), " "))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(w)
	return printServers(w, u.GetRegistrations())
}

func newUsersRebind() *cobra.Command {
	c := &cobra.Command{
		Use:   "rebind USER --provider P [--sub SUB]",
		Short: "Give a user's name to another account, which inherits nothing",
		Long: `A user of the hub is linked to the account he first logged in with. If the hub
gives his name to somebody else, that one's login is refused, until rebind says
that the name is now another account's: --sub, or whoever logs in next.

It asks before it does anything; --yes answers.`,
		Args: cobra.ExactArgs(1),
	}
	r := &pb.RebindRequest{}
	c.Flags().StringVar(&r.Hub, "hub", "", "the hub; not needed if there is only one")
	c.Flags().StringVar(&r.Provider, "provider", "", "the provider whose account it is")
	c.Flags().StringVar(&r.Sub, "sub", "", "the account's subject there; without it, whoever logs in next under the name")
	yes := c.Flags().Bool("yes", false, "don't ask")
	adminAction(c, func(c *cobra.Command, args []string, a pb.AdminClient) error {
		r.User = args[0]
		if r.GetProvider() == "" {
			return &failure{2, errors.New("--provider is missing"), "tokenbroker users show USER names the user's providers"}
		}
		if !*yes {
			if err := confirmRebind(c, a, r); err != nil {
				return err
			}
		}
		done, err := a.Rebind(c.Context(), r)
		if err != nil {
			return err
		}
		if wantsJSON(c) {
			return printJSON(c.OutOrStdout(), protoJSON(done))
		}
		return printRebound(c.OutOrStdout(), r, done)
	})
	return c
}

// confirmRebind says what a rebind does and asks whether to.
func confirmRebind(c *cobra.Command, a pb.AdminClient, r *pb.RebindRequest) error {
	u, err := a.ShowUser(c.Context(), &pb.ShowUserRequest{Hub: r.GetHub(), User: r.GetUser()})
	if err != nil && status.Code(err) != codes.InvalidArgument { // a user who is not known yet may be given an account
		return err
	}
	w := c.ErrOrStderr()
	fmt.Fprint(w, rebindText(u, r))
	fmt.Fprint(w, "Type yes to go on: ")
	line, err := bufio.NewReader(c.InOrStdin()).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read the answer: %w", err)
	}
	if strings.TrimSpace(line) != "yes" {
		return &failure{1, errors.New("nothing was changed"), "--yes answers the question"}
	}
	return nil
}

// rebindText is what a rebind would do to u.
func rebindText(u *pb.ShowUserResponse, r *pb.RebindRequest) string {
	var b strings.Builder
	var ends []*pb.Account
	for _, a := range u.GetAccounts() {
		if a.GetProvider() == r.GetProvider() {
			fmt.Fprintf(&b, "%s of hub %s is now %s.\n", u.GetUser(), u.GetHub(), accountText(a.GetProvider(), a.GetSub(), a.GetGrant().GetUsername()))
			ends = []*pb.Account{a}
			if a.GetLogin() {
				ends = u.GetAccounts() // all that the person leaves behind
				break
			}
		}
	}
	if r.GetSub() == "" {
		fmt.Fprintf(&b, "From now on it is whoever logs in next through %s under this name.\n", r.GetProvider())
	} else {
		fmt.Fprintf(&b, "From now on it is %s.\n", accountText(r.GetProvider(), r.GetSub(), ""))
	}
	for _, a := range ends {
		if a.GetGrant() != nil {
			fmt.Fprintf(&b, "- The grant of %s ends for good, and %s is told to revoke it; tokens already issued live until %s.\n",
				accountText(a.GetProvider(), a.GetSub(), ""), a.GetProvider(), when(a.GetGrant().GetOutstandingUntil()))
		}
	}
	if len(ends) > 0 && slices.ContainsFunc(ends, func(a *pb.Account) bool { return a.GetLogin() }) {
		fmt.Fprint(&b, "- Sessions of that account at the hub end.\n- Servers that are running get no tokens until they are stopped and started again.\n")
	}
	return b.String()
}

func printRebound(w io.Writer, r *pb.RebindRequest, done *pb.RebindResponse) error {
	fmt.Fprintf(w, "%s: %s\n", r.GetUser(), fromTo(done.GetWasSub(), done.GetSub()))
	if len(done.GetEnded()) > 0 {
		if err := printEnded(w, done.GetEnded()); err != nil {
			return err
		}
	}
	_, err := fmt.Fprintf(w, "ref %s\n", done.GetRef())
	return err
}

func fromTo(was, is string) string {
	before, after := "linked to nobody before", "now waits for the next login"
	if was != "" {
		before = "was sub " + was
	}
	if is != "" {
		after = "is now sub " + is
	}
	return before + ", " + after
}

func newExplain() *cobra.Command {
	c := &cobra.Command{
		Use:   "explain --user U [--provider P]",
		Short: "Which rule answers a container's request, and what it would get",
		Long: `Explain takes the steps that a container's request takes, with the user's grant
and roles as they are at this moment, and stops before a provider would be asked.
It issues nothing and changes nothing.`,
		Args: cobra.NoArgs,
	}
	r := &pb.ExplainRequest{}
	c.Flags().StringVar(&r.User, "user", "", "the hub's user")
	c.Flags().StringVar(&r.Hub, "hub", "", "the hub; not needed if there is only one")
	c.Flags().StringVar(&r.Server, "server", "", "the server's name; the default server's is empty")
	c.Flags().StringVar(&r.Provider, "provider", "", "whose token; else the hub's login provider's")
	c.Flags().StringVar(&r.Audience, "audience", "", "the token's audience")
	c.Flags().StringSliceVar(&r.Scopes, "scopes", nil, "the token's scopes, separated by commas")
	adminAction(c, func(c *cobra.Command, _ []string, a pb.AdminClient) error {
		if r.GetUser() == "" {
			return &failure{2, errors.New("--user is missing"), "tokenbroker sessions list shows who there is"}
		}
		x, err := a.Explain(c.Context(), r)
		if err != nil {
			return err
		}
		if wantsJSON(c) {
			return printJSON(c.OutOrStdout(), protoJSON(x))
		}
		return printExplained(c.OutOrStdout(), x)
	})
	return c
}

func printExplained(w io.Writer, x *pb.ExplainResponse) error {
	t := newTable(w)
	if e := x.GetRefusal(); e != nil {
		t.row("answer", "no ("+e.GetCode()+")")
		t.row("the user is told", e.GetSentence()+"; "+e.GetNext())
	} else {
		t.row("answer", "yes")
	}
	rule := "none covers this"
	if x.GetRule() > 0 {
		rule = fmt.Sprintf("%d  %s", x.GetRule(), x.GetRuleText())
	}
	t.row("rule", rule)
	if x.GetRule() > 0 {
		t.row("roles that it wants", strings.Join(x.GetNeeds(), " or "))
		t.row("of these the user has", strings.Join(x.GetFits(), " "))
	}
	t.row("the user's roles", strings.Join(x.GetHas(), " "))
	printIssued(t, x)
	if g := x.GetGrant(); g != nil {
		t.row("grant", stateText(g.GetState())+": "+g.GetWhy())
		t.row("next", g.GetNextText())
	} else {
		t.row("grant", "none")
	}
	t.row("tokens live until", when(x.GetOutstandingUntil()))
	for _, a := range x.GetAssumed() {
		t.row("assumed", a)
	}
	return t.Flush()
}

// printIssued adds what the token would be, unless policy refuses it.
func printIssued(t table, x *pb.ExplainResponse) {
	yes := x.GetRefusal() == nil
	if !yes && x.GetAudience() == "" && len(x.GetScopes()) == 0 {
		return
	}
	t.row("audience", x.GetAudience())
	t.row("scopes", strings.Join(x.GetScopes(), " "))
	if asked := x.GetAskedScopes(); len(asked) > 0 && !slices.Equal(asked, x.GetScopes()) {
		t.row("scopes asked for", strings.Join(asked, " "))
	}
	if ttl := x.GetMaxTtl(); ttl > 0 {
		t.row("lives at most", (time.Duration(ttl) * time.Second).String())
	}
	if x.GetUnverified() {
		t.row("unverified", "a token that can't be read is allowed")
	}
	if until := x.GetCachedUntil(); until != nil {
		t.row("from the cache", "a token that ends at "+when(until))
	} else if yes {
		t.row("from the cache", "nothing; "+x.GetProvider()+" would be asked")
	}
}
