package oauthprovider

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"strings"
)

// claims is the body of a JWT or of a userinfo answer. Methods of nil find
// nothing.
type claims map[string]any

// parseJWT reads the claims of a signed JWT without looking at its signature.
// It returns nil for anything else; an encrypted token, too, begins with "eyJ".
func parseJWT(token string) claims {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return nil
	}
	for _, p := range parts[:2] {
		if decode(p) == nil {
			return nil
		}
	}
	return decode(parts[1])
}

// decode reads a base64url part that holds a JSON object.
func decode(part string) claims {
	raw, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(part, "="))
	if err != nil {
		return nil
	}
	return decodeJSON(raw)
}

// decodeJSON reads a JSON object and keeps its numbers as they are written.
func decodeJSON(raw []byte) claims {
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	var c claims
	if d.Decode(&c) != nil || d.More() {
		return nil
	}
	return c
}

// text is a claim that is a string, or nothing.
func (c claims) text(name string) string {
	s, _ := c[name].(string)
	return s
}

// seconds is a claim that is a date.
func (c claims) seconds(name string) (float64, bool) {
	n, ok := c[name].(json.Number)
	if !ok {
		return 0, false
	}
	f, err := n.Float64()
	return f, err == nil
}

// list is a claim that is a string or an array; what is no string in it is
// left out.
func (c claims) list(name string) []string {
	return values(c[name])
}

func values(v any) (list []string) {
	switch v := v.(type) {
	case string:
		list = append(list, v)
	case []any:
		for _, e := range v {
			if s, ok := e.(string); ok {
				list = append(list, s)
			}
		}
	}
	return list
}

// scopes are those the token itself carries: scope (RFC 9068), or scp.
func (c claims) scopes() ([]string, bool) {
	for _, name := range []string{"scope", "scp"} {
		if v, ok := c[name]; ok {
			return split(v)
		}
	}
	return nil, false
}

// find follows a path such as realm_access.roles. Names may hold dots
// themselves (wlcg.groups, a URL), so each dot may be one or the other; the
// longest name that is there wins.
func (c claims) find(path string) (any, bool) {
	if v, ok := c[path]; ok {
		return v, true
	}
	for i := len(path) - 1; i > 0; i-- {
		if path[i] != '.' {
			continue
		}
		if inner, ok := c[path[:i]].(map[string]any); ok {
			if v, ok := claims(inner).find(path[i+1:]); ok {
				return v, true
			}
		}
	}
	return nil, false
}
