package broker_test

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"tokenbroker/broker"
)

func TestDecide(t *testing.T) {
	kc := broker.ProviderID("keycloak")
	alice := broker.Facts{
		Server: broker.ServerKey{Hub: "main", User: "alice", Server: "gpu"},
		Image:  "registry.example/lab:2026", Roles: []string{
			"gitlab:groups/dev", "keycloak:groups//lab/a", "keycloak:groups/keycloak:roles/boss", "keycloak:groups/roles/admin",
			"keycloak:roles/researcher",
		},
	}
	rule := func(edit func(*broker.Rule)) []broker.Rule {
		r := broker.Rule{Provider: kc, Audiences: []string{"storage"}, Scopes: []string{"read", "write"}}
		edit(&r)
		return []broker.Rule{r}
	}
	for _, tt := range []struct {
		why   string
		rules []broker.Rule
		want  broker.Want
		err   error
		got   broker.Target
	}{
		{"no rules", nil, broker.Want{}, broker.ErrDenied, broker.Target{}},
		{"empty wishes mean the rule's", rule(func(r *broker.Rule) {}), broker.Want{}, nil,
			broker.Target{Audience: "storage", Scopes: []string{"read", "write"}}},
		{"fewer scopes", rule(func(r *broker.Rule) {}), broker.Want{Scopes: []string{"read"}}, nil,
			broker.Target{Audience: "storage", Scopes: []string{"read"}}},
		{"a rule without audiences", rule(func(r *broker.Rule) { r.Audiences = nil }), broker.Want{}, nil,
			broker.Target{Scopes: []string{"read", "write"}}},
		{"a rule without audiences covers none", rule(func(r *broker.Rule) { r.Audiences = nil }), broker.Want{Audience: "storage"}, broker.ErrDenied, broker.Target{}},
		{"a rule without scopes covers none", rule(func(r *broker.Rule) { r.Scopes = nil }), broker.Want{Scopes: []string{"read"}}, broker.ErrDenied, broker.Target{}},
		{"several audiences", rule(func(r *broker.Rule) { r.Audiences = []string{"a", "b"} }), broker.Want{}, broker.ErrInvalid, broker.Target{}},
		{"several audiences, one named", rule(func(r *broker.Rule) { r.Audiences = []string{"a", "b"} }), broker.Want{Audience: "b"}, nil,
			broker.Target{Audience: "b", Scopes: []string{"read", "write"}}},
		{"another provider", rule(func(r *broker.Rule) { r.Provider = "gitlab" }), broker.Want{}, broker.ErrDenied, broker.Target{}},
		{"another hub", rule(func(r *broker.Rule) { r.Hubs = []broker.HubID{"other"} }), broker.Want{}, broker.ErrDenied, broker.Target{}},
		{"another user", rule(func(r *broker.Rule) { r.Users = []broker.UserID{"bob"} }), broker.Want{}, broker.ErrDenied, broker.Target{}},
		{"another server", rule(func(r *broker.Rule) { r.Servers = []broker.ServerName{""} }), broker.Want{}, broker.ErrDenied, broker.Target{}},
		{"another image", rule(func(r *broker.Rule) { r.Images = []string{"lab:*"} }), broker.Want{}, broker.ErrDenied, broker.Target{}},
		{"the image by a pattern", rule(func(r *broker.Rule) { r.Images = []string{"x", "*example/lab:*"} }), broker.Want{}, nil,
			broker.Target{Audience: "storage", Scopes: []string{"read", "write"}}},
		{"the role by its value", rule(func(r *broker.Rule) { r.Roles = []string{"admin", "researcher"} }), broker.Want{}, nil,
			broker.Target{Audience: "storage", Scopes: []string{"read", "write"}}},
		{"the role by claim and value", rule(func(r *broker.Rule) { r.Roles = []string{"roles/researcher"} }), broker.Want{}, nil,
			broker.Target{Audience: "storage", Scopes: []string{"read", "write"}}},
		{"the role by its full name", rule(func(r *broker.Rule) { r.Roles = []string{"keycloak:roles/researcher"} }), broker.Want{}, nil,
			broker.Target{Audience: "storage", Scopes: []string{"read", "write"}}},
		{"another provider's role by its full name", rule(func(r *broker.Rule) { r.Roles = []string{"gitlab:groups/dev"} }), broker.Want{}, nil,
			broker.Target{Audience: "storage", Scopes: []string{"read", "write"}}},
		{"another provider's role by its bare name", rule(func(r *broker.Rule) { r.Roles = []string{"dev"} }), broker.Want{}, broker.ErrDenied, broker.Target{}},
		{"a group path by its value", rule(func(r *broker.Rule) { r.Roles = []string{"/lab/a"} }), broker.Want{}, nil,
			broker.Target{Audience: "storage", Scopes: []string{"read", "write"}}},
		{"a group that is called like another claim's role", rule(func(r *broker.Rule) { r.Roles = []string{"roles/admin"} }), broker.Want{}, broker.ErrDenied, broker.Target{}},
		{"a group that is called like a role's full name", rule(func(r *broker.Rule) { r.Roles = []string{"keycloak:roles/boss"} }), broker.Want{}, broker.ErrDenied, broker.Target{}},
		{"the first rule that covers the request answers",
			append(rule(func(r *broker.Rule) { r.Scopes = []string{"read"} }), rule(func(r *broker.Rule) {})...),
			broker.Want{Scopes: []string{"write"}}, nil, broker.Target{Audience: "storage", Scopes: []string{"write"}}},
	} {
		tt.want.Provider = kc
		d, err := broker.Decide(tt.rules, alice, tt.want)
		if !errors.Is(err, tt.err) && err != tt.err {
			t.Errorf("%s: got error %v, want %v", tt.why, err, tt.err)
		}
		if diff := cmp.Diff(tt.got, d.Target); diff != "" {
			t.Errorf("%s: %s", tt.why, diff)
		}
	}
}

// TestNearestLack holds what a refusal names: of the rules that are about the
// server and the request, the one that lacks the fewest conditions, and of these
// the first of role, group, level and sharing.
func TestNearestLack(t *testing.T) {
	shared := broker.Facts{Roles: []string{"kc:roles/student"}, Groups: []string{"staff", "all"}, Shared: true, Level: "proc"}
	private := shared
	private.Shared = false
	const (
		role  = "a token for kc needs one of the roles researcher; you have student"
		group = "a token for kc needs one of the hub's groups lab, physics; you are in all, staff"
		level = "a token for kc needs attestation pidfd+ns or better; this server has proc"
		off   = "tokens are off while this server is shared"
	)
	open := func(r broker.Rule) broker.Rule { r.Provider, r.Shared = "kc", true; return r }
	student := open(broker.Rule{Roles: []string{"student"}})
	researcher := open(broker.Rule{Roles: []string{"researcher"}})
	lab := open(broker.Rule{Groups: []string{"lab", "physics"}})
	strict := open(broker.Rule{RequireAttestation: "pidfd+ns"})
	all := open(broker.Rule{Roles: []string{"researcher"}, Groups: []string{"lab"}, RequireAttestation: "pidfd"})
	all.Shared = false
	for _, tt := range []struct {
		why   string
		facts broker.Facts
		rules []broker.Rule
		want  string // empty: allowed
	}{
		{"shared, and the rule allows it", shared, []broker.Rule{student}, ""},
		{"shared, and it does not", shared, []broker.Rule{{Provider: "kc"}}, off},
		{"not shared", private, []broker.Rule{{Provider: "kc"}}, ""},
		{"any of the groups", shared, []broker.Rule{open(broker.Rule{Groups: []string{"lab", "staff"}})}, ""},
		{"a group is no role", shared, []broker.Rule{open(broker.Rule{Roles: []string{"staff"}})}, "a token for kc needs one of the roles staff; you have student"},
		{"a role is no group", shared, []broker.Rule{open(broker.Rule{Groups: []string{"student"}})}, "a token for kc needs one of the hub's groups student; you are in all, staff"},
		{"no group", shared, []broker.Rule{lab}, group},
		{"the level that is there", shared, []broker.Rule{open(broker.Rule{RequireAttestation: "proc"})}, ""},
		{"less than is there", shared, []broker.Rule{open(broker.Rule{RequireAttestation: "uid"})}, ""},
		{"a higher level", shared, []broker.Rule{strict}, level},
		{"a level that is none", shared, []broker.Rule{open(broker.Rule{RequireAttestation: "magic"})}, "a token for kc needs attestation magic or better; this server has proc"},
		{"no level at all", broker.Facts{}, []broker.Rule{open(broker.Rule{RequireAttestation: "uid"})}, "a token for kc needs attestation uid or better; this server has none"},
		{"because of a neighbour", broker.Facts{Level: "pidfd", Proved: "pidfd+ns", Lowered: "cadvisor"}, []broker.Rule{strict},
			"a token for kc needs attestation pidfd+ns or better; this server has pidfd, because of a container that runs on its host"},
		{"not only because of one", broker.Facts{Level: "proc", Proved: "pidfd", Lowered: "cadvisor"}, []broker.Rule{strict}, level},
		{"the role is said first", shared, []broker.Rule{all}, role},
		{"the first of those that lack as much", shared, []broker.Rule{lab, researcher}, group},
		{"one that lacks less", shared, []broker.Rule{all, strict}, level},
		{"one that is not about this server", shared, []broker.Rule{{Provider: "kc", Shared: true, Users: []broker.UserID{"bob"}}, researcher}, role},
		{"one that lacks nothing comes late", shared, []broker.Rule{all, strict, student}, ""},
	} {
		_, err := broker.Decide(tt.rules, tt.facts, broker.Want{Provider: "kc"})
		var said *broker.Error
		got := ""
		if errors.As(err, &said) {
			got = said.Sentence
			if said.Code != broker.Denied || said.Next == "" {
				t.Errorf("%s: code %s, next step %q", tt.why, said.Code, said.Next)
			}
		}
		if got != tt.want {
			t.Errorf("%s: said %q, want %q", tt.why, got, tt.want)
		}
	}
}

func TestRulesThatCoverOthers(t *testing.T) {
	rule := func(edit func(*broker.Rule)) broker.Rule {
		r := broker.Rule{Provider: "kc", Roles: []string{"a"}, Audiences: []string{"x"}, Scopes: []string{"s"}}
		edit(&r)
		return r
	}
	base := rule(func(*broker.Rule) {})
	for _, tt := range []struct {
		why          string
		first, later broker.Rule
		want         bool
	}{
		{"the same", base, base, true},
		{"everybody before some", rule(func(r *broker.Rule) { r.Roles = nil }), base, true},
		{"some before everybody", base, rule(func(r *broker.Rule) { r.Roles = nil }), false},
		{"fewer roles later", rule(func(r *broker.Rule) { r.Roles = []string{"b", "a"} }), base, true},
		{"other roles later", base, rule(func(r *broker.Rule) { r.Roles = []string{"a", "b"} }), false},
		{"the role of one claim later", base, rule(func(r *broker.Rule) { r.Roles = []string{"kc:roles/a", "groups/a"} }), true},
		{"the role of any claim later", rule(func(r *broker.Rule) { r.Roles = []string{"groups/a"} }), base, false},
		{"another provider's role later", base, rule(func(r *broker.Rule) { r.Roles = []string{"gl:groups/a"} }), false},
		{"another provider", base, rule(func(r *broker.Rule) { r.Provider = "gl" }), false},
		{"more audiences later", base, rule(func(r *broker.Rule) { r.Audiences = []string{"x", "y"} }), false},
		{"fewer audiences later", base, rule(func(r *broker.Rule) { r.Audiences = nil }), true},
		{"more scopes later", base, rule(func(r *broker.Rule) { r.Scopes = []string{"s", "t"} }), false},
		{"a longer life later is never given", rule(func(r *broker.Rule) { r.MaxTTL = time.Minute }), base, true},
		{"also while shared later", base, rule(func(r *broker.Rule) { r.Shared = true }), false},
		{"also while shared before", rule(func(r *broker.Rule) { r.Shared = true }), base, true},
		{"a level before", rule(func(r *broker.Rule) { r.RequireAttestation = "proc" }), base, false},
		{"a level later", base, rule(func(r *broker.Rule) { r.RequireAttestation = "proc" }), true},
		{"a lower level before", rule(func(r *broker.Rule) { r.RequireAttestation = "proc" }), rule(func(r *broker.Rule) { r.RequireAttestation = "pidfd" }), true},
		{"a group before", rule(func(r *broker.Rule) { r.Groups = []string{"g"} }), base, false},
		{"an image of a pattern", rule(func(r *broker.Rule) { r.Images = []string{"lab/*"} }), rule(func(r *broker.Rule) { r.Images = []string{"lab/a", "lab/b:*"} }), true},
		{"a pattern after an image", rule(func(r *broker.Rule) { r.Images = []string{"lab/a"} }), rule(func(r *broker.Rule) { r.Images = []string{"lab/*"} }), false},
	} {
		if got := tt.first.Covers(&tt.later); got != tt.want {
			t.Errorf("%s: covers %v, want %v", tt.why, got, tt.want)
		}
	}
}

// Whatever the rules: one that another covers is never the one that answers.
func TestACoveredRuleNeverAnswers(t *testing.T) {
	some := func(names ...string) *rapid.Generator[[]string] {
		return rapid.SliceOfNDistinct(rapid.SampledFrom(names), 0, 2, rapid.ID[string])
	}
	rules := rapid.Custom(func(t *rapid.T) broker.Rule {
		return broker.Rule{
			Provider: broker.ProviderID(rapid.SampledFrom([]string{"p", "q"}).Draw(t, "provider")),
			Users:    rapid.SliceOfN(rapid.SampledFrom([]broker.UserID{"u", "v"}), 0, 1).Draw(t, "users"),
			Images:   some("*", "a*", "*b", "a*b", "ab", "aab", "a*a*b").Draw(t, "images"),
			Roles:    some("x", "c/x", "p:c/x", "q:c/x", "d/x/y", "/x", "c//x", "x/y", "p:d/x/y", "p:x").Draw(t, "roles"),
			Groups:   some("g", "h").Draw(t, "groups"), Shared: rapid.Bool().Draw(t, "shared"),
			RequireAttestation: rapid.SampledFrom(append(broker.Levels(), "")).Draw(t, "level"),
			Audiences:          some("m", "n").Draw(t, "audiences"), Scopes: some("s", "t").Draw(t, "scopes"),
		}
	})
	covered := 0
	rapid.Check(t, func(t *rapid.T) {
		// Two rules that differ in two fields or so: others rarely cover each other.
		first, later := rules.Draw(t, "first"), rules.Draw(t, "later")
		a, b := reflect.ValueOf(&first).Elem(), reflect.ValueOf(&later).Elem()
		for i := range a.NumField() {
			if rapid.IntRange(0, 4).Draw(t, "same") != 0 {
				b.Field(i).Set(a.Field(i))
			}
		}
		if !first.Covers(&later) {
			return
		}
		covered++
		for range 20 {
			f := broker.Facts{
				Server: broker.ServerKey{User: rapid.SampledFrom([]broker.UserID{"u", "v", "w"}).Draw(t, "user")},
				Image:  rapid.StringOfN(rapid.RuneFrom([]rune("ab")), 0, 5, -1).Draw(t, "image"),
				Roles:  some("p:c/x", "q:c/x", "p:d/x/y", "p:c//x", "p:x/y", "p:e/x", "p:p:c/x", "q:p:c/x", "p:d/p:x").Draw(t, "has"),
				Groups: some("g", "h").Draw(t, "in"), Shared: rapid.Bool().Draw(t, "is shared"),
				Level: rapid.SampledFrom(broker.Levels()).Draw(t, "has level"),
			}
			want := broker.Want{Provider: later.Provider, Scopes: rapid.SampledFrom([][]string{nil, later.Scopes}).Draw(t, "wanted scopes")}
			if len(later.Audiences) > 0 {
				want.Audience = rapid.SampledFrom([]string{"", later.Audiences[0]}).Draw(t, "wanted audience")
			}
			if d, err := broker.Decide([]broker.Rule{first, later}, f, want); err == nil && d.Rule == 2 {
				t.Fatalf("%+v is covered by %+v, and answers %+v, %+v", later, first, f, want)
			}
		}
	})
	if covered == 0 {
		t.Error("no rule covered another: nothing was tested")
	}
}

func TestGlob(t *testing.T) {
	for _, tt := range []struct {
		pattern, s string
		want       bool
	}{
		{"lab", "lab", true}, {"lab", "lab:1", false}, {"*", "", true}, {"lab:*", "lab:", true},
		{"*lab", "my/lab", true}, {"a*b*c", "a-b-c", true}, {"a*b*c", "a-c", false}, {"ab*ba", "aba", false},
	} {
		facts := broker.Facts{Image: tt.s}
		_, err := broker.Decide([]broker.Rule{{Images: []string{tt.pattern}}}, facts, broker.Want{})
		if got := err == nil; got != tt.want {
			t.Errorf("pattern %q on %q: got %v, want %v", tt.pattern, tt.s, got, tt.want)
		}
	}
}

// TestTokenMustLieInsideTheDecision goes through a provider that gives other
// than it was asked for.
func TestTokenMustLieInsideTheDecision(t *testing.T) {
	good := broker.Issued{
		AccessToken: broker.NewSecret("access-x"), TokenType: "Bearer", ExpiresIn: time.Minute,
		Scopes: []string{"openid", "read", "storage", "write"}, ScopesKnown: true, Audience: []string{"storage"}, AudienceKnown: true,
	}
	for _, tt := range []struct {
		why        string
		unverified bool
		edit       func(*broker.Issued)
		says       string // empty: it is answered
	}{
		{"what was asked for", false, func(*broker.Issued) {}, ""},
		{"a scope is dropped", false, func(i *broker.Issued) { i.Scopes = []string{"read", "storage"} },
			`keycloak does not grant the scope "write"; it grants read, storage`},
		{"a scope is added", true, func(i *broker.Issued) { i.Scopes = append(i.Scopes, "admin") },
			`keycloak adds the scope "admin", which you did not ask for`},
		{"the audience is ignored", false, func(i *broker.Issued) { i.Audience = nil },
			`keycloak does not give a token for audience "storage"`},
		{"an audience is added", true, func(i *broker.Issued) { i.Audience = []string{"compute", "storage"} },
			`keycloak's token is also for audience "compute", which your rule does not allow`},
		{"scopes can't be read", false, func(i *broker.Issued) { i.ScopesKnown = false }, "the scopes of keycloak's token can't be read"},
		{"scopes can't be read, allowed", true, func(i *broker.Issued) { i.ScopesKnown = false }, ""},
		{"audience can't be read", false, func(i *broker.Issued) { i.AudienceKnown = false }, "the audience of keycloak's token can't be read"},
		{"audience can't be read, allowed", true, func(i *broker.Issued) { i.AudienceKnown = false }, ""},
		{"no end", false, func(i *broker.Issued) { i.ExpiresIn = 0 }, "keycloak does not say how long its token lives"},
		{"no end, allowed", true, func(i *broker.Issued) { i.ExpiresIn = 0 }, ""},
		{"too long a life", true, func(i *broker.Issued) { i.ExpiresIn = time.Hour },
			"keycloak gives tokens of 1h0m0s, and your rule allows 5m0s at most"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			iss := good
			iss.Scopes = append([]string(nil), good.Scopes...)
			tt.edit(&iss)
			inBubble(t, func(r *rig) {
				r.loggedIn("alice")
				p := r.running("alice", 100)
				if tt.says == "" {
					r.token(p, broker.Want{})
					return
				}
				for range 2 { // also not from a cache
					if said := r.refused(p, broker.Want{}, broker.ErrUnsatisfiable); said.Sentence != tt.says {
						t.Errorf("said %q, want %q", said.Sentence, tt.says)
					}
				}
			}, func(c *broker.Config) {
				c.Rules[0].Unverified, c.Rules[0].MaxTTL = tt.unverified, 5*time.Minute
				c.Providers = []broker.Provider{gives{c.Providers[0], iss}}
			})
		})
	}
}

// gives is a provider that answers each exchange with the same.
type gives struct {
	broker.Provider
	issued broker.Issued
}

func (p gives) Info() broker.ProviderInfo {
	info := p.Provider.Info()
	info.Audiences = map[string][]string{"storage": {"storage"}}
	return info
}

func (p gives) Exchange(_ context.Context, _ broker.Secret, t broker.Target) (broker.Issued, error) {
	if !slices.Equal(t.Scopes, []string{"read", "storage", "write"}) {
		return broker.Issued{}, fmt.Errorf("asked for %v: the audience's own scope is missing", t.Scopes)
	}
	return p.issued, nil
}
