package broker

import (
	"fmt"
	"unicode"
	"unicode/utf8"
)

// Identities are types of their own, so that a user can't be passed where a
// provider is meant.
type (
	HubID      string // name of a hub in the configuration
	HostID     string // name of a host
	UserID     string // a hub's user name
	ServerName string // a server's name; empty is the default server
	ProviderID string // name of a provider in the configuration
)

// A ServerKey names one single-user server.
type ServerKey struct {
	Hub    HubID
	User   UserID
	Server ServerName
}

// A GrantKey names one grant: who somebody is at a provider, for one hub.
type GrantKey struct {
	Hub      HubID
	Provider ProviderID
	Sub      string
}

// String names it for logs and operators.
func (k ServerKey) String() string { return fmt.Sprintf("server %q of %s/%q", k.Server, k.Hub, k.User) }

// String names it for logs and operators.
func (k GrantKey) String() string { return fmt.Sprintf("grant %s/%s/%q", k.Hub, k.Provider, k.Sub) }

// maxName is JupyterHub's own limit (orm.py: users.name, spawners.name).
const maxName = 255

// checkName says what is wrong with a user or server name. Any printable text
// is a name: hubs use e-mail addresses, spaces and every script there is.
func checkName(field, s string) error {
	switch {
	case utf8.RuneCountInString(s) > maxName:
		return Errorf(Invalid, "%s is longer than %d characters", field, maxName)
	case !utf8.ValidString(s):
		return Errorf(Invalid, "%s is not valid UTF-8", field)
	}
	for _, r := range s {
		if unicode.IsControl(r) {
			return Errorf(Invalid, "%s holds a control character", field)
		}
	}
	return nil
}
