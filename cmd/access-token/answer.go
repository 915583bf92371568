package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/url"
	"strconv"
	"strings"
	"text/tabwriter"
)

// A token is the broker's answer to GET /v1/token.
type token struct {
	AccessToken string   `json:"access_token"`
	Type        string   `json:"token_type"`
	ExpiresIn   float64  `json:"expires_in"`
	Provider    string   `json:"provider"`
	Audience    string   `json:"audience"`
	Scopes      []string `json:"scopes"`
}

// token asks for a token as the command line says.
func (c command) token(ctx context.Context, b *broker, stderr io.Writer) (token, error) {
	path, query := "/v1/token", url.Values{}
	if c.provider != "" {
		path += "/" + url.PathEscape(c.provider)
	}
	if c.audience != "" {
		query.Set("audience", c.audience)
	}
	if c.scope != "" {
		query.Set("scope", c.scope)
	}
	if c.minTTL.Duration > 0 {
		query.Set("min_ttl", strconv.Itoa(int(math.Ceil(c.minTTL.Seconds()))))
	}
	var t token
	err := c.wait.retry(ctx, stderr, func(ctx context.Context) error { return b.get(ctx, path, query, &t) })
	if err == nil && t.AccessToken == "" {
		err = b.stranger()
	}
	return t, err
}

// show prints what is known of a token and what it says itself, but not the
// token: people paste what they see into tickets.
func (c command) show(ctx context.Context, b *broker, stdout, stderr io.Writer) error {
	t, err := c.token(ctx, b, stderr)
	if err != nil {
		return err
	}
	claims, ok := decode(t.AccessToken)
	fmt.Fprintf(stdout, "%s: audience %s, scopes %s, %.0f s left%s\n",
		t.Provider, orDash(t.Audience), orDash(strings.Join(t.Scopes, " ")), t.ExpiresIn, owner(claims))
	if !ok {
		_, err = fmt.Fprintln(stdout, "the token is opaque: it has no claims to show")
		return err
	}
	e := json.NewEncoder(stdout)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(claims)
}

// owner says whose token it is, if it says so.
func owner(claims map[string]any) string {
	for _, name := range []string{"preferred_username", "sub"} {
		if s, ok := claims[name].(string); ok {
			return " (" + s + ")"
		}
	}
	return ""
}

// decode returns the claims of a JSON Web Token. They are not verified; without
// their signature they are of no use to a thief.
func decode(jwt string) (claims map[string]any, ok bool) {
	parts := strings.Split(jwt, ".")
	if len(parts) != 3 {
		return nil, false
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return nil, false
	}
	d := json.NewDecoder(bytes.NewReader(payload))
	d.UseNumber() // times are not to be shown as 1.7e+09
	return claims, d.Decode(&claims) == nil
}

// list prints the providers there are.
func (c command) list(ctx context.Context, b *broker, stdout, stderr io.Writer) error {
	var answer struct {
		Providers []struct {
			Name      string   `json:"name"`
			Login     bool     `json:"login"`
			State     string   `json:"state"`
			Audiences []string `json:"audiences"`
			Scopes    []string `json:"scopes"`
		} `json:"providers"`
	}
	err := c.wait.retry(ctx, stderr, func(ctx context.Context) error { return b.get(ctx, "/v1/providers", nil, &answer) })
	if err != nil {
		return err
	}
	w := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "PROVIDER\tSTATE\tAUDIENCES\tSCOPES")
	for _, p := range answer.Providers {
		if p.Login {
			p.Name += " (login)"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", p.Name, p.State, orDash(strings.Join(p.Audiences, " ")), orDash(strings.Join(p.Scopes, " ")))
	}
	return w.Flush()
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
