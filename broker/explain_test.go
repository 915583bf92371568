package broker_test

import (
	"context"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
)

// What Explain says is compared with what a container is then told.
func TestExplanationIsWhatARequestMeets(t *testing.T) {
	gpu := broker.Rule{Provider: "keycloak", Images: []string{"gpu:*"}, Audiences: []string{"gpu"}}
	open := broker.Rule{Provider: "keycloak", Audiences: []string{"web", "wiki"}, Scopes: []string{"look"}, MaxTTL: time.Minute}
	for _, tt := range []struct {
		why     string
		before  func(r *rig)
		want    broker.Want
		rule    int
		refused broker.Code
	}{
		{"a role that is there", func(r *rig) {}, broker.Want{}, 1, ""},
		{"fewer scopes", func(r *rig) {}, broker.Want{Scopes: []string{"read"}}, 1, ""},
		{"a role that is gone", func(r *rig) {
			r.provider.SetRoles("alice")
			time.Sleep(time.Second)
			r.loggedIn("alice")
		}, broker.Want{Audience: "storage"}, 1, broker.Denied},
		{"no rule", func(r *rig) {}, broker.Want{Audience: "moon"}, 0, broker.Denied},
		{"another image", func(r *rig) {}, broker.Want{Audience: "gpu"}, 0, broker.Denied},
		{"several audiences", func(r *rig) {}, broker.Want{Scopes: []string{"look"}}, 3, broker.Invalid},
		{"disconnected", func(r *rig) { r.Disconnect(context.Background(), "uid 0", "main", "alice", "") }, broker.Want{}, 1, broker.Revoked},
		{"given to another account", func(r *rig) { r.rebound("eve"); r.provider.SetRoles("eve", "researcher") }, broker.Want{}, 0, broker.Denied},
		{"a session that ended", func(r *rig) {
			r.provider.EndSession("alice")
			expire()
			r.Token(context.Background(), r.peer("alice", 100), broker.Want{})
		}, broker.Want{}, 1, broker.LoginRequired},
		{"a switched-off account", func(r *rig) {
			r.provider.Next(brokertest.Answer{Err: &broker.ProviderError{Class: broker.Disabled}})
			expire()
			r.Token(context.Background(), r.peer("alice", 100), broker.Want{})
		}, broker.Want{}, 1, broker.Denied},
		{"a life that only the provider's answer shows", func(r *rig) {}, broker.Want{Audience: "web"}, 3, ""},
	} {
		t.Run(tt.why, func(t *testing.T) {
			inBubble(t, func(r *rig) {
				ctx := context.Background()
				r.loggedIn("alice")
				p := r.running("alice", 100)
				tt.before(r)
				asked := r.provider.Calls("refresh") + r.provider.Calls("exchange") + r.provider.Calls("look")
				lines, sealed := r.audit.String(), r.boxes()
				x, err := r.Explain(ctx, broker.Question{Hub: "main", User: "alice", Want: tt.want})
				if err != nil {
					t.Fatal(err)
				}
				if n := r.provider.Calls("refresh") + r.provider.Calls("exchange") + r.provider.Calls("look"); n != asked {
					t.Errorf("the provider was asked %d times", n-asked)
				}
				if diff := cmp.Diff(sealed, r.boxes()); diff != "" || lines != r.audit.String() {
					t.Errorf("an explanation left something behind: %s", diff)
				}
				if len(x.Assumed) != 0 {
					t.Errorf("the server runs, and yet it is assumed that %q", x.Assumed)
				}
				if x.Rule != tt.rule {
					t.Errorf("got rule %d, want %d", x.Rule, tt.rule)
				}
				if got := codeOfRefusal(x.Refusal); got != tt.refused {
					t.Errorf("got refusal %q (%v), want %q", got, x.Refusal, tt.refused)
				}
				tok, err := r.Token(ctx, p, tt.want)
				if x.Refusal == nil {
					return // what the provider then gives is not known before
				}
				if said := refused(t, err, &broker.Error{Code: tt.refused}); said.Sentence != x.Refusal.Sentence || said.Next != x.Refusal.Next {
					t.Errorf("explained as %q (%s), and the container is told %q (%s); token %v", x.Refusal.Sentence, x.Refusal.Next, said.Sentence, said.Next, tok)
				}
			}, func(c *broker.Config) { c.Rules = append(c.Rules, gpu, open) })
		})
	}
}

func codeOfRefusal(e *broker.Error) broker.Code {
	if e == nil {
		return ""
	}
	return e.Code
}

// boxes are the store's records.
func (r *rig) boxes() map[string]string {
	all := make(map[string]string)
	r.store.Each(func(k broker.Key, rec broker.Record) {
		if k.Kind != "broker" { // a broker's attendance comes by itself
			all[k.String()] = string(rec.Box)
		}
	})
	return all
}

func TestExplanationSaysWhatWouldBeIssued(t *testing.T) {
	inBubble(t, func(r *rig) {
		ctx := context.Background()
		r.loggedIn("alice")
		ask := func() broker.Explanation {
			t.Helper()
			x, err := r.Explain(ctx, broker.Question{Hub: "main", User: "alice", Want: broker.Want{Scopes: []string{"write", "read"}}})
			if err != nil || x.Refusal != nil {
				t.Fatalf("Explain: %+v, %v", x, err)
			}
			return x
		}
		x := ask()
		if diff := cmp.Diff(broker.Target{Audience: "storage", Scopes: []string{"read", "write"}}, x.Target); diff != "" {
			t.Error(diff)
		}
		if diff := cmp.Diff([]string{"gate", "read", "write"}, x.AskedScopes); diff != "" {
			t.Errorf("what the provider is asked for: %s", diff)
		}
		if x.MaxTTL != 10*time.Minute || !x.CachedUntil.IsZero() || x.Grant.State != broker.Live {
			t.Errorf("got %+v", x)
		}
		if diff := cmp.Diff([][]string{{"researcher"}, {"keycloak:roles/researcher"}, {"keycloak:roles/researcher"}}, [][]string{x.Needs, x.Has, x.Fits}); diff != "" {
			t.Errorf("roles: %s", diff)
		}
		if want := "{roles: [researcher], audiences: [storage], scopes: [read, write], provider: keycloak, max_ttl: 10m0s}"; x.RuleText != want {
			t.Errorf("the rule is %s, want %s", x.RuleText, want)
		}
		if len(x.Assumed) == 0 || !strings.Contains(x.Assumed[0], "is not registered here") {
			t.Errorf("no server runs, and assumed is %q", x.Assumed)
		}
		tok := r.token(r.running("alice", 100), broker.Want{})
		if x := ask(); !x.CachedUntil.Equal(tok.ExpiresAt) || x.OutstandingUntil.Before(tok.ExpiresAt) || len(x.Assumed) != 0 {
			t.Errorf("with a token in the cache: %+v", x)
		}
		expire()
		if x := ask(); !x.CachedUntil.IsZero() || x.OutstandingUntil.After(time.Now()) {
			t.Errorf("with an old one: %+v", x)
		}
	}, func(c *broker.Config) {
		c.Providers[0] = brokertest.NewProvider("keycloak", func(i *broker.ProviderInfo) {
			i.Audiences = map[string][]string{"storage": {"gate"}}
			i.ImpliedScopes = append(i.ImpliedScopes, "gate")
		})
		c.Providers[0].(*brokertest.Provider).SetRoles("alice", "researcher")
		c.Rules[0].MaxTTL = 10 * time.Minute
	})
}

func TestExplanationSaysWhatIsWrongWithTheQuestion(t *testing.T) {
	inBubble(t, func(r *rig) {
		for _, tt := range []struct {
			q    broker.Question
			says string
		}{
			{broker.Question{User: "alice"}, `hub: there is no hub ""; there are main, other`},
			{broker.Question{Hub: "main"}, "user is empty"},
			{broker.Question{Hub: "main", User: "alice", Server: "a\x00"}, "server holds a control character"},
			{broker.Question{Hub: "main", User: "alice", Want: broker.Want{Provider: "x"}}, `provider: there is no provider "x"; there are keycloak`},
			{broker.Question{Hub: "main", User: "alice", Want: broker.Want{Scopes: []string{"a b"}}}, `scopes: "a b" is not a scope`},
		} {
			_, err := r.Explain(context.Background(), tt.q)
			if said, ok := err.(*broker.Error); !ok || said.Code != broker.Invalid || said.Sentence != tt.says || said.Next == "" {
				t.Errorf("got %v, want %q", err, tt.says)
			}
		}
		x, err := r.Explain(context.Background(), broker.Question{Hub: "main", User: "nobody"})
		if err != nil || codeOfRefusal(x.Refusal) != broker.LoginRequired || x.Grant != nil {
			t.Errorf("nobody: %+v, %v", x, err)
		}
	})
}

// A condition that the text leaves out would make an explanation a lie.
func TestRuleTextHoldsEveryField(t *testing.T) {
	var r broker.Rule
	empty := r.String()
	for i := range reflect.TypeFor[broker.Rule]().NumField() {
		var r broker.Rule
		f := reflect.ValueOf(&r).Elem().Field(i)
		switch f.Kind() {
		case reflect.Slice:
			f.Set(reflect.MakeSlice(f.Type(), 1, 1))
			f.Index(0).SetString("a b")
		case reflect.String:
			f.SetString("a b")
		case reflect.Int64:
			f.SetInt(int64(time.Minute))
		case reflect.Bool:
			f.SetBool(true)
		}
		if r.String() == empty {
			t.Errorf("the text of a rule does not hold %s", reflect.TypeFor[broker.Rule]().Field(i).Name)
		}
	}
	r.Servers = []broker.ServerName{"", "gpu"}
	if got, want := r.String(), `{servers: ["", gpu], provider: }`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
