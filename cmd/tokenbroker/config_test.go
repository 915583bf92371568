package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.yaml.in/yaml/v3"

	"tokenbroker/broker"
	"tokenbroker/broker/seal"
)

// minimal is all that a site has to write.
const minimal = `providers:
  keycloak:
    issuer: https://sso.example.org/realms/lab
    client_id: jupyterhub
    client_secret_file: secret
policy:
- roles: [researcher]
  audiences: [storage]
  max_ttl: 5m
`

// keycloak is minimal with events.
func keycloak(events string) string {
	return strings.Replace(minimal, "client_id", "profile: keycloak\n    events: "+events+"\n    client_id", 1)
}

// rolesAPI is minimal with a management API.
func rolesAPI(api string) string {
	return strings.Replace(minimal, "client_id", "roles_api: {"+api+"}\n    client_id", 1)
}

// site writes a configuration file with the secrets that it names, and
// returns its path.
func site(t *testing.T, text string) string {
	t.Helper()
	dir := t.TempDir()
	write(t, filepath.Join(dir, "secret"), "s3cret\n", 0o400)
	write(t, filepath.Join(dir, "long-secret"), strings.Repeat("x", 43)+"\n", 0o400)
	write(t, filepath.Join(dir, "wrong-kek"), "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n", 0o400)
	certificate(t, filepath.Join(dir, "cert"), time.Now().Add(time.Hour), "hub.example.org")
	certificate(t, filepath.Join(dir, "nameless"), time.Now().Add(time.Hour))
	if err := seal.Create(filepath.Join(dir, "keyset.json"), filepath.Join(dir, "kek")); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "tokenbroker.yaml")
	write(t, path, text, 0o644)
	return path
}

// certificate writes one for names, as path.pem and path-key.pem, and returns it.
func certificate(t *testing.T, path string, until time.Time, names ...string) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: until, DNSNames: names, IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	write(t, path+".pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), 0o644)
	write(t, path+"-key.pem", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret})), 0o400)
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func write(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil { // whatever the umask says
		t.Fatal(err)
	}
}

// mistakes loads text and returns what is wrong with it, one mistake a line.
func mistakes(t *testing.T, text string) []string {
	t.Helper()
	path := site(t, text)
	_, err := load(path)
	if err == nil {
		return nil
	}
	var wrong Mistakes
	if !errors.As(err, &wrong) {
		t.Fatalf("load: %v", err)
	}
	return strings.Split(strings.ReplaceAll(wrong.Error(), filepath.Dir(path), "DIR"), "\n")
}

func TestAMinimalFileIsCompleted(t *testing.T) {
	path := site(t, minimal)
	got, err := load(path)
	if err != nil {
		t.Fatal(err)
	}
	host, _ := os.Hostname()
	dir := filepath.Dir(path)
	want := &Config{
		Deployment: "default", Host: host, Contact: "your administrator",
		Hubs:    map[broker.HubID]HubConfig{"main": {Socket: "/run/tokenbroker/hubs/main/hub.sock", Login: "keycloak"}},
		Servers: ServersConfig{Directory: "/var/lib/tokenbroker/servers", Attestation: "docker", Rate: 50, Docker: DockerConfig{Socket: "/var/run/docker.sock"}},
		Store:   StoreConfig{RedisConfig{Socket: "/run/redis/redis-server.sock"}},
		Keys:    KeysConfig{filepath.Join(dir, "keyset.json"), filepath.Join(dir, "kek")},
		Providers: map[broker.ProviderID]ProviderConfig{"keycloak": {
			Profile: "generic", Issuer: "https://sso.example.org/realms/lab", ClientID: "jupyterhub",
			ClientSecretFile: filepath.Join(dir, "secret"), Roles: []string{"roles", "groups"}, Rate: 100, OnLogout: broker.StopIssuing,
		}},
		Policy: []RuleConfig{{Roles: []string{"researcher"}, Provider: "keycloak", Audiences: []string{"storage"}, MaxTTL: 5 * time.Minute}},
		Admin:  AdminConfig{"/run/tokenbroker/admin.sock"},
		Audit:  AuditConfig{"-"}, Journal: "/var/lib/tokenbroker/journal",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("load (-want +got):\n%s", diff)
	}
}

func TestEveryMistakeIsNamedAtOnce(t *testing.T) {
	got := mistakes(t, `deploymnt: lab
hubs:
  main: {login: keykloak, uid: root}
servers: {attestation: magic}
providers:
  keycloak:
    profile: keycloack
    issuer: sso.example.org
    client_id: jupyterhub
    client_secret_file: absent
policy:
- {roles: [researcher], provider: github, max_ttl: 5}
- {audiences: storage}
`)
	want := []string{
		`line 1: deploymnt: unknown key; did you mean deployment?`,
		`line 3: hubs.main.login: there is no provider "keykloak"; there are keycloak`,
		`line 3: hubs.main.uid: "root" is not a number`,
		`line 4: servers.attestation: there is no attestation "magic"; there are docker and process`,
		`line 7: providers.keycloak.profile: there is no profile "keycloack"; there are dex, generic, indigo-iam, keycloak`,
		`line 8: providers.keycloak.issuer: is not a URL with http:// or https://`,
		`line 10: providers.keycloak.client_secret_file: DIR/absent does not exist`,
		`line 12: policy[0].max_ttl: "5" is not a time with its unit, like 90s or 5m`,
		`line 12: policy[0].provider: there is no provider "github"; there are keycloak`,
		`line 13: policy[1].audiences: wants a list`,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("load (-want +got):\n%s", diff)
	}
}

func TestMistakes(t *testing.T) {
	long := "/" + strings.Repeat("x", 100)
	for _, tt := range []struct{ why, text, want string }{
		{"nothing at all", "", "the file is empty"},
		{"nothing but a comment", "# hello\n", "the file is empty"},
		{"a list", "- a\n", "line 1: wants a block of keys"},
		{"no YAML", "providers: [\n", "line 1: did not find expected node content"},
		{"two documents", minimal + "---\na: 1\n", "the file holds more than one document"},
		{"a key twice", minimal + "contact: a\ncontact: b\n", "line 11: contact: is here twice, first in line 10"},
		{"a key without a value", minimal + "contact:\n", "line 10: contact: has no value"},
		{"a key that is a list", minimal + "? [a]\n: b\n", "has a key that is not a word"},
		{"a merge key", minimal + "servers: {<<: {attestation: process}}\n", "servers.<<: unknown key"},
		{"an unknown key like nothing else", minimal + "frobnicate: 1\n", "frobnicate: unknown key; known are admin, audit,"},
		{"a truth value for a text", minimal + "contact: yes\nhost: true\n", `host: "true" is not a text`},
		{"a negative time", minimal + "- {max_ttl: -5m}\n", `policy[1].max_ttl: "-5m" is not a time`},
		{"a negative uid", minimal + "hubs: {main: {uid: -1}}\n", `hubs.main.uid: "-1" is not a number`},
		{"no provider", "policy: [{roles: [a]}]\n", "providers: there is none"},
		{"no policy", strings.Split(minimal, "policy:")[0], "policy: there is no rule"},
		{"a hub's socket that is too long", minimal + "hubs: {main: {socket: " + long + "/hub.sock}}\n", "hubs.main.socket: makes a socket path of 110 bytes, and the kernel takes 107"},
		{"the admin socket", minimal + "admin: {socket: " + long + "/admin.sock}\n", "admin.socket: makes a socket path of 112 bytes"},
		{"a server's socket", minimal + "servers: {directory: " + long + "}\n", "servers.directory: makes a socket path of 146 bytes"},
		{"a relative socket", minimal + "admin: {socket: admin.sock}\n", "admin.socket: wants an absolute path"},
		{"two hubs in one directory", minimal + "hubs: {a: {socket: /run/x/a.sock}, b: {socket: /run/x/b.sock}}\n", "hubs.b.socket: needs a directory of its own, and /run/x is that of hubs.a.socket"},
		{"a hub's name that is a path", minimal + "hubs: {../x: {}}\n", "hubs.../x: a name is made of letters"},
		{"a provider called like a command", strings.Replace(minimal, "keycloak:", "list:", 1), "providers.list: this name is a command of access-token"},
		{"no client", strings.Replace(minimal, "client_id: jupyterhub", "adopt: true", 1), "providers.keycloak.client_id: is missing"},
		{"no client secret", strings.Replace(minimal, "client_secret_file: secret", "adopt: true", 1), "client_secret_file: is missing; a public client says auth_style: none"},
		{"no issuer", strings.Replace(minimal, "issuer: https://sso.example.org/realms/lab", "adopt: true", 1), "issuer: is missing; a server without OpenID Connect needs endpoints.token"},
		{"an unknown hub in a rule", minimal + "- {hubs: [other]}\n", `policy[1].hubs[0]: there is no hub "other"; there are main`},
		{"an unknown provider in a role", minimal + "- {roles: [github:org/lab]}\n", `policy[1].roles[0]: there is no provider "github"`},
		{"a role with a colon of its own", minimal + "- {roles: ['urn:x', 'groups/a:b']}\n", ""},
		{"a role that names a provider without saying so", minimal + "- {roles: ['https://x/roles/a']}\n", `policy[1].roles[0]: there is no provider "https"`},
		{"a finding that is none", minimal + "servers: {docker: {posture: {sysadmin: allow}}}\n", `line 10: servers.docker.posture.sysadmin: there is no finding "sysadmin"; there are privileged, all_capabilities, sys_admin,`},
		{"a verdict that is none", minimal + "servers: {docker: {posture: {sys_admin: yes please}}}\n", `line 10: servers.docker.posture.sys_admin: there is no "yes please"; there are refuse, report and allow`},
		{"findings and trusted containers", minimal + "servers: {docker: {posture: {sys_admin: allow, ipc_host: report}, trusted: [hub]}}\n", ""},
		{"a level of attestation that is none", minimal + "- {require_attestation: pid}\n", `line 10: policy[1].require_attestation: there is no level "pid"; there are uid, proc, pidfd, pidfd+ns`},
		{"two scopes in one", minimal + "- {scopes: [a, b c]}\n", `line 10: policy[1].scopes[1]: "b c" is not one scope; write several as [a, b]`},
		{"groups, sharing and a level", minimal + "- {groups: [lab], shared: true, require_attestation: pidfd}\n", ""},
		{"a hub's scopes", minimal + "hubs: {main: {scopes: [openid, profile]}}\n", ""},
		{"a hub's scopes in one", minimal + "hubs: {main: {scopes: [openid profile]}}\n", `line 10: hubs.main.scopes[0]: "openid profile" is not one scope; write several as [a, b]`},
		{"a hub's scope that is none", minimal + "hubs: {main: {scopes: ['a\"b']}}\n", `line 10: hubs.main.scopes[0]: "a\"b" is not one scope`},
		{"a hub's scopes at a provider that can't narrow", strings.Replace(minimal, "client_id", "narrowing: none\n    client_id", 1) + "hubs: {main: {scopes: [openid]}}\n",
			"line 11: hubs.main.scopes: keycloak can't narrow a token (narrowing: none): leave scopes out, and the hub gets the whole token"},
		{"a logout that means something", minimal + "hubs: {main: {on_logout: stop_issuing}}\n", ""},
		{"a logout that means nothing", minimal + "hubs: {main: {on_logout: forget}}\n", `line 10: hubs.main.on_logout: there is no "forget"; there are keep, stop_issuing and revoke`},
		{"a hub's API, which stops servers", "hubs: {main: {api: {url: 'http://127.0.0.1:8081/hub/api', token_file: secret}}}\n" + minimal + "- {roles: [x], on_role_lost: stop_server}\n", ""},
		{"a hub's API without its token", minimal + "hubs: {main: {api: {url: 'http://127.0.0.1:8081/hub/api'}}}\n", "line 10: hubs.main.api.token_file: is missing"},
		{"a hub's address in place of its API's", minimal + "hubs: {main: {api: {url: 'http://127.0.0.1:8081', token_file: secret}}}\n", "line 10: hubs.main.api.url: is not a URL like http://127.0.0.1:8081/hub/api"},
		{"servers that nobody can stop", minimal + "- {roles: [x], on_role_lost: stop_server}\n", "line 10: policy[1].on_role_lost: hub main can't be asked to stop a server: give hubs.main.api"},
		{"a loss of nothing", minimal + "- {on_role_lost: revoke_grants}\n", "policy[1].on_role_lost: the rule names neither roles nor groups that could be lost"},
		{"a group that may be lost", minimal + "- {groups: [x], on_role_lost: revoke_grants}\n", ""},
		{"a loss that means nothing", minimal + "- {roles: [x], on_role_lost: shout}\n", `policy[1].on_role_lost: there is no "shout"`},
		{"a narrowing that is none", strings.Replace(minimal, "client_id", "narrowing: some\n    client_id", 1), `there is no narrowing "some"`},
		{"a rate", strings.Replace(minimal, "client_id", "rate: 20\n    client_id", 1), ""},
		{"a rate that is none", strings.Replace(minimal, "client_id", "rate: -1\n    client_id", 1), "line 4: providers.keycloak.rate: is less than 1 request a second"},
		{"a rate that is no number", strings.Replace(minimal, "client_id", "rate: 1/s\n    client_id", 1), `providers.keycloak.rate: "1/s" is not a number`},
		{"an authentication that is none", strings.Replace(minimal, "client_id", "auth_style: magic\n    client_id", 1), "line 2: providers.keycloak: auth_style: it is client_secret_basic"},
		{"an authority that is none", strings.Replace(minimal, "client_id", "ca_file: secret\n    client_id", 1), "line 2: providers.keycloak: "},
		{"events", keycloak(`{client_id: events, client_secret_file: secret}`), ""},
		{"events of another server", strings.Replace(keycloak(`{client_id: events, client_secret_file: secret}`), "profile: keycloak", "profile: generic", 1), "providers.keycloak.events: is about Keycloak: say profile: keycloak"},
		{"events without a client", keycloak(`{client_secret_file: secret}`), "providers.keycloak.events.client_id: is missing"},
		{"events without a secret", keycloak(`{client_id: events}`), "providers.keycloak.events.client_secret_file: is missing"},
		{"events too often", keycloak(`{client_id: events, client_secret_file: secret, every: 100ms}`), "providers.keycloak.events.every: is less than 1s"},
		{"events of what is no realm", strings.Replace(keycloak(`{client_id: events, client_secret_file: secret}`), "/realms/lab", "", 1), "providers.keycloak.events.url: is missing, and issuer is not the URL of a realm"},
		{"events at a URL that is no realm's", keycloak(`{client_id: events, client_secret_file: secret, url: "https://sso.example.org/realms/lab"}`), "events.url: it is not the URL of a realm in Keycloak's admin API"},
		{"roles by an API", rolesAPI(`url: "https://a.example/{sub}", token_file: secret`), ""},
		{"roles by an API with a key", rolesAPI(`url: "https://a.example/{sub}/roles", path: "[].id", claim: role, token_url: "https://iam.example", api_key_file: secret`), ""},
		{"roles by an API without a URL", rolesAPI(`token_file: secret`), "line 4: providers.keycloak.roles_api.url: is missing"},
		{"roles by an API in the clear", rolesAPI(`url: "http://a.example/{sub}", token_file: secret`), "line 4: providers.keycloak.roles_api.url: is not a URL with https://"},
		{"roles of nobody", rolesAPI(`url: "https://a.example/", token_file: secret`), "line 4: providers.keycloak.roles_api.url: wants {sub} in its path, once"},
		{"a path in another language", rolesAPI(`url: "https://a.example/{sub}", token_file: secret, path: $.roles`), "line 4: providers.keycloak.roles_api.path: is not of the form roles[].name"},
		{"roles by an API without a token", rolesAPI(`url: "https://a.example/{sub}"`), "line 4: providers.keycloak.roles_api.token_file: is missing"},
		{"a token for it that is not there", rolesAPI(`url: "https://a.example/{sub}", token_file: absent`), "line 4: providers.keycloak.roles_api.token_file: DIR/absent does not exist"},
		{"a key for it without a place", rolesAPI(`url: "https://a.example/{sub}", api_key_file: secret`), "line 4: providers.keycloak.roles_api.token_url: is missing"},
		{"a place for it without a key", rolesAPI(`url: "https://a.example/{sub}", token_url: "https://iam.example"`), "line 4: providers.keycloak.roles_api.api_key_file: is missing"},
		{"a token for it and a place", rolesAPI(`url: "https://a.example/{sub}", token_file: secret, token_url: "https://iam.example", api_key_file: secret`), "roles_api.token_file: is of no use beside token_url"},
		{"a place for it in the clear", rolesAPI(`url: "https://a.example/{sub}", token_url: "http://iam.example", api_key_file: secret`), "roles_api.token_url: is not a URL with https://"},
		{"an unknown key of it", rolesAPI(`url: "https://a.example/{sub}", token_file: secret, claims: x`), "line 4: providers.keycloak.roles_api.claims: unknown key; did you mean claim?"},
		{"claims beside it", strings.Replace(rolesAPI(`url: "https://a.example/{sub}", token_file: secret`), "roles_api:", "roles: [groups]\n    roles_api:", 1), "line 4: providers.keycloak.roles: with roles_api all roles come from it, as roles/…: leave this out"},
		{"a server whose refreshes end tokens", strings.Replace(minimal, "client_id", "refresh_ends_access: true\n    client_id", 1), ""},
		{"a key that opens another keyset", minimal + "keys: {kek_file: wrong-kek}\n", "line 10: keys: "},
		{"a Redis socket that is too long", minimal + "store: {redis: {socket: " + long + "/redis.sock}}\n", "store.redis.socket: makes a socket path of 112 bytes"},
		{"a user of Redis without a password", minimal + "store: {redis: {user: tb}}\n", "line 10: store.redis: "},
		{"Redis twice", minimal + "store: {redis: {socket: /x, address: 'y:1'}}\n", "store.redis.address: give either socket or address"},
		{"Sentinels", minimal + "store: {redis: {sentinel: {master: lab, addresses: ['a:1', 'b:1'], password_file: secret}, password_file: secret, db: 1}}\n", ""},
		{"Sentinels and an address", minimal + "store: {redis: {address: 'a:1', sentinel: {master: lab, addresses: ['a:1']}}}\n", "store.redis.sentinel: says where Redis is, and so does another key"},
		{"Sentinels without a name", minimal + "store: {redis: {sentinel: {addresses: ['a:1']}}}\n", "line 10: store.redis.sentinel.master: is missing"},
		{"a name without Sentinels", minimal + "store: {redis: {sentinel: {master: lab}}}\n", "store.redis.sentinel.addresses: is missing"},
		{"a Sentinel without a port", minimal + "store: {redis: {sentinel: {master: lab, addresses: ['a:1', b]}}}\n", "store.redis.sentinel.addresses[1]: wants host:port"},
		{"a user of the Sentinels without a password", minimal + "store: {redis: {sentinel: {master: lab, addresses: ['a:1'], user: tb}}}\n", "store.redis.sentinel.password_file: is missing"},
		{"a password of the Sentinels that is not there", minimal + "store: {redis: {sentinel: {master: lab, addresses: ['a:1'], password_file: absent}}}\n", "store.redis.sentinel.password_file: DIR/absent does not exist"},
		{"a cluster", minimal + "store: {redis: {cluster: {addresses: ['a:1']}, tls: true}}\n", ""},
		{"a cluster and Sentinels", minimal + "store: {redis: {cluster: {addresses: ['a:1']}, sentinel: {master: lab, addresses: ['a:1']}}}\n", "store.redis.sentinel: says where Redis is"},
		{"a cluster and a socket", minimal + "store: {redis: {cluster: {addresses: ['a:1']}, socket: /x}}\n", "store.redis.cluster: says where Redis is"},
		{"a cluster without nodes", minimal + "store: {redis: {cluster: {}}}\n", "store.redis.cluster.addresses: is missing"},
		{"a node without a host", minimal + "store: {redis: {cluster: {addresses: [':1']}}}\n", "store.redis.cluster.addresses[0]: wants host:port"},
		{"a database of a cluster", minimal + "store: {redis: {cluster: {addresses: ['a:1']}, db: 1}}\n", "store.redis.db: is not 0, and a cluster has no other"},
		{"Redis without a port", minimal + "store: {redis: {address: y}}\n", "store.redis.address: wants host:port"},
		{"servers that may ask nothing", minimal + "servers: {rate: -1}\n", "line 10: servers.rate: is less than 1 request a second"},
		{"a listener for everybody", minimal + "hubs: {main: {listener: {address: '0.0.0.0:1', client_secret_file: secret}}}\n", "hubs.main.listener.address: 0.0.0.0:1 can be reached from elsewhere"},
		{"a listener on this machine", minimal + "hubs: {main: {listener: {address: '127.0.0.1:1', client_secret_file: long-secret}}}\n", ""},
		{"a listener whose secret could be guessed", minimal + "hubs: {main: {listener: {address: '127.0.0.1:1', client_secret_file: secret}}}\n", "line 10: hubs.main.listener.client_secret_file: the secret in DIR/secret has fewer than 43 characters and could be guessed: make one with openssl rand -base64 32"},
		{"a listener without a secret", minimal + "hubs: {main: {listener: {address: '[::1]:1'}}}\n", "hubs.main.listener.client_secret_file: is missing"},
		{"a key of a listener without its certificate", minimal + "hubs: {main: {listener: {address: 'a:1', client_secret_file: secret, tls_key_file: secret}}}\n", "hubs.main.listener.tls_cert_file: is missing"},
		{"a logout listener for everybody", minimal + "logout: {address: '0.0.0.0:1'}\n", "logout.address: 0.0.0.0:1 can be reached from elsewhere"},
		{"metrics for everybody", minimal + "metrics: {address: '0.0.0.0:1'}\n", "metrics.address: 0.0.0.0:1 can be reached from elsewhere"},
		{"a logout listener on this machine", minimal + "logout: {address: '127.0.0.1:1'}\n", ""},
		{"a logout listener nowhere", minimal + "logout: {}\n", "logout.address: wants host:port"},
		{"a logout listener's certificate without its key", minimal + "logout: {address: 'a:1', tls_cert_file: secret}\n", "logout.tls_key_file: is missing"},
		{"a logout listener with a secret", minimal + "logout: {address: '[::1]:1', client_secret_file: secret}\n", "logout.client_secret_file: unknown key"},
		{"names of a listener", minimal + "logout: {address: '127.0.0.1:1', hosts: [hub.example.org, Hub, 192.0.2.7, '2001:db8::1', host_1.docker.internal]}\n", ""},
		{"a listener's name with a port", minimal + "hubs: {main: {listener: {address: '127.0.0.1:1', client_secret_file: long-secret, hosts: [a, 'hub.example.org:443']}}}\n", `line 10: hubs.main.listener.hosts[1]: "hub.example.org:443" is not a name like hub.example.org: no port, no scheme, no path`},
		{"a listener's name that is a URL", minimal + "metrics: {address: '127.0.0.1:1', hosts: ['https://hub.example.org']}\n", `metrics.hosts[0]: "https://hub.example.org" is not a name`},
		{"any name of a listener", minimal + "metrics: {address: '127.0.0.1:1', hosts: ['*']}\n", `metrics.hosts[0]: "*" is not a name`},
		{"a listener with a certificate", minimal + "logout: {address: '0.0.0.0:1', tls_cert_file: cert.pem, tls_key_file: cert-key.pem}\n", ""},
		{"a certificate that is none", minimal + "logout: {address: 'a:1', tls_cert_file: secret, tls_key_file: secret}\n", "line 10: logout.tls_cert_file: tls: failed to find any PEM data in certificate input"},
		{"a certificate that names no host", minimal + "logout: {address: 'a:1', tls_cert_file: nameless.pem, tls_key_file: nameless-key.pem}\n", "line 10: logout.tls_cert_file: the certificate in DIR/nameless.pem names no host (subjectAltName), so that nobody could ask"},
		{"a certificate that names no host, and names", minimal + "logout: {address: 'a:1', tls_cert_file: nameless.pem, tls_key_file: nameless-key.pem, hosts: [a]}\n", ""},
		{"a logout that keeps", strings.Replace(minimal, "client_id:", "on_logout: keep\n    client_id:", 1), `providers.keycloak.on_logout: there is no "keep"; there are ignore, stop_issuing and revoke`},
		{"a logout that ignores", strings.Replace(minimal, "client_id:", "on_logout: ignore\n    client_id:", 1), ""},
		{"an audit beside nothing", minimal + "audit: {file: audit.log}\n", "audit.file: wants an absolute path"},
		{"a helper that is not there", minimal + "helper: /nowhere/access-token\n", "helper: /nowhere/access-token does not exist"},
		{"keys that are not there", minimal + "keys: {kek_file: /nowhere/kek}\n", "keys.kek_file: /nowhere/kek does not exist: tokenbroker keys create makes it"},
		{"the default server by its name", minimal + "- {servers: ['', gpu]}\n", ""},
		{"a text that looks like a number", minimal + "deployment: 42\n", ""},
		{"an anchor", strings.Replace(minimal, "[researcher]", "&r [researcher]", 1) + "- {roles: *r}\n", ""},
	} {
		t.Run(tt.why, func(t *testing.T) {
			got := strings.Join(mistakes(t, tt.text), "\n")
			if !strings.Contains(got, tt.want) || tt.want == "" && got != "" {
				t.Errorf("load: got %q, want %q", got, tt.want)
			}
		})
	}
}

func TestSeveralProvidersNeedNaming(t *testing.T) {
	got := strings.Join(mistakes(t, `providers:
  a: &p {issuer: "https://a", client_id: a, client_secret_file: secret}
  b: *p
policy: [{roles: [x]}]
`), "\n")
	for _, want := range []string{
		"hubs.main.login: is missing, and there are several: a, b",
		"line 4: policy[0].provider: is missing, and there are several: a, b",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("load: got %q, want %q", got, want)
		}
	}
}

func TestSecretFilesAreClosedToOthers(t *testing.T) {
	for _, tt := range []struct {
		mode os.FileMode
		text string
		want string
	}{
		{0o400, "x", ""},
		{0o600, "x", ""},
		{0o440, "x", "DIR/it may be read by others (mode 0440): chmod 0400 DIR/it"},
		{0o604, "x", "DIR/it may be read by others (mode 0604): chmod 0400 DIR/it"},
		{0o400, "\n", "DIR/it is empty"},
		{0o400, strings.Repeat("x", 1<<20), "DIR/it is too large for a secret"},
	} {
		t.Run(fmt.Sprintf("%04o %d", tt.mode, len(tt.text)), func(t *testing.T) {
			path := site(t, strings.Replace(minimal, "file: secret", "file: it", 1))
			write(t, filepath.Join(filepath.Dir(path), "it"), tt.text, tt.mode)
			_, err := load(path)
			got := strings.ReplaceAll(fmt.Sprint(err), filepath.Dir(path), "DIR")
			want := "<nil>"
			if tt.want != "" {
				want = "line 5: providers.keycloak.client_secret_file: " + tt.want
			}
			if got != want {
				t.Errorf("load: got %q, want %q", got, want)
			}
		})
	}
}

func TestSystemdCredentialsComeFirst(t *testing.T) {
	path, credentials := site(t, minimal), t.TempDir()
	t.Setenv("CREDENTIALS_DIRECTORY", credentials)
	write(t, filepath.Join(credentials, "secret"), "from systemd", 0o440)
	c, err := load(path)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := c.Providers["keycloak"].ClientSecretFile, filepath.Join(credentials, "secret"); got != want {
		t.Errorf("client_secret_file: got %s, want %s", got, want)
	}
	if got, want := c.Keys.KEKFile, filepath.Join(filepath.Dir(path), "kek"); got != want {
		t.Errorf("kek_file: got %s, want %s", got, want)
	}
}

// Whatever the file holds: the parser returns, each mistake has a text, and a
// file without mistakes means the same when it is printed and read again.
func FuzzParse(f *testing.F) {
	f.Add([]byte(minimal))
	f.Add([]byte("hubs: {main: {listener: {address: '[::1]:1'}}}\nstore: {redis: {db: 1, tls: true}}\n"))
	f.Add([]byte("store: {redis: {sentinel: {master: lab, addresses: ['a:1']}, cluster: {addresses: [a]}}}\n"))
	f.Add([]byte(keycloak("{every: 10s}")))
	f.Add([]byte("a: &a [*a]\nb: *a\n"))
	f.Add([]byte("policy: [{max_ttl: 5m, roles: [a, 1, true, ~]}]\n<<: *x"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, d := parse(data)
		for _, m := range d.mistakes {
			if m.Text == "" || m.Line < 0 {
				t.Errorf("a mistake without a text or place: %+v", m)
			}
		}
		if len(d.mistakes) == 0 {
			printed, err := yaml.Marshal(c)
			if err != nil {
				t.Fatal(err)
			}
			again, d := parse(printed)
			if diff := cmp.Diff(c, again, cmpopts.EquateEmpty()); diff != "" || len(d.mistakes) > 0 {
				t.Errorf("printed and read again: %v\n%s\n%s", d.mistakes, diff, printed)
			}
		}
		check(c, d, files{t.TempDir()})
	})
}
