package broker_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"tokenbroker/broker"
)

// A modelIDP is a provider as it may be at the worst, and keeps count.
type modelIDP struct {
	m    *model
	kind string

	mu       sync.Mutex // guards all below
	roles    []string
	answers  []modelAnswer // to come
	sessions []*modelSession
	uses     map[string]*modelUse // of refresh tokens
	of       map[string]int       // access token → its session
}

// A modelSession is what a login began.
type modelSession struct {
	current  string
	underWay int       // refreshes
	began    time.Time // the last of them
	spent    map[string]time.Time
	state    string
}

// States of a session.
const (
	modelLives  = "lives"
	modelEnded  = "was ended"
	modelReused = "ended by a second use of a refresh token"
)

// A modelUse is what is known of the uses of one refresh token.
type modelUse struct {
	sent       int
	unanswered int
	last       time.Time
	late       bool       // the retry was: the provider hung, or did not want it
	got        *modelHost // whose broker got the answer; nil: none did
	stored     bool       // and the store had it
}

// A modelAnswer is how a refresh goes.
type modelAnswer struct {
	latency time.Duration
	refusal broker.ProviderClass // nothing is spent
	lost    bool                 // the answer is
	cut     bool                 // the request is: the provider never gets it
}

func (p *modelIDP) next(a modelAnswer)  { p.locked(func() { p.answers = append(p.answers, a) }) }
func (p *modelIDP) setRoles(r []string) { p.locked(func() { p.roles = r }) }

// troubled says whether something is still to come that is no plain answer.
func (p *modelIDP) troubled() (yes bool) { p.locked(func() { yes = len(p.answers) > 0 }); return yes }

func (p *modelIDP) newest() (n int) { p.locked(func() { n = len(p.sessions) }); return n }

// busySince says whether a refresh of any session is under way that began after t:
// a store that goes back may go back to an earlier session.
func (p *modelIDP) busySince(t time.Time) (yes bool) {
	p.locked(func() {
		yes = slices.ContainsFunc(p.sessions, func(s *modelSession) bool { return s.underWay > 0 && s.began.After(t) })
	})
	return yes
}

func (p *modelIDP) calm() {
	p.locked(func() { p.answers, p.roles = nil, []string{"roles/researcher"} })
}

func (p *modelIDP) endSession() {
	p.locked(func() {
		if s := p.sessions[len(p.sessions)-1]; s.state == modelLives {
			s.state = modelEnded
		}
	})
}

// state is that of the nth session.
func (p *modelIDP) state(n int) (state string) {
	p.locked(func() { state = p.sessions[n-1].state })
	return state
}

// sent says how many refreshes there were.
func (p *modelIDP) sent() (n int) {
	p.locked(func() {
		for _, u := range p.uses {
			n += u.sent
		}
	})
	return n
}

// unheard says whether a refresh token was spent and no broker got the answer.
func (p *modelIDP) unheard() (yes bool) {
	p.locked(func() {
		for refresh, u := range p.uses {
			_, spent := p.sessions[p.find(refresh)].spent[refresh]
			yes = yes || spent && u.got == nil
		}
	})
	return yes
}

func (p *modelIDP) sessionOf(tok broker.Token) (n int) {
	p.locked(func() { n = p.of[tok.Access.Reveal()] })
	return n
}

// stored says that a broker's answer is in the store.
func (p *modelIDP) stored(h *modelHost) {
	p.locked(func() {
		for _, u := range p.uses {
			if u.got == h {
				u.stored = true
			}
		}
	})
}

func (p *modelIDP) locked(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f()
}

// arrive counts a use of a refresh token, which is where the rules about it are.
func (p *modelIDP) arrive(refresh string) (u *modelUse, a modelAnswer) {
	p.locked(func() {
		u = p.uses[refresh]
		if u == nil {
			u = &modelUse{}
			p.uses[refresh] = u
		}
		switch {
		case u.got != nil && (u.stored || !u.got.life.isDead()):
			p.m.broken("a refresh token is sent again whose answer %s has", u.got.name)
		case !mayBeSent(u.unanswered, u.last) && !p.m.was(&p.m.fell): // the mark is lost with the rest
			p.m.broken("a refresh token is sent again %s after %d uses without an answer", time.Since(u.last), u.unanswered)
		}
		u.sent++
		s := p.sessions[p.find(refresh)]
		s.began = time.Now()
		if s.underWay++; s.underWay > 1 {
			p.m.broken("%d refreshes of one session are under way at once", s.underWay)
		}
		if len(p.answers) > 0 {
			a, p.answers = p.answers[0], p.answers[1:]
		}
	})
	return u, a
}

// spend is what the provider does with a refresh token.
func (p *modelIDP) spend(refresh string, scopes []string) (id broker.Identity, iss broker.Issued, err error) {
	p.locked(func() {
		n := p.find(refresh)
		s := p.sessions[n]
		at, spent := s.spent[refresh]
		if spent && !(p.kind == modelGrace && time.Since(at) <= 30*time.Second) && s.state == modelLives {
			s.state = modelReused
			if u := p.uses[refresh]; p.kind == modelGrace && u.unanswered < 2 && !u.late && !p.m.was(&p.m.killed) {
				p.m.broken("one lost answer cost a grant that the provider would have forgiven")
			}
		}
		if s.state != modelLives {
			err = &broker.ProviderError{Class: broker.Dead, Reason: "session_ended", Status: 400, Code: "invalid_grant"}
			return
		}
		if p.kind != modelKeeps {
			if !spent {
				s.spent[refresh] = time.Now()
			}
			s.rotate(n + 1)
		}
		id, iss = p.issue(n+1, scopes)
	})
	return id, iss, err
}

// find says which session a refresh token is of.
func (p *modelIDP) find(refresh string) int {
	return slices.IndexFunc(p.sessions, func(s *modelSession) bool {
		_, spent := s.spent[refresh]
		return spent || s.current == refresh
	})
}

func (s *modelSession) rotate(n int) {
	s.current = fmt.Sprintf("refresh %d.%d", n, len(s.spent))
}

// issue makes an access token of the nth session.
func (p *modelIDP) issue(n int, scopes []string) (broker.Identity, broker.Issued) {
	access := fmt.Sprintf("access %d", len(p.of)+1)
	p.of[access] = n
	id := broker.Identity{Sub: "alice", Username: "alice", Roles: p.roles, Known: true}
	return id, broker.Issued{
		AccessToken: broker.NewSecret(access), TokenType: "Bearer", ExpiresIn: 5 * time.Minute,
		RefreshToken: broker.NewSecret(p.sessions[n-1].current), Scopes: scopes, ScopesKnown: true, AudienceKnown: true,
	}
}

// A modelDoor is the provider as one broker reaches it.
type modelDoor struct {
	*modelIDP
	life *modelLife
}

func (d modelDoor) Info() broker.ProviderInfo {
	return broker.ProviderInfo{Name: "idp", Issuer: "https://idp.example", ClientID: "jupyterhub", Narrowing: broker.ByScope, RoleClaims: []string{"roles"}}
}

func (d modelDoor) Login(context.Context, broker.CodeGrant) (id broker.Identity, iss broker.Issued, err error) {
	d.locked(func() {
		s := &modelSession{spent: map[string]time.Time{}, state: modelLives}
		d.sessions = append(d.sessions, s)
		s.rotate(len(d.sessions))
		id, iss = d.issue(len(d.sessions), []string{"a", "b"})
	})
	return id, iss, nil
}

// Refresh is one request. The broker may give up or be killed meanwhile; what
// the provider has begun happens all the same.
func (d modelDoor) Refresh(ctx context.Context, refresh broker.Secret, _ string, scopes []string) (broker.Identity, broker.Issued, error) {
	var use *modelUse
	var got modelGot
	sent := time.Now()
	err := d.life.step(func() error {
		u, a := d.arrive(refresh.Reveal())
		use = u
		answer := make(chan modelGot, 1)
		go func() { answer <- d.answer(a, refresh.Reveal(), scopes) }()
		select {
		case got = <-answer:
		case <-d.life.died:
		case <-ctx.Done():
			got.err = ctx.Err()
		}
		return got.err
	})
	if use != nil {
		d.answered(use, sent, refresh.Reveal(), err)
	}
	return got.id, got.iss, err
}

type modelGot struct {
	id  broker.Identity
	iss broker.Issued
	err error
}

// answer decides at once, and then takes its time.
func (p *modelIDP) answer(a modelAnswer, refresh string, scopes []string) (got modelGot) {
	switch {
	case a.refusal != "":
		got.err = &broker.ProviderError{Class: a.refusal}
	case !a.cut:
		got.id, got.iss, got.err = p.spend(refresh, scopes)
	}
	time.Sleep(a.latency)
	if a.lost || a.cut {
		return modelGot{err: &broker.ProviderError{Class: broker.Lost}}
	}
	return got
}

// answered notes what a broker knows of the use u it made of a refresh token.
func (d modelDoor) answered(u *modelUse, sent time.Time, refresh string, err error) {
	d.locked(func() {
		d.sessions[d.find(refresh)].underWay--
		var pe *broker.ProviderError
		switch {
		case err == nil && d.kind == modelKeeps:
			u.unanswered = 0
		case err == nil:
			u.got, u.stored = d.life.host, false
		case errors.As(err, &pe) && pe.Class != broker.Lost:
			u.late = u.late || u.unanswered > 0
		default:
			u.unanswered, u.last, u.late = u.unanswered+1, sent, u.late || errors.Is(err, context.DeadlineExceeded)
		}
	})
}

func (d modelDoor) Exchange(context.Context, broker.Secret, broker.Target) (broker.Issued, error) {
	return broker.Issued{}, &broker.ProviderError{Class: broker.Misconfigured}
}

func (d modelDoor) Look(_ context.Context, refresh broker.Secret, _ string) (id broker.Identity, err error) {
	d.locked(func() {
		if d.sessions[d.find(refresh.Reveal())].state != modelLives {
			err = &broker.ProviderError{Class: broker.Dead, Reason: "session_ended"}
			return
		}
		id = broker.Identity{Sub: "alice", Username: "alice", Roles: d.roles, Known: true}
	})
	return id, err
}

func (d modelDoor) LogoutToken(context.Context, broker.Secret, time.Time) (broker.Logout, error) {
	return broker.Logout{}, &broker.ProviderError{Class: broker.Misconfigured}
}

// Revoke ends the session of a refresh token.
func (d modelDoor) Revoke(_ context.Context, t broker.Secret, kind broker.TokenKind) error {
	return d.life.step(func() error {
		d.locked(func() {
			if s := d.sessions[d.find(t.Reveal())]; kind == broker.RefreshToken && s.state == modelLives {
				s.state = modelEnded
			}
		})
		return nil
	})
}

func (d modelDoor) Check(context.Context) error { return nil }
