package broker_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

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
