package rolewatch

import (
	"encoding/json"
	"errors"
	"io"
	"slices"
	"strings"
)

// An event is one of Keycloak's: what an administrator did, or a user. What else
// Keycloak tells of it, names and values before all, is not read.
type event struct {
	ID   string `json:"id"`
	Time int64  `json:"time"` // of Keycloak's clock, in milliseconds

	Operation string `json:"operationType"` // an administrator's: CREATE, UPDATE, DELETE, ACTION
	Resource  string `json:"resourceType"`  // …
	Path      string `json:"resourcePath"`  // … below the realm

	Type string `json:"type"` // a user's
	User string `json:"userId"`
}

// ofUsers are the events of users that may change what a session is worth. A
// Keycloak before 25, which doesn't know all of them, refuses to be asked.
var ofUsers = []string{
	"LOGOUT", "REVOKE_GRANT", "DELETE_ACCOUNT", "USER_DISABLED_BY_PERMANENT_LOCKOUT",
	"UPDATE_PROFILE", "UPDATE_EMAIL", "UPDATE_PASSWORD", "UPDATE_CREDENTIAL", "REMOVE_FEDERATED_IDENTITY",
}

// shared are the resources that many users' rights hang on. An event about one
// says nothing of whom it touches.
var shared = map[string]bool{
	"REALM": true, "REALM_ROLE": true, "CLIENT_ROLE": true, "GROUP": true, "CLIENT": true,
	"REALM_ROLE_MAPPING": true, "CLIENT_ROLE_MAPPING": true, // of a group
	"CLIENT_SCOPE": true, "CLIENT_SCOPE_CLIENT_MAPPING": true, "CLIENT_SCOPE_MAPPING": true, "REALM_SCOPE_MAPPING": true,
	"PROTOCOL_MAPPER": true, "COMPONENT": true, "USER_FEDERATION_PROVIDER": true, "USER_FEDERATION_MAPPER": true,
	"ORGANIZATION": true, "ORGANIZATION_MEMBERSHIP": true,
	"USER_SESSION": true, // it names the session, which is gone
}

// unused are those that nobody has yet when they are created.
var unused = map[string]bool{"REALM_ROLE": true, "CLIENT_ROLE": true, "GROUP": true, "CLIENT": true, "CLIENT_SCOPE": true}

// hint is what to do because of e; ok is false if that is nothing. The subject is
// the user's id, as it is in tokens unless somebody has given the client another
// mapper for sub.
func (e event) hint() (h hint, ok bool) {
	if e.Type != "" {
		return hint{e.User, "user event " + e.Type}, e.User != "" && slices.Contains(ofUsers, e.Type)
	}
	cause := "admin event " + word(e.Operation) + " " + word(e.Resource)
	if rest, ofUser := strings.CutPrefix(e.Path, "users/"); ofUser {
		id, _, _ := strings.Cut(rest, "/")
		return hint{id, cause}, id != ""
	}
	if e.Operation == "CREATE" && unused[e.Resource] && !strings.HasSuffix(e.Path, "/composites") {
		return hint{}, false
	}
	return hint{cause: cause}, shared[e.Resource]
}

// word is s as it may be written down.
func word(s string) string {
	if len(s) > 40 || strings.Trim(s, "ABCDEFGHIJKLMNOPQRSTUVWXYZ_") != "" {
		return "?"
	}
	return s
}

// readEvents reads a list of events, one at a time, so that long ones take no
// room. An event that can't be understood is passed over; all counts it.
func readEvents(r io.Reader) (events []event, all int, err error) {
	d := json.NewDecoder(r)
	if t, err := d.Token(); err != nil || t != json.Delim('[') {
		return nil, 0, errUnreadable
	}
	for d.More() {
		var e event
		err := d.Decode(&e)
		var wrong *json.UnmarshalTypeError
		if err != nil && !errors.As(err, &wrong) {
			return events, all, errUnreadable
		}
		all++
		if err == nil && e.ID != "" && e.Time > 0 {
			events = append(events, e)
		}
	}
	if _, err := d.Token(); err != nil { // the list's end
		return events, all, errUnreadable
	}
	return events, all, nil
}
