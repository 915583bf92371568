package brokertest

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"time"

	"tokenbroker/broker"
)

var _ broker.Provider = (*Provider)(nil)

// A Provider is a strict provider in memory: it rotates the refresh token with
// each use and takes a second use for theft, which ends the session. It has one
// session per subject; the code of a login is the subject's name.
//
// It reads the time from time.Now, so it works inside a synctest bubble.
type Provider struct {
	mu       sync.Mutex // guards all below
	info     broker.ProviderInfo
	life     time.Duration
	idle     time.Duration       // 0: a session never ends by itself
	maximum  time.Duration       // of a session, used or not; 0: none
	sessions map[string]*session // by subject
	roles    map[string][]string
	calls    map[string]int
	revoked  []string
	answers  []Answer
	wide     bool
	onTrade  func() error
	onLook   func(*broker.Identity) error
	onRevoke func() error
}

type session struct {
	began   time.Time
	id      string
	refresh string
	used    time.Time
	spent   []string
	access  []string
}

// An Answer changes how the Provider answers one refresh. Before is called
// first and may wait. If Err is set it is the answer; the refresh token is spent
// all the same if Spend is.
type Answer struct {
	Before func()
	Err    error
	Spend  bool
}

// NewProvider returns a provider whose access tokens live five minutes and are
// narrowed by exchange. Each of edit alters what it says of itself.
func NewProvider(name broker.ProviderID, edit ...func(*broker.ProviderInfo)) *Provider {
	p := &Provider{
		info: broker.ProviderInfo{
			Name: name, Issuer: "https://" + string(name) + ".example", ClientID: "jupyterhub",
			Narrowing: broker.ByExchange, RoleClaims: []string{"roles"}, ImpliedScopes: []string{"openid"},
			RevokesAccessAlone: true,
		},
		life:     5 * time.Minute,
		sessions: make(map[string]*session),
		roles:    make(map[string][]string),
		calls:    make(map[string]int),
	}
	for _, e := range edit {
		e(&p.info)
	}
	return p
}

// SetLife sets how long access tokens live from now on.
func (p *Provider) SetLife(d time.Duration) { p.locked(func() { p.life = d }) }

// SetIdle makes sessions end that are not refreshed for d.
func (p *Provider) SetIdle(d time.Duration) { p.locked(func() { p.idle = d }) }

// SetMaximum makes sessions end d after their login, used or not.
func (p *Provider) SetMaximum(d time.Duration) { p.locked(func() { p.maximum = d }) }

// SetRoles sets the roles of a subject; they show with its next token.
func (p *Provider) SetRoles(sub string, roles ...string) { p.locked(func() { p.roles[sub] = roles }) }

// Next queues answers for the refreshes to come.
func (p *Provider) Next(a ...Answer) { p.locked(func() { p.answers = append(p.answers, a...) }) }

// SetWide has it give all that was granted, whatever is asked for.
func (p *Provider) SetWide(wide bool) { p.locked(func() { p.wide = wide }) }

// OnExchange has f called before each exchange, which it may hold up or refuse; nil:
// nobody does.
func (p *Provider) OnExchange(f func() error) { p.locked(func() { p.onTrade = f }) }

// Calm has refreshes and exchanges answered as usual again.
func (p *Provider) Calm() { p.locked(func() { p.onTrade, p.answers = nil, nil }) }

// OnLook has f change or refuse what Look answers; nil: nobody does.
func (p *Provider) OnLook(f func(*broker.Identity) error) { p.locked(func() { p.onLook = f }) }

// OnRevoke has revocations answered by f; nil: they succeed.
func (p *Provider) OnRevoke(f func() error) { p.locked(func() { p.onRevoke = f }) }

// EndSession ends a subject's session: no token of it works any more.
func (p *Provider) EndSession(sub string) { p.locked(func() { delete(p.sessions, sub) }) }

// Calls returns how often "login", "refresh", "exchange", "look" or "revoke" was called.
func (p *Provider) Calls(what string) (n int) { p.locked(func() { n = p.calls[what] }); return n }

// Revoked returns the tokens that were revoked, of both kinds.
func (p *Provider) Revoked() (all []string) {
	p.locked(func() { all = slices.Clone(p.revoked) })
	return all
}

// Session returns the name of sub's session.
func (p *Provider) Session(sub string) (id string) {
	p.locked(func() { id = p.identity(sub).Session })
	return id
}

// RefreshToken returns the one refresh token of sub that is good now.
func (p *Provider) RefreshToken(sub string) (token string) {
	p.locked(func() {
		if s := p.sessions[sub]; s != nil {
			token = s.refresh
		}
	})
	return token
}

func (p *Provider) locked(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f()
}

// Info implements broker.Provider.
func (p *Provider) Info() broker.ProviderInfo { return p.info }

// Check implements broker.Provider.
func (p *Provider) Check(context.Context) error { return nil }

// Login begins a new session for the subject that the code names.
func (p *Provider) Login(_ context.Context, c broker.CodeGrant) (id broker.Identity, iss broker.Issued, err error) {
	p.locked(func() {
		p.calls["login"]++
		sub := c.Code.Reveal()
		p.sessions[sub] = &session{id: rand.Text(), began: time.Now()}
		id, iss = p.identity(sub), p.issue(sub, nil)
	})
	return id, iss, nil
}

// Refresh implements broker.Provider.
func (p *Provider) Refresh(_ context.Context, refresh broker.Secret, sub string, scopes []string) (id broker.Identity, iss broker.Issued, err error) {
	a := p.begin("refresh")
	if a.Before != nil {
		a.Before()
	}
	p.locked(func() {
		if a.Err != nil && !a.Spend {
			err = a.Err
			return
		}
		owner, ok := p.owner(refresh.Reveal())
		if !ok {
			err = &broker.ProviderError{Class: broker.Dead, Reason: "expired", Status: 400, Code: "invalid_grant"}
			return
		}
		id, iss = p.identity(owner), p.issue(owner, scopes)
		if sub != "" && owner != sub {
			err = &broker.ProviderError{Class: broker.Dead, Reason: "subject_changed"}
		}
	})
	if a.Err != nil {
		return broker.Identity{}, broker.Issued{}, a.Err
	}
	return id, iss, err
}

func (p *Provider) begin(what string) (a Answer) {
	p.locked(func() {
		p.calls[what]++
		if len(p.answers) > 0 {
			a, p.answers = p.answers[0], p.answers[1:]
		}
	})
	return a
}

// owner finds whose refresh token it is; a spent one ends the session.
func (p *Provider) owner(refresh string) (string, bool) {
	for sub, s := range p.sessions {
		if slices.Contains(s.spent, refresh) {
			delete(p.sessions, sub)
			return "", false
		}
		if s.refresh == refresh {
			return sub, p.open(s)
		}
	}
	return "", false
}

// open says whether a session has not ended by itself.
func (p *Provider) open(s *session) bool {
	return (p.idle == 0 || time.Since(s.used) <= p.idle) && (p.maximum == 0 || time.Since(s.began) < p.maximum)
}

// Exchange implements broker.Provider.
func (p *Provider) Exchange(_ context.Context, access broker.Secret, t broker.Target) (iss broker.Issued, err error) {
	var first func() error
	p.locked(func() {
		p.calls["exchange"]++
		first = p.onTrade
	})
	if first != nil {
		if err := first(); err != nil {
			return iss, err
		}
	}
	p.locked(func() {
		for sub, s := range p.sessions {
			if slices.Contains(s.access, access.Reveal()) {
				iss = p.access(sub, t)
				return
			}
		}
		err = &broker.ProviderError{Class: broker.Dead, Reason: "session_ended", Status: 400}
	})
	return iss, err
}

// Look shows a subject's roles by any refresh token of its session, as Keycloak
// does. It spends nothing.
func (p *Provider) Look(_ context.Context, refresh broker.Secret, sub string) (id broker.Identity, err error) {
	var edit func(*broker.Identity) error
	p.locked(func() {
		p.calls["look"]++
		id, edit = p.identity(sub), p.onLook
		if !p.alive(refresh.Reveal(), sub) {
			err = &broker.ProviderError{Class: broker.Dead, Reason: "session_ended", Status: 200}
		}
	})
	if edit != nil {
		err = cmp.Or(edit(&id), err)
	}
	return id, err
}

// alive says whether a refresh token, spent or not, is of sub's session.
func (p *Provider) alive(refresh, sub string) bool {
	s := p.sessions[sub]
	return s != nil && (s.refresh == refresh || slices.Contains(s.spent, refresh)) && p.open(s)
}

// Revoke implements broker.Provider.
func (p *Provider) Revoke(_ context.Context, t broker.Secret, _ broker.TokenKind) (err error) {
	var fails func() error
	p.locked(func() {
		p.calls["revoke"]++
		fails = p.onRevoke
	})
	if fails != nil {
		err = fails()
	}
	p.locked(func() {
		if err == nil {
			p.revoked = append(p.revoked, t.Reveal())
		}
	})
	return err
}

// LogoutToken believes all that LogoutTokenOf has made, while it holds.
func (p *Provider) LogoutToken(_ context.Context, token broker.Secret, now time.Time) (l broker.Logout, err error) {
	if json.Unmarshal([]byte(token.Reveal()), &l) != nil || !l.Until.After(now) {
		return l, broker.Errorf(broker.Invalid, "this is no logout token that holds")
	}
	return l, nil
}

// LogoutTokenOf is a logout token that says l.
func LogoutTokenOf(l broker.Logout) broker.Secret {
	text, _ := json.Marshal(l) // strings and a time always marshal
	return broker.NewSecret(string(text))
}

func (p *Provider) identity(sub string) broker.Identity {
	var roles []string
	for _, r := range p.roles[sub] {
		roles = append(roles, "roles/"+r)
	}
	id := broker.Identity{Sub: sub, Username: sub, Roles: roles, Known: true}
	if s := p.sessions[sub]; s != nil {
		id.Session = s.id
	}
	return id
}

// all is what a token of the whole grant carries.
var all = []string{"all", "openid"}

// issue rotates sub's refresh token and makes a token with scopes; empty: of the
// whole grant.
func (p *Provider) issue(sub string, scopes []string) broker.Issued {
	s := p.sessions[sub]
	if s.refresh != "" {
		s.spent = append(s.spent, s.refresh)
	}
	s.refresh = fmt.Sprintf("refresh-%s-%s", sub, rand.Text())
	if len(scopes) == 0 {
		scopes = all
	}
	iss := p.access(sub, broker.Target{Scopes: scopes})
	iss.RefreshToken, iss.RefreshExpiresIn = broker.NewSecret(s.refresh), p.idle
	if left := p.maximum - time.Since(s.began); p.maximum > 0 && (p.idle == 0 || left < p.idle) {
		iss.RefreshExpiresIn = left.Truncate(time.Second) // as Keycloak counts
	}
	s.used = time.Now()
	iss.IDToken = broker.NewSecret("id-" + sub)
	return iss
}

func (p *Provider) access(sub string, t broker.Target) broker.Issued {
	token := fmt.Sprintf("access-%s-%s", sub, rand.Text())
	p.sessions[sub].access = append(p.sessions[sub].access, token)
	iss := broker.Issued{
		AccessToken: broker.NewSecret(token), TokenType: "Bearer", ExpiresIn: p.life,
		Scopes: t.Scopes, ScopesKnown: true, AudienceKnown: true,
	}
	if p.wide {
		iss.Scopes = all
	}
	if t.Audience != "" {
		iss.Audience = []string{t.Audience}
	}
	return iss
}
