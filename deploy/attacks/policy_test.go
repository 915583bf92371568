//go:build linux

package attacks_test

import (
	"net/http"
	"testing"

	"tokenbroker/broker"
)

func (w *world) policy(t *testing.T, _ *server) {
	s := w.up(t, "main", "niaj", "niaj")
	for _, a := range []struct {
		name, target string
		code         broker.Code
		reason       string
	}{
		{"a scope behind a space", "/v1/token?audience=storage&scope=read%20write", broker.Denied, "write"},
		{"a scope behind a newline", "/v1/token?audience=storage&scope=read%0Awrite", broker.Denied, "write"},
		{"a scope with a quote", "/v1/token?audience=storage&scope=read%22", broker.Invalid, "not a scope"},
		{"a scope with a zero byte", "/v1/token?audience=storage&scope=read%00write", broker.Invalid, "not a scope"},
		{"an audience behind a space", "/v1/token?audience=storage%20compute", broker.Denied, "storage compute"},
		{"an audience behind a newline", "/v1/token?audience=storage%0Acompute", broker.Invalid, "audience"},
		{"an audience with a quote", "/v1/token?audience=storage%22", broker.Denied, "storage"},
		{"two audiences", "/v1/token?audience=storage&audience=compute", broker.Invalid, "more than once"},
		{"another audience", "/v1/token?audience=compute", broker.Denied, "compute"},
		{"a parameter of the provider's", "/v1/token?audience=storage&resource=x", broker.Invalid, "no parameter"},
		{"another user, by parameter", "/v1/token?audience=storage&user=alice", broker.Invalid, "no parameter"},
	} {
		w.refused(t, attempt{"policy", a.name, a.target, a.code, a.reason}, s.asks(t, a.target))
	}
	for _, a := range []struct{ name, tried, target string }{
		{"no-audience", "the exchanged token is for compute, too", "/v1/token/no-audience?audience=storage"},
		{"no-scope", "the exchanged token has all scopes", "/v1/token/no-scope?audience=storage"},
		{"no-exchange", "the exchange gives the whole token back", "/v1/token/no-exchange?audience=storage"},
		{"no-refresh", "the refreshed token has all scopes", "/v1/token/no-refresh?scope=read"},
	} {
		if c := w.claim(t, "main", a.name, w.login(t, "main", a.name, "niaj"), "niaj"); c.Status != http.StatusOK {
			t.Fatalf("claim at %s: %+v", a.name, c)
		}
		w.refused(t, attempt{"policy", "a provider that does not narrow: " + a.name, a.tried, broker.Unsatisfiable, "."}, s.asks(t, a.target))
	}
	s.served(t)
}
