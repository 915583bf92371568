package httpserver

import (
	"net/http"
	"strings"
	"time"

	"tokenbroker/broker"
)

type refResponse struct {
	Ref string `json:"ref"`
}

type claimRequest struct {
	Provider broker.ProviderID `json:"provider"`
	Handle   string            `json:"handle"`
	User     broker.UserID     `json:"user"`
}

func (e edge) claim(r *http.Request, p *broker.Peer, body []byte) (any, error) {
	var q claimRequest
	if err := decodeJSON(body, &q); err != nil {
		return nil, err
	}
	ref, err := e.b.Claim(r.Context(), p.Hub, q.Provider, broker.NewSecret(q.Handle), q.User)
	return refResponse{ref}, err
}

type checkSessionRequest struct {
	Provider   broker.ProviderID `json:"provider"`
	Handle     string            `json:"handle"`
	User       broker.UserID     `json:"user"`
	HaveSHA256 string            `json:"have_sha256"`
}

type checkSessionResponse struct {
	Active bool      `json:"active"`
	Stale  bool      `json:"stale"`
	Token  *hubToken `json:"token"`
	Reason string    `json:"reason"`
	Ref    string    `json:"ref"`
}

func (e edge) checkSession(r *http.Request, p *broker.Peer, body []byte) (any, error) {
	var q checkSessionRequest
	if err := decodeJSON(body, &q); err != nil {
		return nil, err
	}
	s, err := e.b.CheckSession(r.Context(), p.Hub, q.Provider, broker.NewSecret(q.Handle), q.User, q.HaveSHA256)
	if err != nil {
		return nil, err
	}
	answer := checkSessionResponse{Active: s.Active, Stale: s.Stale, Reason: s.Reason, Ref: s.Ref}
	if s.Token != nil {
		answer.Token = hubTokenOf(*s.Token)
	}
	return answer, nil
}

// A hubToken is a token response of RFC 6749, section 5.1, with a handle in the
// place of the refresh token.
type hubToken struct {
	AccessToken  string `json:"access_token"`
	TokenType    string `json:"token_type"`
	ExpiresIn    int64  `json:"expires_in,omitempty"`
	Scope        string `json:"scope"`
	IDToken      string `json:"id_token,omitempty"`
	RefreshToken string `json:"refresh_token"`
}

func hubTokenOf(t broker.HubToken) *hubToken {
	return &hubToken{
		AccessToken:  t.Access.Reveal(),
		TokenType:    t.Type,
		ExpiresIn:    int64(t.ExpiresIn / time.Second),
		Scope:        strings.Join(t.Scopes, " "),
		IDToken:      t.IDToken.Reveal(),
		RefreshToken: t.Handle.Reveal(),
	}
}

type registerRequest struct {
	User          broker.UserID     `json:"user"`
	Server        broker.ServerName `json:"server"`
	ContainerName string            `json:"container_name"`
	Provider      broker.ProviderID `json:"provider"`
	Handle        string            `json:"handle"`
	Groups        []string          `json:"groups"`
	Shared        bool              `json:"shared"`
	RequireGrant  bool              `json:"require_grant"`
	UID           *uint32           `json:"uid"`
}

type registerResponse struct {
	Directory  string            `json:"directory"`
	Helper     string            `json:"helper"`
	Grant      broker.GrantState `json:"grant"`
	Generation int64             `json:"generation"`
	Ref        string            `json:"ref"`
}

func (e edge) register(r *http.Request, p *broker.Peer, body []byte) (any, error) {
	var q registerRequest
	if err := decodeJSON(body, &q); err != nil {
		return nil, err
	}
	done, err := e.b.Register(r.Context(), p.Hub, broker.RegisterRequest{
		User:          q.User,
		Server:        q.Server,
		ContainerName: q.ContainerName,
		Provider:      q.Provider,
		Handle:        broker.NewSecret(q.Handle),
		Groups:        q.Groups,
		Shared:        q.Shared,
		RequireGrant:  q.RequireGrant,
		UID:           q.UID,
	})
	return registerResponse(done), err
}

type unregisterRequest struct {
	User       broker.UserID     `json:"user"`
	Server     broker.ServerName `json:"server"`
	Generation int64             `json:"generation"`
}

func (e edge) unregister(r *http.Request, p *broker.Peer, body []byte) (any, error) {
	var q unregisterRequest
	if err := decodeJSON(body, &q); err != nil {
		return nil, err
	}
	ref, err := e.b.Unregister(r.Context(), p.Hub, q.User, q.Server, q.Generation)
	return refResponse{ref}, err
}

type setGroupsRequest struct {
	User   broker.UserID `json:"user"`
	Groups []string      `json:"groups"`
}

func (e edge) setGroups(r *http.Request, p *broker.Peer, body []byte) (any, error) {
	var q setGroupsRequest
	if err := decodeJSON(body, &q); err != nil {
		return nil, err
	}
	ref, err := e.b.SetGroups(r.Context(), p.Hub, q.User, q.Groups)
	return refResponse{ref}, err
}

type setSharedRequest struct {
	User   broker.UserID     `json:"user"`
	Server broker.ServerName `json:"server"`
	Shared bool              `json:"shared"`
}

func (e edge) setShared(r *http.Request, p *broker.Peer, body []byte) (any, error) {
	var q setSharedRequest
	if err := decodeJSON(body, &q); err != nil {
		return nil, err
	}
	ref, err := e.b.SetShared(r.Context(), p.Hub, q.User, q.Server, q.Shared)
	return refResponse{ref}, err
}

type logoutRequest struct {
	User       broker.UserID `json:"user"`
	NotAllowed bool          `json:"not_allowed"`
}

func (e edge) logout(r *http.Request, p *broker.Peer, body []byte) (any, error) {
	var q logoutRequest
	if err := decodeJSON(body, &q); err != nil {
		return nil, err
	}
	ref, err := e.b.HubLogout(r.Context(), p.Hub, q.User, q.NotAllowed)
	return refResponse{ref}, err
}
