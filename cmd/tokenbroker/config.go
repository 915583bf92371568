package main

import (
	"cmp"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"time"

	"tokenbroker/broker"
	"tokenbroker/broker/oauthprovider"
	"tokenbroker/broker/peersocket"
	"tokenbroker/broker/rolewatch"
	"tokenbroker/spawnerhook"
)

// defaultConfigFile is read where --config names no other.
const defaultConfigFile = "/etc/tokenbroker/tokenbroker.yaml"

// A Config is the configuration file. The comments of its fields are its manual.
// Only providers and policy have no default. Files that hold secrets must be
// closed to group and others; relative paths to files are looked for in
// $CREDENTIALS_DIRECTORY (systemd), then beside the configuration file.
type Config struct {
	// Deployment names one Redis and the brokers on it. It is part of every
	// sealed record's place: with another name nothing old can be read.
	// Default: default.
	Deployment string `yaml:"deployment"`
	// Host names this machine among the brokers of a deployment. Default: the
	// machine's host name.
	Host string `yaml:"host"`
	// Contact is whom users are told to ask. Default: your administrator.
	Contact string `yaml:"contact"`
	// Hubs are the JupyterHubs that this broker serves. Default: one called main.
	Hubs map[broker.HubID]HubConfig `yaml:"hubs"`
	// Logout is the TCP listener for logout tokens (OpenID Connect Back-Channel
	// Logout). The client at the provider names its URL, whose path is
	// /backchannel-logout/NAME with the provider's name here; in Keycloak: Clients, the
	// client, "Backchannel logout URL", with "Backchannel logout session required" on.
	// One broker of a deployment is enough. Default: none.
	Logout *ListenConfig `yaml:"logout,omitempty"`
	// Metrics is the TCP listener for Prometheus, at /metrics. They name no user.
	// Default: none.
	Metrics *ListenConfig `yaml:"metrics,omitempty"`
	// Servers says how single-user servers reach the broker.
	Servers ServersConfig `yaml:"servers"`
	// Store is where the sealed records lie.
	Store StoreConfig `yaml:"store"`
	// Keys seal the records. `tokenbroker keys create` makes them.
	Keys KeysConfig `yaml:"keys"`
	// Providers are the OAuth 2.0 and OpenID Connect servers. No default.
	Providers map[broker.ProviderID]ProviderConfig `yaml:"providers,omitempty"`
	// Policy is who may have which tokens: the first rule that covers a request
	// answers it, and what none covers is denied. No default.
	Policy []RuleConfig `yaml:"policy,omitempty"`
	// Admin is the socket of the administrator's commands.
	Admin AdminConfig `yaml:"admin"`
	// Audit is where the audit lines go.
	Audit AuditConfig `yaml:"audit"`
	// Journal is a file of this broker alone, on a disk that outlives a crash: a
	// refreshed token is safe there before Redis has it. Default: journal beside
	// servers.directory.
	Journal string `yaml:"journal"`
	// Helper is the access-token binary on this host, for the hub to mount into
	// containers. Default: access-token beside this program or in
	// ../lib/tokenbroker, if it is there.
	Helper string `yaml:"helper,omitempty"`
}

// HubConfig is one JupyterHub.
type HubConfig struct {
	// Socket is the hub's own socket, in a directory of its own. Default:
	// /run/tokenbroker/hubs/NAME/hub.sock.
	Socket string `yaml:"socket"`
	// UID is who the hub runs as; nobody else is let in. Default: 0.
	UID uint32 `yaml:"uid,omitempty"`
	// Login is the provider that the hub's users log in with. Default: the only one.
	Login broker.ProviderID `yaml:"login,omitempty"`
	// Scopes are what the hub's own access token is narrowed to, as in [openid,
	// profile, email]: all that the hub reads of its users at the provider, and openid
	// for its userinfo. What services want of containers need not be in it. The token
	// must be for no other audience than the client, and what can't be narrowed or read
	// is not given to the hub: the login says why. (Keycloak adds the audience account
	// for who has roles of that client, unless "Full scope allowed" is off for ours.)
	// With a further provider that can't narrow the hub gets the whole token. Default:
	// the whole token.
	Scopes []string `yaml:"scopes,omitempty"`
	// OnLogout is what a logout at the hub does to the user's grants: keep them, so
	// that a computation goes on; stop_issuing, no token until the next login; or
	// revoke, the same and the provider ends the session. The hub's logout is heard
	// only where our Python half is installed. Default: keep.
	OnLogout broker.OnLogout `yaml:"on_logout,omitempty"`
	// API is the hub's own, for what it tells nobody: servers and users that are
	// gone, and to stop a server. Default: it is not asked.
	API *HubAPIConfig `yaml:"api,omitempty"`
	// Listener is a token endpoint for hubs without our Python half. Default: none.
	Listener *ListenerConfig `yaml:"listener,omitempty"`
}

// HubAPIConfig is a hub's REST API.
type HubAPIConfig struct {
	// URL ends with /hub/api.
	URL string `yaml:"url,omitempty"`
	// TokenFile holds the API token of a service of the hub, whose role has the
	// scopes list:users, read:servers and, for on_role_lost: stop_server,
	// delete:servers, and no others.
	TokenFile string `yaml:"token_file,omitempty"`
	// CAFile holds who signed the hub's certificate. Default: the system's.
	CAFile string `yaml:"ca_file,omitempty"`
}

// ListenerConfig is a TCP token endpoint.
type ListenerConfig struct {
	ListenConfig `yaml:",inline"`
	// ClientSecretFile holds what the hub must send as client_secret: at least 43
	// characters, as `openssl rand -base64 32` makes them.
	ClientSecretFile string `yaml:"client_secret_file,omitempty"`
}

// listeners returns the TCP listeners by their keys.
func (c *Config) listeners() map[string]*ListenConfig {
	all := map[string]*ListenConfig{"logout": c.Logout, "metrics": c.Metrics}
	for name, h := range c.Hubs {
		if h.Listener != nil {
			all["hubs."+string(name)+".listener"] = &h.Listener.ListenConfig
		}
	}
	maps.DeleteFunc(all, func(_ string, l *ListenConfig) bool { return l == nil })
	return all
}

// ListenConfig is a TCP listener.
type ListenConfig struct {
	// Address is host:port. Without TLS the host must be a loopback address.
	Address string `yaml:"address,omitempty"`
	// TLSCertFile and TLSKeyFile are the certificate chain and key, as PEM.
	TLSCertFile string `yaml:"tls_cert_file,omitempty"`
	TLSKeyFile  string `yaml:"tls_key_file,omitempty"`
	// Hosts are further names under which it may be asked (header Host), without the
	// port: what a proxy before it passes on. Requests for others are refused. Default:
	// only the names in the certificate; without one, localhost and its addresses.
	Hosts []string `yaml:"hosts,omitempty"`
}

// ServersConfig is about single-user servers.
type ServersConfig struct {
	// Directory holds one directory with a socket for each server. Default:
	// /var/lib/tokenbroker/servers.
	Directory string `yaml:"directory"`
	// Attestation is docker, or process for servers without containers, each
	// under a uid of its own. Default: docker.
	Attestation string `yaml:"attestation"`
	// Rate is how many requests a second one server may make, over all of its
	// connections, and four times as many at once. What is over it is refused as
	// limited; of what goes on, no more is read, so that nobody else is slowed
	// down. Default: 50.
	Rate int `yaml:"rate"`
	// Docker is about the Docker daemon.
	Docker DockerConfig `yaml:"docker"`
}

// DockerConfig is about the Docker daemon.
type DockerConfig struct {
	// Socket is the daemon's. Default: /var/run/docker.sock.
	Socket string `yaml:"socket"`
	// Posture says what becomes of a server whose container was started with an
	// option that weakens it: refuse, it gets no tokens; report, it gets them, and
	// the log and the audit say so; allow, only the audit does. As in {sys_admin:
	// allow, devices: allow} for FUSE. The refusal names the option and the key;
	// `tokenbroker doctor --dry-run` lists all of them for the containers that run.
	// Default: refuse what lets a container become another one or the host, report
	// the rest.
	Posture spawnerhook.Posture `yaml:"posture,omitempty"`
	// Trusted are the names of containers that may be able to pass for others: a
	// hub's own and the broker's, if they have the Docker socket. Any other that
	// could lowers the level of attestation on this host by one, and that is
	// logged. Default: none.
	Trusted []string `yaml:"trusted,omitempty"`
}

// StoreConfig is where the sealed records lie.
type StoreConfig struct {
	Redis RedisConfig `yaml:"redis"`
}

// RedisConfig is how to reach Redis 6.2 or later, in one of four ways.
type RedisConfig struct {
	// Socket is a Unix socket. Default, if none of the others is there:
	// /run/redis/redis-server.sock.
	Socket string `yaml:"socket,omitempty"`
	// Address is host:port.
	Address string `yaml:"address,omitempty"`
	// Sentinel finds the primary by asking Sentinels, and again when they
	// promote another. Have it keep "min-replicas-to-write 1": a primary that is
	// cut off then takes no changes that would be lost.
	Sentinel *SentinelConfig `yaml:"sentinel,omitempty"`
	// Cluster is a Redis Cluster.
	Cluster *ClusterConfig `yaml:"cluster,omitempty"`
	// User is an ACL user; `go doc tokenbroker/broker/redisstore` lists the rights
	// it needs. Default: Redis's default user.
	User string `yaml:"user,omitempty"`
	// PasswordFile holds the password, the same for all servers of a set.
	PasswordFile string `yaml:"password_file,omitempty"`
	// TLS switches TLS on; CAFile does, too, and names who signed the server.
	// Both are about Sentinels as well.
	TLS    bool   `yaml:"tls,omitempty"`
	CAFile string `yaml:"ca_file,omitempty"`
	// DB is the database's number. A cluster has only 0.
	DB int `yaml:"db,omitempty"`
	// AllowNoPersistence accepts that a restart of Redis logs everybody out.
	AllowNoPersistence bool `yaml:"allow_no_persistence,omitempty"`
}

// SentinelConfig is about Redis Sentinel.
type SentinelConfig struct {
	// Master is the name that the Sentinels know the primary by.
	Master string `yaml:"master,omitempty"`
	// Addresses are some Sentinels, host:port; they know the others. Name more
	// than one: the first may be gone with the primary.
	Addresses []string `yaml:"addresses,omitempty"`
	// User is an ACL user of the Sentinels. Default: their default user.
	User string `yaml:"user,omitempty"`
	// PasswordFile holds the Sentinels' own password. They need one: who may
	// command them decides where the broker sends Redis's password.
	PasswordFile string `yaml:"password_file,omitempty"`
}

// ClusterConfig is about Redis Cluster.
type ClusterConfig struct {
	// Addresses are some nodes, host:port; they know the others.
	Addresses []string `yaml:"addresses,omitempty"`
}

// KeysConfig is the keyset and the key that opens it.
type KeysConfig struct {
	// Keyset is the wrapped keyset. Default: keyset.json.
	Keyset string `yaml:"keyset"`
	// KEKFile is the key-encryption key. Default: kek.
	KEKFile string `yaml:"kek_file"`
}

// ProviderConfig is one OAuth 2.0 or OpenID Connect server.
type ProviderConfig struct {
	// Profile names the server's quirks. Default: generic.
	Profile string `yaml:"profile"`
	// Issuer is the OpenID Connect issuer, exactly as the server states it.
	Issuer string `yaml:"issuer,omitempty"`
	// DiscoveryURL is where to read the issuer's metadata if not from the issuer.
	DiscoveryURL string `yaml:"discovery_url,omitempty"`
	// Endpoints stand in for discovery.
	Endpoints EndpointsConfig `yaml:"endpoints,omitempty"`
	// ClientID is the client that the hub's logins are made with.
	ClientID string `yaml:"client_id,omitempty"`
	// ClientSecretFile holds its secret. The hub needs it no more.
	ClientSecretFile string `yaml:"client_secret_file,omitempty"`
	// PrivateKeyFile signs assertions in place of a secret.
	PrivateKeyFile string `yaml:"private_key_file,omitempty"`
	// AuthStyle is how the client authenticates. Default: the profile's.
	AuthStyle string `yaml:"auth_style,omitempty"`
	// CAFile holds who signed the server's certificate. Default: the system's.
	CAFile string `yaml:"ca_file,omitempty"`
	// Proxy is the URL of an HTTP proxy. Default: none, whatever the environment says.
	Proxy string `yaml:"proxy,omitempty"`
	// RedirectURI is the only one that a login may name. Default: any.
	RedirectURI string `yaml:"redirect_uri,omitempty"`
	// Roles are the claims that policy sees as roles; a dot steps into an
	// object, as in realm_access.roles. Default: roles and groups.
	Roles []string `yaml:"roles,omitempty"`
	// Audiences maps an audience to the scopes that must be asked for with it.
	Audiences map[string][]string `yaml:"audiences,omitempty"`
	// Narrowing is exchange, scope or none. Default: the profile's.
	Narrowing string `yaml:"narrowing,omitempty"`
	// RolesAPI is a management API that says which roles a user has now, for a
	// server that neither puts them into tokens nor shows them otherwise, such as IBM
	// App ID. All roles then come from there: at logins and refreshes, and twice a
	// minute for users with a running server. An answer that fails changes no roles.
	// Default: none.
	RolesAPI *RolesAPIConfig `yaml:"roles_api,omitempty"`
	// RefreshEndsAccess says that a refresh ends the access token before it, as at
	// GitHub and GitLab. Otherwise, where roles show at refreshes only, sessions with
	// a running server are refreshed every four minutes or so to see them.
	RefreshEndsAccess bool `yaml:"refresh_ends_access,omitempty"`
	// Adopt takes refresh tokens that the hub has from before the broker.
	Adopt bool `yaml:"adopt,omitempty"`
	// Rate is how many requests this broker sends the provider in any second, of
	// all kinds together. What is over it waits for up to 5 s, and is then told to
	// come again later; a login waits longer. Default: 100, which is enough for
	// 2,000 users with running servers on this host.
	Rate int `yaml:"rate"`
	// OnLogout is what a logout at the provider, told to logout, does to what rests
	// on the session that ended: stop_issuing gives no tokens until the next login,
	// revoke also has the provider revoke what was issued, and ignore changes
	// nothing by itself. In each case the provider is asked at once what is left of
	// the user's other sessions. Default: stop_issuing.
	OnLogout broker.OnLogout `yaml:"on_logout"`
	// Events has Keycloak's events read, so that a change of somebody's rights is
	// seen within every and a second instead of a minute. Default: they are not.
	Events *EventsConfig `yaml:"events,omitempty"`
}

// EventsConfig is how Keycloak's admin and user events are read (Keycloak 25 or
// later, profile keycloak). The realm must save both: Realm settings, Events, "Save
// events". They name users by their id, so sub must be that in tokens, as it is
// unless somebody has changed the mapper.
type EventsConfig struct {
	// URL is that of the realm in the admin API. Default: of the server at
	// discovery_url or issuer, https://sso.example.org/admin/realms/lab.
	URL string `yaml:"url,omitempty"`
	// ClientID is a client of the realm for this alone, with a service account
	// whose only role is view-events of the client realm-management.
	ClientID string `yaml:"client_id,omitempty"`
	// ClientSecretFile holds its secret.
	ClientSecretFile string `yaml:"client_secret_file,omitempty"`
	// Every is the time from one poll to the next, 1s at the least. Default: 5s.
	Every time.Duration `yaml:"every,omitempty"`
}

// RolesAPIConfig is a management API. ca_file and proxy hold for it, too; rate does
// once more, apart from the server's own.
type RolesAPIConfig struct {
	// URL is that of a user's roles; {sub} in its path stands for the user's subject,
	// as in https://eu-gb.appid.cloud.ibm.com/management/v4/TENANT/users/{sub}/roles.
	URL string `yaml:"url,omitempty"`
	// Path leads to the roles in the answer: a name steps into an object, [] into
	// each item of an array. An answer to which it doesn't fit changes nothing.
	// Default: roles[].name.
	Path string `yaml:"path,omitempty"`
	// Claim is what a rule calls them: claim/value. Default: roles.
	Claim string `yaml:"claim,omitempty"`
	// TokenFile holds the bearer token for it, and is read for each request.
	TokenFile string `yaml:"token_file,omitempty"`
	// TokenURL and APIKeyFile get a bearer token in its place from IBM Cloud IAM:
	// https://iam.cloud.ibm.com/identity/token.
	TokenURL   string `yaml:"token_url,omitempty"`
	APIKeyFile string `yaml:"api_key_file,omitempty"`
}

// EndpointsConfig names a server's endpoints.
type EndpointsConfig struct {
	Token         string `yaml:"token,omitempty"`
	Userinfo      string `yaml:"userinfo,omitempty"`
	JWKS          string `yaml:"jwks,omitempty"`
	Revocation    string `yaml:"revocation,omitempty"`
	Introspection string `yaml:"introspection,omitempty"`
}

// RuleConfig is one rule of the policy. All that it names must fit.
type RuleConfig struct {
	// Hubs, Users, Servers, Images and Roles say who: any of each list will do,
	// and a list that is absent allows all. In images * stands for any text. A
	// role is value, claim/value or provider:claim/value.
	Hubs    []broker.HubID      `yaml:"hubs,omitempty"`
	Users   []broker.UserID     `yaml:"users,omitempty"`
	Servers []broker.ServerName `yaml:"servers,omitempty"`
	Images  []string            `yaml:"images,omitempty"`
	Roles   []string            `yaml:"roles,omitempty"`
	// Groups are groups at the hub that the user must be in one of, for a site
	// that keeps its roles there. Roles and groups in one rule must both fit.
	Groups []string `yaml:"groups,omitempty"`
	// Shared gives tokens also on a server that somebody else may open.
	// Default: no tokens while it is shared.
	Shared bool `yaml:"shared,omitempty"`
	// RequireAttestation is how surely the broker must know who asks: uid, proc,
	// pidfd or pidfd+ns, each better than those before. `tokenbroker status` shows
	// what this host has. Default: any.
	RequireAttestation string `yaml:"require_attestation,omitempty"`
	// OnRoleLost is what happens to a user who loses the last of roles, or of
	// groups, while he works: deny, the next token is refused; revoke_grants, his
	// session at the provider ends, too, single sign-on included where it is one; or
	// stop_server, the hub stops those of his servers that no rule gives anything any
	// more, with unsaved work. Sharing a server loses nothing: it gets no tokens while
	// it is shared, and is not stopped. Default: deny.
	OnRoleLost broker.OnRoleLost `yaml:"on_role_lost,omitempty"`
	// Provider is whose tokens. Default: the only one.
	Provider broker.ProviderID `yaml:"provider,omitempty"`
	// Audiences and Scopes are what may be asked for.
	Audiences []string `yaml:"audiences,omitempty"`
	Scopes    []string `yaml:"scopes,omitempty"`
	// MaxTTL refuses tokens that live longer. Default: any.
	MaxTTL time.Duration `yaml:"max_ttl,omitempty"`
	// Unverified allows tokens that can't be read, so that nobody checks what
	// the provider put into them.
	Unverified bool `yaml:"unverified,omitempty"`
}

// AdminConfig is the socket of the administrator's commands.
type AdminConfig struct {
	// Socket is open to root and the broker's user. Default:
	// /run/tokenbroker/admin.sock.
	Socket string `yaml:"socket"`
}

// AuditConfig is where the audit lines go, which are chained: see tokenbroker audit.
type AuditConfig struct {
	// File is a path, or - for standard output. Default: -. Rotate it by renaming
	// and SIGHUP, as deploy/site/logrotate does; copytruncate would lose lines. The
	// last line is also in a file beside the journal, for the chain to go on.
	File string `yaml:"file"`
}

// auditFile is the file that audit lines go to; empty: standard output.
func (c *Config) auditFile() string {
	if c.Audit.File == "-" {
		return ""
	}
	return c.Audit.File
}

// auditHead is the file that holds the audit's last line.
func (c *Config) auditHead() string { return c.Journal + ".audit-head" }

// load reads, completes and checks a configuration file. If anything is wrong
// with it, the error is Mistakes and names all of it.
func load(path string) (*Config, error) {
	c, _, err := read(path)
	return c, err
}

// read is load, and also returns in which lines what is.
func read(path string) (*Config, *decoder, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, nil, fmt.Errorf("read configuration: %w", err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, nil, fmt.Errorf("read configuration: %w", err)
	}
	c, d := parse(data)
	dirs := []string{filepath.Dir(path)}
	if credentials := os.Getenv("CREDENTIALS_DIRECTORY"); credentials != "" {
		dirs = append([]string{credentials}, dirs...)
	}
	// A file whose shape is wrong is still checked: whoever has made three
	// mistakes wants to hear of all three at once.
	if !d.broken {
		check(c, d, files(dirs))
	}
	if len(d.mistakes) > 0 {
		d.mistakes.sort()
		return nil, d, d.mistakes
	}
	return c, d, nil
}

// parse reads data and fills in the defaults.
func parse(data []byte) (*Config, *decoder) {
	var c Config
	d := decode(data, &c)
	c.fill()
	return &c, d
}

// fill sets the defaults.
func (c *Config) fill() {
	if c.Host == "" {
		c.Host, _ = os.Hostname()
	}
	def(&c.Deployment, "default")
	def(&c.Contact, "your administrator")
	if c.Hubs == nil {
		c.Hubs = map[broker.HubID]HubConfig{"main": {}}
	}
	for name, h := range c.Hubs {
		def(&h.Socket, "/run/tokenbroker/hubs/"+string(name)+"/hub.sock")
		def(&h.Login, c.onlyProvider())
		c.Hubs[name] = h
	}
	def(&c.Servers.Directory, "/var/lib/tokenbroker/servers")
	def(&c.Servers.Attestation, "docker")
	def(&c.Servers.Rate, peersocket.DefaultRate)
	def(&c.Servers.Docker.Socket, "/var/run/docker.sock")
	if r := c.Store.Redis; r.Address == "" && r.Sentinel == nil && r.Cluster == nil {
		def(&c.Store.Redis.Socket, "/run/redis/redis-server.sock")
	}
	def(&c.Keys.Keyset, "keyset.json")
	def(&c.Keys.KEKFile, "kek")
	for name, p := range c.Providers {
		def(&p.Profile, "generic")
		def(&p.Rate, oauthprovider.DefaultRate)
		def(&p.OnLogout, broker.StopIssuing)
		switch a := p.RolesAPI; {
		case a != nil:
			def(&a.Path, "roles[].name")
			def(&a.Claim, "roles")
			if p.Roles == nil {
				p.Roles = []string{a.Claim}
			}
		case p.Roles == nil:
			p.Roles = []string{"roles", "groups"}
		}
		if p.Events != nil {
			def(&p.Events.URL, rolewatch.AdminURL(cmp.Or(p.DiscoveryURL, p.Issuer)))
			def(&p.Events.Every, 5*time.Second)
		}
		c.Providers[name] = p
	}
	for i := range c.Policy {
		def(&c.Policy[i].Provider, c.onlyProvider())
	}
	def(&c.Admin.Socket, "/run/tokenbroker/admin.sock")
	def(&c.Audit.File, "-")
	def(&c.Journal, filepath.Join(filepath.Dir(c.Servers.Directory), "journal"))
	def(&c.Helper, helperNearby())
}

func def[T comparable](p *T, value T) { *p = cmp.Or(*p, value) }

// onlyProvider returns the provider's name if there is exactly one.
func (c *Config) onlyProvider() broker.ProviderID {
	if len(c.Providers) == 1 {
		for name := range c.Providers {
			return name
		}
	}
	return ""
}

// helperNearby returns the path of the helper if it lies beside this program or
// where programs keep what is not for the command line.
func helperNearby() string {
	self, err := os.Executable()
	if err != nil {
		return ""
	}
	bin := filepath.Dir(self)
	for _, dir := range []string{bin, filepath.Join(filepath.Dir(bin), "lib", "tokenbroker")} {
		path := filepath.Join(dir, "access-token")
		if i, err := os.Stat(path); err == nil && i.Mode().IsRegular() {
			return path
		}
	}
	return ""
}

// files finds the files that a configuration names.
type files []string

// find returns the path of a file: the first directory that has it, else in
// the last one.
func (dirs files) find(name string) string {
	if filepath.IsAbs(name) {
		return name
	}
	var path string
	for _, dir := range dirs {
		path = filepath.Join(dir, name)
		if _, err := os.Stat(path); err == nil {
			break
		}
	}
	return path
}

// readSecret reads a secret that nobody but its owner may read.
func readSecret(path string) (broker.Secret, error) {
	f, err := os.Open(path)
	if err != nil {
		return broker.Secret{}, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return broker.Secret{}, err
	}
	switch {
	case !info.Mode().IsRegular():
		return broker.Secret{}, fmt.Errorf("%s is not a file", path)
	case info.Mode().Perm()&others(path) != 0:
		return broker.Secret{}, fmt.Errorf("%s may be read by others (mode %04o): chmod 0400 %s", path, info.Mode().Perm(), path)
	case info.Size() > maxSecret:
		return broker.Secret{}, fmt.Errorf("%s is too large for a secret", path)
	}
	data := make([]byte, info.Size())
	if _, err := f.ReadAt(data, 0); err != nil && len(data) > 0 {
		return broker.Secret{}, err
	}
	s := strings.TrimRight(string(data), "\r\n")
	if s == "" {
		return broker.Secret{}, fmt.Errorf("%s is empty", path)
	}
	return broker.NewSecret(s), nil
}

// others are the permissions that a secret must not have. systemd lets a
// service's user read its credentials by an ACL, whose mask shows as the group's
// permission; their directory is closed to everybody else.
func others(path string) fs.FileMode {
	if dir := os.Getenv("CREDENTIALS_DIRECTORY"); dir != "" && filepath.Dir(path) == filepath.Clean(dir) {
		return 0o007
	}
	return 0o077
}

// maxSecret is more than any key or password has.
const maxSecret = 64 << 10
