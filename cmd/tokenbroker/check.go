package main

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"tokenbroker/broker"
	"tokenbroker/broker/oauthprovider"
	"tokenbroker/broker/seal"
	"tokenbroker/spawnerhook"
)

// check looks for mistakes in what a configuration says, notes them in d, and
// makes the paths of files absolute.
func check(c *Config, d *decoder, f files) {
	k := checker{c, d, f}
	k.names()
	k.hubs()
	k.logins()
	for key, l := range c.listeners() {
		k.tcp(key, l)
	}
	k.servers()
	k.store()
	k.keys()
	k.providers()
	k.policy()
	k.parts()
}

type checker struct {
	c *Config
	d *decoder
	f files
}

// add notes a mistake at the line of key, or of the nearest block around it.
// A key that was wrong in shape already is not reported twice.
func (k checker) add(key, text string, args ...any) {
	line := 0
	for _, m := range k.d.mistakes {
		if m.Key == key {
			return
		}
	}
	for at := key; at != "" && line == 0; at = parent(at) {
		line = k.d.lines[at]
	}
	k.d.add(line, key, text, args...)
}

// parent returns the key of the block around key.
func parent(key string) string {
	return key[:max(strings.LastIndexAny(key, ".["), 0)]
}

// name is what hubs and providers may be called: the names appear in paths,
// commands and URLs.
var name = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)

// helperWords are commands of the helper, so that `access-token show` means one thing.
var helperWords = []string{"list", "show", "exec", "git-credential", "aws", "kube", "doctor"}

func (k checker) names() {
	for h := range k.c.Hubs {
		if !name.MatchString(string(h)) {
			k.add("hubs."+string(h), "a name is made of letters, digits, dots, dashes and underscores")
		}
	}
	for p := range k.c.Providers {
		key := "providers." + string(p)
		if !name.MatchString(string(p)) {
			k.add(key, "a name is made of letters, digits, dots, dashes and underscores")
		}
		if slices.Contains(helperWords, string(p)) {
			k.add(key, "this name is a command of access-token; choose another")
		}
	}
	if k.c.Host == "" {
		k.add("host", "the machine has no host name; give it one here")
	}
}

func (k checker) hubs() {
	dirs := map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(k.c.Hubs)) {
		h, key := k.c.Hubs[name], "hubs."+string(name)
		k.socket(key+".socket", h.Socket)
		// The directory is what gets mounted into a hub's container.
		dir := filepath.Dir(h.Socket)
		if other, taken := dirs[dir]; taken {
			k.add(key+".socket", "needs a directory of its own, and %s is that of %s", dir, other)
		}
		dirs[dir] = key + ".socket"
		k.scopes(key+".scopes", h.Scopes)
		switch h.OnLogout {
		case "", broker.Keep, broker.StopIssuing, broker.RevokeAll:
		default:
			k.add(key+".on_logout", "there is no %q; there are keep, stop_issuing and revoke", h.OnLogout)
		}
		if h.API != nil {
			k.hubAPI(key+".api", h.API)
		}
		if h.Listener != nil {
			k.listenerSecret(key+".listener.client_secret_file", h.Listener)
		}
		k.c.Hubs[name] = h
	}
}

func (k checker) logins() {
	for name, h := range k.c.Hubs {
		k.provider("hubs."+string(name)+".login", h.Login)
	}
}

func (k checker) hubAPI(key string, a *HubAPIConfig) {
	switch u, err := url.Parse(a.URL); {
	case a.URL == "":
		k.add(key+".url", "is missing")
	case err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" || !strings.HasSuffix(strings.TrimRight(u.Path, "/"), "/api"):
		k.add(key+".url", "is not a URL like http://127.0.0.1:8081/hub/api")
	}
	a.TokenFile = k.secret(key+".token_file", a.TokenFile, true)
	a.CAFile = k.optionalFile(key+".ca_file", a.CAFile)
}

// longSecret is how many characters of base64 hold 256 random bits.
const longSecret = 43

func (k checker) listenerSecret(key string, l *ListenerConfig) {
	l.ClientSecretFile = k.secret(key, l.ClientSecretFile, true)
	// A socket knows its peer; here a good guess would be the hub.
	if s, err := readSecret(l.ClientSecretFile); err == nil && len(s.Reveal()) < longSecret {
		k.add(key, "the secret in %s has fewer than %d characters and could be guessed: make one with openssl rand -base64 32",
			l.ClientSecretFile, longSecret)
	}
}

// tcp notes what is wrong with where a TCP listener listens.
func (k checker) tcp(key string, l *ListenConfig) {
	host, _, err := net.SplitHostPort(l.Address)
	if err != nil {
		k.add(key+".address", "wants host:port")
		host = ""
	}
	for i, h := range l.Hosts {
		if !hostName.MatchString(h) {
			k.add(fmt.Sprintf("%s.hosts[%d]", key, i), "%q is not a name like hub.example.org: no port, no scheme, no path", h)
		}
	}
	if l.TLSCertFile == "" && l.TLSKeyFile == "" {
		if ip, _ := netip.ParseAddr(host); err == nil && host != "localhost" && !ip.IsLoopback() {
			k.add(key+".address", "%s can be reached from elsewhere: give tls_cert_file and tls_key_file, or use 127.0.0.1", l.Address)
		}
		return
	}
	l.TLSCertFile = k.file(key+".tls_cert_file", l.TLSCertFile)
	l.TLSKeyFile = k.secret(key+".tls_key_file", l.TLSKeyFile, true)
	if k.wrong(key) {
		return
	}
	if cert, err := l.certificate(); err != nil {
		k.add(key+".tls_cert_file", "%v", err)
	} else if c := cert.Leaf; len(l.Hosts)+len(c.DNSNames)+len(c.IPAddresses) == 0 {
		k.add(key+".tls_cert_file", "the certificate in %s names no host (subjectAltName), so that nobody could ask: use another, or give hosts", l.TLSCertFile)
	}
}

// hostName is a DNS name or an IP address.
var hostName = regexp.MustCompile(`^([A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*|[0-9A-Fa-f:.]+)$`)

func (k checker) servers() {
	s := k.c.Servers
	// Below it lies a directory of 32 letters, and in that broker.sock.
	k.socket("servers.directory", filepath.Join(s.Directory, strings.Repeat("x", 32), "broker.sock"))
	if !slices.Contains([]string{"docker", "process"}, s.Attestation) {
		k.add("servers.attestation", "there is no attestation %q; there are docker and process", s.Attestation)
	}
	if s.Rate < 1 {
		k.add("servers.rate", "is less than 1 request a second")
	}
	k.socket("servers.docker.socket", s.Docker.Socket)
	k.posture("servers.docker.posture", s.Docker.Posture)
	k.socket("admin.socket", k.c.Admin.Socket)
	if k.c.Helper != "" {
		k.c.Helper = k.file("helper", k.c.Helper)
	}
	if !filepath.IsAbs(k.c.Journal) {
		k.add("journal", "wants an absolute path")
	}
	if a := k.c.Audit.File; a != "-" && !filepath.IsAbs(a) {
		k.add("audit.file", "wants an absolute path, or - for standard output")
	}
}

func (k checker) posture(key string, p spawnerhook.Posture) {
	for name, verdict := range p {
		if names := spawnerhook.FindingNames(); !slices.Contains(names, name) {
			k.add(key+"."+name, "there is no finding %q; there are %s", name, strings.Join(names, ", "))
		}
		if !slices.Contains(spawnerhook.Verdicts(), verdict) {
			k.add(key+"."+name, "there is no %q; there are refuse, report and allow", verdict)
		}
	}
}

func (k checker) store() {
	r := &k.c.Store.Redis
	if r.Socket != "" && r.Address != "" {
		k.add("store.redis.address", "give either socket or address")
	}
	if r.Address != "" {
		k.address("store.redis.address", r.Address)
	}
	if r.Socket != "" {
		k.socket("store.redis.socket", r.Socket)
	}
	if r.Sentinel != nil {
		k.sentinel("store.redis.sentinel", r)
	}
	if r.Cluster != nil {
		k.cluster("store.redis.cluster", r)
	}
	if r.DB < 0 {
		k.add("store.redis.db", "is less than 0")
	}
	r.PasswordFile = k.secret("store.redis.password_file", r.PasswordFile, false)
	r.CAFile = k.optionalFile("store.redis.ca_file", r.CAFile)
}

func (k checker) sentinel(key string, r *RedisConfig) {
	if r.Socket != "" || r.Address != "" || r.Cluster != nil {
		k.add(key, "says where Redis is, and so does another key: leave one of socket, address, sentinel and cluster")
	}
	if r.Sentinel.Master == "" {
		k.add(key+".master", "is missing")
	}
	k.addresses(key+".addresses", r.Sentinel.Addresses)
	r.Sentinel.PasswordFile = k.secret(key+".password_file", r.Sentinel.PasswordFile, r.Sentinel.User != "")
}

func (k checker) cluster(key string, r *RedisConfig) {
	if r.Socket != "" || r.Address != "" {
		k.add(key, "says where Redis is, and so does another key: leave one of socket, address, sentinel and cluster")
	}
	if r.DB > 0 {
		k.add("store.redis.db", "is not 0, and a cluster has no other")
	}
	k.addresses(key+".addresses", r.Cluster.Addresses)
}

func (k checker) addresses(key string, all []string) {
	if len(all) == 0 {
		k.add(key, "is missing")
	}
	for i, a := range all {
		k.address(fmt.Sprintf("%s[%d]", key, i), a)
	}
}

func (k checker) address(key, a string) {
	if host, port, err := net.SplitHostPort(a); err != nil || host == "" || port == "" {
		k.add(key, "wants host:port")
	}
}

func (k checker) keys() {
	keyset, kek := &k.c.Keys.Keyset, &k.c.Keys.KEKFile
	for key, file := range map[string]*string{"keys.keyset": keyset, "keys.kek_file": kek} {
		path := k.f.find(*file)
		*file = path
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
			k.add(key, "%s does not exist: tokenbroker keys create makes it", path)
			continue
		}
		k.secret(key, path, true)
	}
}

// parts opens what can be opened without asking anybody: keys that don't fit
// together, or certificates that can't be read, are mistakes as well. What is
// wrong already is not tried.
func (k checker) parts() {
	if !k.wrong("keys") {
		if _, err := seal.Load(k.c.Keys.Keyset, k.c.Keys.KEKFile); err != nil {
			k.add("keys", "%v", err)
		}
	}
	if !k.wrong("store") {
		if s, err := openStore(k.c); err != nil {
			k.add("store.redis", "%v", err)
		} else {
			s.Close()
		}
	}
	for _, name := range slices.Sorted(maps.Keys(k.c.Providers)) {
		key := "providers." + string(name)
		if k.wrong(key) {
			continue
		}
		p, err := openWatched(name, k.c.Providers[name], slog.New(slog.DiscardHandler))
		if err != nil {
			k.add(key, "%v", err)
			continue
		}
		k.narrows(name, p.Info().Narrowing)
	}
}

// narrows notes hubs whose own token provider can't narrow to what they say.
func (k checker) narrows(provider broker.ProviderID, n broker.Narrowing) {
	for name, h := range k.c.Hubs {
		if h.Login == provider && len(h.Scopes) > 0 && !n.Narrows() {
			k.add("hubs."+string(name)+".scopes", "%s can't narrow a token (narrowing: %s): leave scopes out, and the hub gets the whole token", provider, n)
		}
	}
}

// wrong says whether a mistake was found in a block.
func (k checker) wrong(key string) bool {
	return slices.ContainsFunc(k.d.mistakes, func(m Mistake) bool { return m.Key == key || strings.HasPrefix(m.Key, key+".") })
}

func (k checker) providers() {
	if len(k.c.Providers) == 0 {
		k.add("providers", "there is none")
	}
	for _, name := range slices.Sorted(maps.Keys(k.c.Providers)) {
		p := k.c.Providers[name]
		k.oneProvider("providers."+string(name), &p)
		k.c.Providers[name] = p
	}
}

func (k checker) oneProvider(key string, p *ProviderConfig) {
	if !slices.Contains(oauthprovider.Profiles(), p.Profile) {
		k.add(key+".profile", "there is no profile %q; there are %s", p.Profile, strings.Join(oauthprovider.Profiles(), ", "))
	}
	if p.Issuer == "" && p.Endpoints.Token == "" {
		k.add(key+".issuer", "is missing; a server without OpenID Connect needs endpoints.token instead")
	}
	if p.ClientID == "" {
		k.add(key+".client_id", "is missing")
	}
	if p.ClientSecretFile == "" && p.PrivateKeyFile == "" && p.AuthStyle != "none" {
		k.add(key+".client_secret_file", "is missing; a public client says auth_style: none")
	}
	p.ClientSecretFile = k.secret(key+".client_secret_file", p.ClientSecretFile, false)
	p.PrivateKeyFile = k.secret(key+".private_key_file", p.PrivateKeyFile, false)
	p.CAFile = k.optionalFile(key+".ca_file", p.CAFile)
	if p.Events != nil {
		k.events(key+".events", p)
	}
	if p.RolesAPI != nil {
		k.rolesAPI(key, p)
	}
	if n := broker.Narrowing(p.Narrowing); n != "" && n != broker.ByExchange && n != broker.ByScope && n != broker.Never {
		k.add(key+".narrowing", "there is no narrowing %q; there are exchange, scope and none", n)
	}
	if p.Rate < 1 {
		k.add(key+".rate", "is less than 1 request a second")
	}
	if o := p.OnLogout; o != broker.OnlyLook && o != broker.StopIssuing && o != broker.RevokeAll {
		k.add(key+".on_logout", "there is no %q; there are ignore, stop_issuing and revoke", o)
	}
	for sub, u := range map[string]string{
		"issuer": p.Issuer, "discovery_url": p.DiscoveryURL, "proxy": p.Proxy, "redirect_uri": p.RedirectURI,
		"endpoints.token": p.Endpoints.Token, "endpoints.userinfo": p.Endpoints.Userinfo, "endpoints.jwks": p.Endpoints.JWKS,
		"endpoints.revocation": p.Endpoints.Revocation, "endpoints.introspection": p.Endpoints.Introspection,
	} {
		if v, err := url.Parse(u); u != "" && (err != nil || v.Host == "" || v.Scheme != "https" && v.Scheme != "http") {
			k.add(key+"."+sub, "is not a URL with http:// or https://")
		}
	}
}

func (k checker) rolesAPI(key string, p *ProviderConfig) {
	a := p.RolesAPI
	if !slices.Equal(p.Roles, []string{a.Claim}) {
		k.add(key+".roles", "with roles_api all roles come from it, as %s/…: leave this out", a.Claim)
	}
	key += ".roles_api"
	if field, what := a.use().Wrong(); what != "" {
		k.add(key+"."+field, "%s", what)
	}
	switch {
	case a.TokenURL != "" && a.TokenFile != "":
		k.add(key+".token_file", "is of no use beside token_url, which gives the token")
	case a.TokenURL == "" && a.APIKeyFile != "":
		k.add(key+".token_url", "is missing; api_key_file says what is traded there")
	}
	a.TokenFile = k.secret(key+".token_file", a.TokenFile, a.TokenURL == "" && a.APIKeyFile == "")
	a.APIKeyFile = k.secret(key+".api_key_file", a.APIKeyFile, a.TokenURL != "")
}

func (k checker) onRoleLost(key string, r RuleConfig) {
	switch r.OnRoleLost {
	case "", broker.Deny, broker.RevokeGrants, broker.StopServer:
	default:
		k.add(key, "there is no %q; there are deny, revoke_grants and stop_server", r.OnRoleLost)
		return
	}
	if len(r.Roles)+len(r.Groups) == 0 && r.OnRoleLost != "" {
		k.add(key, "the rule names neither roles nor groups that could be lost")
	}
	for name, h := range k.c.Hubs {
		if r.OnRoleLost == broker.StopServer && h.API == nil && (len(r.Hubs) == 0 || slices.Contains(r.Hubs, name)) {
			k.add(key, "hub %s can't be asked to stop a server: give hubs.%s.api", name, name)
		}
	}
}

func (k checker) events(key string, p *ProviderConfig) {
	e := p.Events
	if p.Profile != "keycloak" {
		k.add(key, "is about Keycloak: say profile: keycloak, or leave it out")
	}
	if e.ClientID == "" {
		k.add(key+".client_id", "is missing")
	}
	e.ClientSecretFile = k.secret(key+".client_secret_file", e.ClientSecretFile, true)
	if e.Every < time.Second {
		k.add(key+".every", "is less than 1s")
	}
	if e.URL == "" {
		k.add(key+".url", "is missing, and issuer is not the URL of a realm to make it from")
	}
}

func (k checker) policy() {
	if len(k.c.Policy) == 0 {
		k.add("policy", "there is no rule, so that nobody would get a token")
	}
	for i, r := range k.c.Policy {
		key := fmt.Sprintf("policy[%d]", i)
		k.provider(key+".provider", r.Provider)
		for j, h := range r.Hubs {
			if _, ok := k.c.Hubs[h]; !ok {
				k.add(fmt.Sprintf("%s.hubs[%d]", key, j), "there is no hub %q; there are %s", h, list(k.c.Hubs))
			}
		}
		if need := r.RequireAttestation; need != "" && !slices.Contains(broker.Levels(), need) {
			k.add(key+".require_attestation", "there is no level %q; there are %s", need, strings.Join(broker.Levels(), ", "))
		}
		k.onRoleLost(key+".on_role_lost", r)
		k.scopes(key+".scopes", r.Scopes)
		for j, role := range r.Roles {
			if owner, _ := k.roleOf(role, r.Provider); owner != r.Provider {
				k.provider(fmt.Sprintf("%s.roles[%d]", key, j), owner)
			}
		}
	}
}

// scopes notes what no scope can be.
func (k checker) scopes(key string, scopes []string) {
	each(k, key, scopes, func(s string) bool { return !broker.IsScope(s) },
		"%q is not one scope; write several as [a, b], each of printable ASCII without space, quote and backslash")
}

// roleOf splits a role, as written in a rule of provider, into the provider that
// shows it and the rest.
func (k checker) roleOf(role string, provider broker.ProviderID) (owner broker.ProviderID, rest string) {
	p, rest, ok := strings.Cut(role, ":")
	own := slices.ContainsFunc(k.c.Providers[provider].Roles, func(claim string) bool { return strings.HasPrefix(role, claim+"/") })
	if !ok || own || strings.Contains(p, "/") || !strings.Contains(rest, "/") {
		return provider, role // a colon of its own, as in https://example.org/roles/admin
	}
	return broker.ProviderID(p), rest
}

// provider notes a name that no provider has.
func (k checker) provider(key string, p broker.ProviderID) {
	if _, ok := k.c.Providers[p]; ok || len(k.c.Providers) == 0 {
		return
	}
	if p == "" {
		k.add(key, "is missing, and there are several: %s", list(k.c.Providers))
		return
	}
	k.add(key, "there is no provider %q; there are %s", p, list(k.c.Providers))
}

func list[K cmp.Ordered, V any](m map[K]V) string {
	return strings.Join(strings.Fields(strings.Trim(fmt.Sprint(slices.Sorted(maps.Keys(m))), "[]")), ", ")
}

// maxSocket is the longest path of a Unix socket (sun_path, less its end).
const maxSocket = 107

func (k checker) socket(key, path string) {
	switch {
	case !filepath.IsAbs(path):
		k.add(key, "wants an absolute path")
	case len(path) > maxSocket:
		k.add(key, "makes a socket path of %d bytes, and the kernel takes %d: choose a shorter one", len(path), maxSocket)
	}
}

// secret notes a secret file that is missing or open to others, and returns its path.
func (k checker) secret(key, file string, needed bool) string {
	if file == "" {
		if needed {
			k.add(key, "is missing")
		}
		return ""
	}
	path := k.f.find(file)
	if _, err := readSecret(path); err != nil {
		k.add(key, "%s", plain(err))
	}
	return path
}

// file notes a file that is missing, and returns its path.
func (k checker) file(key, file string) string {
	if file == "" {
		k.add(key, "is missing")
		return ""
	}
	path := k.f.find(file)
	if info, err := os.Stat(path); err != nil {
		k.add(key, "%s", plain(err))
	} else if !info.Mode().IsRegular() {
		k.add(key, "%s is not a file", path)
	}
	return path
}

func (k checker) optionalFile(key, file string) string {
	if file == "" {
		return ""
	}
	return k.file(key, file)
}

// plain says an error of the file system as a sentence.
func plain(err error) string {
	var p *fs.PathError
	if !errors.As(err, &p) {
		return err.Error()
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return p.Path + " does not exist"
	case errors.Is(err, fs.ErrPermission):
		return p.Path + " can't be read by this user; run this as the broker does"
	}
	return fmt.Sprintf("%s: %v", p.Path, p.Err)
}
