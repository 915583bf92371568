//go:build !release

package devidp

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/zitadel/oidc/v3/pkg/oidc"
	"github.com/zitadel/oidc/v3/pkg/op"

	"tokenbroker/broker"
)

// storage is what op asks. Everything lives in memory, under one lock.
type storage struct {
	cfg    Config
	client *client
	key    signingKey

	mu      sync.Mutex // guards what follows
	users   []*account
	logins  map[string]*login // requests on their way through the login page
	codes   map[string]string // code → login
	refresh map[string]*family
	access  map[string]*access
}

type account struct {
	User
	disabled bool
}

// A session is one login.
type session struct {
	id    string
	user  *account
	at    time.Time
	ended bool
}

// A family is the refresh tokens that follow from one login. Only the newest
// works; the older ones stay known, so that their reuse is seen.
type family struct {
	*session
	scopes  []string
	current string
	spent   map[string]time.Time // when each older one was first used
	until   time.Time
	reused  bool
}

// An access is an access token that was issued.
type access struct {
	*session
	family *family
	scopes []string
	until  time.Time
}

func newStorage(cfg Config, key *rsa.PrivateKey) *storage {
	s := &storage{
		cfg: cfg, client: &client{cfg}, key: signingKey{id: rand.Text(), key: key},
		logins: map[string]*login{}, codes: map[string]string{}, refresh: map[string]*family{}, access: map[string]*access{},
	}
	for _, u := range cfg.Users {
		if u.Sub == "" {
			u.Sub = "sub-" + u.Name
		}
		s.users = append(s.users, &account{User: u})
	}
	return s
}

// change calls f with a user, under the lock.
func (s *storage) change(name string, f func(*account)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, u := range s.users {
		if u.Name == name {
			f(u)
			return nil
		}
	}
	return fmt.Errorf("devidp: there is no user %q", name)
}

// people are those who can log in.
func (s *storage) people() (list []User) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, u := range s.users {
		if !u.disabled {
			list = append(list, u.User)
		}
	}
	return list
}

func (s *storage) endSessions(name string) error {
	return s.change(name, func(u *account) {
		for _, f := range s.refresh {
			if f.user == u {
				f.ended = true
			}
		}
		for _, a := range s.access {
			if a.user == u {
				a.ended = true
			}
		}
	})
}

// --- the login page ---

// A login is an authorization request, and op's view of it.
type login struct {
	id      string
	request *oidc.AuthRequest
	session *session // nil until somebody has clicked
	used    bool
	aud     []string // see accessAudience
}

func (l *login) GetID() string         { return l.id }
func (l *login) GetACR() string        { return "" }
func (l *login) GetAMR() []string      { return []string{"click"} }
func (l *login) GetAudience() []string { return l.aud }
func (l *login) GetAuthTime() time.Time {
	if l.session == nil {
		return time.Time{}
	}
	return l.session.at
}
func (l *login) GetClientID() string { return l.request.ClientID }
func (l *login) GetCodeChallenge() *oidc.CodeChallenge {
	if l.request.CodeChallenge == "" {
		return nil
	}
	return &oidc.CodeChallenge{Challenge: l.request.CodeChallenge, Method: l.request.CodeChallengeMethod}
}
func (l *login) GetNonce() string                   { return l.request.Nonce }
func (l *login) GetRedirectURI() string             { return l.request.RedirectURI }
func (l *login) GetResponseType() oidc.ResponseType { return l.request.ResponseType }
func (l *login) GetResponseMode() oidc.ResponseMode { return l.request.ResponseMode }
func (l *login) GetScopes() []string                { return l.request.Scopes }
func (l *login) GetState() string                   { return l.request.State }
func (l *login) Done() bool                         { return l.session != nil }

func (l *login) GetSubject() string {
	if l.session == nil {
		return ""
	}
	return l.session.user.Sub
}

// CreateAuthRequest is called by /authorize. A refresh token is given without
// being asked for, as Keycloak does; op gives one only for offline_access.
func (s *storage) CreateAuthRequest(_ context.Context, r *oidc.AuthRequest, _ string) (op.AuthRequest, error) {
	if slices.Contains(r.Prompt, oidc.PromptNone) {
		return nil, oidc.ErrLoginRequired()
	}
	if r.CodeChallenge == "" || r.CodeChallengeMethod != oidc.CodeChallengeMethodS256 {
		return nil, oidc.ErrInvalidRequest().WithDescription("PKCE with S256 is required")
	}
	if !slices.Contains(r.Scopes, oidc.ScopeOfflineAccess) {
		r.Scopes = append(r.Scopes, oidc.ScopeOfflineAccess)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	l := &login{id: rand.Text(), request: r}
	s.logins[l.id] = l
	return l, nil
}

// complete ends the login page: user was clicked. It returns what is wrong.
func (s *storage) complete(id, user string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.logins[id]
	if l == nil {
		return "This login is no longer under way. Go back to the application."
	}
	for _, u := range s.users {
		switch {
		case u.Name != user:
		case u.disabled:
			return "The account " + user + " is disabled."
		default:
			l.session = &session{id: rand.Text(), user: u, at: time.Now()}
			return ""
		}
	}
	return "There is no user of that name."
}

func (s *storage) AuthRequestByID(_ context.Context, id string) (op.AuthRequest, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l := s.logins[id]; l != nil {
		c := *l
		return &c, nil
	}
	return nil, errors.New("no such login")
}

func (s *storage) AuthRequestByCode(ctx context.Context, code string) (op.AuthRequest, error) {
	s.mu.Lock()
	id, ok := s.codes[code]
	s.mu.Unlock()
	if !ok {
		return nil, errors.New("no such code")
	}
	return s.AuthRequestByID(ctx, id)
}

func (s *storage) SaveAuthCode(_ context.Context, id, code string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.codes[code] = id
	return nil
}

func (s *storage) DeleteAuthRequest(_ context.Context, id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.logins, id)
	for code, of := range s.codes {
		if of == id {
			delete(s.codes, code)
		}
	}
	return nil
}

// --- tokens ---

// A refreshing is a refresh request, and op's view of it. Narrower scopes are
// of this request only; the family keeps its own.
type refreshing struct {
	client string
	family *family
	scopes []string
	aud    []string // see accessAudience
}

func (r *refreshing) GetAMR() []string            { return []string{"click"} }
func (r *refreshing) GetAudience() []string       { return r.aud }
func (r *refreshing) GetAuthTime() time.Time      { return r.family.at }
func (r *refreshing) GetClientID() string         { return r.client }
func (r *refreshing) GetScopes() []string         { return r.scopes }
func (r *refreshing) GetSubject() string          { return r.family.user.Sub }
func (r *refreshing) SetCurrentScopes(s []string) { r.scopes = s }

// TokenRequestByRefreshToken finds a refresh token, also one that is spent: op
// drops the reason of a refusal here, and a request that is wrong in another
// way must not count as reuse. CreateAccessAndRefreshTokens decides.
func (s *storage) TokenRequestByRefreshToken(_ context.Context, token string) (op.RefreshTokenRequest, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.refresh[token]
	if f == nil {
		return nil, errors.New("no such refresh token")
	}
	return &refreshing{client: s.cfg.ClientID, family: f, scopes: f.scopes}, nil
}

// CreateAccessAndRefreshTokens is the one place where codes and refresh tokens
// are spent.
func (s *storage) CreateAccessAndRefreshTokens(_ context.Context, request op.TokenRequest, current string) (string, string, time.Time, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var f *family
	switch r := request.(type) {
	case *login:
		l := s.logins[r.id]
		if l == nil || l.used {
			return "", "", time.Time{}, oidc.ErrInvalidGrant().WithDescription("Code not valid")
		}
		if l.session.user.disabled {
			return "", "", time.Time{}, oidc.ErrInvalidGrant().WithDescription("User disabled")
		}
		l.used = true
		f = &family{session: l.session, scopes: slices.Clone(r.GetScopes()), spent: map[string]time.Time{}}
	case *refreshing:
		f = r.family
		if err := s.spend(f, current); err != nil {
			return "", "", time.Time{}, err
		}
	default:
		return "", "", time.Time{}, oidc.ErrUnsupportedGrantType()
	}
	s.accessAudience(request, s.audiences(request.GetScopes()))
	s.rotate(f, current)
	id, until := s.issue(&access{session: f.session, family: f, scopes: request.GetScopes()})
	return id, f.current, until, nil
}

// rotate gives f its next refresh token, unless the one it has is kept.
func (s *storage) rotate(f *family, used string) {
	f.until = time.Now().Add(s.cfg.RefreshTTL)
	if used != "" && s.cfg.KeepRefresh {
		return
	}
	if _, again := f.spent[used]; used != "" && !again {
		f.spent[used] = time.Now()
	}
	f.current = rand.Text()
	s.refresh[f.current] = f
}

// inGrace says whether a refresh token that isn't the newest may be used.
func (s *storage) inGrace(f *family, token string) bool {
	first, spent := f.spent[token]
	return !spent || time.Since(first) < s.cfg.Grace
}

// accessAudience sets the audience of the token that op makes next. op asks the
// request for it twice, for the access token and then for the ID token, which
// is nobody's but the client's; so it is set before the first and taken away
// by GetPrivateClaimsFromRequest, between the two.
func (s *storage) accessAudience(request op.TokenRequest, aud []string) {
	switch r := request.(type) {
	case *login:
		r.aud = aud
	case *refreshing:
		r.aud = aud
	}
}

// spend refuses a refresh token that can't be used, in Keycloak's words.
func (s *storage) spend(f *family, token string) error {
	refuse := func(why string) error { return oidc.ErrInvalidGrant().WithDescription("%s", why) }
	switch {
	case f.ended:
		return refuse("Session not active")
	case f.reused:
		return refuse("Session doesn't have required client")
	case f.user.disabled:
		return refuse("User disabled") // and not spent: the account may come back
	case token != f.current && !s.inGrace(f, token):
		f.reused = true
		return refuse("Maximum allowed refresh token reuse exceeded")
	case time.Now().After(f.until):
		return refuse("Token is not active")
	}
	return nil
}

// issue notes an access token.
func (s *storage) issue(a *access) (id string, until time.Time) {
	id, a.until = rand.Text(), time.Now().Add(s.cfg.AccessTTL)
	s.access[id] = a
	return id, a.until
}

// CreateAccessToken is called for exchanges only.
func (s *storage) CreateAccessToken(_ context.Context, request op.TokenRequest) (string, time.Time, error) {
	r, ok := request.(op.TokenExchangeRequest)
	if !ok {
		return "", time.Time{}, oidc.ErrUnsupportedGrantType()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	from, err := s.live(r.GetExchangeSubjectTokenIDOrToken())
	if err != nil {
		return "", time.Time{}, oidc.ErrInvalidRequest().WithDescription("Invalid token")
	}
	id, until := s.issue(&access{session: from.session, family: from.family, scopes: r.GetScopes()})
	return id, until, nil
}

// live finds an access token that still works.
func (s *storage) live(id string) (*access, error) {
	a := s.access[id]
	if a == nil || a.ended || a.user.disabled || a.family.reused || time.Now().After(a.until) {
		return nil, errors.New("the access token is not active")
	}
	return a, nil
}

// ValidateTokenExchangeRequest allows what is narrower than the subject token.
func (s *storage) ValidateTokenExchangeRequest(_ context.Context, r op.TokenExchangeRequest) error {
	if r.GetExchangeSubjectTokenType() != oidc.AccessTokenType {
		return oidc.ErrInvalidRequest().WithDescription("Parameter 'subject_token' supports access tokens only")
	}
	if t := r.GetRequestedTokenType(); t != "" && t != oidc.AccessTokenType {
		return oidc.ErrInvalidRequest().WithDescription("requested_token_type unsupported")
	}
	r.SetRequestedTokenType(oidc.AccessTokenType)
	s.mu.Lock()
	defer s.mu.Unlock()
	from, err := s.live(r.GetExchangeSubjectTokenIDOrToken())
	if err != nil {
		return oidc.ErrInvalidRequest().WithDescription("Invalid token")
	}
	if slices.ContainsFunc(r.GetScopes(), func(scope string) bool { return !slices.Contains(from.scopes, scope) }) {
		return oidc.ErrInvalidScope().WithDescription("Invalid scopes: %s", strings.Join(r.GetScopes(), " "))
	}
	for _, aud := range r.GetAudience() {
		if !slices.Contains(s.audiences(r.GetScopes()), aud) {
			return oidc.ErrInvalidRequest().WithDescription("Requested audience not available: %s", aud)
		}
	}
	return nil
}

// VerifyExchangeSubjectToken is asked about a subject token that op finds
// invalid. It lets it pass, so that ValidateTokenExchangeRequest refuses it, in
// Keycloak's words.
func (s *storage) VerifyExchangeSubjectToken(context.Context, string, oidc.TokenType) (string, string, map[string]any, error) {
	return "", "", nil, nil
}

func (s *storage) VerifyExchangeActorToken(context.Context, string, oidc.TokenType) (string, string, map[string]any, error) {
	return "", "", nil, errors.New("no delegation")
}

func (s *storage) CreateTokenExchangeRequest(context.Context, op.TokenExchangeRequest) error {
	return nil
}

// audiences are those that scopes bring.
func (s *storage) audiences(scopes []string) (list []string) {
	for aud, needs := range s.cfg.Audiences {
		if !slices.ContainsFunc(needs, func(n string) bool { return !slices.Contains(scopes, n) }) {
			list = append(list, aud)
		}
	}
	slices.Sort(list)
	return list
}

// --- claims ---

// roles are the claims that policy is made of, as they are now. A claim
// without values is left out.
func (u *account) roles() map[string]any {
	c := map[string]any{}
	if len(u.Roles) > 0 {
		c["roles"] = slices.Clone(u.Roles)
	}
	if len(u.Groups) > 0 {
		c["groups"] = slices.Clone(u.Groups)
	}
	return c
}

// bySub finds a user. The caller holds the lock.
func (s *storage) bySub(sub string) *account {
	for _, u := range s.users {
		if u.Sub == sub {
			return u
		}
	}
	return &account{}
}

// GetPrivateClaimsFromRequest fills an access token. Its audiences are what the
// scopes bring; without any, op makes it one for the client itself.
func (s *storage) GetPrivateClaimsFromRequest(_ context.Context, r op.TokenRequest, _ []string) (map[string]any, error) {
	s.accessAudience(r, nil)
	return s.claims(r.GetSubject(), r.GetScopes()), nil
}

// GetPrivateClaimsFromTokenExchangeRequest fills an exchanged one. Its
// audiences are those that were named.
func (s *storage) GetPrivateClaimsFromTokenExchangeRequest(_ context.Context, r op.TokenExchangeRequest) (map[string]any, error) {
	return s.claims(r.GetSubject(), r.GetScopes()), nil
}

func (s *storage) claims(sub string, scopes []string) map[string]any {
	s.mu.Lock()
	defer s.mu.Unlock()
	u := s.bySub(sub)
	c := u.roles()
	c["scope"] = strings.Join(scopes, " ")
	c["azp"] = s.cfg.ClientID
	c["preferred_username"] = u.Name
	return c
}

func (s *storage) GetPrivateClaimsFromScopes(context.Context, string, string, []string) (map[string]any, error) {
	return nil, nil // GetPrivateClaimsFromRequest is asked instead
}

func (s *storage) SetUserinfoFromScopes(context.Context, *oidc.UserInfo, string, string, []string) error {
	return nil // SetUserinfoFromRequest is asked as well
}

// SetUserinfoFromRequest fills an ID token.
func (s *storage) SetUserinfoFromRequest(_ context.Context, info *oidc.UserInfo, r op.IDTokenRequest, scopes []string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	u := s.bySub(r.GetSubject())
	u.describe(info, scopes)
	switch r := r.(type) {
	case *login:
		info.AppendClaims("sid", r.session.id)
	case *refreshing:
		info.AppendClaims("sid", r.family.id)
	}
	return nil
}

func (s *storage) SetUserinfoFromTokenExchangeRequest(context.Context, *oidc.UserInfo, op.TokenExchangeRequest) error {
	return errors.New("no ID tokens by exchange")
}

// SetUserinfoFromToken answers /userinfo.
func (s *storage) SetUserinfoFromToken(_ context.Context, info *oidc.UserInfo, tokenID, _, _ string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	a, err := s.live(tokenID)
	if err != nil {
		return err
	}
	a.user.describe(info, a.scopes)
	return nil
}

// SetIntrospectionFromToken answers an introspection with the roles of now.
func (s *storage) SetIntrospectionFromToken(_ context.Context, to *oidc.IntrospectionResponse, tokenID, _, clientID string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	a, err := s.live(tokenID)
	if err != nil {
		return err
	}
	info := new(oidc.UserInfo)
	a.user.describe(info, a.scopes)
	to.SetUserInfo(info)
	to.Scope, to.ClientID, to.TokenType, to.Expiration = a.scopes, clientID, oidc.BearerToken, oidc.FromTime(a.until)
	return nil
}

// describe fills in who u is, as far as scopes go.
func (u *account) describe(info *oidc.UserInfo, scopes []string) {
	info.Subject, info.PreferredUsername = u.Sub, u.Name
	if slices.Contains(scopes, oidc.ScopeEmail) {
		info.Email, info.EmailVerified = u.Email, true
	}
	for name, v := range u.roles() {
		info.AppendClaims(name, v)
	}
}

// --- endings ---

// GetRefreshTokenInfo is asked before a revocation.
func (s *storage) GetRefreshTokenInfo(_ context.Context, _, token string) (userID, tokenID string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.refresh[token]
	if f == nil {
		return "", "", op.ErrInvalidRefreshToken
	}
	return f.user.Sub, token, nil
}

// RevokeToken ends the session of a refresh token, spent or not, or one access
// token.
func (s *storage) RevokeToken(_ context.Context, token, _, _ string) *oidc.Error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f := s.refresh[token]; f != nil {
		f.ended = true
	}
	delete(s.access, token)
	return nil
}

func (s *storage) TerminateSession(_ context.Context, sub, _ string) error {
	s.mu.Lock()
	name := s.bySub(sub).Name
	s.mu.Unlock()
	return s.endSessions(name)
}

// TerminateSessionFromRequest ends the session that the ID token names.
func (s *storage) TerminateSessionFromRequest(_ context.Context, r *op.EndSessionRequest) (string, error) {
	if r.IDTokenHintClaims == nil {
		return r.RedirectURI, nil // nobody said whose: nothing ends
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	sid := r.IDTokenHintClaims.SessionID
	for _, f := range s.refresh {
		if f.id == sid {
			f.ended = true
		}
	}
	return r.RedirectURI, nil
}

// --- the client and the key ---

func (s *storage) GetClientByClientID(_ context.Context, id string) (op.Client, error) {
	if id != s.cfg.ClientID {
		return nil, errors.New("no such client")
	}
	return s.client, nil
}

func (s *storage) AuthorizeClientIDSecret(_ context.Context, id, secret string) error {
	if id != s.cfg.ClientID || !s.cfg.ClientSecret.Equal(broker.NewSecret(secret)) {
		return errors.New("wrong client credentials")
	}
	return nil
}

func (s *storage) GetKeyByIDAndClientID(context.Context, string, string) (*jose.JSONWebKey, error) {
	return nil, errors.New("the client has no key")
}

func (s *storage) ValidateJWTProfileScopes(context.Context, string, []string) ([]string, error) {
	return nil, errors.New("no JWT profile")
}

func (s *storage) SigningKey(context.Context) (op.SigningKey, error) { return &s.key, nil }
func (s *storage) KeySet(context.Context) ([]op.Key, error)          { return []op.Key{publicKey{&s.key}}, nil }
func (s *storage) SignatureAlgorithms(context.Context) ([]jose.SignatureAlgorithm, error) {
	return []jose.SignatureAlgorithm{jose.RS256}, nil
}

type signingKey struct {
	id  string
	key *rsa.PrivateKey
}

func (k *signingKey) ID() string                                  { return k.id }
func (k *signingKey) Key() any                                    { return k.key }
func (k *signingKey) SignatureAlgorithm() jose.SignatureAlgorithm { return jose.RS256 }

type publicKey struct{ *signingKey }

func (k publicKey) Key() any                           { return &k.key.PublicKey }
func (k publicKey) Use() string                        { return "sig" }
func (k publicKey) Algorithm() jose.SignatureAlgorithm { return jose.RS256 }

// A client is the one client there is.
type client struct{ cfg Config }

func (c *client) GetID() string                       { return c.cfg.ClientID }
func (c *client) RedirectURIs() []string              { return c.cfg.RedirectURIs }
func (c *client) PostLogoutRedirectURIs() []string    { return nil }
func (c *client) ApplicationType() op.ApplicationType { return op.ApplicationTypeWeb }
func (c *client) AuthMethod() oidc.AuthMethod         { return oidc.AuthMethodBasic }
func (c *client) ResponseTypes() []oidc.ResponseType {
	return []oidc.ResponseType{oidc.ResponseTypeCode}
}
func (c *client) LoginURL(id string) string            { return "/login?id=" + id }
func (c *client) AccessTokenType() op.AccessTokenType  { return op.AccessTokenTypeJWT }
func (c *client) IDTokenLifetime() time.Duration       { return c.cfg.IDTokenTTL }
func (c *client) DevMode() bool                        { return false }
func (c *client) IsScopeAllowed(scope string) bool     { return slices.Contains(c.cfg.rights(), scope) }
func (c *client) IDTokenUserinfoClaimsAssertion() bool { return true }
func (c *client) ClockSkew() time.Duration             { return 0 }
func (c *client) PostLogoutRedirectURIGlobs() []string {
	return c.anywhere("http://127.0.0.1:*", "http://127.0.0.1:*/*", "http://localhost:*/*")
}
func (c *client) RedirectURIGlobs() []string {
	return c.anywhere("http://127.0.0.1:*/**", "http://localhost:*/**")
}
func (c *client) GrantTypes() []oidc.GrantType {
	return []oidc.GrantType{oidc.GrantTypeCode, oidc.GrantTypeRefreshToken, oidc.GrantTypeTokenExchange}
}

func (c *client) RestrictAdditionalIdTokenScopes() func([]string) []string     { return same }
func (c *client) RestrictAdditionalAccessTokenScopes() func([]string) []string { return same }

func same(scopes []string) []string { return scopes }

// anywhere are the patterns of redirects if none are configured.
func (c *client) anywhere(globs ...string) []string {
	if len(c.cfg.RedirectURIs) > 0 {
		return nil
	}
	return globs
}
