package broker

import (
	"context"
	"time"
)

// A Provider is one OAuth 2.0 or OpenID Connect server. Implementations make
// one HTTP request per call and never repeat it: a refresh token that is sent
// twice looks like theft to a provider that rotates.
//
// Errors are *ProviderError; anything else counts as an unknown outcome. No
// error holds a response body or an error_description, since some providers
// echo tokens there. What a call needs of refresh tokens in the clear is made
// within [Erasing].
//
// All methods may be called from many goroutines at once.
type Provider interface {
	// Info returns what is known without asking the provider.
	Info() ProviderInfo

	// Login trades an authorization code. The subject is that of the verified
	// ID token, or of the userinfo endpoint where there is none; without a
	// subject Login fails. RefreshToken may be empty: the provider gave none.
	Login(ctx context.Context, c CodeGrant) (Identity, Issued, error)

	// Refresh spends refresh. scopes narrows the access token only; empty asks
	// for all that was granted. Issued.RefreshToken is empty unless the
	// provider gave a new one. sub is the expected subject; if the answer names
	// another one the error is of class Dead with reason "subject_changed", and
	// Issued still holds the answer.
	Refresh(ctx context.Context, refresh Secret, sub string, scopes []string) (Identity, Issued, error)

	// Exchange trades an access token for one with the audience and scopes
	// (RFC 8693). It spends nothing.
	Exchange(ctx context.Context, access Secret, t Target) (Issued, error)

	// Look says who sub is now, for whom refresh was issued, and spends nothing
	// (RFC 7662, or a management API). It fails with class Dead if the provider calls the token
	// inactive, which some do for an account that is only switched off: a refresh
	// tells. A provider that doesn't show the roles of now by a refresh token
	// fails with class Misconfigured and reason "unsupported"; any other error
	// says that nothing is known. It is not called while this process may be
	// spending the token. Another broker may be: so it must do a spent token no
	// harm, and what it says of one counts like what it says of the newest.
	Look(ctx context.Context, refresh Secret, sub string) (Identity, error)

	// Revoke ends a token (RFC 7009). A dead token is no error. A provider that
	// can't be told fails with class Misconfigured and reason "unsupported".
	Revoke(ctx context.Context, t Secret, kind TokenKind) error

	// LogoutToken reads a token by which the provider says that somebody has
	// logged out (OpenID Connect Back-Channel Logout 1.0, section 2.6) and holds it
	// against all that such a token must be at the time now. The error of one that
	// does not hold is an *Error with code Invalid, whose cause says what is wrong
	// in words of ours: anybody can send one, so nothing of it is repeated. It may
	// ask the provider for its keys, however many tokens come, now and then only.
	LogoutToken(ctx context.Context, token Secret, now time.Time) (Logout, error)

	// Check says whether the provider answers now.
	Check(ctx context.Context) error
}

// ProviderInfo is what the domain needs to know of a provider.
type ProviderInfo struct {
	Name      ProviderID
	Issuer    string
	ClientID  string
	Narrowing Narrowing
	// Audiences maps each audience to the scopes that must be asked for with
	// it. An audience that is not here needs none.
	Audiences map[string][]string
	// ImpliedScopes come with every token of the provider, asked for or not,
	// and give no rights of their own (openid, profile, …).
	ImpliedScopes []string
	// RoleClaims are the claims that policy sees as roles.
	RoleClaims []string
	// Adopt lets a refresh token from before the broker become a grant.
	Adopt bool
	// RevokesAccessAlone says that an access token can be revoked without an end
	// of the session it comes from.
	RevokesAccessAlone bool
	// RefreshEndsAccess says that a refresh ends the access token before it, so
	// that none is made only to see the roles.
	RefreshEndsAccess bool
	// RedirectURI, if not empty, is the only one a login may name.
	RedirectURI string
	// OnLogout is what a logout at the provider does; empty: StopIssuing.
	OnLogout OnLogout
}

// Narrowing is how a provider makes an access token smaller than the grant.
type Narrowing string

const (
	ByExchange Narrowing = "exchange" // RFC 8693, from the access token of the whole grant
	ByScope    Narrowing = "scope"    // the scope parameter of a refresh
	Never      Narrowing = "none"     // it can't; only whole tokens
)

// Narrows says whether there is a way.
func (n Narrowing) Narrows() bool { return n == ByExchange || n == ByScope }

// CodeGrant is what a hub sends to trade an authorization code.
type CodeGrant struct {
	Code        Secret
	Verifier    Secret // PKCE; never empty
	RedirectURI string
}

// Target is what an access token is wanted for.
type Target struct {
	Audience string
	Scopes   []string // sorted
}

// Identity is who an answer of a provider was about.
type Identity struct {
	Sub      string
	Username string // preferred_username, for people only
	// Roles are canonical: claim/value, sorted. Known tells an absent claim,
	// which means no roles, from an answer that had no claims at all.
	Roles []string
	Known bool
	// Session is the provider's session that the tokens are of (sid), empty if the
	// provider doesn't say.
	Session string
}

// A Logout is what a logout token says.
type Logout struct {
	ID      string // the token's own (jti), never empty
	Sub     string // empty: Session says whose
	Session string // empty: all of Sub's
	// Until is when the token stops being one that holds.
	Until time.Time
}

// Issued is one token answer of a provider.
type Issued struct {
	AccessToken  Secret
	TokenType    string
	RefreshToken Secret
	IDToken      Secret
	// ExpiresIn is the life of the access token, 0 if the provider said none.
	ExpiresIn time.Duration
	// RefreshExpiresIn is the life of the refresh token, 0 if it has no end or
	// the provider didn't say.
	RefreshExpiresIn time.Duration
	// Scopes is what the token carries, sorted, by its own scope claim or the
	// answer's scope field. ScopesKnown is false if neither is there.
	Scopes      []string
	ScopesKnown bool
	// Audience is the token's aud claim, sorted. AudienceKnown is false if the
	// token can't be read.
	Audience      []string
	AudienceKnown bool
}

// A ProviderClass is what an unfavourable answer means for the grant.
type ProviderClass string

const (
	// Dead: what was sent will never work again: the code, the refresh token, or
	// at Exchange the access token, which says nothing of the grant.
	Dead ProviderClass = "dead"
	// Disabled: the account is switched off; the same token may work later.
	Disabled ProviderClass = "disabled"
	// UserAction: the user must do something at the provider; the token lives.
	UserAction ProviderClass = "user_action"
	// Misconfigured: our client credentials or settings are wrong; the grant lives.
	Misconfigured ProviderClass = "config"
	// Refused: this scope or audience can't be had; the grant lives.
	Refused ProviderClass = "narrow"
	// TryLater: the provider answered that it can't now, or was not reached at
	// all; nothing was spent.
	TryLater ProviderClass = "try_later"
	// Lost: the request was sent and no readable answer came; the token may
	// have been spent.
	Lost ProviderClass = "lost"
)

// A ProviderError is a provider's unfavourable answer, or its absence.
type ProviderError struct {
	Class ProviderClass
	// Reason is a word of ours: revoked, expired, reuse_detected,
	// session_ended, subject_changed, …; never the provider's text.
	Reason     string
	Status     int           // HTTP status, 0 if there was no answer
	Code       string        // the OAuth error code, if it is a known one
	RetryAfter time.Duration // what the provider asked for, or when we ask it again
	Since      time.Time     // since when its requests have failed, all of them; zero: not known
	Err        error         // transport error, without URL or body
}

// Error is for logs: class, reason, code and what the transport said.
func (e *ProviderError) Error() string {
	s := "provider: " + string(e.Class)
	if e.Reason != "" {
		s += " (" + e.Reason + ")"
	}
	if e.Code != "" {
		s += ": " + e.Code
	}
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	if !e.Since.IsZero() {
		s += "; it has failed since " + e.Since.UTC().Format("2006-01-02 15:04:05 MST")
	}
	return s
}

// Unwrap returns the transport error, if there is one.
func (e *ProviderError) Unwrap() error { return e.Err }
