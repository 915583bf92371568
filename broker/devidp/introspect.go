//go:build !release

package devidp

import (
	"encoding/json"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// introspectRefresh answers an introspection of a refresh token as Keycloak
// does: with the roles of now, spent or not. op knows access tokens only, and
// gets all other requests. It reports whether it has answered.
func (s *Server) introspectRefresh(w http.ResponseWriter, r *http.Request) bool {
	id, secret, ok := r.BasicAuth()
	if ok {
		id, _ = url.QueryUnescape(id)
		secret, _ = url.QueryUnescape(secret)
	} else {
		id, secret = r.PostFormValue("client_id"), r.PostFormValue("client_secret")
	}
	if s.store.AuthorizeClientIDSecret(r.Context(), id, secret) != nil {
		return false
	}
	a := s.store.introspectRefresh(r.PostFormValue("token"))
	if a == nil {
		return false
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(a)
	return true
}

// introspectRefresh says what a refresh token stands for; nil: it is none.
func (s *storage) introspectRefresh(token string) map[string]any {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.refresh[token]
	switch {
	case f == nil:
		return nil
	case f.ended, f.reused, f.user.disabled, time.Now().After(f.until):
		return map[string]any{"active": false}
	}
	a := f.user.roles()
	a["active"], a["typ"], a["token_type"], a["client_id"] = true, "Refresh", "Refresh", s.cfg.ClientID
	a["sub"], a["preferred_username"], a["scope"] = f.user.Sub, f.user.Name, strings.Join(f.scopes, " ")
	return a
}
