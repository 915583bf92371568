package oauthprovider

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"

	"tokenbroker/broker"
)

// RolesAPI is a management API that says which roles a subject has now, for a
// provider whose tokens don't say it or whose introspection doesn't. IBM App ID is
// one. With it all roles come from there, at a login and a refresh, too: a look
// that saw other roles than a refresh does would have the two correct each other
// for ever.
type RolesAPI struct {
	// URL is that of a subject's roles, with {sub} in its path for the subject.
	URL string
	// Path leads to the roles in the answer, as in roles[].name: a name steps into
	// an object, [] into each item of an array. An answer to which it doesn't fit
	// says nothing.
	Path string
	// Claim is what the roles found there count as a value of.
	Claim string
	// Secret is called for the bearer token of each request; or, if TokenURL is
	// given, for the API key that is traded there for one, in the manner of IBM
	// Cloud IAM.
	Secret   func() (broker.Secret, error)
	TokenURL string
}

// missingMost is of how many subjects in a row a RolesAPI may say that there are
// none such. From then on it is the URL that is wrong.
const missingMost = 2

// A rolesAPI is a RolesAPI in use. It has a gate of its own: another server, or
// another limit of the same one, and its trouble is not that of the refreshes.
type rolesAPI struct {
	RolesAPI
	gate    *gate
	log     *slog.Logger
	fetch   func(*http.Request) (*reply, error)
	trading singleflight.Group

	mu      sync.Mutex      // guards what follows
	bearer  broker.Secret   // what the API key was traded for
	until   time.Time       // when it is traded again
	missing map[string]bool // subjects that were not found since one was
}

// Wrong returns the first field that can't be, by its name in a configuration, and
// what is wrong with it; nothing if all may be well.
func (a *RolesAPI) Wrong() (field, what string) {
	u, err := url.Parse(a.URL)
	switch {
	case a.URL == "":
		return "url", "is missing"
	case err != nil || !isPrivate(a.URL):
		return "url", "is not a URL with https://"
	case strings.Count(a.URL, "{sub}") != 1 || !strings.Contains(u.Path, "{sub}"):
		return "url", "wants {sub} in its path, once"
	case !pathForm.MatchString(a.Path):
		return "path", "is not of the form roles[].name"
	case a.Claim == "":
		return "claim", "is missing"
	case a.TokenURL != "" && !isPrivate(a.TokenURL):
		return "token_url", "is not a URL with https://"
	}
	return "", ""
}

var pathForm = regexp.MustCompile(`^(\[\]|[A-Za-z0-9_-]+(\[\])?)(\.[A-Za-z0-9_-]+(\[\])?)*$`)

// isPrivate reports whether nobody on the way can read what is sent to s.
func isPrivate(s string) bool {
	u, err := url.Parse(s)
	return err == nil && isURL(s) && (u.Scheme == "https" || here(u.Hostname()))
}

// look is Look by the API.
func (a *rolesAPI) look(ctx context.Context, sub string) (broker.Identity, error) {
	roles, err := a.roles(ctx, sub)
	if err != nil {
		return broker.Identity{}, err
	}
	return broker.Identity{Sub: sub, Roles: roles, Known: true}, nil
}

// after is look for the subject of a token answer, which must be kept whatever
// the API says.
func (a *rolesAPI) after(ctx context.Context, sub, username string) broker.Identity {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	who, err := a.look(ctx, sub)
	if err != nil {
		a.log.Warn("roles_api told no roles", "error", err)
	}
	who.Sub, who.Username = sub, username
	return who
}

// roles asks for sub's, in its turn.
func (a *rolesAPI) roles(ctx context.Context, sub string) (roles []string, err error) {
	err = a.gate.pass(ctx, opLook, sub, func() error {
		roles, err = a.ask(ctx, sub)
		return err
	})
	var e *broker.ProviderError
	if errors.As(err, &e) {
		named := *e // it may be that of several who waited for one bearer token
		named.Reason = "roles_api_" + e.Reason
		return nil, &named
	}
	return roles, err
}

// ask asks once.
func (a *rolesAPI) ask(ctx context.Context, sub string) ([]string, error) {
	if strings.Trim(sub, ".") == "" { // a server may take it for a step to elsewhere
		return nil, &broker.ProviderError{Class: broker.Misconfigured, Reason: "bad_subject"}
	}
	bearer, err := a.authority(ctx)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.Replace(a.URL, "{sub}", url.PathEscape(sub), 1), nil)
	if err != nil {
		return nil, &broker.ProviderError{Class: broker.Misconfigured, Reason: "bad_url"}
	}
	req.Header.Set("Authorization", "Bearer "+bearer.Reveal())
	r, err := a.fetch(req)
	if err != nil {
		return nil, err
	}
	return a.read(r, sub)
}

// read reads the answer about sub. Who is not there has no roles. His session may
// live on all the same, so it is not called dead: the domain has a refresh tell.
func (a *rolesAPI) read(r *reply, sub string) ([]string, error) {
	switch {
	case r.status == http.StatusNotFound && a.isMissing(sub):
		return nil, nil
	case r.status == http.StatusNotFound:
		return nil, &broker.ProviderError{Class: broker.Misconfigured, Reason: "not_found", Status: r.status}
	case r.status == http.StatusUnauthorized, r.status == http.StatusForbidden:
		a.forget()
		return nil, &broker.ProviderError{Class: broker.Misconfigured, Reason: "refused", Status: r.status}
	case r.status != http.StatusOK:
		class, reason := byStatus(opLook, r.status, false)
		return nil, &broker.ProviderError{Class: class, Reason: reason, Status: r.status, RetryAfter: retryAfter(r.header)}
	}
	var answer any
	// What can't be read leads nowhere.
	_ = json.Unmarshal(r.body, &answer)
	names, ok := at(answer, a.Path)
	if !ok {
		return nil, &broker.ProviderError{Class: broker.TryLater, Reason: "unreadable_answer", Status: r.status}
	}
	a.isFound()
	for i, name := range names {
		names[i] = a.Claim + "/" + name
	}
	return set(names), nil
}

// isMissing notes that sub was not found, and reports whether that is believed: a
// path that is wrong, or has moved, finds nobody at all.
func (a *rolesAPI) isMissing(sub string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.missing) <= missingMost {
		a.missing[sub] = true
	}
	return len(a.missing) <= missingMost
}

func (a *rolesAPI) isFound() {
	a.mu.Lock()
	defer a.mu.Unlock()
	clear(a.missing)
}

// authority returns the bearer token for a request.
func (a *rolesAPI) authority(ctx context.Context) (broker.Secret, error) {
	if a.TokenURL == "" {
		return a.secret()
	}
	a.mu.Lock()
	bearer, until := a.bearer, a.until
	a.mu.Unlock()
	if time.Now().Before(until) {
		return bearer, nil
	}
	traded := a.trading.DoChan("", func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lookTimeout)
		defer cancel()
		return a.trade(ctx)
	})
	select {
	case <-ctx.Done():
		return broker.Secret{}, unreached(opLook, false, ctx.Err())
	case t := <-traded:
		if t.Err != nil {
			return broker.Secret{}, t.Err
		}
		return t.Val.(broker.Secret), nil
	}
}

// trade gets a bearer token for the API key, and keeps it for most of its life.
func (a *rolesAPI) trade(ctx context.Context) (broker.Secret, error) {
	key, err := a.secret()
	if err != nil {
		return key, err
	}
	form := url.Values{"grant_type": {"urn:ibm:params:oauth:grant-type:apikey"}, "apikey": {key.Reveal()}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, a.TokenURL, strings.NewReader(form.Encode()))
	if err != nil {
		return broker.Secret{}, &broker.ProviderError{Class: broker.Misconfigured, Reason: "bad_token_url"}
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	r, err := a.fetch(req)
	if err != nil {
		return broker.Secret{}, err
	}
	got := parseAnswer(r.body)
	switch {
	case r.status/100 == 4 && !busy(r.status): // IAM calls a wrong key a bad request
		return broker.Secret{}, &broker.ProviderError{Class: broker.Misconfigured, Reason: "key_refused", Status: r.status}
	case r.status != http.StatusOK || got == nil:
		class, reason := byStatus(opLook, r.status, false)
		return broker.Secret{}, &broker.ProviderError{Class: class, Reason: reason, Status: r.status, RetryAfter: retryAfter(r.header)}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.bearer, a.until = broker.NewSecret(got.access), time.Now().Add(got.expiresIn*4/5)
	return a.bearer, nil
}

// forget has the API key traded again.
func (a *rolesAPI) forget() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.until = time.Time{}
}

// secret reads the configured one. It may be replaced while the broker runs.
func (a *rolesAPI) secret() (broker.Secret, error) {
	s, err := a.Secret()
	if err != nil {
		return s, &broker.ProviderError{Class: broker.Misconfigured, Reason: "secret", Err: err}
	}
	if s.IsZero() || !visible(s.Reveal()) {
		return s, &broker.ProviderError{Class: broker.Misconfigured, Reason: "secret", Err: errors.New("the file holds no token")}
	}
	return s, nil
}

// at returns the strings to which path leads in v; ok: it leads to strings and to
// nothing else, be they none.
func at(v any, path string) (list []string, ok bool) {
	if path == "" {
		s, ok := v.(string)
		return []string{s}, ok && s != ""
	}
	step, rest, _ := strings.Cut(path, ".")
	name, each := strings.CutSuffix(step, "[]")
	if name != "" {
		object, _ := v.(map[string]any)
		v = object[name]
	}
	if !each {
		return at(v, rest)
	}
	items, ok := v.([]any)
	for _, item := range items {
		more, fits := at(item, rest)
		list, ok = append(list, more...), ok && fits
	}
	return list, ok
}
