package broker

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// A Rule says who may have which tokens. Every condition that is given must
// hold; within one condition any of its values will do. The first rule that
// covers a request answers it; if none does, the answer is no.
type Rule struct {
	// Who. An empty list allows all.
	Hubs    []HubID
	Users   []UserID
	Servers []ServerName
	Images  []string // image references; * stands for any text
	// Roles are "value" or "claim/value" of Provider, or "provider:claim/value".
	// A value with a slash, unless that is its first character, needs its claim:
	// a group called roles/admin must not pass for the role admin.
	Roles []string
	// Groups are the user's groups at his hub: for a site that keeps its roles
	// there. They are no roles of a provider and satisfy only this. Where several
	// hubs are served, Hubs says whose.
	Groups []string
	// Shared gives tokens also while somebody else may open the server.
	Shared bool
	// RequireAttestation is the least of Levels that will do; empty: any.
	RequireAttestation string

	// OnRoleLost is what else happens to a user who loses the last of Roles or of
	// Groups, or the session with it; empty: Deny.
	OnRoleLost OnRoleLost

	// What.
	Provider  ProviderID
	Audiences []string
	Scopes    []string
	MaxTTL    time.Duration // refuse longer tokens; 0: any
	// Unverified allows tokens whose scopes, audience or end can't be read.
	// What can be read must still lie inside the rule.
	Unverified bool
}

// Facts is what a decision rests on besides the request.
type Facts struct {
	Server ServerKey
	Image  string
	Roles  []string // canonical, provider:claim/value
	Groups []string // at the hub
	Shared bool     // somebody else may open the server
	Level  string   // of attestation
	// Proved is what Level would be if nobody on the host could forge proofs, and
	// Lowered who can, for operators; empty: nobody.
	Proved, Lowered string
}

// A Decision is policy's answer: the most that the token may be.
type Decision struct {
	Rule       int // counted from 1; 0: none, it is the hub's own token
	Provider   ProviderID
	Target     Target
	MaxTTL     time.Duration
	Unverified bool
}

// Decide answers want, whose Provider is set, for f. It is pure: the same three
// inputs give the same answer. The errors are Denied, with what is missing, and
// Invalid for a request without an audience where the rule has several; of the
// decision only Rule is set then, if it is one rule that refuses.
func Decide(rules []Rule, f Facts, want Want) (Decision, error) {
	var near *Rule // lacks the fewest conditions
	var by int     // near, counted from 1
	var lacks []lack
	for i := range rules {
		r := &rules[i]
		if !r.meets(f) || !r.covers(want) {
			continue
		}
		if l := r.lacks(f); len(l) > 0 {
			if near == nil || len(l) < len(lacks) {
				near, by, lacks = r, i+1, l
			}
			continue
		}
		audience, err := r.audience(want.Audience)
		if err != nil {
			return Decision{Rule: i + 1}, err
		}
		scopes := want.Scopes
		if len(scopes) == 0 {
			scopes = r.Scopes
		}
		return Decision{
			Rule:       i + 1,
			Provider:   r.Provider,
			Target:     Target{Audience: audience, Scopes: sorted(scopes)},
			MaxTTL:     r.MaxTTL,
			Unverified: r.Unverified,
		}, nil
	}
	return Decision{Rule: by}, refusal(near, lacks, f, want)
}

// meets is what a server is or is not: the conditions that nothing done for its
// user would change. The others are in lacks.
func (r *Rule) meets(f Facts) bool {
	return oneOf(r.Hubs, f.Server.Hub) && oneOf(r.Users, f.Server.User) &&
		oneOf(r.Servers, f.Server.Server) &&
		(len(r.Images) == 0 || slices.ContainsFunc(r.Images, func(p string) bool { return glob(p, f.Image) }))
}

func (r *Rule) covers(want Want) bool {
	return r.Provider == want.Provider &&
		(want.Audience == "" || slices.Contains(r.Audiences, want.Audience)) &&
		subset(want.Scopes, r.Scopes)
}

func (r *Rule) hasRole(roles []string) bool {
	return len(r.Roles) == 0 || slices.ContainsFunc(r.Roles, func(want string) bool {
		return slices.ContainsFunc(roles, func(have string) bool { return r.names(want, have) })
	})
}

func (r *Rule) hasGroup(groups []string) bool {
	return len(r.Groups) == 0 || slices.ContainsFunc(r.Groups, func(g string) bool { return slices.Contains(groups, g) })
}

// names says whether want, as written in the rule, means the canonical role have.
func (r *Rule) names(want, have string) bool {
	own, ok := strings.CutPrefix(have, string(r.Provider)+":")
	if strings.Index(want, "/") > 0 {
		return want == have || ok && want == own
	}
	_, value, _ := strings.Cut(own, "/")
	return ok && want == value
}

func (r *Rule) audience(want string) (string, error) {
	switch {
	case want != "":
		return want, nil
	case len(r.Audiences) > 1:
		return "", Errorf(Invalid, "audience is empty, and there are several: %s", list(r.Audiences)).
			Hint("name one of them as audience")
	case len(r.Audiences) == 1:
		return r.Audiences[0], nil
	}
	return "", nil
}

// A lack is a condition of a rule that does not hold but could, as what a user
// is told of it; what is the token that he asked for.
type lack func(r *Rule, f Facts, what string) *Error

// lacks are the conditions that r finds wanting in f, in the order in which they
// are worth being told: no longer sharing a server does not help who has no role.
func (r *Rule) lacks(f Facts) (all []lack) {
	if !r.hasRole(f.Roles) {
		all = append(all, noRole)
	}
	if !r.hasGroup(f.Groups) {
		all = append(all, noGroup)
	}
	if !reaches(f.Level, r.RequireAttestation) {
		all = append(all, lowLevel)
	}
	if f.Shared && !r.Shared {
		all = append(all, isShared)
	}
	return all
}

func noRole(r *Rule, f Facts, what string) *Error {
	return Errorf(Denied, "%s needs one of the roles %s; you have %s", what, list(r.Roles), list(ownRoles(r.Provider, f.Roles)))
}

func noGroup(r *Rule, f Facts, what string) *Error {
	return Errorf(Denied, "%s needs one of the hub's groups %s; you are in %s", what, list(r.Groups), list(sorted(f.Groups)))
}

// lowLevel names no neighbour to the user: it may be another user's server.
func lowLevel(r *Rule, f Facts, what string) *Error {
	says := fmt.Sprintf("%s needs attestation %s or better; this server has %s", what, r.RequireAttestation, cmp.Or(f.Level, "none"))
	if f.Lowered != "" && reaches(f.Proved, r.RequireAttestation) {
		return Errorf(Denied, "%s, because of a container that runs on its host", says).
			Hint("ask {contact}: the broker's log names that container").Because(errors.New(f.Lowered))
	}
	return Errorf(Denied, "%s", says).Hint("ask {contact}: the host of this server must prove more about who calls")
}

func isShared(*Rule, Facts, string) *Error {
	return Errorf(Denied, "tokens are off while this server is shared").
		Hint("end the sharing at the hub, which tells us within minutes, or ask {contact}: a rule may allow it")
}

// refusal says what would have to be different: of the rule that lacks the
// fewest conditions, the first of these.
func refusal(near *Rule, lacks []lack, f Facts, want Want) error {
	what := fmt.Sprintf("a token for %s", want.Provider)
	if want.Audience != "" {
		what += fmt.Sprintf(" with audience %q", want.Audience)
	}
	if len(want.Scopes) > 0 {
		what += " with scopes " + list(want.Scopes)
	}
	if near == nil {
		return Errorf(Denied, "no rule gives you %s here", what)
	}
	return lacks[0](near, f, what)
}

// ownRoles shortens the roles of provider to how rules and people write them.
func ownRoles(provider ProviderID, roles []string) []string {
	var own []string
	for _, role := range roles {
		if s, ok := strings.CutPrefix(role, string(provider)+":"); ok {
			_, s, _ = strings.Cut(s, "/")
			role = s
		}
		own = append(own, role)
	}
	return sorted(own)
}

// target is what the provider is asked for: the decision, and the scopes
// without which it does not grant the audience.
func (d *Decision) target(info ProviderInfo) Target {
	return Target{Audience: d.Target.Audience, Scopes: sorted(slices.Concat(d.Target.Scopes, info.Audiences[d.Target.Audience]))}
}

// holds says whether a token lies inside the decision. A provider may drop
// scopes, ignore the audience or give more than was asked, all without a word,
// so what it gave is read, never assumed.
func (d *Decision) holds(info ProviderInfo, t *cachedToken) error {
	asked := d.target(info)
	if err := d.holdsScopes(info, asked, t); err != nil {
		return err
	}
	if err := d.holdsAudience(info, t); err != nil {
		return err
	}
	switch {
	case t.Life == 0 && !d.Unverified:
		return Errorf(Unsatisfiable, "%s does not say how long its token lives", d.Provider).Hint(askForUnverified)
	case d.MaxTTL > 0 && t.Life > d.MaxTTL:
		return Errorf(Unsatisfiable, "%s gives tokens of %s, and your rule allows %s at most", d.Provider, t.Life, d.MaxTTL).
			Hint("ask {contact}: the client's token life at the provider, or the rule's max_ttl, must change")
	}
	return nil
}

const askForUnverified = "ask {contact}: only a rule with unverified: true allows such tokens"

func (d *Decision) holdsScopes(info ProviderInfo, asked Target, t *cachedToken) error {
	if !t.ScopesKnown {
		if d.Unverified {
			return nil
		}
		return Errorf(Unsatisfiable, "the scopes of %s's token can't be read", d.Provider).Hint(askForUnverified)
	}
	asks, _ := d.who()
	for _, s := range t.Scopes {
		if !slices.Contains(asked.Scopes, s) && !slices.Contains(info.ImpliedScopes, s) {
			return Errorf(Unsatisfiable, "%s adds the scope %q, which %s not ask for", d.Provider, s, asks).
				Hint("ask {contact}: the scope must be optional at the provider, or be in the rule")
		}
	}
	for _, s := range asked.Scopes {
		if !slices.Contains(t.Scopes, s) {
			return Errorf(Unsatisfiable, "%s does not grant the scope %q; it grants %s", d.Provider, s, list(t.Scopes))
		}
	}
	return nil
}

// holdsAudience wants the audience that was decided and no other. Where none
// was decided, a token for the client itself is not wider than none.
func (d *Decision) holdsAudience(info ProviderInfo, t *cachedToken) error {
	if !t.AudienceKnown {
		if d.Unverified {
			return nil
		}
		return Errorf(Unsatisfiable, "the audience of %s's token can't be read", d.Provider).Hint(askForUnverified)
	}
	want := d.Target.Audience
	if want != "" && !slices.Contains(t.Audience, want) {
		return Errorf(Unsatisfiable, "%s does not give a token for audience %q", d.Provider, want)
	}
	_, allows := d.who()
	for _, a := range t.Audience {
		if a != want && (want != "" || a != info.ClientID) {
			return Errorf(Unsatisfiable, "%s's token is also for audience %q, which %s not allow", d.Provider, a, allows).
				Hint("ask {contact}: the rule must name that audience, or the provider must not add it")
		}
	}
	return nil
}

// who says, each before a "not", who asked for the token and who allows it.
func (d *Decision) who() (asks, allows string) {
	if d.Rule == 0 {
		return "the hub did", "the hub's scopes do"
	}
	return "you did", "your rule does"
}

// offered says whether any rule is about f at provider, whatever f lacks.
func offered(rules []Rule, f Facts, provider ProviderID) bool {
	return slices.ContainsFunc(rules, func(r Rule) bool { return r.Provider == provider && r.meets(f) })
}

// offers sums up what the rules give f at provider: for ListProviders.
func offers(rules []Rule, f Facts, provider ProviderID) (audiences, scopes []string) {
	for i := range rules {
		r := &rules[i]
		if r.Provider == provider && r.meets(f) && len(r.lacks(f)) == 0 {
			audiences = append(audiences, r.Audiences...)
			scopes = append(scopes, r.Scopes...)
		}
	}
	return sorted(audiences), sorted(scopes)
}

// couldGive says whether r gives f's user want on some server of his.
func (r *Rule) couldGive(f Facts, want Want) bool {
	return oneOf(r.Hubs, f.Server.Hub) && oneOf(r.Users, f.Server.User) && r.covers(want) &&
		r.hasRole(f.Roles) && r.hasGroup(f.Groups)
}

// Covers says whether r, standing before other, leaves it nothing: whatever
// other would answer, r answers. False where that can't be told.
func (r *Rule) Covers(other *Rule) bool {
	return r.Provider == other.Provider &&
		wider(r.Hubs, other.Hubs, same) && wider(r.Users, other.Users, same) && wider(r.Servers, other.Servers, same) &&
		wider(r.Images, other.Images, glob) && // also of a pattern: its stars lie in ours
		wider(r.Roles, other.Roles, r.namesAll) && wider(r.Groups, other.Groups, same) &&
		(r.Shared || !other.Shared) && reaches(other.RequireAttestation, r.RequireAttestation) &&
		subset(other.Audiences, r.Audiences) && subset(other.Scopes, r.Scopes)
}

// wider says whether ours lets through what theirs does: everything if it is
// empty, else for each of theirs there is one of ours that covers it.
func wider[T any](ours, theirs []T, covers func(our, their T) bool) bool {
	return len(ours) == 0 || len(theirs) > 0 && !slices.ContainsFunc(theirs, func(t T) bool {
		return !slices.ContainsFunc(ours, func(o T) bool { return covers(o, t) })
	})
}

func same[T comparable](a, b T) bool { return a == b }

// namesAll says whether the role our names all that their does; both are as
// written in a rule of r's provider.
func (r *Rule) namesAll(our, their string) bool {
	claim, value, ok := strings.Cut(strings.TrimPrefix(their, string(r.Provider)+":"), "/")
	return our == their || strings.Index(our, "/") <= 0 && ok && claim != "" && !strings.Contains(claim, ":") && our == value
}

// glob matches s against a pattern in which * stands for any text.
func glob(pattern, s string) bool {
	parts := strings.Split(pattern, "*")
	if len(parts) == 1 {
		return pattern == s
	}
	s, ok := strings.CutPrefix(s, parts[0])
	if !ok {
		return false
	}
	last := parts[len(parts)-1]
	for _, part := range parts[1 : len(parts)-1] {
		_, s, ok = strings.Cut(s, part)
		if !ok {
			return false
		}
	}
	return strings.HasSuffix(s, last)
}

func oneOf[T comparable](allowed []T, v T) bool {
	return len(allowed) == 0 || slices.Contains(allowed, v)
}

func subset(some, all []string) bool {
	return !slices.ContainsFunc(some, func(s string) bool { return !slices.Contains(all, s) })
}

// sorted returns a sorted copy without repetitions.
func sorted(list []string) []string {
	c := slices.Clone(list)
	slices.Sort(c)
	return slices.Compact(c)
}

// list writes names for people.
func list(names []string) string {
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}
