package main

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// warnings loads text, which has no mistakes, and returns what can have no effect.
func warnings(t *testing.T, text string) string {
	t.Helper()
	c, d, err := read(site(t, text))
	if err != nil {
		t.Fatal(err)
	}
	w := lint(c, d)
	w.sort()
	return strings.TrimSuffix(w.Error(), "\n")
}

const twoProviders = `providers:
  keycloak:
    issuer: https://sso.example.org/realms/lab
    client_id: jupyterhub
    client_secret_file: secret
    roles: [realm_access.roles, groups]
    audiences: {storage: [storage], compute: []}
  gitlab: {issuer: "https://gitlab.example.org", client_id: x, client_secret_file: secret, roles: ["https://gitlab.org/claims/groups", groups]}
hubs: {main: {login: keycloak}, other: {login: gitlab}}
`

func TestWarnings(t *testing.T) {
	for _, tt := range []struct{ why, text, want string }{
		// Nothing to warn of.
		{"a minimal file", minimal, ""},
		{"two providers with the same rule", twoProviders + "policy: [{provider: keycloak, roles: [a]}, {provider: gitlab, roles: [a]}]\n", ""},
		{"the narrow rule first", minimal + "- {roles: [researcher], audiences: [storage, compute]}\n- {}\n", ""},
		{"the same for a shared server", minimal + "- {roles: [researcher], audiences: [storage], shared: true}\n", ""},
		{"other hubs", twoProviders + "policy: [{hubs: [main], provider: keycloak}, {hubs: [other], provider: keycloak}, {provider: keycloak}]\n", ""},
		{"roles in every form", twoProviders + "policy:\n- {provider: keycloak, roles: [a, /lab/a, groups//lab/a, groups/lab/a, realm_access.roles/a, 'keycloak:groups/a', 'gitlab:groups/lab/a', 'urn:x', 'groups/urn:x:y']}\n", ""},
		{"a claim that is a URL", twoProviders + "policy:\n- {provider: gitlab, roles: ['https://gitlab.org/claims/groups/a', 'gitlab:https://gitlab.org/claims/groups/b']}\n- {provider: keycloak, roles: ['gitlab:https://gitlab.org/claims/groups/a']}\n", ""},
		{"audiences that are listed", twoProviders + "policy: [{provider: keycloak, audiences: [storage, compute]}, {provider: gitlab, audiences: [any]}]\n", ""},
		{"images", minimal + "- {images: ['quay.io/lab:*', 'lab', '*', 'localhost:5000/lab@sha256:00']}\n", ""},
		{"levels with Docker", minimal + "- {require_attestation: pidfd+ns}\n- {require_attestation: pidfd, roles: [a]}\n", ""},
		{"the uid with process attestation", minimal + "- {require_attestation: uid, images: ['*']}\nservers: {attestation: process}\n", ""},

		// Rules that nothing reaches.
		{"the same rule twice", minimal + "- {roles: [researcher], audiences: [storage]}\n",
			"line 10: policy[1]: is never reached: policy[0] in line 7 answers all that it would"},
		{"a rule for everybody first", minimal + "- {audiences: [a, b]}\n- {roles: [x], audiences: [b]}\n- {users: [u], roles: [groups/researcher], audiences: [storage]}\n",
			"line 11: policy[2]: is never reached: policy[1] in line 10 answers all that it would\n" +
				"line 12: policy[3]: is never reached: policy[0] in line 7 answers all that it would"},

		// What nothing is.
		{"a user by a pattern", minimal + "- {users: [alice, 'b*']}\n", `line 10: policy[1].users[1]: "b*" never matches: a star stands for any text in images only`},
		{"a server by a pattern", minimal + "- servers:\n  - 'gpu*'\n", `line 11: policy[1].servers[0]: "gpu*" never matches`},
		{"a group by a pattern", minimal + "- {groups: ['lab-*']}\n", `policy[1].groups[0]: "lab-*" never matches`},
		{"an image with a scheme", minimal + "- {images: ['docker://lab:*']}\n", `policy[1].images[0]: "docker://lab:*" never matches: an image reference has no spaces and no scheme`},
		{"an image without images", minimal + "- {images: ['lab:*']}\nservers: {attestation: process}\n", `line 10: policy[1].images[0]: "lab:*" never matches: with servers.attestation: process there are no images`},
		{"a role of an unknown claim", twoProviders + "policy: [{provider: keycloak, roles: [a, roles/a]}]\n",
			`line 10: policy[0].roles[1]: "roles/a" never matches: keycloak shows roles in realm_access.roles, groups, not in roles; a role is VALUE or CLAIM/VALUE`},
		{"another provider's role of an unknown claim", twoProviders + "policy: [{provider: keycloak, roles: ['gitlab:roles/a']}]\n",
			`policy[0].roles[0]: "gitlab:roles/a" never matches: gitlab shows roles in https://gitlab.org/claims/groups, groups, not in roles`},
		{"a value with a slash", minimal + "- {roles: [lab/a]}\n", `policy[1].roles[0]: "lab/a" never matches: keycloak shows roles in roles, groups, not in lab`},
		{"an audience that is not listed", twoProviders + "policy: [{provider: keycloak, audiences: [storage, payroll]}]\n",
			`line 10: policy[0].audiences[1]: "payroll" is not in providers.keycloak.audiences, which has compute, storage; if it needs no scope, say so there with []`},
		{"a level that process attestation has not", minimal + "- {require_attestation: proc}\nservers: {attestation: process}\n",
			"line 10: policy[1].require_attestation: proc is never reached: with servers.attestation: process it is uid"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			got := warnings(t, tt.text)
			if !strings.Contains(got, tt.want) || tt.want == "" && got != "" {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

func TestWarningsOfTheProviders(t *testing.T) {
	var scopes string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		issuer := "http://" + r.Host
		w.Write([]byte(`{"issuer":"` + issuer + `","token_endpoint":"` + issuer + `/token"` + scopes + `}`))
	}))
	defer srv.Close()
	text := strings.Replace(minimal, "https://sso.example.org/realms/lab", srv.URL, 1) + "  scopes: [openid, storage]\n"
	for _, tt := range []struct{ why, scopes, want string }{
		{"it says none", ``, ""},
		{"it knows all", `,"scopes_supported":["openid","storage","email"]`, ""},
		{"it does not know one", `,"scopes_supported":["openid"]`,
			`line 10: policy[0].scopes[1]: "storage" is not among the scopes that keycloak says it knows (scopes_supported)`},
		{"it can't be asked", `,"issuer":"http://else"`, "line 2: providers.keycloak: could not be asked for its scopes: "},
	} {
		t.Run(tt.why, func(t *testing.T) {
			scopes = tt.scopes
			c, d, err := read(site(t, text))
			if err != nil {
				t.Fatal(err)
			}
			got := lintOnline(context.Background(), c, d).Error()
			if !strings.Contains(got, tt.want) || tt.want == "" && got != "" {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}
