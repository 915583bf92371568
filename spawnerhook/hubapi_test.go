package spawnerhook_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"testing"

	"tokenbroker/broker"
	"tokenbroker/spawnerhook"
)

// hubOf serves n users, the first of which has two servers, as a hub does.
func hubOf(t *testing.T, n int, deleted *[]string) *spawnerhook.HubAPI {
	t.Helper()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /hub/api/users", func(w http.ResponseWriter, r *http.Request) {
		offset, _ := strconv.Atoi(r.FormValue("offset"))
		limit, _ := strconv.Atoi(r.FormValue("limit"))
		page := []map[string]any{}
		for i := offset; i < min(n, offset+limit, offset+200); i++ {
			servers := map[string]any{}
			if i == 0 {
				servers[""], servers["gpu"] = map[string]any{"pending": nil}, map[string]any{"pending": "spawn"}
			}
			page = append(page, map[string]any{"name": fmt.Sprintf("user%d", i), "servers": servers})
		}
		json.NewEncoder(w).Encode(page)
	})
	mux.HandleFunc("DELETE /hub/api/", func(w http.ResponseWriter, r *http.Request) {
		*deleted = append(*deleted, r.URL.EscapedPath())
		w.WriteHeader(map[bool]int{true: http.StatusNotFound, false: http.StatusAccepted}[strings.Contains(r.URL.Path, "gone")])
	})
	hub := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "token the-token" {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		mux.ServeHTTP(w, r)
	}))
	t.Cleanup(hub.Close)
	return spawnerhook.NewHubAPI(hub.URL+"/hub/api/", broker.NewSecret("the-token"), nil)
}

func TestHubAPIListsAllUsersPageByPage(t *testing.T) {
	for _, n := range []int{0, 1, 199, 200, 401} {
		users, err := hubOf(t, n, nil).Users(context.Background())
		if err != nil || len(users) != n {
			t.Fatalf("%d users, %v, want %d", len(users), err, n)
		}
		if n > 0 {
			servers := users["user0"]
			slices.Sort(servers)
			if !slices.Equal(servers, []broker.ServerName{"", "gpu"}) {
				t.Errorf("user0 has the servers %q", servers)
			}
		}
	}
}

func TestHubAPIStopsAServer(t *testing.T) {
	var deleted []string
	hub := hubOf(t, 1, &deleted)
	for _, s := range []struct {
		user   broker.UserID
		server broker.ServerName
	}{{"alice", ""}, {"a b/c", "g p"}, {"alice", "gone"}} {
		if err := hub.Stop(context.Background(), s.user, s.server); err != nil {
			t.Errorf("stop %q %q: %v", s.user, s.server, err)
		}
	}
	want := []string{"/hub/api/users/alice/server", "/hub/api/users/a%20b%2Fc/servers/g%20p", "/hub/api/users/alice/servers/gone"}
	if !slices.Equal(deleted, want) {
		t.Errorf("asked for %q, want %q", deleted, want)
	}
}

func TestHubAPISaysWhatItsTokenLacks(t *testing.T) {
	hub := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) }))
	defer hub.Close()
	api := spawnerhook.NewHubAPI(hub.URL+"/hub/api", broker.NewSecret("the-token"), nil)
	if _, err := api.Users(context.Background()); err == nil || !strings.Contains(err.Error(), "list:users and read:servers") {
		t.Errorf("Users: %v", err)
	}
	if err := api.Stop(context.Background(), "alice", ""); err == nil || !strings.Contains(err.Error(), "delete:servers") || strings.Contains(err.Error(), "the-token") {
		t.Errorf("Stop: %v", err)
	}
}

func TestHubAPIRefusesAnswersThatAreNone(t *testing.T) {
	for _, body := range []string{"", "<html>", `{"users": []}`, `[{"name": 7}]`, "["} {
		hub := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte(body)) }))
		if users, err := spawnerhook.NewHubAPI(hub.URL, broker.NewSecret("t"), nil).Users(context.Background()); err == nil {
			t.Errorf("%q is taken for %v", body, users)
		}
		hub.Close()
	}
}
