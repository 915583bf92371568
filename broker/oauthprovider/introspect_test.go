package oauthprovider_test

import (
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"tokenbroker/broker"
	"tokenbroker/broker/oauthprovider"
)

// introspection is the answer that Keycloak 26.5.5 gives about a live refresh
// token, with fields replaced or, by nil, left out.
func introspection(change claimset) claimset {
	c := claimset{
		"exp": 1764086400, "iat": 1764084600, "jti": "onrtrt:1", "iss": "https://sso.example/realms/lab", "sub": "u1", "typ": "Refresh",
		"azp": "hub", "sid": "s1", "scope": "openid profile", "roles": []string{"student", "researcher"}, "groups": []string{"/lab-a"},
		"preferred_username": "alice", "client_id": "hub", "username": "alice", "token_type": "Refresh", "active": true,
	}
	for k, v := range change {
		if c[k] = v; v == nil {
			delete(c, k)
		}
	}
	return c
}

// introspecting is a client of a server that answers introspections so.
func introspecting(t *testing.T, profile string, status int, body string, seen func(*http.Request)) *oauthprovider.Provider {
	t.Helper()
	ts := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if seen != nil {
			seen(r)
		}
		w.WriteHeader(status)
		io.WriteString(w, body)
	}))
	t.Cleanup(ts.Close)
	p, err := oauthprovider.New(oauthprovider.Config{
		Name: "lab", Profile: profile, ClientID: "hub", ClientSecret: broker.NewSecret("s"), Roles: []string{"roles", "groups"},
		Endpoints: oauthprovider.Endpoints{Token: ts.URL + "/token", Introspection: ts.URL + "/introspect"},
	})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestALookShowsTheRolesOfNow(t *testing.T) {
	all := []string{"groups//lab-a", "roles/researcher", "roles/student"}
	for _, tt := range []struct {
		name   string
		change claimset
		roles  []string
	}{
		{"refresh token", nil, all},
		{"offline token", claimset{"typ": "Offline", "token_type": "Offline", "exp": nil}, all},
		{"without typ", claimset{"typ": nil}, all},
		{"a role is gone", claimset{"roles": []string{"student"}}, []string{"groups//lab-a", "roles/student"}},
		{"absent claims are no roles", claimset{"roles": nil, "groups": nil}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			asked := 0
			p := introspecting(t, "keycloak", 200, mustJSON(t, introspection(tt.change)), func(r *http.Request) {
				asked++
				id, secret, _ := r.BasicAuth()
				if r.Method != http.MethodPost || r.URL.Path != "/introspect" || id != "hub" || secret != "s" || r.PostFormValue("token") != "rt-1" {
					t.Errorf("asked %s %s as %q", r.Method, r.URL, id)
				}
			})
			got, err := p.Look(t.Context(), broker.NewSecret("rt-1"), "u1")
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(broker.Identity{Sub: "u1", Username: "alice", Roles: tt.roles, Known: true}, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if asked != 1 {
				t.Errorf("asked %d times", asked)
			}
		})
	}
}

func TestALookThatShowsNothing(t *testing.T) {
	about := func(change claimset) string { return mustJSON(t, introspection(change)) }
	for _, tt := range []struct {
		name   string
		status int
		body   string
		class  broker.ProviderClass
		reason string
	}{
		{"session gone, user disabled, expired, revoked", 200, `{"active":false}`, broker.Dead, "session_ended"},
		{"an access token", 200, about(claimset{"typ": "Bearer", "token_type": "Bearer"}), broker.TryLater, "wrong_token_type"},
		{"an ID token", 200, about(claimset{"typ": "ID", "token_type": "ID"}), broker.TryLater, "wrong_token_type"},
		{"no type", 200, about(claimset{"typ": nil, "token_type": nil}), broker.TryLater, "wrong_token_type"},
		{"another subject", 200, about(claimset{"sub": "u2"}), broker.TryLater, "wrong_subject"},
		{"no subject", 200, about(claimset{"sub": nil}), broker.TryLater, "wrong_subject"},
		{"another client's token", 200, about(claimset{"azp": "other", "client_id": "other"}), broker.TryLater, "wrong_client"},
		{"active is missing", 200, about(claimset{"active": nil}), broker.TryLater, "unreadable_answer"},
		{"active is no boolean", 200, about(claimset{"active": "false"}), broker.TryLater, "unreadable_answer"},
		{"no JSON", 200, "<html>maintenance</html>", broker.TryLater, "unreadable_answer"},
		{"null", 200, "null", broker.TryLater, "unreadable_answer"},
		{"cut off", 200, `{"active":true,"sub":"u1"`, broker.TryLater, "unreadable_answer"},
		{"nothing", 204, "", broker.TryLater, "unreadable_answer"},
		{"bad credentials", 401, failure("invalid_request", "Authentication failed."), broker.Misconfigured, "client_refused"},
		{"no token in the form", 400, failure("invalid_request", "Token not provided."), broker.TryLater, "unknown_answer"},
		{"no such realm", 404, failure("Realm does not exist", ""), broker.TryLater, "unknown_answer"},
		{"broken", 500, failure("unknown_error", ""), broker.TryLater, "provider_error"},
		{"gateway", 502, "<html>bad gateway</html>", broker.TryLater, "unreadable_answer"},
		{"busy", 503, "", broker.TryLater, "busy"},
		{"moved", 302, "", broker.Misconfigured, "redirect"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := introspecting(t, "keycloak", tt.status, tt.body, nil)
			got, err := p.Look(t.Context(), broker.NewSecret("rt-1"), "u1")
			wantClass(t, err, tt.class, tt.reason)
			if got.Known || got.Roles != nil {
				t.Errorf("it says something all the same: %+v", got)
			}
			if strings.Contains(err.Error(), "rt-1") || strings.Contains(err.Error(), "Authentication failed") {
				t.Errorf("the error repeats what was sent or said: %v", err)
			}
		})
	}
}

func TestAServerThatIsNotKnownToShowRolesIsNotAsked(t *testing.T) {
	for _, profile := range oauthprovider.Profiles() {
		if profile == "keycloak" {
			continue
		}
		p := introspecting(t, profile, 200, mustJSON(t, introspection(nil)), func(r *http.Request) { t.Errorf("%s: asked %s", profile, r.URL) })
		_, err := p.Look(t.Context(), broker.NewSecret("rt-1"), "u1")
		wantClass(t, err, broker.Misconfigured, "unsupported")
	}
	_, err := plainProvider(t, "keycloak", "http://127.0.0.1:1").Look(t.Context(), broker.NewSecret("rt-1"), "u1")
	wantClass(t, err, broker.Misconfigured, "unsupported") // there is no endpoint
}

func TestAnUnreachableServerShowsNothing(t *testing.T) {
	p, err := oauthprovider.New(oauthprovider.Config{
		Name: "lab", Profile: "keycloak", ClientID: "hub", ClientSecret: broker.NewSecret("s"),
		Endpoints: oauthprovider.Endpoints{Token: "http://127.0.0.1:1/token", Introspection: "http://127.0.0.1:1/introspect"},
	})
	if err != nil {
		t.Fatal(err)
	}
	_, err = p.Look(t.Context(), broker.NewSecret("rt-1"), "u1")
	wantClass(t, err, broker.TryLater, "unreachable")
}

func TestTheIntrospectionEndpointOfADocumentIsUsedOnlyIfSafe(t *testing.T) {
	s := newStranger(t)
	s.document = claimset{"introspection_endpoint": "ftp://elsewhere/"}
	p, err := oauthprovider.New(oauthprovider.Config{Name: "lab", Profile: "keycloak", Issuer: s.issuer, ClientID: "hub", ClientSecret: broker.NewSecret("s")})
	if err != nil {
		t.Fatal(err)
	}
	_, err = p.Look(t.Context(), broker.NewSecret("rt-1"), "u1")
	wantClass(t, err, broker.Misconfigured, "endpoint_unsafe")
	var pe *broker.ProviderError
	if errors.As(err, &pe) && strings.Contains(pe.Error(), "elsewhere") {
		t.Errorf("the error repeats the URL: %v", pe)
	}
}
