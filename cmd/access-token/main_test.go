package main

import (
	"encoding/base64"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// jwt is a token whose claims can be read.
var jwt = "eyJhbGciOiJub25lIn0." + base64.RawURLEncoding.EncodeToString([]byte(`{"sub":"ada","aud":"storage","exp":1795000000}`)) + ".signature"

// A fakeBroker answers on a real Unix socket, as httpserver does.
type fakeBroker struct {
	mu      sync.Mutex // guards the rest
	answers []answer   // one per request; the last stays
	asked   []string
}

type answer struct {
	status int
	kind   string
	body   string
}

func (b *fakeBroker) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.asked = append(b.asked, r.Method+" "+r.Host+r.URL.RequestURI())
	a := b.answers[0]
	if len(b.answers) > 1 {
		b.answers = b.answers[1:]
	}
	w.Header().Set("Content-Type", a.kind)
	w.WriteHeader(a.status)
	fmt.Fprint(w, a.body)
}

// serve lets a broker answer and points TOKENBROKER_SOCKET at it.
func serve(t *testing.T, answers ...answer) *fakeBroker {
	t.Helper()
	dir, err := os.MkdirTemp("", "helper")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "broker.sock")
	t.Setenv("TOKENBROKER_SOCKET", path)
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	b := &fakeBroker{answers: answers}
	s := &http.Server{Handler: b}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	return b
}

// call runs the program.
func call(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs strings.Builder
	code = run(t.Context(), args, &out, &errs)
	return code, out.String(), errs.String()
}

func aToken(access string) answer {
	return answer{200, "application/json", fmt.Sprintf(
		`{"access_token":%q,"token_type":"Bearer","expires_in":299,"provider":"keycloak","audience":"storage","scopes":["read","write"],"ref":"r7"}`, access)}
}

func problem(code string, retry int) answer {
	return answer{403, "application/problem+json", fmt.Sprintf(
		`{"title":"x","status":403,"detail":"so it is","code":%q,"next":"do this","ref":"r9","retry_after":%d}`, code, retry)}
}

func TestOnlyTheTokenIsPrinted(t *testing.T) {
	b := serve(t, aToken("opaque"))
	code, out, errs := call(t, "keycloak", "--audience", "storage", "--scope", "read write", "--min-ttl=1.5s")
	if code != 0 || out != "opaque\n" || errs != "" {
		t.Errorf("got %d, %q, %q", code, out, errs)
	}
	want := []string{"GET localhost/v1/token/keycloak?audience=storage&min_ttl=2&scope=read+write"}
	if diff := cmp.Diff(want, b.asked); diff != "" {
		t.Errorf("asked (-want +got):\n%s", diff)
	}
}

func TestWithoutWordsTheLoginProviderIsMeant(t *testing.T) {
	b := serve(t, aToken("opaque"))
	call(t)
	call(t, "--", "a/b c")
	want := []string{"GET localhost/v1/token?", "GET localhost/v1/token/a%2Fb%20c?"}
	if diff := cmp.Diff(want, b.asked); diff != "" {
		t.Errorf("asked (-want +got):\n%s", diff)
	}
}

func TestShowDecodesTheClaimsAndHidesTheToken(t *testing.T) {
	for _, tt := range []struct{ why, token, want string }{
		{"a JSON Web Token", jwt, `"sub": "ada"`},
		{"its owner", jwt, "left (ada)"},
		{"a time in it", jwt, `"exp": 1795000000`},
		{"an opaque one", "gho_16C7e42F", "the token is opaque"},
		{"one that only looks like it", "a.b.c", "the token is opaque"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			serve(t, aToken(tt.token))
			code, out, errs := call(t, "show", "keycloak")
			if code != 0 || errs != "" {
				t.Fatalf("got %d, %q", code, errs)
			}
			for _, want := range []string{tt.want, "keycloak: audience storage, scopes read write, 299 s left"} {
				if !strings.Contains(out, want) {
					t.Errorf("show lacks %q:\n%s", want, out)
				}
			}
			if strings.Contains(out, tt.token) {
				t.Errorf("show prints the token:\n%s", out)
			}
		})
	}
}

func TestListShowsTheProviders(t *testing.T) {
	serve(t, answer{200, "application/json", `{"providers":[
		{"name":"github","login":false,"state":"none","audiences":[],"scopes":["repo"]},
		{"name":"keycloak","login":true,"state":"live","audiences":["storage","batch"],"scopes":[]}],"ref":"1"}`})
	code, out, _ := call(t, "list")
	want := "PROVIDER          STATE  AUDIENCES      SCOPES\n" +
		"github            none   -              repo\n" +
		"keycloak (login)  live   storage batch  -\n"
	if diff := cmp.Diff(want, out); code != 0 || diff != "" {
		t.Errorf("list: exit code %d (-want +got):\n%s", code, diff)
	}
}

func TestARefusalIsASentenceAHintAndAnExitCode(t *testing.T) {
	for code, want := range map[string]int{
		"internal": 1, "invalid": 2, "unsatisfiable": 2, "denied": 3, "revoked": 3, "unknown_peer": 3,
		"login_required": 4, "pending": 5, "provider_down": 5, "unavailable": 5, "limited": 5, "new_in_2030": 1,
	} {
		t.Run(code, func(t *testing.T) {
			serve(t, problem(code, 0))
			got, out, errs := call(t, "keycloak")
			if got != want || out != "" {
				t.Errorf("got exit code %d and output %q, want %d and none", got, out, want)
			}
			const text = "access-token: so it is\naccess-token: hint: do this (ref r9)\n"
			if errs != text {
				t.Errorf("got %q, want %q", errs, text)
			}
		})
	}
}

func TestAnswersThatAreNotABrokers(t *testing.T) {
	for _, tt := range []struct {
		why string
		a   answer
	}{
		{"a web page", answer{200, "text/html", "<html>"}},
		{"an error page", answer{502, "text/html", "<html>"}},
		{"an empty object", answer{200, "application/json", "{}"}},
		{"a problem without a word", answer{500, "application/problem+json", "{}"}},
		{"a redirect", answer{302, "application/json", "{}"}},
		{"the wrong types", answer{200, "application/json", `{"access_token":7}`}},
	} {
		t.Run(tt.why, func(t *testing.T) {
			serve(t, tt.a)
			code, out, errs := call(t)
			if code != 1 || out != "" || !strings.Contains(errs, "does not speak like a token broker") {
				t.Errorf("got %d, %q, %q", code, out, errs)
			}
		})
	}
}

func TestAnAbsentBrokerCanBeTriedLater(t *testing.T) {
	t.Setenv("TOKENBROKER_SOCKET", filepath.Join(t.TempDir(), "none"))
	code, _, errs := call(t)
	if code != 5 || !strings.Contains(errs, "may be restarting") {
		t.Errorf("got %d, %q", code, errs)
	}
	t.Setenv("TOKENBROKER_SOCKET", "/"+strings.Repeat("x", 200))
	code, _, errs = call(t)
	if code != 2 || !strings.Contains(errs, "can't be the path of a socket") {
		t.Errorf("a path that is too long: got %d, %q", code, errs)
	}
}

func TestWaitOutlastsWhatPasses(t *testing.T) {
	b := serve(t, problem("pending", 1), aToken("opaque"))
	code, out, errs := call(t, "--wait")
	if code != 0 || out != "opaque\n" || errs != "access-token: waiting: so it is\n" {
		t.Errorf("got %d, %q, %q", code, out, errs)
	}
	if len(b.asked) != 2 {
		t.Errorf("asked %d times, want 2", len(b.asked))
	}
}

func TestWaitEndsWithTheReason(t *testing.T) {
	serve(t, problem("pending", 30))
	code, _, errs := call(t, "--wait=1s")
	if code != 5 || !strings.Contains(errs, "hint: do this") {
		t.Errorf("got %d, %q", code, errs)
	}
	b := serve(t, problem("denied", 0))
	if code, _, _ = call(t, "--wait"); code != 3 || len(b.asked) != 1 {
		t.Errorf("a denial: got %d after %d requests, want 3 after 1", code, len(b.asked))
	}
}

func TestMisuseIsExplained(t *testing.T) {
	t.Setenv("TOKENBROKER_SOCKET", filepath.Join(t.TempDir(), "none"))
	for _, tt := range []struct{ args, want string }{
		{"--nonsense", "not defined: -nonsense"},
		{"a b", `"b" is one too many`},
		{"list a", "list takes no provider"},
		{"..", "no provider's name"},
		{"--min-ttl soon", "not a time like 60, 90s or 10m"},
		{"--min-ttl -5s", "not a time like"},
		{"--wait=-1s", "not a time like"},
		{"--audience", "needs an argument"},
	} {
		t.Run(tt.args, func(t *testing.T) {
			code, out, errs := call(t, strings.Fields(tt.args)...)
			if code != 2 || out != "" || !strings.Contains(errs, tt.want) || !strings.Contains(errs, "hint: access-token -h") {
				t.Errorf("got %d, %q, %q; want %q", code, out, errs, tt.want)
			}
		})
	}
}

func TestHelpIsNoError(t *testing.T) {
	for _, args := range [][]string{{"-h"}, {"--help"}, {"show", "-h"}} {
		code, out, errs := call(t, args...)
		if code != 0 || errs != "" || !strings.HasPrefix(out, "usage: access-token") {
			t.Errorf("%v: got %d, %q, %q", args, code, out, errs)
		}
	}
}
