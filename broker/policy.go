package broker

import "time"

// A Rule says who may have which tokens. Every condition that is given must
// hold; within one condition any of its values will do. The first rule that
// covers a request answers it.
type Rule struct {
	// Who. An empty list allows all.
	Hubs    []HubID
	Users   []UserID
	Servers []ServerName
	Images  []string // image references; * stands for any text
	Roles   []string // "value" or "claim/value" of Provider, or "provider:claim/value"

	// What.
	Provider   ProviderID
	Audiences  []string
	Scopes     []string
	MaxTTL     time.Duration // refuse longer tokens; 0: any
	Unverified bool          // allow tokens whose scopes, audience or end can't be read
}
