package httpserver

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"

	"tokenbroker/broker"
)

const tokenPath = "/oauth2/token/{provider}"

// NewTokenEndpoint is the token endpoint for a hub that does not come in over
// its socket: for a loopback or TLS listener of Bound's. The hub shows secret, in the form
// or by HTTP Basic; its client_id is the provider's business and not looked at.
func NewTokenEndpoint(b *broker.Broker, hub broker.HubID, secret broker.Secret, hosts Hosts, log *slog.Logger) *http.Server {
	e := edge{b: b, log: log, hosts: hosts}
	mux := e.mux(nil)
	mux.Handle(tokenPath, tokenEndpoint{e, func(r *http.Request, f url.Values) (broker.HubID, error) {
		return hub, checkSecret(r, f, secret)
	}})
	return e.tcp(mux)
}

// A tokenEndpoint trades codes and handles for tokens (RFC 6749, section 3.2).
// OAuthenticator is its client, and decides the form of its errors:
//
//   - A login's error goes out as 200. Of any other status the user sees
//     "500 : Internal Server Error", of a 200 he sees error_description.
//   - A refresh's error goes out as RFC 6749 has it. invalid_grant ends the
//     user's session at the hub, so nothing but the end of a grant is called so.
//   - The hub logs error bodies whole, so nothing of the request is in them.
type tokenEndpoint struct {
	edge
	hub func(*http.Request, url.Values) (broker.HubID, error) // whose request it is
}

// hubOfSocket knows the hub by its socket. What a client sends there to prove
// itself is not looked at.
func hubOfSocket(r *http.Request, _ url.Values) (broker.HubID, error) {
	return peerOf(r.Context()).Hub, nil
}

// checkSecret compares what the hub showed with what it was given. Wrong ones are
// not counted: whoever can come here could lock the hub out, and nobody guesses 256
// bits.
func checkSecret(r *http.Request, f url.Values, want broker.Secret) error {
	for _, shown := range shownSecrets(r, f) {
		if shown != "" && broker.NewSecret(shown).Equal(want) {
			trust(r.Context())
			return nil
		}
	}
	return broker.Errorf(broker.UnknownPeer, "the hub's client secret is missing or not the one the token broker has").
		Hint("compare the hub's client_secret with the broker's client_secret_file")
}

// shownSecrets returns what may be the client's secret: from the form, or from
// HTTP Basic, where RFC 6749, section 2.3.1, wants it escaped and OAuthenticator
// doesn't.
func shownSecrets(r *http.Request, f url.Values) []string {
	_, plain, ok := r.BasicAuth()
	if !ok {
		return []string{f.Get("client_secret")}
	}
	escaped, _ := url.QueryUnescape(plain)
	return []string{plain, escaped}
}

func (t tokenEndpoint) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	action := "grant" // until the grant type is known
	defer func() {
		if v := recover(); v != nil {
			t.fail(w, r, action, t.crashed(action, v))
		}
	}()
	token, err := t.trade(w, r, &action)
	if err != nil {
		t.fail(w, r, action, err)
		return
	}
	writeJSON(w, http.StatusOK, "application/json", hubTokenOf(token))
}

// trade answers a request and says, in action, what it was.
func (t tokenEndpoint) trade(w http.ResponseWriter, r *http.Request, action *string) (broker.HubToken, error) {
	body, end, err := t.receive(w, r, http.MethodPost, "application/x-www-form-urlencoded")
	if err != nil {
		return broker.HubToken{}, err
	}
	defer end()
	// OAuthenticator sends a stray data=None; such fields are not looked at.
	f, err := form(body, "grant_type", "code", "code_verifier", "redirect_uri", "refresh_token", "client_secret")
	if err != nil {
		return broker.HubToken{}, err
	}
	hub, err := t.hub(r, f)
	if err != nil {
		return broker.HubToken{}, err
	}
	provider := broker.ProviderID(r.PathValue("provider"))
	switch f.Get("grant_type") {
	case "authorization_code":
		*action = login
		return t.login(r, hub, provider, f)
	case "refresh_token":
		*action = "refresh"
		return t.refresh(r, hub, provider, f)
	case "":
		return broker.HubToken{}, missing("grant_type")
	}
	return broker.HubToken{}, &requestError{http.StatusBadRequest, "unsupported_grant_type",
		broker.Errorf(broker.Invalid, "grant_type must be authorization_code or refresh_token")}
}

const login = "login"

func (t tokenEndpoint) login(r *http.Request, hub broker.HubID, provider broker.ProviderID, f url.Values) (broker.HubToken, error) {
	for _, name := range []string{"code", "redirect_uri"} {
		if f.Get(name) == "" {
			return broker.HubToken{}, missing(name)
		}
	}
	if f.Get("code_verifier") == "" { // whoever stole the code could use it
		return broker.HubToken{}, broker.Errorf(broker.Invalid, "code_verifier is missing: logins without PKCE are not accepted").
			Hint("set enable_pkce = True in the hub's authenticator")
	}
	return t.b.Login(r.Context(), hub, provider, broker.CodeGrant{
		Code:        broker.NewSecret(f.Get("code")),
		Verifier:    broker.NewSecret(f.Get("code_verifier")),
		RedirectURI: f.Get("redirect_uri"),
	})
}

func (t tokenEndpoint) refresh(r *http.Request, hub broker.HubID, provider broker.ProviderID, f url.Values) (broker.HubToken, error) {
	if f.Get("refresh_token") == "" {
		return broker.HubToken{}, missing("refresh_token")
	}
	return t.b.RefreshHub(r.Context(), hub, provider, broker.NewSecret(f.Get("refresh_token")))
}

// oauthErrors is what OAuth 2.0 calls the domain's codes.
var oauthErrors = map[broker.Code]string{
	broker.LoginRequired: "invalid_grant",
	broker.Revoked:       "invalid_grant",
	broker.Denied:        "invalid_grant",
	broker.Invalid:       "invalid_request",
	broker.UnknownPeer:   "invalid_client",
	broker.Unsatisfiable: "invalid_scope",
	broker.Pending:       "temporarily_unavailable",
	broker.ProviderDown:  "temporarily_unavailable",
	broker.Unavailable:   "temporarily_unavailable",
	broker.Limited:       "temporarily_unavailable",
}

// oauthStatuses is the status of the errors that don't go out as 400.
var oauthStatuses = map[string]int{
	"invalid_client":          http.StatusUnauthorized,
	"temporarily_unavailable": http.StatusServiceUnavailable,
	"server_error":            http.StatusInternalServerError,
}

// An oauthError is an error as RFC 6749, section 5.2, writes it.
type oauthError struct {
	Error       string `json:"error"`
	Description string `json:"error_description"`
	Ref         string `json:"ref"`
}

func (t tokenEndpoint) fail(w http.ResponseWriter, r *http.Request, action string, err error) {
	told := t.told(r, peerOf(r.Context()), action, err)
	name, status := nameOf(told, err)
	if action == login {
		status = http.StatusOK
	}
	if status == http.StatusUnauthorized {
		w.Header().Set("WWW-Authenticate", `Basic realm="tokenbroker"`)
	}
	setRetryAfter(w, told)
	writeJSON(w, status, "application/json", oauthError{
		Error:       name,
		Description: fmt.Sprintf("%s (%s; ref %s)", told.Sentence, told.Next, told.Ref),
		Ref:         told.Ref,
	})
}

// nameOf returns OAuth's name for what is told, and the status; err is where it
// came from.
func nameOf(told *broker.Error, err error) (string, int) {
	name, ok := oauthErrors[told.Code]
	if !ok {
		name = "server_error"
	}
	if status, ok := oauthStatuses[name]; ok {
		return name, status
	}
	var own *requestError
	if !errors.As(err, &own) {
		return name, http.StatusBadRequest
	}
	if own.oauth != "" {
		name = own.oauth
	}
	return name, own.status
}
