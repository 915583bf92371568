//go:build linux

package attacks_test

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
	"testing"

	"tokenbroker/broker"
)

// TestAttacks tries them all. The groups run at the same time, and last what
// stops or freezes the broker.
func TestAttacks(t *testing.T) {
	w := newWorld(t)
	t.Cleanup(func() {
		if t.Failed() {
			text := w.log()
			t.Logf("the broker's log:\n%s", text[max(0, len(text)-8000):])
		}
	})
	alice := w.up(t, "main", "alice", "alice")
	t.Run("at once", func(t *testing.T) {
		for name, group := range map[string]func(*testing.T, *server){
			"processes": w.processes, "mounts": w.mounts, "identity": w.identity, "restarts": w.restarts,
			"protocol": w.protocol, "hub": w.hub, "policy": w.policy, "design": w.design,
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				group(t, alice)
			})
		}
	})
	t.Run("alone", func(t *testing.T) { w.alone(t, alice) })
	alice.served(t)
	w.judge(t)
	if unit {
		w.neverEnded(t)
	}
}

// An attempt is one attack.
type attempt struct {
	kind, name, tried string
	code              broker.Code // what the answer must say
	reason            string      // what its audit line must say, as a regular expression
}

// refused checks the answer to an attack and gives it its line.
func (w *world) refused(t *testing.T, at attempt, a answer) {
	t.Helper()
	if strings.Contains(a.Body+a.Raw, "access_token") {
		t.Errorf("%s: GOT A TOKEN, of %s", at.name, subject(a.said.AccessToken))
	}
	if a.said.Code != string(at.code) {
		t.Errorf("%s: answered %d %s %s%s, want %s", at.name, a.Status, a.said.Code, a.said.Detail, a.Error, at.code)
		return
	}
	e := w.find(t, "audit line "+a.said.Ref, func(e broker.Entry) bool { return e.Ref == a.said.Ref })
	w.refusedBy(t, at, fmt.Sprintf("%d %s: %s", a.Status, a.said.Code, a.said.Detail), e)
}

// refusedBy checks the audit line of an attack and gives it its line.
func (w *world) refusedBy(t *testing.T, at attempt, said string, e broker.Entry) {
	t.Helper()
	if e.Outcome != "refused" || e.Code != at.code || !regexp.MustCompile(at.reason).MatchString(e.Reason) {
		t.Errorf("%s: the audit says %s, %s: %q; want %s: …%s…", at.name, e.Outcome, e.Code, e.Reason, at.code, at.reason)
	}
	theTable.add(line{at.kind, at.name, at.tried, said, e.Action + " refused: " + e.Reason})
}

// issued is what the audit says of an answer with a token.
func (w *world) issued(t *testing.T, a answer) string {
	t.Helper()
	e := w.find(t, "audit line "+a.said.Ref, func(e broker.Entry) bool { return e.Ref == a.said.Ref })
	return fmt.Sprintf("%s %s: hub %s, user %s, %s, container %.12s, level %s", e.Action, e.Outcome, e.Hub, e.User, e.Sub, e.Container, e.Level)
}

// kernel checks an attack that never reached the broker.
func (w *world) kernel(t *testing.T, at attempt, a answer) {
	t.Helper()
	if a.Error == "" || !regexp.MustCompile(at.reason).MatchString(a.Error) {
		t.Errorf("%s: got %+v, want the kernel's %q", at.name, a, at.reason)
	}
	theTable.add(line{at.kind, at.name, at.tried, "the kernel: " + a.Error, "- (it did not get to the broker)"})
}

// notBound checks that a server which a container weakens is not bound.
func (w *world) notBound(t *testing.T, at attempt, s *server) {
	t.Helper()
	at.code = broker.Denied
	e := w.find(t, "refusal to bind "+s.name, func(e broker.Entry) bool {
		return e.Action == "bind" && e.Outcome == "refused" && string(e.User) == s.user && string(e.Hub) == s.hub
	})
	a := s.asks(t)
	if a.said.Code != string(broker.Denied) {
		t.Errorf("%s: its process was answered %d %s, want denied", at.name, a.Status, a.Body)
	}
	w.refusedBy(t, at, fmt.Sprintf("%d %s: %s", a.Status, a.said.Code, a.said.Detail), e)
}

// judge reads the whole audit: each token went to a container of the user whose
// it is, and the tests know of it.
func (w *world) judge(t *testing.T) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	tokens, refusals := 0, 0
	subs := map[string]string{} // of users, by hub, name and provider
	for _, e := range w.audit(t) {
		user := fmt.Sprint(e.Hub, " ", e.User, " ", e.Provider)
		if e.Action == "claim" && e.Outcome == "done" {
			if sub, ok := subs[user]; ok && sub != e.Sub {
				t.Errorf("CROSS ISSUE: %s is %s, and was %s", user, e.Sub, sub)
			}
			subs[user] = e.Sub
		}
		if e.Outcome == "refused" {
			refusals++
			if e.Reason == "" {
				t.Errorf("a refusal without a reason: %+v", e)
			}
		}
		if e.Action != "token" || e.Outcome != "done" {
			continue
		}
		tokens++
		owner, to := w.owners[e.Container], w.given[e.Ref]
		switch {
		case owner == nil:
			t.Errorf("CROSS ISSUE: a token for %s went to container %.12s, which is nobody's", e.User, e.Container)
		case owner.user != string(e.User) || owner.hub != string(e.Hub) || e.Sub != "sub-"+owner.account:
			t.Errorf("CROSS ISSUE: a token of %s (%s) went to the container of %s at %s", e.User, e.Sub, owner.user, owner.hub)
		case to == nil && owner.unread:
		case to == nil:
			t.Errorf("CROSS ISSUE: a token of %s came to somebody whom the tests don't know (pid %d)", e.User, e.PID)
		case to != owner:
			t.Errorf("CROSS ISSUE: a token of %s came to %s", owner.user, to.user)
		}
	}
	fmt.Printf("\nthe audit: %d tokens issued, all to containers of their owners; %d refusals, each with its reason\n", tokens, refusals)
}

// subject is the sub of an access token.
func subject(token string) string {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return ""
	}
	text, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return ""
	}
	var claims struct{ Sub string }
	json.Unmarshal(text, &claims)
	return claims.Sub
}
