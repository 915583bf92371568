// Package oauthprovider is a broker.Provider for OpenID Connect and OAuth 2.0
// servers. What differs between them is data: a profile (profile.go).
//
//	provider.go   Config, New and the methods of broker.Provider
//	metadata.go   discovery: once, lazily, shared by all who wait
//	gate.go       how often it is asked, and whether at all while it is in trouble
//	endpoint.go   the token-endpoint client: one POST, never repeated
//	answer.go     what a token answer says
//	identity.go   whom it is about, and their roles
//	introspect.go the same between refreshes, without spending anything
//	rolesapi.go   the same by a management API, which then says all roles
//	logout.go     the provider's word that somebody has logged out
//	classify.go   what a refusal means for the grant
//	profile.go    the families of servers
//
// golang.org/x/oauth2 gives the types and PKCE of the protocol but sends
// nothing here: with the style of authentication left open it posts a refresh
// token twice on any error, it loses a new refresh token if a field beside it
// can't be read, and its errors print the body, in which some servers echo the
// token (DESIGN.md, section 7).
package oauthprovider

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
	"golang.org/x/time/rate"

	"tokenbroker/broker"
)

// Config says which provider, and who we are to it.
type Config struct {
	Name    broker.ProviderID
	Profile string // "generic" if empty; see Profiles

	// Issuer is the provider's name, exactly as its ID tokens spell it. It may
	// be empty for a plain OAuth 2.0 server; then Endpoints.Token is needed.
	Issuer string
	// DiscoveryURL is where the discovery document is, if not under Issuer. The
	// document must still name Issuer.
	DiscoveryURL string
	// Endpoints replace those of the discovery document. With Endpoints.Token
	// there is no discovery at all.
	Endpoints Endpoints

	ClientID     string
	ClientSecret broker.Secret
	// AuthStyle is how the client proves who it is: client_secret_basic,
	// client_secret_post, private_key_jwt or none. If empty, it is the first of
	// these that the discovery document offers and that we have the means for.
	AuthStyle string
	// PrivateKeyFile holds the key for private_key_jwt: PEM, or a JWK whose kid
	// is then sent along.
	PrivateKeyFile string

	CAFile string // PEM; trusted in the place of the system's authorities
	Proxy  string // URL of an HTTP proxy. The environment is not asked

	RedirectURI string              // the only one a login may name; empty: any
	Roles       []string            // claims that policy sees as roles; a dot steps into an object
	Audiences   map[string][]string // audience → scopes that must be asked for with it
	Narrowing   broker.Narrowing    // empty: the profile's
	Adopt       bool
	// RefreshEndsAccess says that a refresh ends the access token before it.
	RefreshEndsAccess bool
	// RolesAPI, if not nil, says the roles. Roles is then its claim alone.
	RolesAPI *RolesAPI
	OnLogout broker.OnLogout // what a logout at the provider does

	Rate    int           // requests in any second, at most; 0: DefaultRate
	Timeout time.Duration // of one call, all requests of it together; 0: 30 s
	Log     *slog.Logger  // nil: none
}

// Endpoints are URLs. Empty ones come from discovery.
type Endpoints struct {
	Token, Userinfo, JWKS, Revocation, Introspection string
}

// defaultTimeout is the hard end of a call (DESIGN.md, section 4.4): the lease
// on a grant must outlast it.
const defaultTimeout = 30 * time.Second

// lookTimeout bounds what is asked after a token answer has come. Until the
// answer is stored a crash would lose it, so it must not wait for long.
const lookTimeout = 5 * time.Second

// A Provider is one provider. It is safe for use by many goroutines.
type Provider struct {
	cfg     Config
	profile profile
	signer  *assertionSigner // nil without a private key
	timeout time.Duration
	log     *slog.Logger
	gate    *gate
	api     *rolesAPI // nil: roles are in tokens, userinfo and introspection

	once *http.Client // for POSTs: a new connection each
	look *http.Client // for GETs
	oidc *http.Client // for go-oidc, which asks for keys and userinfo

	// How often tokens that anybody may have sent can have the provider asked for
	// its metadata and its keys.
	logoutFinds, logoutKeys *rate.Limiter

	discovering singleflight.Group
	mu          sync.Mutex // guards known
	known       *metadata
}

var _ broker.Provider = (*Provider)(nil)

// New checks cfg and reads the files it names. It doesn't ask the provider
// anything: a broker must start while its providers are down.
func New(cfg Config) (*Provider, error) {
	p := &Provider{cfg: cfg, timeout: cmp.Or(cfg.Timeout, defaultTimeout), log: cfg.Log}
	p.logoutFinds, p.logoutKeys = rate.NewLimiter(rate.Every(keysRest), 1), rate.NewLimiter(rate.Every(keysRest), 1)
	if p.log == nil {
		p.log = slog.New(slog.DiscardHandler)
	}
	p.log = p.log.With("provider", string(cfg.Name))
	if err := cfg.check(); err != nil {
		return nil, err
	}
	if u, _ := url.Parse(cmp.Or(cfg.DiscoveryURL, cfg.Endpoints.Token, cfg.Issuer)); u.Scheme != "https" && !here(u.Hostname()) {
		p.log.Warn("the provider is asked without TLS: whoever is on the way reads every token", "host", u.Host)
	}
	p.profile = profiles[cmp.Or(cfg.Profile, "generic")]
	p.gate = newGate(cmp.Or(cfg.Rate, DefaultRate), p.log, p.reach)
	if err := p.open(); err != nil {
		return nil, err
	}
	if a := cfg.RolesAPI; a != nil {
		log := p.log.With("api", "roles_api")
		p.cfg.Roles = []string{a.Claim}
		p.api = &rolesAPI{RolesAPI: *a, gate: newGate(cmp.Or(cfg.Rate, DefaultRate), log, nil), log: log, fetch: p.fetch, missing: make(map[string]bool)}
	}
	if cfg.Endpoints.Token != "" {
		m, err := p.use(&metadata{Issuer: cfg.Issuer}, "")
		if err != nil {
			return nil, err
		}
		p.known = m
	}
	return p, nil
}

// open reads the files and makes the HTTP clients.
func (p *Provider) open() error {
	var err error
	if p.cfg.PrivateKeyFile != "" {
		if p.signer, err = readSigner(p.cfg.PrivateKeyFile); err != nil {
			return err
		}
	}
	base, err := Transport(p.cfg.CAFile, p.cfg.Proxy)
	if err != nil {
		return err
	}
	p.once, p.look = clients(base, p.timeout)
	p.oidc = &http.Client{Transport: counted{p.gate, p.look.Transport}, CheckRedirect: p.look.CheckRedirect, Timeout: p.timeout}
	return nil
}

// Info returns what is known without asking the provider.
func (p *Provider) Info() broker.ProviderInfo {
	audiences := make(map[string][]string, len(p.cfg.Audiences))
	for a, scopes := range p.cfg.Audiences {
		audiences[a] = slices.Clone(scopes)
	}
	narrowing := cmp.Or(p.cfg.Narrowing, p.profile.narrowing)
	return broker.ProviderInfo{
		Name:          p.cfg.Name,
		Issuer:        p.cfg.Issuer,
		ClientID:      p.cfg.ClientID,
		Narrowing:     narrowing,
		Audiences:     audiences,
		ImpliedScopes: slices.Clone(p.profile.implied),

		RevokesAccessAlone: p.profile.revokesAccessAlone && narrowing != broker.ByExchange,
		RoleClaims:         slices.Clone(p.cfg.Roles),
		RefreshEndsAccess:  p.cfg.RefreshEndsAccess,
		Adopt:              p.cfg.Adopt,
		RedirectURI:        p.cfg.RedirectURI,
		OnLogout:           p.cfg.OnLogout,
	}
}

// Login trades an authorization code. If it fails after the provider has
// answered, Issued still holds the answer, so that it can be revoked.
func (p *Provider) Login(ctx context.Context, c broker.CodeGrant) (broker.Identity, broker.Issued, error) {
	if c.Verifier.IsZero() {
		return broker.Identity{}, broker.Issued{}, broker.Errorf(broker.Invalid, "the login has no code_verifier; the hub must use PKCE")
	}
	ctx, cancel := context.WithTimeout(ctx, p.timeout)
	defer cancel()
	m, err := p.metadata(ctx, opCode)
	if err != nil {
		return broker.Identity{}, broker.Issued{}, err
	}
	a, err := p.ask(ctx, m, opCode, c.Code.Fingerprint(), url.Values{
		"grant_type":    {"authorization_code"},
		"code":          {c.Code.Reveal()},
		"code_verifier": {c.Verifier.Reveal()},
		"redirect_uri":  {c.RedirectURI},
	})
	if err != nil {
		return broker.Identity{}, broker.Issued{}, err
	}
	who, err := p.newcomer(ctx, m, a)
	return who, a.issued(), err
}

// Refresh spends refresh. An empty sub expects nobody in particular, for a
// refresh token that is adopted; then an answer that doesn't say whose it is is
// an error, of class Dead or Lost, and Issued still holds it.
func (p *Provider) Refresh(ctx context.Context, refresh broker.Secret, sub string, scopes []string) (broker.Identity, broker.Issued, error) {
	ctx, cancel := context.WithTimeout(ctx, p.timeout)
	defer cancel()
	m, err := p.metadata(ctx, opRefresh)
	if err != nil {
		return broker.Identity{}, broker.Issued{}, err
	}
	form := url.Values{"grant_type": {"refresh_token"}, "refresh_token": {refresh.Reveal()}}
	if len(scopes) > 0 {
		form.Set("scope", p.narrowed(scopes))
	}
	a, err := p.ask(ctx, m, opRefresh, cmp.Or(sub, refresh.Fingerprint()), form)
	if err != nil {
		return broker.Identity{}, broker.Issued{}, err
	}
	issued := a.issued()
	if issued.RefreshToken.Equal(refresh) {
		issued.RefreshToken = broker.Secret{} // the same one again is not a new one
	}
	if sub == "" {
		who, err := p.newcomer(ctx, m, a)
		return who, issued, adopted(err)
	}
	who, err := p.returning(ctx, m, a, sub)
	return who, issued, err
}

// adopted is the error of an answer that does not say whose it is. The token is
// spent all the same, so it is not the error of a login, which starts anew:
// the token is lost if it might have been told, and else as good as dead.
func adopted(err error) error {
	var pe *broker.ProviderError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &pe) && pe.Class == broker.TryLater:
		return &broker.ProviderError{Class: broker.Lost, Reason: pe.Reason, Status: http.StatusOK, Err: pe.Err}
	}
	return &broker.ProviderError{Class: broker.Dead, Reason: "no_subject", Status: http.StatusOK, Err: err}
}

// narrowed is the scope parameter of a refresh. Without openid an OpenID
// Connect server need not send an ID token, and the roles of this moment would
// stay unknown.
func (p *Provider) narrowed(scopes []string) string {
	if p.cfg.Issuer == "" {
		return strings.Join(set(scopes), " ")
	}
	return strings.Join(set(scopes, []string{"openid"}), " ")
}

// Exchange trades an access token for a smaller one. If the error is of class
// Dead it is the access token that is no good; the grant may well be. A refresh
// token in the answer is dropped: nobody asked for it, and nobody would keep it.
func (p *Provider) Exchange(ctx context.Context, access broker.Secret, t broker.Target) (broker.Issued, error) {
	ctx, cancel := context.WithTimeout(ctx, p.timeout)
	defer cancel()
	m, err := p.metadata(ctx, opExchange)
	if err != nil {
		return broker.Issued{}, err
	}
	form := url.Values{
		"grant_type":           {"urn:ietf:params:oauth:grant-type:token-exchange"},
		"subject_token":        {access.Reveal()},
		"subject_token_type":   {typeAccess},
		"requested_token_type": {typeAccess},
	}
	if t.Audience != "" {
		form.Set("audience", t.Audience)
	}
	if scopes := set(t.Scopes, p.cfg.Audiences[t.Audience], p.profile.exchanged); len(scopes) > 0 {
		form.Set("scope", strings.Join(scopes, " "))
	}
	who := cmp.Or(parseJWT(access.Reveal()).text("sub"), access.Fingerprint())
	a, err := p.ask(ctx, m, opExchange, who, form)
	if err != nil {
		return broker.Issued{}, err
	}
	if !a.isAccessToken() {
		return broker.Issued{}, &broker.ProviderError{Class: broker.Refused, Reason: "wrong_token_type", Status: http.StatusOK}
	}
	issued := a.issued()
	issued.RefreshToken = broker.Secret{}
	return issued, nil
}

// Revoke ends a refresh token.
func (p *Provider) Revoke(ctx context.Context, t broker.Secret, kind broker.TokenKind) error {
	ctx, cancel := context.WithTimeout(ctx, p.timeout)
	defer cancel()
	m, err := p.metadata(ctx, opRevoke)
	if err != nil {
		return err
	}
	if m.Revocation == "" {
		return &broker.ProviderError{Class: broker.Misconfigured, Reason: "unsupported"}
	}
	// Keycloak answers an unknown token with 200 and an error in the body; RFC
	// 7009 counts it as done, and so do we.
	return p.post(ctx, m, opRevoke, m.Revocation, t.Fingerprint(), url.Values{
		"token":           {t.Reveal()},
		"token_type_hint": {string(kind)},
	}, func(*reply) bool { return true })
}

// Check asks the provider whether it is there, and says so too if it is, but the
// requests that matter have failed and are held back.
func (p *Provider) Check(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, p.timeout)
	defer cancel()
	p.gate.count()
	return p.gate.said(p.reach(ctx))
}

// reach asks for what anybody may have, and spends nothing. What it learns about
// a moved endpoint is used from then on.
func (p *Provider) reach(ctx context.Context) error {
	if p.cfg.Endpoints.Token != "" {
		return p.knock(ctx, p.cfg.Endpoints.Token)
	}
	m, err := p.discover(ctx)
	if err != nil {
		return err
	}
	p.learn(m)
	return nil
}

// ScopesSupported asks the provider which scopes it knows. A provider need not
// say, nor say all (OpenID Connect Discovery 1.0, section 3).
func (p *Provider) ScopesSupported(ctx context.Context) ([]string, error) {
	if p.cfg.Issuer == "" {
		return nil, nil // no discovery
	}
	m, err := p.discover(ctx)
	if err != nil {
		return nil, err
	}
	return m.Scopes, nil
}

// check returns all that is wrong with the configuration.
func (c Config) check() error {
	var wrong []error
	add := func(bad bool, what string) {
		if bad {
			wrong = append(wrong, errors.New(what))
		}
	}
	_, known := profiles[cmp.Or(c.Profile, "generic")]
	add(c.Name == "", "name: it is needed")
	add(!known, "profile: there is none called "+c.Profile+"; there are "+strings.Join(Profiles(), ", "))
	add(c.ClientID == "", "client_id: it is needed")
	add(c.Issuer == "" && c.Endpoints.Token == "", "issuer: it is needed, or endpoints.token for a server without discovery")
	add(c.Rate < 0, "rate: it is less than 1")
	add(c.Issuer == "" && c.DiscoveryURL != "", "issuer: it is needed with discovery_url; the document found there must name it")
	for field, u := range map[string]string{
		"issuer": c.Issuer, "discovery_url": c.DiscoveryURL,
		"endpoints.token": c.Endpoints.Token, "endpoints.userinfo": c.Endpoints.Userinfo, "endpoints.jwks": c.Endpoints.JWKS,
		"endpoints.revocation": c.Endpoints.Revocation, "endpoints.introspection": c.Endpoints.Introspection,
	} {
		add(u != "" && !isURL(u), field+": it is not an http or https URL")
	}
	switch c.Narrowing {
	case "", broker.ByExchange, broker.ByScope, broker.Never:
	default:
		add(true, "narrowing: it is exchange, scope or none")
	}
	if c.RolesAPI != nil {
		add(len(c.Roles) > 0 && !slices.Equal(c.Roles, []string{c.RolesAPI.Claim}), "roles: with roles_api they are its claim alone; leave it out")
		field, what := c.RolesAPI.Wrong()
		add(what != "", "roles_api."+field+": it "+what)
		add(c.RolesAPI.Secret == nil, "roles_api.token_file: it is needed")
	}
	switch c.OnLogout {
	case "", broker.OnlyLook, broker.StopIssuing, broker.RevokeAll:
	default:
		add(true, "on_logout: it is ignore, stop_issuing or revoke")
	}
	slices.SortFunc(wrong, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return errors.Join(append(wrong, c.checkAuth())...)
}

// checkAuth says what is missing for the style of authentication.
func (c Config) checkAuth() error {
	switch c.AuthStyle {
	case "":
	case "client_secret_basic", "client_secret_post":
		if c.ClientSecret.IsZero() {
			return errors.New("client_secret_file: it is needed for auth_style " + c.AuthStyle)
		}
	case "private_key_jwt":
		if c.PrivateKeyFile == "" {
			return errors.New("private_key_file: it is needed for auth_style private_key_jwt")
		}
	case "none":
	default:
		return errors.New("auth_style: it is client_secret_basic, client_secret_post, private_key_jwt or none")
	}
	return nil
}

func isURL(s string) bool {
	u, err := url.Parse(s)
	return err == nil && (u.Scheme == "http" || u.Scheme == "https") && u.Host != "" && u.User == nil && u.Fragment == ""
}

// here reports whether a host is this machine.
func here(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// set is the sorted union of lists.
func set(lists ...[]string) []string {
	return slices.Compact(slices.Sorted(func(yield func(string) bool) {
		for _, l := range lists {
			for _, s := range l {
				if s != "" && !yield(s) {
					return
				}
			}
		}
	}))
}

// Profiles lists the names of the profiles, sorted.
func Profiles() []string { return slices.Sorted(maps.Keys(profiles)) }
