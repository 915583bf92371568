//go:build failpoints && linux

package faults_test

import (
	"bufio"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"tokenbroker/broker"
)

// Disconnect ends the user's grant.
func (s *Service) Disconnect(c Call, r *Reply) error {
	gone, _, err := s.s.(*ours).Broker.Disconnect(context.Background(), "test", "hub", broker.UserID(c.User), "")
	for _, d := range gone {
		r.Stopped, r.Until, r.NotKept = d.IssuingStoppedAt, d.OutstandingUntil, d.NotKept
	}
	return r.of(err)
}

// SetRoles gives the user other roles.
func (s *Service) SetRoles(c Call, r *Reply) error {
	var roles []string
	for _, name := range c.Roles {
		roles = append(roles, "roles/"+name)
	}
	return r.of(s.s.(*ours).Broker.SetRoles(context.Background(), "hub", broker.UserID(c.User), "idp", roles...))
}

// reply is what b, who must be alive, answers.
func (w *world) reply(b *process, method string, c Call) Reply {
	r, err := b.call(method, c)
	if err != nil {
		w.t.Errorf("%s: %s: %v", b.host, method, err)
		r.Code = "died"
	}
	return r
}

// setRoles changes what the user is at the provider and then, by b, at the brokers.
func (w *world) setRoles(b *process, user string, roles ...string) {
	w.idp.SetRoles(user, roles...)
	if r := w.reply(b, "SetRoles", Call{User: user, Roles: roles}); r.Code != "" {
		w.t.Errorf("%s: set the roles of %s: %+v", b.host, user, r)
	}
}

// audit is what all brokers have written down.
func (w *world) audit() (all []broker.Entry) {
	w.t.Helper()
	for _, b := range w.brokers {
		f, err := os.Open(filepath.Join(w.setup.Dir, b.host+".audit"))
		if err != nil {
			w.t.Fatal(err)
		}
		defer f.Close()
		for lines := json.NewDecoder(bufio.NewReader(f)); lines.More(); {
			var e broker.Entry
			if err := lines.Decode(&e); err != nil {
				w.t.Fatal(err)
			}
			all = append(all, e)
		}
	}
	return all
}

// log is what b has logged.
func (w *world) log(t *testing.T, b *process) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(w.setup.Dir, b.host+".log"))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
