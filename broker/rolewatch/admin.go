package rolewatch

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"tokenbroker/broker"
)

const (
	// askWithin bounds one request with its answer.
	askWithin = 10 * time.Second
	// maxAnswer bounds what is read of one answer. Events hold what they are
	// about, a realm with all of its settings for one.
	maxAnswer = 32 << 20
	// tokenFor is how long a token is used at the most, however long it lives: it
	// has the rights of the time when it was given, and tells the time of then.
	tokenFor = time.Minute
)

var errUnreadable = errors.New("the answer can't be read")

// A trouble is why Keycloak's events are not to be had, for an administrator.
type trouble struct {
	sentence string
	cause    error
}

// Error is the sentence and what is behind it.
func (t *trouble) Error() string {
	if t.cause == nil {
		return t.sentence
	}
	return t.sentence + " (" + t.cause.Error() + ")"
}

// Unwrap returns what is behind it.
func (t *trouble) Unwrap() error { return t.cause }

// An admin asks Keycloak's admin API, as a service account. x/oauth2's
// clientcredentials would do but for two things: it quotes answers in its errors,
// and it can't be told that a token is no good any more.
type admin struct {
	url, tokenURL string
	client        string
	secret        broker.Secret
	http          *http.Client

	mu    sync.Mutex // guards token
	token *token     // nil: there is none that is any good
}

// A token is the service account's.
type token struct {
	bearer broker.Secret
	issued time.Time // by Keycloak's clock
	got    time.Time // by ours
	until  time.Time // by ours; a new one is due
}

// now is Keycloak's time: that of the token, and how long we have had it. No
// clock is compared with another, so that they may differ by any amount. It is up
// to a second slow.
func (a *admin) now(ctx context.Context) (time.Time, error) {
	t, err := a.bearer(ctx)
	if err != nil {
		return time.Time{}, err
	}
	return t.issued.Add(time.Since(t.got)), nil
}

// get asks for a resource of the realm and has the answer read.
func (a *admin) get(ctx context.Context, path string, query url.Values, read func(io.Reader) error) error {
	var err error
	// Keycloak takes back tokens that have not ended: when all sessions of the
	// realm are ended, for one.
	for range 2 {
		var status int
		if status, err = a.getOnce(ctx, path, query, read); status != http.StatusUnauthorized {
			break
		}
	}
	return err
}

func (a *admin) getOnce(ctx context.Context, path string, query url.Values, read func(io.Reader) error) (int, error) {
	t, err := a.bearer(ctx)
	if err != nil {
		return 0, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, a.url+path+"?"+query.Encode(), nil)
	if err != nil {
		return 0, &trouble{sentence: "events.url is not a URL"}
	}
	req.Header.Set("Authorization", "Bearer "+t.bearer.Reveal())
	status, err := a.do(req, read)
	if status == http.StatusUnauthorized || status == http.StatusForbidden {
		a.forget(t) // rights are the token's: with a new one they may be others
	}
	return status, err
}

// do sends a request and has a favourable answer read.
func (a *admin) do(req *http.Request, read func(io.Reader) error) (int, error) {
	req.Header.Set("Accept", "application/json")
	resp, err := a.http.Do(req)
	if err != nil {
		return 0, &trouble{"Keycloak can't be reached for its events", plain(err)}
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusOK {
		if err := read(io.LimitReader(resp.Body, maxAnswer)); err != nil {
			return resp.StatusCode, &trouble{"what Keycloak answered about its events can't be read", plain(err)}
		}
		return resp.StatusCode, nil
	}
	return resp.StatusCode, a.refusal(req.URL, resp.StatusCode)
}

// refusal says what an answer without events means and what to do.
func (a *admin) refusal(u *url.URL, status int) *trouble {
	where := u.Scheme + "://" + u.Host + u.Path
	switch {
	case where == a.tokenURL && (status == http.StatusUnauthorized || status == http.StatusBadRequest):
		return &trouble{sentence: fmt.Sprintf("Keycloak does not take the client %q that reads events: correct events.client_id and events.client_secret_file, and switch on \"Service accounts roles\" of that client", a.client)}
	case status == http.StatusForbidden:
		return &trouble{sentence: fmt.Sprintf("the service account of the client %q lacks the role view-events of the client realm-management: give it that role, and give the client the client scope \"roles\", by which the role gets into its tokens", a.client)}
	case status == http.StatusUnauthorized:
		return &trouble{sentence: fmt.Sprintf("Keycloak does not take the token of the client %q at %s: events.url must be that of the client's realm", a.client, where)}
	case status == http.StatusNotFound:
		return &trouble{sentence: fmt.Sprintf("there is nothing at %s: correct events.url", where)}
	}
	return &trouble{fmt.Sprintf("Keycloak answered %d in place of its events", status), errors.New("at " + where)}
}

// bearer returns a token that is good for a while.
func (a *admin) bearer(ctx context.Context) (*token, error) {
	a.mu.Lock()
	t := a.token
	a.mu.Unlock()
	if t != nil && time.Now().Before(t.until) {
		return t, nil
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, a.tokenURL, strings.NewReader("grant_type=client_credentials"))
	if err != nil {
		return nil, &trouble{sentence: "events.url is not a URL"}
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.SetBasicAuth(url.QueryEscape(a.client), url.QueryEscape(a.secret.Reveal()))
	if _, err = a.do(req, func(r io.Reader) error { t, err = readToken(r); return err }); err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.token = t
	return t, nil
}

// forget has the next request get a new token in place of t.
func (a *admin) forget(t *token) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.token == t {
		a.token = nil
	}
}

// readToken reads a token answer. The token is not verified: nobody but
// Keycloak sees it, and what it says of the time is a hint.
func readToken(r io.Reader) (*token, error) {
	var answer struct {
		Bearer string `json:"access_token"`
		Life   int64  `json:"expires_in"`
	}
	if err := json.NewDecoder(r).Decode(&answer); err != nil {
		return nil, errUnreadable
	}
	_, payload, _ := strings.Cut(answer.Bearer, ".")
	payload, _, _ = strings.Cut(payload, ".")
	text, err := base64.RawURLEncoding.DecodeString(payload)
	var claims struct {
		Issued int64 `json:"iat"`
	}
	if err != nil || json.Unmarshal(text, &claims) != nil || claims.Issued <= 0 {
		return nil, errUnreadable
	}
	got := time.Now()
	life := min(time.Duration(max(answer.Life, 1)), tokenFor/time.Second) * time.Second
	return &token{broker.NewSecret(answer.Bearer), time.Unix(claims.Issued, 0), got, got.Add(life * 4 / 5)}, nil
}

// plain is err without what Keycloak sent.
func plain(err error) error {
	var (
		op   *net.OpError
		cert *tls.CertificateVerificationError
		late net.Error
	)
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, errUnreadable):
		return cmp.Or(errors.Unwrap(err), err)
	case errors.As(err, &cert):
		return cert
	case errors.As(err, &op):
		return op
	case errors.As(err, &late) && late.Timeout():
		return context.DeadlineExceeded
	}
	return errUnreadable
}
