//go:build !release

package devidp

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	"golang.org/x/oauth2"
)

// Login does in the place of a browser what a person does: it opens authURL,
// clicks on user on the login page, and returns the redirect that would take
// the browser back to the application, with its code and state.
func Login(ctx context.Context, authURL, user string) (*url.URL, error) {
	u, err := url.Parse(authURL)
	if err != nil {
		return nil, errors.New("log in: the authorization URL is not a URL")
	}
	home := u.Query().Get("redirect_uri")
	c := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, authURL, nil)
	for range 8 { // authorize, login page, click, callback, and some to spare
		if err != nil {
			return nil, fmt.Errorf("log in: %w", err)
		}
		resp, err := c.Do(req)
		if err != nil {
			return nil, fmt.Errorf("log in: %w", err)
		}
		body, _ := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
		resp.Body.Close()
		switch next, errLoc := resp.Location(); {
		case errLoc == nil && strings.HasPrefix(next.String(), home):
			return next, nil
		case errLoc == nil:
			req, err = http.NewRequestWithContext(ctx, http.MethodGet, next.String(), nil)
		case resp.StatusCode == http.StatusOK && req.Method == http.MethodGet && req.URL.Path == "/login":
			req, err = click(ctx, req.URL, user)
		default:
			return nil, fmt.Errorf("log in: the provider answered %s: %.200s", resp.Status, strings.TrimSpace(string(body)))
		}
		if err != nil {
			return nil, fmt.Errorf("log in: %w", err)
		}
	}
	return nil, errors.New("log in: too many redirects")
}

// click sends the form of the login page at u.
func click(ctx context.Context, u *url.URL, user string) (*http.Request, error) {
	form := url.Values{"id": {u.Query().Get("id")}, "username": {user}}
	u = &url.URL{Scheme: u.Scheme, Host: u.Host, Path: "/login"}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, u.String(), strings.NewReader(form.Encode()))
	if err == nil {
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	return req, err
}

// CodeFor logs user in for a client, with PKCE as a hub does it, and returns
// what the hub then sends to its token endpoint.
func CodeFor(ctx context.Context, issuer, clientID, redirectURI, user string, scopes ...string) (code, verifier string, err error) {
	verifier = oauth2.GenerateVerifier()
	c := oauth2.Config{
		ClientID: clientID, RedirectURL: redirectURI, Scopes: scopes,
		Endpoint: oauth2.Endpoint{AuthURL: strings.TrimSuffix(issuer, "/") + "/authorize"},
	}
	back, err := Login(ctx, c.AuthCodeURL("state", oauth2.S256ChallengeOption(verifier)), user)
	if err != nil {
		return "", "", err
	}
	q := back.Query()
	if code = q.Get("code"); code == "" {
		return "", "", fmt.Errorf("log in: no code came back: %s %s", q.Get("error"), q.Get("error_description"))
	}
	return code, verifier, nil
}
