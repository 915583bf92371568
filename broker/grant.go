package broker

import "time"

// GrantState is what can be done with a grant.
type GrantState string

const (
	NoGrant       GrantState = "none"
	Live          GrantState = "live"
	NeedsLogin    GrantState = "login_required" // quarantined: the provider refused the refresh token
	Disconnected  GrantState = "revoked"        // tombstone
	GrantDisabled GrantState = "disabled"       // the account is switched off at the provider
)

// A Grant is a subject's refresh token for one hub and all that decides about
// it, one record, sealed whole.
type Grant struct {
	Key    GrantKey
	Issuer string
	User   UserID // the hub's user it is linked to; empty if none

	Refresh Secret
	// Version moves with every new refresh token: commit and login, nothing else.
	Version int64
	// Epoch moves with every change of rights; what was decided under an older
	// one is void. It never falls.
	Epoch int64
	// Tombstone is when the grant was disconnected; zero if it wasn't. Nothing
	// but a new login is stored over it.
	Tombstone time.Time

	// Lease is the right to refresh, held by Holder until Until.
	Lease Lease
	// Mark is written before the refresh token is sent, so that a crash or a
	// lost answer can be told from a provider's own decision.
	Mark Mark

	State  GrantState
	Reason string // why State is not live

	Username string
	Roles    []string // canonical, provider:claim/value, sorted

	RefreshedAt time.Time
	RefreshedBy HostID
	// Expires is when the refresh token ends; zero: no end known.
	Expires time.Time
	// OutstandingUntil is until when an access token that was issued for the
	// grant may live. It is raised before a token leaves.
	OutstandingUntil time.Time
}

// A Lease is a bounded right to refresh one grant.
type Lease struct {
	Holder string
	Until  time.Time
}

// A Mark says that a refresh token was about to be sent.
type Mark struct {
	Attempt string    // who, unique
	At      time.Time // when
	Lost    bool      // the answer never came
}
