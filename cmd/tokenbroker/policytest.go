package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"tokenbroker/broker"
)

// A policyTest is a file that says what the policy should answer. The comments
// of its fields are its manual.
type policyTest struct {
	Cases []policyCase `yaml:"cases"`
}

// policyCase is one request and what should come of it.
type policyCase struct {
	// Why says what the case is about.
	Why string `yaml:"why"`
	// Hub is where the user's server runs. Default: the only one.
	Hub broker.HubID `yaml:"hub"`
	// User, Server and Image say whose server it is, and which. A server without
	// a name is the default one.
	User   broker.UserID     `yaml:"user"`
	Server broker.ServerName `yaml:"server"`
	Image  string            `yaml:"image"`
	// Roles are what providers say of the user: CLAIM/VALUE for the provider that
	// is asked for, or PROVIDER:CLAIM/VALUE. Groups are his groups at the hub.
	Roles  []string `yaml:"roles"`
	Groups []string `yaml:"groups"`
	// Shared says that somebody else may open the server.
	Shared bool `yaml:"shared"`
	// Attestation is the level of the server's host. Default: the best that
	// servers.attestation gives.
	Attestation string `yaml:"attestation"`
	// Provider, Audience and Scopes are what is asked for, as a notebook does.
	// Default: the hub's login provider, and what the rule says.
	Provider broker.ProviderID `yaml:"provider"`
	Audience string            `yaml:"audience"`
	Scopes   []string          `yaml:"scopes"`
	// Allow or Deny is what should come of it: a token like this, or a refusal
	// that says this.
	Allow *allowed `yaml:"allow"`
	Deny  string   `yaml:"deny"`
}

// allowed is a token that the policy gives. What is left out may be anything.
type allowed struct {
	// Rule is the number of the rule that answers, the first is 1.
	Rule int `yaml:"rule"`
	// Audience and Scopes are what the token is for.
	Audience string   `yaml:"audience"`
	Scopes   []string `yaml:"scopes"`
}

func newPolicy() *cobra.Command {
	test := &cobra.Command{
		Use:   "test FILE",
		Short: "Try the policy on a table of requests and what should come of them",
		Long: `Try the policy of a configuration file on a table of requests and what should
come of them. Nobody is asked, and no secret or key need be there.

  cases:
  - {why: researchers write, user: alice, roles: [roles/researcher], audience: storage, allow: {rule: 1}}
  - {why: students do not, user: bob, roles: [roles/student], audience: storage, deny: needs one of the roles researcher}

A case also has hub, server, image, groups, shared, attestation, provider and scopes.`,
		Args: cobra.ExactArgs(1),
	}
	config := configFlag(test)
	test.RunE = action(func(c *cobra.Command, args []string) error { return tryPolicy(c, *config, args[0]) })
	return group("policy", "The policy", test)
}

// A policyMiss is a case in which the policy answers otherwise.
type policyMiss struct {
	Line int    `json:"line"`
	Why  string `json:"why"`
	Want string `json:"want"`
	Got  string `json:"got"`
}

func tryPolicy(c *cobra.Command, config, file string) error {
	cfg, err := loadPolicy(config)
	if err != nil {
		return err
	}
	cases, d, err := readCases(file, cfg)
	if err != nil {
		return err
	}
	missed := []policyMiss{}
	for i := range cases {
		if m, ok := cases[i].try(cfg); !ok {
			m.Line = d.lines[fmt.Sprintf("cases[%d]", i)]
			missed = append(missed, m)
		}
	}
	if wantsJSON(c) {
		err = printJSON(c.OutOrStdout(), map[string]any{"file": file, "cases": len(cases), "missed": missed})
	} else {
		err = printMissed(c, file, len(cases), missed)
	}
	if err == nil && len(missed) > 0 {
		err = fmt.Errorf("%d of %s in %s did not come out", len(missed), count(len(cases), "case"), file)
	}
	return err
}

func printMissed(c *cobra.Command, file string, n int, missed []policyMiss) error {
	w := c.OutOrStdout()
	for _, m := range missed {
		fmt.Fprintf(w, "line %d: %s\n  want: %s\n  got:  %s\n", m.Line, m.Why, m.Want, m.Got)
	}
	if len(missed) > 0 {
		return nil
	}
	_, err := fmt.Fprintf(w, "%s: %s as expected\n", file, count(n, "case"))
	return err
}

// loadPolicy reads what a policy needs of a configuration file. Secrets and keys
// need not be there, so that it can be tried where they must not be.
func loadPolicy(path string) (*Config, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, &failure{1, fmt.Errorf("read configuration: %w", err), "name another file with --config"}
	}
	c, d := parse(data)
	if !d.broken {
		k := checker{c, d, nil}
		k.names()
		if len(c.Providers) == 0 {
			k.add("providers", "there is none")
		}
		k.logins()
		k.policy()
	}
	if len(d.mistakes) > 0 {
		d.mistakes.sort()
		return nil, mistaken(path, d.mistakes)
	}
	return c, nil
}

// readCases reads the table, fills it in and notes what in it can't be meant.
func readCases(path string, cfg *Config) ([]policyCase, *decoder, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, nil, fmt.Errorf("read cases: %w", err)
	}
	var t policyTest
	d := decode(data, &t)
	k := checker{cfg, d, nil}
	if len(t.Cases) == 0 && len(d.mistakes) == 0 {
		k.add("cases", "there is none")
	}
	for i := range t.Cases {
		k.policyCase(fmt.Sprintf("cases[%d]", i), &t.Cases[i])
	}
	if len(d.mistakes) > 0 {
		d.mistakes.sort()
		return nil, nil, mistaken(path, d.mistakes)
	}
	return t.Cases, d, nil
}

func (k checker) policyCase(key string, c *policyCase) {
	if len(k.c.Hubs) == 1 && c.Hub == "" {
		for only := range k.c.Hubs {
			c.Hub = only
		}
	}
	if _, ok := k.c.Hubs[c.Hub]; !ok {
		k.add(key+".hub", "there is no hub %q; there are %s", c.Hub, list(k.c.Hubs))
	}
	def(&c.Provider, k.c.Hubs[c.Hub].Login)
	if c.Provider != "" {
		k.provider(key+".provider", c.Provider)
	}
	best := broker.Levels()[len(broker.Levels())-1]
	if k.c.Servers.Attestation == "process" {
		best = "uid"
	}
	def(&c.Attestation, best)
	if !slices.Contains(broker.Levels(), c.Attestation) {
		k.add(key+".attestation", "there is no level %q; there are %s", c.Attestation, strings.Join(broker.Levels(), ", "))
	}
	if (c.Allow == nil) == (c.Deny == "") {
		k.add(key, "wants either allow or deny")
	}
	for i := range c.Roles {
		c.Roles[i] = k.fullRole(fmt.Sprintf("%s.roles[%d]", key, i), c.Roles[i], c.Provider)
	}
}

// fullRole is role as the broker would have it of its provider.
func (k checker) fullRole(key, role string, provider broker.ProviderID) string {
	owner, value := k.roleOf(role, provider)
	p, ok := k.c.Providers[owner]
	claim := func(name string) bool { return strings.HasPrefix(value, name+"/") }
	switch {
	case !ok:
		k.provider(key, owner)
	case !slices.ContainsFunc(p.Roles, claim):
		k.add(key, "%q is not in a claim that %s shows as roles (%s); write it as CLAIM/VALUE", role, owner, strings.Join(p.Roles, ", "))
	}
	return string(owner) + ":" + value
}

// try asks the policy, and says whether the answer is the one that is wanted.
func (c *policyCase) try(cfg *Config) (policyMiss, bool) {
	d, err := broker.Decide(rules(cfg.Policy), broker.Facts{
		Server: broker.ServerKey{Hub: c.Hub, User: c.User, Server: c.Server}, Image: c.Image,
		Roles: c.Roles, Groups: c.Groups, Shared: c.Shared, Level: c.Attestation,
	}, broker.Want{Provider: c.Provider, Audience: c.Audience, Scopes: c.Scopes})
	m := policyMiss{Why: c.Why, Want: c.wanted()}
	var said *broker.Error
	switch {
	case errors.As(err, &said):
		m.Got = fmt.Sprintf("%s: %s", said.Code, said.Sentence)
		return m, c.Deny != "" && strings.Contains(said.Sentence, c.Deny)
	case err != nil:
		m.Got = err.Error()
		return m, false
	}
	got := allowed{d.Rule, d.Target.Audience, d.Target.Scopes}
	m.Got = got.String()
	return m, c.Allow != nil && c.Allow.fits(got)
}

func (c *policyCase) wanted() string {
	if c.Allow == nil {
		return "a refusal that says: " + c.Deny
	}
	return c.Allow.String()
}

func (a *allowed) fits(got allowed) bool {
	scopes := slices.Clone(a.Scopes)
	slices.Sort(scopes)
	return (a.Rule == 0 || a.Rule == got.Rule) && (a.Audience == "" || a.Audience == got.Audience) &&
		(a.Scopes == nil || slices.Equal(scopes, got.Scopes))
}

// String says a for people.
func (a *allowed) String() string {
	var parts []string
	if a.Rule != 0 {
		parts = append(parts, fmt.Sprintf("rule %d", a.Rule))
	}
	if a.Audience != "" {
		parts = append(parts, "audience "+a.Audience)
	}
	if len(a.Scopes) > 0 {
		parts = append(parts, "scopes "+strings.Join(a.Scopes, " "))
	}
	return strings.Join(append([]string{"a token"}, parts...), ", ")
}
