//go:build linux

package attacks_test

import (
	"fmt"
	"net/http"
	"net/url"
	"testing"

	"tokenbroker/broker"
)

// told gives an attack on a hub's socket its line, where the answer is one of the
// token endpoint's, or no error at all.
func (w *world) told(t *testing.T, at attempt, a answer) {
	t.Helper()
	if a.said.AccessToken != "" || a.said.RefreshToken != "" {
		t.Errorf("%s: GOT A TOKEN: %s", at.name, a.Body)
	}
	e := w.find(t, "audit line "+a.said.Ref, func(e broker.Entry) bool { return e.Ref == a.said.Ref })
	said := fmt.Sprintf("%d %s: %s%s", a.Status, a.said.Error, a.said.Description, a.said.Detail)
	w.refusedBy(t, at, said, e)
}

func (w *world) hub(t *testing.T, _ *server) {
	handle := w.user(t, "main", "victor", "victor")
	w.handles(t, handle)
	w.logins(t)
	w.names(t)
	w.registrations(t)
}

// handles tries one where it does not belong.
func (w *world) handles(t *testing.T, handle string) {
	form := url.Values{"grant_type": {"refresh_token"}, "refresh_token": {handle}}
	unknown := "does not know this session"
	at := func(name, tried string, code broker.Code, reason string) attempt {
		return attempt{"hub", name, tried, code, reason}
	}
	w.told(t, at("a handle at another hub's token endpoint", "refresh_token=<main's> at other", broker.LoginRequired, unknown), w.trade(t, "other", "idp", form))
	w.refused(t, at("a handle claimed at another hub", "claim for the same name", broker.LoginRequired, unknown), w.claim(t, "other", "idp", handle, "victor"))
	w.told(t, at("a handle at another provider", "refresh_token=<idp's> at second", broker.LoginRequired, unknown), w.trade(t, "main", "second", form))
	w.refused(t, at("a handle claimed at another provider", "claim", broker.LoginRequired, unknown), w.claim(t, "main", "second", handle, "victor"))
	w.refused(t, at("a handle for another user", "claim by mallory of victor's", broker.Denied, "linked to another user"), w.claim(t, "main", "idp", handle, "mallory2"))
	w.told(t, at("a handle at an unknown provider", "/oauth2/token/nowhere", broker.Invalid, "nowhere"), w.trade(t, "main", "nowhere", form))
	w.refused(t, at("a handle at another path", "/oauth2/token/idp/../second", broker.Invalid, "nothing at this path"),
		w.post(t, "main", "/oauth2/token/idp/x", "application/x-www-form-urlencoded", form.Encode()))
	w.told(t, at("a handle that is made up", "tbh_AAAA…", broker.LoginRequired, unknown),
		w.trade(t, "main", "idp", url.Values{"grant_type": {"refresh_token"}, "refresh_token": {"tbh_AAAAAAAAAAAAAAAAAAAAAAAAAA"}}))
	check := w.call(t, "other", "/v1/check-session", map[string]any{"provider": "idp", "handle": handle, "user": "victor"})
	if check.said.Active || check.Status != http.StatusOK {
		t.Errorf("check-session at another hub: %+v", check)
	}
	theTable.add(line{"hub", "a handle checked at another hub", "check-session", "200: not active: " + check.said.Reason, "session"})
	w.refused(t, at("a hub that names another hub", `{"hub": "main", …} on other's socket`, broker.Invalid, `no field "hub"`),
		w.call(t, "other", "/v1/register", map[string]any{"hub": "main", "user": "victor", "container_name": "x"}))
}

// logins are incomplete, or another's.
func (w *world) logins(t *testing.T) {
	for _, a := range []struct {
		name, field string
		values      []string
		code        broker.Code
		reason      string
	}{
		{"a login without redirect_uri", "redirect_uri", nil, broker.Invalid, "redirect_uri is missing"},
		{"a login with a foreign redirect_uri", "redirect_uri", []string{"https://evil.example/cb"}, broker.Invalid, "not the one in the token broker's configuration"},
		{"a login without code_verifier", "code_verifier", nil, broker.Invalid, "without PKCE"},
		{"a login with a foreign code_verifier", "code_verifier", []string{"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"}, broker.LoginRequired, "did not accept the login"},
		{"two redirect_uri", "redirect_uri", []string{callback, "https://evil.example/cb"}, broker.Invalid, "more than once"},
	} {
		form := w.codeOf(t, "walter")
		if form.Del(a.field); a.values != nil {
			form[a.field] = a.values
		}
		w.told(t, attempt{"hub", a.name, a.field, a.code, a.reason}, w.trade(t, "main", "idp", form))
	}
	form := w.codeOf(t, "walter")
	if a := w.trade(t, "main", "idp", form); a.Status != http.StatusOK {
		t.Fatalf("login: %+v", a)
	}
	w.told(t, attempt{"hub", "a code used twice", "the same login again, at another hub", broker.LoginRequired, "did not accept the login"}, w.trade(t, "other", "idp", form))

	// The hub has refused walter: nobody claims his login.
	walter := w.register(t, "main", "walter", "walter", "walter")
	walter.starts(t)
	w.refused(t, attempt{"hub", "a login that the hub refused", "nobody claims it; a container of that user asks", broker.LoginRequired, "has not logged in"}, walter.asks(t))
}

// names are of users who share them.
func (w *world) names(t *testing.T) {
	w.user(t, "main", "wendy", "wendy")
	at := attempt{"hub", "a user name given to another person", "sybil logs in under wendy's name", broker.Denied, "linked to another idp account"}
	w.refused(t, at, w.claim(t, "main", "idp", w.login(t, "main", "idp", "sybil"), "wendy"))

	here := w.up(t, "main", "same", "yves")
	there := w.up(t, "other", "same", "zoe")
	a, b := here.served(t), there.served(t)
	theTable.add(line{"hub", "two hubs with the same user name", "both users' containers ask", "200: each one his own token", w.issued(t, a) + "; " + w.issued(t, b)})
	w.refused(t, attempt{"hub", "the same name at another hub, on its socket", "the container of other's user asks on main's", broker.UnknownPeer, otherCgroup},
		w.once(t, here.mount(), "ask", socket))

	// JupyterHub writes both as jupyter-a-2db.
	one := w.register(t, "main", "a-b", "", "a-2db")
	two := w.register(t, "main", "a-2db", "", "a-2db")
	split := w.register(t, "main", "a", "", "a")
	if one.dir == two.dir || one.dir == split.dir {
		t.Error("two users have the same directory")
	}
	one.starts(t)
	w.find(t, "one user's server to be bound", func(e broker.Entry) bool { return e.Action == "bind" && e.User == "a-b" && e.Outcome == "done" })
	w.refused(t, attempt{"hub", "user names that are the same when escaped", "both are registered for one container name; the second one's socket is asked",
		broker.Denied, "not mount its server's directory but another one|already bound"}, w.onHost(t, "ask", two.socket()))
}

// registrations are late, or nobody's.
func (w *world) registrations(t *testing.T) {
	s := w.up(t, "main", "xavier", "xavier")
	late := s.generation
	s.again(t)
	a := w.call(t, "main", "/v1/unregister", map[string]any{"user": s.user, "generation": late})
	if a.Status != http.StatusOK {
		t.Errorf("a late unregister: %+v", a)
	}
	s.served(t)
	theTable.add(line{"hub", "a late word of an older registration", "unregister with the old generation", "200, and nothing happens: the server is served", "- (nothing was done)"})

	s.unregister(t)
	w.kernel(t, attempt{kind: "hub", name: "the container after unregister", tried: "it still runs, and asks", reason: "no such file|refused"}, execIn(t, s.name, "ask", socket))
	w.refused(t, attempt{"hub", "a registration replayed by the container", "POST /v1/register on another server's socket", broker.Invalid, "nothing at this path"},
		w.onHost(t, "ask", w.register(t, "main", "xavier2", "", "xavier2").socket(), "POST /v1/register"))
	before := s.generation
	s.again(t)
	if s.generation <= before {
		t.Errorf("the generation went from %d to %d", before, s.generation)
	}
	s.served(t)
	theTable.add(line{"hub", "a registration replayed by the hub", "the same register again", "200: a new generation, bound anew", "register, bind done"})
}
