//go:build !release

// Package devidp is an identity provider for development: an OpenID Connect
// server inside the process, with three users and no passwords. It is the
// provider of the demo and the strict model provider of the tests.
//
// It answers on the loopback interface only, says loudly what it is, and does
// not exist in builds with the tag "release".
//
// The protocol is github.com/zitadel/oidc's; what is here is its storage, which
// is as strict as a provider can be: a refresh token works once, and one that
// is used again ends its family with all access tokens. Refusals are worded as
// Keycloak 26 words them, so the broker's profile for it is "keycloak":
//
//   - an access token's aud is the audiences whose scopes it carries
//   - an exchange gives an audience only together with its scopes
//   - a role that is taken away ends nothing; the next token lacks it
//   - a disabled account's refresh token is refused but not spent
//
// Config.KeepRefresh and Config.Grace make it as lenient as others are.
//
// Unlike Keycloak, an exchange can't add scopes that the login didn't ask for.
package devidp

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/zitadel/oidc/v3/pkg/oidc"
	"github.com/zitadel/oidc/v3/pkg/op"

	"tokenbroker/broker"
)

// Config says what a Server is like. Its zero value is a usable provider.
type Config struct {
	// Issuer is the server's own URL, without a path. Its host is a loopback
	// address. Empty: whatever loopback address a request was sent to.
	Issuer string

	ClientID     string        // "jupyterhub" if empty
	ClientSecret broker.Secret // a random one if empty; see Server.Client
	RedirectURIs []string      // empty: any http URL on loopback

	Users     []User              // DefaultUsers if nil
	Audiences map[string][]string // audience → scopes that bring it; DefaultAudiences if nil
	Scopes    []string            // further scopes that give rights; read and write if nil

	AccessTTL  time.Duration // of access tokens; 0: 5 minutes
	IDTokenTTL time.Duration // 0: 5 minutes
	RefreshTTL time.Duration // of a refresh token that isn't used; 0: 8 hours

	// A lenient provider: KeepRefresh never gives a new refresh token, and Grace
	// is for how long a spent one may be used again. Neither: strict.
	KeepRefresh bool
	Grace       time.Duration

	Log *slog.Logger // nil: none
}

// A User is somebody who can log in.
type User struct {
	Name   string // what people call them, and how controls name them
	Sub    string // the subject; "sub-" and the name if empty
	Email  string
	Roles  []string
	Groups []string
}

// DefaultUsers are three people of one lab.
func DefaultUsers() []User {
	return []User{
		{Name: "alice", Email: "alice@lab.example", Roles: []string{"researcher"}, Groups: []string{"/lab-a"}},
		{Name: "bob", Email: "bob@lab.example", Roles: []string{"student"}, Groups: []string{"/course-1"}},
		{Name: "carol", Email: "carol@lab.example", Roles: []string{"admin", "researcher"}, Groups: []string{"/lab-a", "/staff"}},
	}
}

// DefaultAudiences are two services, each with the scope that brings it.
func DefaultAudiences() map[string][]string {
	return map[string][]string{"storage": {"storage"}, "compute": {"compute"}}
}

// Kinds of requests, as Requests counts them.
const (
	Discovery  = "discovery"
	Keys       = "keys"
	Authorize  = "authorize"
	LoginPage  = "login"
	Code       = "code"
	Refresh    = "refresh"
	Exchange   = "exchange"
	Revoke     = "revoke"
	Introspect = "introspect"
	Userinfo   = "userinfo"
	EndSession = "end_session"
	Other      = "other"
)

// A Server is a development identity provider. It is safe for use by many
// goroutines.
type Server struct {
	cfg    Config
	store  *storage
	oidc   http.Handler
	faults faults
}

// New makes a provider. Serve it on a loopback address.
func New(cfg Config) (*Server, error) {
	if err := cfg.fill(); err != nil {
		return nil, err
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, fmt.Errorf("make the signing key: %w", err)
	}
	s := &Server{cfg: cfg, store: newStorage(cfg, key)}
	var secret [32]byte
	rand.Read(secret[:])
	issuer := op.IssuerFromHost("")
	if cfg.Issuer != "" {
		issuer = op.StaticIssuer(cfg.Issuer)
	}
	s.oidc, err = op.NewProvider(&op.Config{
		CryptoKey: secret, CryptoKeyId: "devidp", CodeMethodS256: true, AuthMethodPost: true, GrantTypeRefreshToken: true,
		DefaultLogoutRedirectURI: "/logged-out",
		SupportedScopes:          append([]string{oidc.ScopeOpenID, oidc.ScopeProfile, oidc.ScopeEmail, oidc.ScopeOfflineAccess}, cfg.rights()...),
	}, s.store, issuer, op.WithAllowInsecure(), op.WithCORSOptions(nil))
	if err != nil {
		return nil, fmt.Errorf("make the provider: %w", err)
	}
	cfg.Log.Warn("DEVELOPMENT identity provider: whoever reaches it can log in as anybody; never use it for real", "issuer", cmp.Or(cfg.Issuer, "any loopback address"))
	return s, nil
}

// fill puts the defaults in and checks the rest.
func (c *Config) fill() error {
	c.ClientID = cmp.Or(c.ClientID, "jupyterhub")
	c.AccessTTL = cmp.Or(c.AccessTTL, 5*time.Minute)
	c.IDTokenTTL = cmp.Or(c.IDTokenTTL, 5*time.Minute)
	c.RefreshTTL = cmp.Or(c.RefreshTTL, 8*time.Hour)
	if c.ClientSecret.IsZero() {
		c.ClientSecret = broker.NewSecret(rand.Text())
	}
	if c.Users == nil {
		c.Users = DefaultUsers()
	}
	if c.Audiences == nil {
		c.Audiences = DefaultAudiences()
	}
	if c.Scopes == nil {
		c.Scopes = []string{"read", "write"}
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Issuer == "" {
		return nil
	}
	u, err := url.Parse(c.Issuer)
	switch {
	case err != nil || u.Host == "" || u.Path != "" || u.RawQuery != "":
		return errors.New("devidp: the issuer is a URL without a path")
	case !loopback(u.Host):
		return fmt.Errorf("devidp: the issuer %s is not on loopback; this provider is for development only", c.Issuer)
	}
	return nil
}

// rights are all scopes that give rights, sorted.
func (c *Config) rights() []string {
	all := slices.Clone(c.Scopes)
	for _, scopes := range c.Audiences {
		all = append(all, scopes...)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// Client returns the credentials of the one client there is.
func (s *Server) Client() (id string, secret broker.Secret) {
	return s.cfg.ClientID, s.cfg.ClientSecret
}

// ServeHTTP answers requests from this machine to this machine. The second
// half keeps a web page elsewhere from reaching it by a name that resolves to
// loopback.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !loopback(r.RemoteAddr) || !loopback(r.Host) {
		http.Error(w, "the development identity provider answers on loopback only", http.StatusForbidden)
		return
	}
	r.Body = http.MaxBytesReader(w, r.Body, 64<<10)
	kind := s.faults.count(r)
	switch {
	case r.URL.Path == "/login":
		s.login(w, r)
	case r.URL.Path == "/logged-out", r.URL.Path == "/":
		s.notice(w)
	case kind == Introspect && s.introspectRefresh(w, r):
	case kind == Code, kind == Refresh, kind == Exchange:
		s.faults.serve(w, r, s.oidc)
	default:
		s.oidc.ServeHTTP(w, r)
	}
}

// loopback reports whether a host, with or without port, is this machine.
func loopback(host string) bool {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// Requests is how many requests of each kind have come.
func (s *Server) Requests() map[string]int { return s.faults.counts() }

// SetRoles replaces a user's roles. Tokens that exist keep the old ones.
func (s *Server) SetRoles(user string, roles ...string) error {
	return s.store.change(user, func(u *account) { u.Roles = slices.Clone(roles) })
}

// SetGroups replaces a user's groups.
func (s *Server) SetGroups(user string, groups ...string) error {
	return s.store.change(user, func(u *account) { u.Groups = slices.Clone(groups) })
}

// Disable switches a user's account off. Its sessions rest until Enable.
func (s *Server) Disable(user string) error {
	return s.store.change(user, func(u *account) { u.disabled = true })
}

// Enable switches a user's account on again.
func (s *Server) Enable(user string) error {
	return s.store.change(user, func(u *account) { u.disabled = false })
}

// EndSession ends all of a user's sessions, as an administrator's logout does.
func (s *Server) EndSession(user string) error { return s.store.endSessions(user) }

// LogoutToken is what a provider says to its client when a user has logged out of
// all sessions (OpenID Connect Back-Channel Logout). It is not sent, and ends
// nothing; Config.Issuer must be there.
func (s *Server) LogoutToken(user string) (string, error) {
	key := jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: s.store.key.key, KeyID: s.store.key.id}}
	signer, err := jose.NewSigner(key, (&jose.SignerOptions{}).WithType("logout+jwt"))
	if err != nil {
		return "", err
	}
	end := time.Now().Add(2 * time.Minute)
	return jwt.Signed(signer).Claims(oidc.NewLogoutTokenClaims(s.cfg.Issuer, s.Sub(user), oidc.Audience{s.cfg.ClientID}, end, rand.Text(), "", 0)).Serialize()
}

// Sub is a user's subject; empty if there is no such user.
func (s *Server) Sub(user string) string {
	sub := ""
	s.store.change(user, func(u *account) { sub = u.Sub })
	return sub
}

// Delay makes every token request wait for d before anything happens; 0: none.
func (s *Server) Delay(d time.Duration) { s.faults.setDelay(d) }

// Hold stops token requests before anything happens, until release is called.
// arrived receives a value for each that waits.
func (s *Server) Hold() (arrived <-chan struct{}, release func()) { return s.faults.hold() }

// Fail answers the next n token requests with status and body; nothing happens.
func (s *Server) Fail(n, status int, body string) { s.faults.fail(n, status, body) }

// LoseNextAnswer does all that the next token request asks for, and then cuts
// the connection in the place of an answer.
func (s *Server) LoseNextAnswer() { s.faults.loseNext() }

// Health is asked by op's /ready.
func (s *storage) Health(context.Context) error { return nil }
