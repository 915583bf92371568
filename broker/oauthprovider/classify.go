package oauthprovider

import (
	"encoding/json"
	"net/http"
	"strings"

	"tokenbroker/broker"
)

// A rule says what an answer means. Empty fields match anything.
type rule struct {
	ops  op     // the requests it speaks of
	code string // the OAuth error code
	// text is the error_description; a "*" stands for anything. It is compared and
	// then forgotten: some servers echo tokens in it.
	text   string
	class  broker.ProviderClass
	reason string
}

func (r rule) matches(o op, code, text string) bool {
	if r.ops != 0 && r.ops&o == 0 || r.code != "" && r.code != code {
		return false
	}
	return r.text == "" || like(text, r.text)
}

// like reports whether text is of pattern, in which "*" stands for anything.
func like(text, pattern string) bool {
	first, rest, ok := strings.Cut(pattern, "*")
	if !ok {
		return text == pattern
	}
	text, ok = strings.CutPrefix(text, first)
	for i := 0; ok && i <= len(text); i++ {
		if like(text[i:], rest) {
			return true
		}
	}
	return false
}

// common are the rules of RFC 6749, 7009 and 8693, for any server. A profile's
// own rules are asked first.
var common = []rule{
	{opRefresh, "invalid_grant", "", broker.Dead, "refused"},
	{opCode, "invalid_grant", "", broker.Dead, "code_refused"},
	// Some servers speak of the token (INDIGO IAM), some in codes of their own
	// (GitHub), which mean nothing else anywhere.
	{opRefresh, "invalid_token", "", broker.Dead, "refused"},
	{opRefresh, "bad_refresh_token", "", broker.Dead, "refused"},
	{opCode, "bad_verification_code", "", broker.Dead, "code_refused"},
	{0, "incorrect_client_credentials", "", broker.Misconfigured, "client_refused"},
	// Of an exchange it is the access token that is dead, never the grant. RFC
	// 8693 (section 2.2.2) has invalid_request for it, but for all else that is
	// wrong with a request, too. That must not count as dead: the caller would
	// spend a refresh to get another access token, for nothing, each time.
	{opExchange, "invalid_grant", "", broker.Dead, "access_token_refused"},
	{opExchange, "invalid_token", "", broker.Dead, "access_token_refused"},

	{0, "invalid_scope", "", broker.Refused, "scope"},
	{0, "invalid_target", "", broker.Refused, "audience"},
	{opExchange, "access_denied", "", broker.Refused, "access_denied"},

	{0, "invalid_client", "", broker.Misconfigured, "client_refused"},
	{0, "unauthorized_client", "", broker.Misconfigured, "client_refused"},
	{0, "unsupported_grant_type", "", broker.Misconfigured, "unsupported"},
	{0, "unsupported_token_type", "", broker.Misconfigured, "unsupported"},
	{0, "invalid_dpop_proof", "", broker.Misconfigured, "dpop_required"},

	{0, "interaction_required", "", broker.UserAction, "interaction_required"},
	{0, "login_required", "", broker.UserAction, "interaction_required"},
	{0, "consent_required", "", broker.UserAction, "consent_required"},
	{0, "account_selection_required", "", broker.UserAction, "interaction_required"},

	{0, "temporarily_unavailable", "", broker.TryLater, "busy"},
	{0, "slow_down", "", broker.TryLater, "busy"},
	{0, "server_error", "", broker.TryLater, "provider_error"},
}

// tellable are the error codes of the RFCs; any other is the provider's own
// text, and not repeated.
var tellable = map[string]bool{
	"invalid_request": true, "invalid_client": true, "invalid_grant": true, "unauthorized_client": true,
	"unsupported_grant_type": true, "invalid_scope": true, "invalid_target": true, "invalid_token": true,
	"access_denied": true, "server_error": true, "temporarily_unavailable": true, "unsupported_token_type": true,
	"interaction_required": true, "login_required": true, "consent_required": true, "account_selection_required": true,
	"invalid_dpop_proof": true, "slow_down": true, "not_allowed": true,
}

// refusal is the error of an answer that is not a favourable one.
func (p profile) refusal(o op, r *reply) *broker.ProviderError {
	code, text, readable := parseError(r.body)
	e := &broker.ProviderError{Status: r.status, RetryAfter: retryAfter(r.header)}
	if tellable[code] {
		e.Code = code
	}
	e.Class, e.Reason = p.classify(o, r.status, code, text, readable)
	return e
}

// classify looks first at what a status alone decides, then at the profile's
// rules, then at the common ones.
func (p profile) classify(o op, status int, code, text string, readable bool) (broker.ProviderClass, string) {
	if !readable || busy(status) || status >= 500 {
		return byStatus(o, status, readable)
	}
	for _, rules := range [][]rule{p.rules, common} {
		for _, r := range rules {
			if r.matches(o, code, text) {
				return r.class, r.reason
			}
		}
	}
	return byStatus(o, status, readable)
}

// byStatus is what the status says. A 5xx in the provider's own words is its
// decision; one in a gateway's words says nothing about how far the request
// came, so a spent token may be lost.
func byStatus(o op, status int, readable bool) (broker.ProviderClass, string) {
	switch {
	case busy(status):
		return broker.TryLater, "busy"
	case status/100 == 3:
		return broker.Misconfigured, "redirect"
	case status >= 500 && readable:
		return broker.TryLater, "provider_error"
	case (status >= 500 || status/100 == 2) && !readable && o.spends():
		return broker.Lost, "unreadable_answer"
	case status == http.StatusUnauthorized && o != opLook:
		return broker.Misconfigured, "client_refused"
	case !readable:
		return broker.TryLater, "unreadable_answer"
	}
	return broker.TryLater, "unknown_answer"
}

// busy is a status by which a server, or the gateway before it, says that it
// has not taken the request up.
func busy(status int) bool {
	return status == http.StatusTooManyRequests || status == http.StatusRequestTimeout || status == http.StatusServiceUnavailable
}

// parseError reads an OAuth error. readable says that the body is an object in
// which the server says what is wrong; a token answer without a token is not.
func parseError(body []byte) (code, desc string, readable bool) {
	var f map[string]json.RawMessage
	if json.Unmarshal(body, &f) != nil {
		return "", "", false
	}
	code = text(f["error"])
	return code, text(f["error_description"]), len(f["error"]) > 0 && string(f["error"]) != "null"
}
