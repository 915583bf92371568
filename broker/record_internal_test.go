package broker

import (
	"encoding/json"
	"testing"

	"tokenbroker/broker/seal"
)

// What lies in the store may be anything; what opens may be of another version of
// this program.
func FuzzStoredRecord(f *testing.F) {
	keys, err := seal.New()
	if err != nil {
		f.Fatal(err)
	}
	a := &vault{keys: keys, deployment: "lab"}
	k := GrantKey{Hub: "main", Provider: "keycloak", Sub: "alice"}.record()
	whole, err := json.Marshal(Grant{Key: GrantKey{Hub: "main", Provider: "keycloak", Sub: "alice"}, Refresh: NewSecret("r"), State: Live}.record())
	if err != nil {
		f.Fatal(err)
	}
	for _, seed := range []string{string(whole), "", "{}", "null", "[]", `{"Epoch":1e99}`, `{"Roles":{}}`, `{"Tombstone":"yesterday"}`, `{"Spending":null}`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		var r grantRecord
		if err := a.open(k, Record{Revision: 1, Box: text}, &r); err == nil {
			t.Error("a record that nobody sealed was opened")
		}
		box, err := keys.Seal(text, a.place(k, 1))
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range []any{&r, &tokenRecord{}, &handleRecord{}, &linkRecord{}, &issuedRecord{}, &logoutRecord{}, &Registration{}} {
			if err := a.open(k, Record{Revision: 2, Box: box}, v); err == nil {
				t.Error("a record of another revision was opened")
			}
			if err := a.open(k, Record{Revision: 1, Box: box}, v); err != nil && json.Unmarshal(text, v) == nil {
				t.Errorf("%T: %v", v, err)
			}
		}
		g := r.open()
		_ = g.usable("https://keycloak.example")
	})
}
