package oauthprovider

import "tokenbroker/broker"

// A profile is what differs between families of servers. Add a family by
// adding a row, with its recorded answers in vectors_test.go.
type profile struct {
	narrowing broker.Narrowing
	// implied scopes come with every token and give no rights at a service.
	implied []string
	// exchanged scopes are asked for with every exchange.
	exchanged []string
	// userinfoRoles says that a role claim which the tokens don't have may still
	// be in the userinfo answer. Where it is false an absent claim is empty.
	userinfoRoles bool
	// introspects are the types by which an introspection answer says that it is
	// about a refresh token, for servers that then show the roles of now and take
	// no offence at a spent token. Empty: the server is not asked.
	introspects []string
	// revokesAccessAlone says that a revoked access token leaves its session
	// alone, unless tokens of that session are exchanged; elsewhere it may end the
	// refresh token, too (RFC 7009, section 2.1).
	revokesAccessAlone bool
	// logoutTypes are those that logout tokens may have besides logout+jwt, in
	// small letters; empty: none at all.
	logoutTypes []string
	rules       []rule
}

var profiles = map[string]profile{
	// generic is any server that keeps to the RFCs. It puts most claims into
	// userinfo only (OpenID Connect Core, section 5.4).
	"generic": {
		narrowing:     broker.ByScope,
		implied:       []string{"email", "offline_access", "openid", "profile"},
		userinfoRoles: true,
	},

	// dex is Dex 2.45. It calls dead tokens an invalid request.
	"dex": {
		narrowing:     broker.ByScope,
		implied:       []string{"email", "groups", "offline_access", "openid", "profile"},
		userinfoRoles: true,
		rules: []rule{
			{opRefresh, "invalid_request", "Refresh token is invalid or has already been claimed by another client.", broker.Dead, "unknown_token"},
			{opRefresh, "invalid_request", "Refresh token expired.", broker.Dead, "expired"},
			{opRefresh, "invalid_grant", "The session this refresh token belongs to has ended.", broker.Dead, "session_ended"},
			{opRefresh, "invalid_request", "Requested scopes contain unauthorized scope(s)*", broker.Refused, "scope"},
		},
	},

	// indigo-iam is INDIGO IAM 1.12. Who has not signed the usage policy gets
	// invalid_grant, and tokens again once it is signed.
	"indigo-iam": {
		narrowing:     broker.ByScope,
		implied:       []string{"email", "offline_access", "openid", "profile"},
		userinfoRoles: true,
		rules: []rule{
			{opRefresh, "unauthorized", "User * is not active.", broker.Disabled, "user_disabled"},
			{opRefresh, "invalid_grant", "User * needs to sign AUP*", broker.UserAction, "usage_policy"},
		},
	},

	// keycloak is Keycloak 26. Its mappers put roles into the tokens, and leave
	// out a claim that has no values, so userinfo knows no more than they do.
	//
	// The implied scopes are a realm's default client scopes, which stay in
	// every token whatever is asked for, and offline_access, which stays in
	// those of an offline session. web-origins, roles, basic and acr stand in a
	// token only if a realm says so. address, phone and microprofile-jwt are
	// optional and must be asked for, so they are not here.
	"keycloak": {
		narrowing: broker.ByExchange,
		implied:   []string{"acr", "basic", "email", "offline_access", "openid", "profile", "roles", "web-origins"},
		// An exchange without openid takes openid from the whole session (measured
		// on 26.5.5): refreshes then bring no ID token and no openid, the hub's
		// userinfo call gets 403, and the hub logs the user out.
		exchanged: []string{"openid"},
		// The roles are computed anew (measured on 26.5.5). A spent token is called
		// active, too, and ends nothing.
		introspects: []string{"Refresh", "Offline"},
		// Measured on 26.5.5: once a client has exchanged a token of its own, any
		// access token of that session takes the client out of it when it is
		// revoked, and the refresh token is dead ("Session doesn't have required
		// client").
		revokesAccessAlone: true,
		// 26.5.5 sends logout+jwt. Older versions said the same of all JWTs.
		logoutTypes: []string{"jwt", ""},
		rules: []rule{
			{opRefresh, "invalid_grant", "User disabled", broker.Disabled, "user_disabled"},
			{opRefresh, "invalid_grant", "Token is not active", broker.Dead, "expired"},
			{opRefresh, "invalid_grant", "Maximum allowed refresh token reuse exceeded", broker.Dead, "reuse_detected"},
			// The client was taken out of the session: by a reuse, or by revoking
			// another of its tokens.
			{opRefresh, "invalid_grant", "Session doesn't have required client", broker.Dead, "session_ended"},
			{opRefresh, "invalid_grant", "Session not active", broker.Dead, "session_ended"},
			{opRefresh, "invalid_grant", "Client session not active", broker.Dead, "session_ended"},
			{opRefresh, "invalid_grant", "Offline session not active", broker.Dead, "session_ended"},
			{opRefresh, "invalid_grant", "Offline user session not found", broker.Dead, "session_ended"},
			{opRefresh, "invalid_grant", "Refresh token issued before the user session started", broker.Dead, "session_ended"},
			{opRefresh, "invalid_grant", "Stale token", broker.Dead, "revoked"}, // not-before was moved
			{opRefresh, "invalid_grant", "Offline session invalid because offline access not granted anymore", broker.Dead, "offline_not_allowed"},
			{opRefresh, "not_allowed", "Offline tokens not allowed for the user or client", broker.Dead, "offline_not_allowed"},
			{opRefresh, "invalid_grant", "Invalid refresh token. Token client and authorized client don't match", broker.Dead, "wrong_client"},
			{opRefresh, "invalid_grant", "Unmatching clients", broker.Dead, "wrong_client"},
			{opRefresh, "invalid_grant", "Invalid refresh token", broker.Dead, "unknown_token"},
			{opRefresh, "invalid_scope", "Client no longer has requested consent from user", broker.UserAction, "consent_required"},
			{opRefresh | opCode, "invalid_request", "DPoP*", broker.Misconfigured, "dpop_required"},
			{opExchange, "invalid_request", "DPoP*", broker.Misconfigured, "dpop_required"},
			{opRevoke, "invalid_request", "Unmatching clients", broker.Misconfigured, "wrong_client"},

			{opExchange, "invalid_request", "Invalid token", broker.Dead, "access_token_refused"},
			// An audience is named like a client, and missing in the same words.
			{opExchange, "invalid_client", "Audience not found", broker.Refused, "audience"},
			{opExchange, "invalid_request", "Requested audience not available*", broker.Refused, "audience"},
			{opExchange, "invalid_request", "Scope offline_access not allowed for token exchange", broker.Refused, "scope"},
			{opExchange, "invalid_request", "Standard token exchange is not enabled*", broker.Misconfigured, "exchange_not_enabled"},
			{opExchange, "invalid_request", "Parameter 'subject_token' supports*", broker.Misconfigured, "unsupported"},
			{opExchange, "invalid_request", "requested_token_type unsupported", broker.Misconfigured, "unsupported"},
		},
	},
}
