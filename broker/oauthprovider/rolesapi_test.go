package oauthprovider_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"

	"tokenbroker/broker"
	"tokenbroker/broker/oauthprovider"
)

// appIDRoles is an answer of IBM App ID's management API to GET
// /management/v4/TENANT/users/SUB/roles. It is written after App ID's documents and
// a client that reads it (IBM/python-appid-auth, auth.py); no live App ID was asked.
const appIDRoles = `{"roles":[{"id":"c4c1b3ae-0e9c-4d43-a28d-000000000001","name":"researcher"},{"id":"c4c1b3ae-0e9c-4d43-a28d-000000000002","name":"student"}]}`

// An appID is a management API and an IAM as App ID has them, by documents.
type appID struct {
	*httptest.Server
	status, asked, traded atomic.Int32
	body                  atomic.Value // of the answer about anybody
	seen                  atomic.Value // the path that was asked for last, as it was sent
	bearer                atomic.Value // the one that is good
	expires               string
}

func newAppID(t *testing.T) *appID {
	t.Helper()
	a := &appID{expires: "3600"}
	a.status.Store(200)
	a.body.Store(appIDRoles)
	a.bearer.Store("iam-1")
	mux := http.NewServeMux()
	mux.HandleFunc("POST /identity/token", func(w http.ResponseWriter, r *http.Request) {
		a.traded.Add(1)
		_, _, basic := r.BasicAuth()
		if basic || r.PostFormValue("client_secret") != "" {
			t.Error("IAM was told the client's secret")
		}
		if r.PostFormValue("grant_type") != "urn:ibm:params:oauth:grant-type:apikey" || r.PostFormValue("apikey") != "key-1" {
			w.WriteHeader(400)
			io.WriteString(w, `{"errorCode":"BXNIM0415E","errorMessage":"Provided API key could not be found."}`)
			return
		}
		io.WriteString(w, `{"access_token":"`+a.bearer.Load().(string)+`","refresh_token":"not_supported","token_type":"Bearer","expires_in":`+a.expires+`,"scope":"ibm openid"}`)
	})
	mux.HandleFunc("POST /token", func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, `{"access_token":"at","token_type":"Bearer","expires_in":3600,"refresh_token":"rt-2"}`)
	})
	mux.HandleFunc("GET /userinfo", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		io.WriteString(w, `{"sub":"u1","roles":["admin"]}`)
	})
	mux.HandleFunc("GET /management/", func(w http.ResponseWriter, r *http.Request) {
		a.asked.Add(1)
		a.seen.Store(r.RequestURI)
		if r.Header.Get("Authorization") != "Bearer "+a.bearer.Load().(string) {
			w.WriteHeader(401)
			return
		}
		w.WriteHeader(int(a.status.Load()))
		io.WriteString(w, a.body.Load().(string))
	})
	a.Server = httptest.NewServer(mux)
	t.Cleanup(a.Close)
	return a
}

// answers has the API answer so.
func (a *appID) answers(status int, body string) {
	a.status.Store(int32(status))
	a.body.Store(body)
}

// client is one of a, changed by edit.
func (a *appID) client(t *testing.T, edit ...func(*oauthprovider.Config)) *oauthprovider.Provider {
	t.Helper()
	cfg := oauthprovider.Config{
		Name: "appid", ClientID: "hub", ClientSecret: broker.NewSecret("s"),
		Endpoints: oauthprovider.Endpoints{Token: a.URL + "/token", Userinfo: a.URL + "/userinfo"},
		RolesAPI: &oauthprovider.RolesAPI{
			URL: a.URL + "/management/v4/tenant/users/{sub}/roles", Path: "roles[].name", Claim: "roles",
			Secret: func() (broker.Secret, error) { return broker.NewSecret("iam-1"), nil },
		},
	}
	for _, e := range edit {
		e(&cfg)
	}
	p, err := oauthprovider.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// byKey has the bearer token come from IAM.
func (a *appID) byKey(key string) func(*oauthprovider.Config) {
	return func(c *oauthprovider.Config) {
		c.RolesAPI.TokenURL = a.URL + "/identity/token"
		c.RolesAPI.Secret = func() (broker.Secret, error) { return broker.NewSecret(key), nil }
	}
}

func look(p *oauthprovider.Provider, sub string) (broker.Identity, error) {
	return p.Look(context.Background(), broker.NewSecret("rt-1"), sub)
}

func TestTheRolesAPIShowsTheRolesOfNow(t *testing.T) {
	both := []string{"roles/researcher", "roles/student"}
	for _, tt := range []struct {
		name, path, body string
		roles            []string
	}{
		{"as App ID answers", "roles[].name", appIDRoles, both},
		{"no role is left", "roles[].name", `{"roles":[]}`, nil},
		{"a plain list", "data.names[]", `{"data":{"names":["student","researcher"]}}`, both},
		{"a list alone", "[].name", `[{"name":"student"},{"name":"researcher"},{"name":"student"}]`, both},
		{"lists in a list", "teams[].roles[]", `{"teams":[{"roles":["student"]},{"roles":[]},{"roles":["researcher"]}]}`, both},
		{"one role", "role", `{"role":"student"}`, []string{"roles/student"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := newAppID(t)
			a.answers(200, tt.body)
			got, err := look(a.client(t, func(c *oauthprovider.Config) { c.RolesAPI.Path = tt.path }), "u1")
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(broker.Identity{Sub: "u1", Roles: tt.roles, Known: true}, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if seen := a.seen.Load(); seen != "/management/v4/tenant/users/u1/roles" || a.asked.Load() != 1 {
				t.Errorf("asked %d times for %s", a.asked.Load(), seen)
			}
		})
	}
}

func TestARolesAPIThatShowsNothing(t *testing.T) {
	for _, tt := range []struct {
		name   string
		status int
		body   string
		class  broker.ProviderClass
		reason string
	}{
		{"the token is refused", 401, `{"Error":{"Code":401,"Status":"Unauthorized"}}`, broker.Misconfigured, "roles_api_refused"},
		{"the token may not", 403, "", broker.Misconfigured, "roles_api_refused"},
		{"an error in place of roles", 200, `{"Error":{"Code":401,"Status":"Unauthorized"}}`, broker.TryLater, "roles_api_unreadable_answer"},
		{"another form", 200, `{"roles":["researcher"]}`, broker.TryLater, "roles_api_unreadable_answer"},
		{"one of another form", 200, `{"roles":[{"name":"researcher"},{"id":"2"}]}`, broker.TryLater, "roles_api_unreadable_answer"},
		{"null", 200, `{"roles":null}`, broker.TryLater, "roles_api_unreadable_answer"},
		{"one in place of a list", 200, `{"roles":{"name":"researcher"}}`, broker.TryLater, "roles_api_unreadable_answer"},
		{"an empty name", 200, `{"roles":[{"name":""}]}`, broker.TryLater, "roles_api_unreadable_answer"},
		{"no JSON", 200, "<html>maintenance</html>", broker.TryLater, "roles_api_unreadable_answer"},
		{"cut off", 200, `{"roles":[`, broker.TryLater, "roles_api_unreadable_answer"},
		{"nothing", 204, "", broker.TryLater, "roles_api_unreadable_answer"},
		{"broken", 500, "", broker.TryLater, "roles_api_unreadable_answer"},
		{"busy", 429, "", broker.TryLater, "roles_api_busy"},
		{"moved", 302, "", broker.Misconfigured, "roles_api_redirect"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := newAppID(t)
			a.answers(tt.status, tt.body)
			p := a.client(t)
			got, err := look(p, "u1")
			wantClass(t, err, tt.class, tt.reason)
			if got.Known || got.Roles != nil {
				t.Errorf("it says something all the same: %+v", got)
			}
			if strings.Contains(err.Error(), "iam-1") || strings.Contains(err.Error(), "u1") {
				t.Errorf("the error repeats what was sent: %v", err)
			}
			// The answer of a refresh is kept, and its roles are not known.
			id, iss, err := p.Refresh(context.Background(), broker.NewSecret("rt-1"), "u1", nil)
			if err != nil || id.Known || iss.RefreshToken.Reveal() != "rt-2" {
				t.Errorf("a refresh: known %t, error %v", id.Known, err)
			}
		})
	}
	a := newAppID(t)
	p := a.client(t)
	a.Close()
	_, err := look(p, "u1")
	wantClass(t, err, broker.TryLater, "roles_api_unreachable")
}

func TestWithARolesAPIAllRolesComeFromIt(t *testing.T) {
	a := newAppID(t)
	p := a.client(t)
	if diff := cmp.Diff([]string{"roles"}, p.Info().RoleClaims); diff != "" {
		t.Errorf("role claims (-want +got):\n%s", diff)
	}
	want := broker.Identity{Sub: "u1", Roles: []string{"roles/researcher", "roles/student"}, Known: true} // and not userinfo's admin
	login, _, err := p.Login(context.Background(), broker.CodeGrant{Code: broker.NewSecret("c"), Verifier: broker.NewSecret("v")})
	if diff := cmp.Diff(want, login); diff != "" || err != nil {
		t.Errorf("login: %v (-want +got):\n%s", err, diff)
	}
	refresh, _, err := p.Refresh(context.Background(), broker.NewSecret("rt-1"), "u1", nil)
	if diff := cmp.Diff(want, refresh); diff != "" || err != nil {
		t.Errorf("refresh: %v (-want +got):\n%s", err, diff)
	}
}

func TestWhoIsNotThereHasNoRolesUnlessNobodyIs(t *testing.T) {
	a := newAppID(t)
	log := &strings.Builder{}
	p := a.client(t, func(c *oauthprovider.Config) { c.Log = slog.New(slog.NewTextHandler(log, nil)) })
	none := func(sub string) {
		t.Helper()
		got, err := look(p, sub)
		if diff := cmp.Diff(broker.Identity{Sub: sub, Known: true}, got); diff != "" || err != nil {
			t.Errorf("%s: %v (-want +got):\n%s", sub, err, diff)
		}
	}
	a.answers(404, `{"errorCode":"USER_NOT_FOUND"}`)
	none("u1")
	none("u2")
	none("u1")
	_, err := look(p, "u3")
	wantClass(t, err, broker.Misconfigured, "roles_api_not_found")
	_, err = look(p, "u1") // the one before is doubted, too
	wantClass(t, err, broker.Misconfigured, "roles_api_not_found")
	if id, _, err := p.Refresh(context.Background(), broker.NewSecret("rt-1"), "u1", nil); err != nil || id.Known {
		t.Errorf("a refresh: known %t, error %v", id.Known, err)
	}
	if !strings.Contains(log.String(), "roles_api_not_found") {
		t.Error("the log doesn't say what is wrong")
	}
	a.answers(200, appIDRoles)
	if _, err := look(p, "u4"); err != nil {
		t.Fatal(err)
	}
	a.answers(404, "")
	none("u3")
}

func TestASubjectStaysInItsPlaceInTheURL(t *testing.T) {
	a := newAppID(t)
	p := a.client(t)
	for sub, want := range map[string]string{
		"a/../b":      "a%2F..%2Fb",
		"x?y#z":       "x%3Fy%23z",
		"auth0|1 2":   "auth0%7C1%202",
		"%2e%2e":      "%252e%252e",
		"a@b.example": "a@b.example",
		"{sub}":       "%7Bsub%7D",
	} {
		if _, err := look(p, sub); err != nil {
			t.Errorf("%q: %v", sub, err)
		}
		if seen := a.seen.Load(); seen != "/management/v4/tenant/users/"+want+"/roles" {
			t.Errorf("%q: asked for %s", sub, seen)
		}
	}
	n := a.asked.Load()
	for _, sub := range []string{"", ".", ".."} {
		_, err := look(p, sub)
		wantClass(t, err, broker.Misconfigured, "roles_api_bad_subject")
	}
	if a.asked.Load() != n {
		t.Error("a subject that is a step in a path was asked for")
	}
}

func TestAnAPIKeyIsTradedOnceForManyRequests(t *testing.T) {
	a := newAppID(t)
	p := a.client(t, a.byKey("key-1"))
	for range 5 {
		if _, err := look(p, "u1"); err != nil {
			t.Fatal(err)
		}
	}
	if n := a.traded.Load(); n != 1 {
		t.Errorf("traded %d times", n)
	}
	a.bearer.Store("iam-2") // the first one has been withdrawn
	_, err := look(p, "u1")
	wantClass(t, err, broker.Misconfigured, "roles_api_refused")
	if _, err := look(p, "u1"); err != nil || a.traded.Load() != 2 {
		t.Errorf("after a refusal: %v, traded %d times", err, a.traded.Load())
	}
}

func TestABearerTokenThatIsOverIsTradedAgain(t *testing.T) {
	a := newAppID(t)
	a.expires = "0"
	p := a.client(t, a.byKey("key-1"))
	for range 2 {
		if _, err := look(p, "u1"); err != nil {
			t.Fatal(err)
		}
	}
	if n := a.traded.Load(); n != 2 {
		t.Errorf("traded %d times", n)
	}
}

func TestAnAPIKeyThatIsRefusedNamesTheRolesAPI(t *testing.T) {
	a := newAppID(t)
	_, err := look(a.client(t, a.byKey("key-2")), "u1")
	wantClass(t, err, broker.Misconfigured, "roles_api_key_refused")
	if strings.Contains(err.Error(), "key-2") || strings.Contains(err.Error(), "API key") {
		t.Errorf("the error repeats what was sent or said: %v", err)
	}
}

func TestABearerTokenIsReadAnewForEachRequest(t *testing.T) {
	a := newAppID(t)
	token, fault := "old", error(nil)
	p := a.client(t, func(c *oauthprovider.Config) {
		c.RolesAPI.Secret = func() (broker.Secret, error) { return broker.NewSecret(token), fault }
	})
	_, err := look(p, "u1")
	wantClass(t, err, broker.Misconfigured, "roles_api_refused")
	token = "iam-1"
	if _, err := look(p, "u1"); err != nil {
		t.Error(err)
	}
	for _, token = range []string{"", "two\nlines"} {
		_, err = look(p, "u1")
		wantClass(t, err, broker.Misconfigured, "roles_api_secret")
	}
	fault = errors.New("the file is gone")
	_, err = look(p, "u1")
	if e := wantClass(t, err, broker.Misconfigured, "roles_api_secret"); !errors.Is(e, fault) {
		t.Errorf("the error does not say why: %v", err)
	}
}

func TestARolesAPIInTroubleDoesNotStopRefreshes(t *testing.T) {
	a := newAppID(t)
	a.answers(500, "")
	p := a.client(t)
	for range 4 {
		for _, sub := range []string{"u1", "u2", "u3"} {
			if _, err := look(p, sub); err == nil {
				t.Fatal("it told something")
			}
		}
	}
	if n := a.asked.Load(); n != 5 {
		t.Errorf("asked %d times, want 5 and then no more for a while", n)
	}
	_, err := look(p, "u1")
	wantClass(t, err, broker.TryLater, "roles_api_circuit_open")
	if _, _, err := p.Refresh(context.Background(), broker.NewSecret("rt-1"), "u1", nil); err != nil {
		t.Errorf("a refresh: %v", err)
	}
}

func TestARolesAPIThatCanNotBe(t *testing.T) {
	for _, tt := range []struct {
		name string
		edit func(*oauthprovider.RolesAPI)
		want string
	}{
		{"no URL", func(a *oauthprovider.RolesAPI) { a.URL = "" }, "roles_api.url: it is missing"},
		{"in the clear", func(a *oauthprovider.RolesAPI) { a.URL = "http://appid.example/{sub}" }, "roles_api.url: it is not a URL with https://"},
		{"of nobody", func(a *oauthprovider.RolesAPI) { a.URL = "https://appid.example/" }, "roles_api.url: it wants {sub} in its path, once"},
		{"of a host", func(a *oauthprovider.RolesAPI) { a.URL = "https://{sub}.example/" }, "roles_api.url: "},
		{"in the query", func(a *oauthprovider.RolesAPI) { a.URL = "https://appid.example/?u={sub}" }, "roles_api.url: it wants {sub} in its path, once"},
		{"a path of another language", func(a *oauthprovider.RolesAPI) { a.Path = "$.roles[*].name" }, "roles_api.path: it is not of the form roles[].name"},
		{"no path", func(a *oauthprovider.RolesAPI) { a.Path = "" }, "roles_api.path: "},
		{"no claim", func(a *oauthprovider.RolesAPI) { a.Claim = "" }, "roles_api.claim: it is missing"},
		{"no token", func(a *oauthprovider.RolesAPI) { a.Secret = nil }, "roles_api.token_file: it is needed"},
		{"a key in the clear", func(a *oauthprovider.RolesAPI) { a.TokenURL = "http://iam.example/" }, "roles_api.token_url: it is not a URL with https://"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			api := oauthprovider.RolesAPI{
				URL: "https://appid.example/{sub}", Path: "roles[].name", Claim: "roles",
				Secret: func() (broker.Secret, error) { return broker.NewSecret("x"), nil },
			}
			cfg := oauthprovider.Config{Name: "a", ClientID: "hub", Issuer: "https://appid.example", AuthStyle: "none", RolesAPI: &api}
			if _, err := oauthprovider.New(cfg); err != nil {
				t.Fatal(err)
			}
			cfg.Roles = []string{"roles", "groups"}
			if _, err := oauthprovider.New(cfg); err == nil || !strings.Contains(err.Error(), "roles: with roles_api they are its claim alone") {
				t.Errorf("roles beside it: %v", err)
			}
			cfg.Roles = nil
			tt.edit(&api)
			if _, err := oauthprovider.New(cfg); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}
