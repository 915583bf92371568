package spawnerhook

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"tokenbroker/broker"
)

// A HubAPI asks a JupyterHub's REST API, as a service with the scopes list:users,
// read:servers and delete:servers and no others.
type HubAPI struct {
	base   string
	token  broker.Secret
	client *http.Client
}

const (
	// hubPage is how many users one request lists; the hub allows 200.
	hubPage = 200
	// hubWithin bounds one request.
	hubWithin = 20 * time.Second
	// maxHubAnswer bounds an answer: a page of users with many servers each.
	maxHubAnswer = 16 << 20
)

// NewHubAPI asks the API at base, which ends with /hub/api, with an API token of a
// service.
func NewHubAPI(base string, token broker.Secret, tlsConfig *tls.Config) *HubAPI {
	return &HubAPI{
		base: strings.TrimRight(base, "/"), token: token,
		// No proxy of the environment's: the hub is a neighbour.
		client: &http.Client{
			Timeout:       hubWithin,
			Transport:     &http.Transport{TLSClientConfig: tlsConfig, MaxIdleConns: 2, IdleConnTimeout: time.Minute},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}
}

// hubUser is a user as GET /users shows him.
type hubUser struct {
	Name    broker.UserID                         `json:"name"`
	Servers map[broker.ServerName]json.RawMessage `json:"servers"` // that run, start or stop
}

// Users returns all users of the hub with the servers of each that run, start or
// stop.
func (h *HubAPI) Users(ctx context.Context) (map[broker.UserID][]broker.ServerName, error) {
	all := make(map[broker.UserID][]broker.ServerName)
	for offset := 0; ; offset += hubPage {
		var page []hubUser
		if err := h.get(ctx, fmt.Sprintf("/users?offset=%d&limit=%d", offset, hubPage), &page); err != nil {
			return nil, err
		}
		for _, u := range page {
			all[u.Name] = nil
			for name := range u.Servers {
				all[u.Name] = append(all[u.Name], name)
			}
		}
		if len(page) < hubPage {
			return all, nil
		}
	}
}

// Stop stops a server. One that is gone, or stops already, is no error. The hub
// answers 400 alike for one that is not running and for one that is just starting:
// that is an error, and whoever still finds the server registered asks again.
func (h *HubAPI) Stop(ctx context.Context, user broker.UserID, server broker.ServerName) error {
	path := "/users/" + url.PathEscape(string(user)) + "/server"
	if server != "" {
		path += "s/" + url.PathEscape(string(server))
	}
	resp, err := h.do(ctx, http.MethodDelete, path)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode/100 == 2 || resp.StatusCode == http.StatusNotFound {
		return nil
	}
	return h.refused("delete:servers", resp.StatusCode)
}

func (h *HubAPI) get(ctx context.Context, path string, into any) error {
	resp, err := h.do(ctx, http.MethodGet, path)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return h.refused("list:users and read:servers", resp.StatusCode)
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxHubAnswer)).Decode(into); err != nil {
		return fmt.Errorf("ask the hub: the answer is not what its API gives: %w", err)
	}
	return nil
}

func (h *HubAPI) do(ctx context.Context, method, path string) (*http.Response, error) {
	r, err := http.NewRequestWithContext(ctx, method, h.base+path, nil)
	if err != nil {
		return nil, fmt.Errorf("ask the hub: %w", err)
	}
	r.Header.Set("Authorization", "token "+h.token.Reveal())
	r.Header.Set("Accept", "application/json")
	resp, err := h.client.Do(r)
	if err != nil {
		return nil, fmt.Errorf("ask the hub: %w", err)
	}
	return resp, nil
}

func (h *HubAPI) refused(scopes string, status int) error {
	if status == http.StatusForbidden || status == http.StatusUnauthorized {
		return fmt.Errorf("ask the hub: it answers %d: the service's token needs the scopes %s", status, scopes)
	}
	return fmt.Errorf("ask the hub: it answers %d", status)
}
