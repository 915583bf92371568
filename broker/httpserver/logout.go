package httpserver

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"golang.org/x/time/rate"

	"tokenbroker/broker"
)

const (
	logoutPath   = "/backchannel-logout/{provider}"
	logoutAction = "provider_logout"
	// logoutsAtOnce is enough for a provider that logs everybody out at a time,
	// logoutsASecond for what then comes, and keeps a flood out of the audit. What
	// is turned away the recheck makes good.
	logoutsAtOnce  = 1000
	logoutsASecond = 20
)

// NewLogout receives the providers' logout tokens (OpenID Connect Back-Channel
// Logout 1.0, section 2.5), on a loopback or TLS listener of Bound's. Anybody may
// send some.
func NewLogout(b *broker.Broker, hosts Hosts, log *slog.Logger) *http.Server {
	e := edge{b: b, log: log, hosts: hosts}
	mux := e.mux(nil)
	mux.Handle(logoutPath, logoutReceiver{e})
	pace := rate.NewLimiter(logoutsASecond, logoutsAtOnce)
	tell := rate.Sometimes{Interval: 10 * time.Second}
	return e.tcp(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !pace.Allow() {
			tell.Do(func() { log.Warn("too many logout tokens come at once; some are turned away unread") })
			w.Header().Set("Cache-Control", "no-store")
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		mux.ServeHTTP(w, r)
	}))
}

// A logoutReceiver answers with 200 or 400, as section 2.8 has it.
type logoutReceiver struct{ edge }

func (l logoutReceiver) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	defer func() {
		if v := recover(); v != nil {
			l.fail(w, r, l.crashed(logoutAction, v))
		}
	}()
	if err := l.hear(w, r); err != nil {
		l.fail(w, r, err)
		return
	}
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusOK)
}

func (l logoutReceiver) hear(w http.ResponseWriter, r *http.Request) error {
	body, end, err := l.receive(w, r, http.MethodPost, "application/x-www-form-urlencoded")
	if err != nil {
		return err
	}
	defer end()
	f, err := form(body, "logout_token")
	if err != nil {
		return err
	}
	if f.Get("logout_token") == "" {
		return missing("logout_token")
	}
	_, err = l.b.ProviderLogout(r.Context(), broker.ProviderID(r.PathValue("provider")), broker.NewSecret(f.Get("logout_token")))
	if err == nil {
		trust(r.Context())
	}
	return err
}

func (l logoutReceiver) fail(w http.ResponseWriter, r *http.Request, err error) {
	told := l.told(r, nil, logoutAction, err)
	name, _ := nameOf(told, err)
	status := http.StatusBadRequest
	var own *requestError
	if errors.As(err, &own) && own.status == http.StatusMethodNotAllowed {
		status = own.status
	}
	writeJSON(w, status, "application/json", oauthError{
		Error: name, Description: fmt.Sprintf("%s (ref %s)", told.Sentence, told.Ref), Ref: told.Ref,
	})
}
