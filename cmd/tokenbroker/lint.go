package main

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"

	"tokenbroker/broker"
)

// lint looks for what a configuration without mistakes does not mean: rules that
// nothing reaches and names that nothing has. What it can't be sure of it does
// not say.
func lint(c *Config, d *decoder) Mistakes {
	k := checker{c, &decoder{lines: d.lines}, nil}
	all := rules(c.Policy)
	for i := range all {
		key := fmt.Sprintf("policy[%d]", i)
		k.reached(key, all[:i], &all[i])
		k.canMatch(key, &all[i])
		k.knownAudiences(key, &all[i])
		k.reachable(key, &all[i])
	}
	return k.d.mistakes
}

// each notes the items of a list that are bad.
func each[T any](k checker, key string, list []T, bad func(T) bool, text string) {
	for i, v := range list {
		if bad(v) {
			k.add(fmt.Sprintf("%s[%d]", key, i), text, v)
		}
	}
}

// reached notes a rule that an earlier one leaves nothing.
func (k checker) reached(key string, before []broker.Rule, r *broker.Rule) {
	for i := range before {
		if before[i].Covers(r) {
			k.add(key, "is never reached: policy[%d] in line %d answers all that it would", i, k.d.lines[fmt.Sprintf("policy[%d]", i)])
			return
		}
	}
}

// canMatch notes what no user, server, image or role can be.
func (k checker) canMatch(key string, r *broker.Rule) {
	const noPattern = "%q never matches: a star stands for any text in images only"
	each(k, key+".users", r.Users, starred, noPattern)
	each(k, key+".servers", r.Servers, starred, noPattern)
	each(k, key+".groups", r.Groups, starred, noPattern)
	if k.c.Servers.Attestation == "process" {
		each(k, key+".images", r.Images, func(image string) bool { return strings.Trim(image, "*") != "" },
			"%q never matches: with servers.attestation: process there are no images")
	}
	each(k, key+".images", r.Images, func(image string) bool { return strings.ContainsAny(image, " \t") || strings.Contains(image, "://") },
		"%q never matches: an image reference has no spaces and no scheme")
	for i, role := range r.Roles {
		if owner, claim, ok := k.unknownClaim(role, r.Provider); ok {
			k.add(fmt.Sprintf("%s.roles[%d]", key, i), "%q never matches: %s shows roles in %s, not in %s; a role is VALUE or CLAIM/VALUE",
				role, owner, strings.Join(k.c.Providers[owner].Roles, ", "), claim)
		}
	}
}

func starred[T ~string](name T) bool { return strings.Contains(string(name), "*") }

// unknownClaim says whether a role names a claim that its provider does not show.
func (k checker) unknownClaim(role string, provider broker.ProviderID) (owner broker.ProviderID, claim string, ok bool) {
	owner, value := k.roleOf(role, provider)
	claim, _, found := strings.Cut(value, "/")
	return owner, claim, found && claim != "" && !slices.ContainsFunc(k.c.Providers[owner].Roles, func(name string) bool {
		return strings.HasPrefix(value, name+"/")
	})
}

// knownAudiences notes audiences that are missing where audiences are listed.
func (k checker) knownAudiences(key string, r *broker.Rule) {
	known := k.c.Providers[r.Provider].Audiences
	if len(known) == 0 {
		return
	}
	each(k, key+".audiences", r.Audiences, func(a string) bool { _, ok := known[a]; return !ok },
		"%q is not in providers."+string(r.Provider)+".audiences, which has "+list(known)+"; if it needs no scope, say so there with []")
}

// reachable notes a level of attestation that no server has here.
func (k checker) reachable(key string, r *broker.Rule) {
	if k.c.Servers.Attestation == "process" && r.RequireAttestation != "" && r.RequireAttestation != "uid" {
		k.add(key+".require_attestation", "%s is never reached: with servers.attestation: process it is uid", r.RequireAttestation)
	}
}

// lintOnline asks the providers which scopes they know. Only those that say so
// are believed, and even they may keep some to themselves.
func lintOnline(ctx context.Context, c *Config, d *decoder) Mistakes {
	k := checker{c, &decoder{lines: d.lines}, nil}
	for _, name := range slices.Sorted(maps.Keys(c.Providers)) {
		scopes, err := scopesOf(ctx, name, c.Providers[name])
		if err != nil {
			k.add("providers."+string(name), "could not be asked for its scopes: %v", err)
		}
		if len(scopes) == 0 {
			continue
		}
		unknown := func(s string) bool { return !slices.Contains(scopes, s) }
		text := "%q is not among the scopes that " + string(name) + " says it knows (scopes_supported)"
		for i, r := range c.Policy {
			if r.Provider == name {
				each(k, fmt.Sprintf("policy[%d].scopes", i), r.Scopes, unknown, text)
			}
		}
		for hub, h := range c.Hubs {
			if h.Login == name {
				each(k, fmt.Sprintf("hubs.%s.scopes", hub), h.Scopes, unknown, text)
			}
		}
		for a, needs := range c.Providers[name].Audiences {
			each(k, fmt.Sprintf("providers.%s.audiences.%s", name, a), needs, unknown, text)
		}
	}
	return k.d.mistakes
}

func scopesOf(ctx context.Context, name broker.ProviderID, c ProviderConfig) ([]string, error) {
	p, err := openProvider(name, c, slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, doctorTime)
	defer cancel()
	return p.ScopesSupported(ctx)
}
