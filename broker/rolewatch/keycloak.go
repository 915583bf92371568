package rolewatch

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"tokenbroker/broker"
)

// KeycloakConfig says whose events are read, and as whom.
type KeycloakConfig struct {
	Provider broker.ProviderID
	// URL is that of the realm in the admin API; AdminURL makes it.
	URL string
	// ClientID is a client whose service account has the role view-events of the
	// client realm-management. It needs no other, and should have none.
	ClientID     string
	ClientSecret broker.Secret
	Every        time.Duration     // from one poll to the next; 0: 5 s
	Transport    http.RoundTripper // nil: http.DefaultTransport
	Log          *slog.Logger      // nil: none
}

const (
	// overlap is how much of what was read is read again. An event can appear
	// with a time that is past: it is stored when all that belongs to it is, and
	// the clocks of a cluster differ.
	overlap = time.Minute
	// outage is how long Keycloak may not answer before it is thought to have
	// forgotten events meanwhile. It removes old ones, after a time of the
	// realm's that this client may not see all of.
	outage = time.Minute
	// pageSize and maxPages bound a poll. More events than that are a reason to
	// look at everybody.
	pageSize, maxPages = 250, 20
	// pollWithin bounds a poll in time.
	pollWithin = 30 * time.Second
	// patience is the longest that a Keycloak in trouble is left alone.
	patience = 30 * time.Second
	// settingsEvery is how often the realm is asked whether it keeps events.
	settingsEvery = time.Minute
)

// Keycloak is a source: what administrators and users do at a Keycloak realm, by
// polling its events.
//
// Where the last process stopped to read is not kept. A position on disk would
// have to be as safe as the grants, and would still not tell what Keycloak has
// forgotten since. A look at everybody who is here does, and is what the recheck
// does twice a minute anyway. So each start is one, and each time that something
// may have been missed.
type Keycloak struct {
	cfg   KeycloakConfig
	admin *admin
	log   *slog.Logger
	feeds []*feed

	said     string    // the last complaint
	asked    time.Time // for the realm's settings, by our clock
	settings error     // what is wrong with them
}

// A feed is one of the two lists of events.
type feed struct {
	path  string
	types []string        // empty: all
	from  time.Time       // Keycloak's time until which all was read; zero: nothing was
	seen  map[string]bool // ids of the events since then, less the overlap
	odd   bool            // an event could not be understood, and that was said
}

// AdminURL is where Keycloak's admin API has the realm that realm names: an
// issuer, or where its discovery document is. It is empty if that is no URL of a realm.
func AdminURL(realm string) string {
	realm = strings.TrimSuffix(strings.TrimSuffix(realm, "/.well-known/openid-configuration"), "/")
	i := strings.LastIndex(realm, "/realms/")
	if i < 0 || strings.Contains(realm[i+len("/realms/"):], "/") {
		return ""
	}
	return realm[:i] + "/admin" + realm[i:]
}

// NewKeycloak checks cfg. It asks Keycloak nothing.
func NewKeycloak(cfg KeycloakConfig) (*Keycloak, error) {
	cfg.URL = strings.TrimSuffix(cfg.URL, "/")
	i := strings.LastIndex(cfg.URL, "/admin/realms/")
	switch u, err := url.Parse(cfg.URL); {
	case err != nil || i < 0 || u.Host == "" || u.User != nil || u.RawQuery != "":
		return nil, errors.New("events.url: it is not the URL of a realm in Keycloak's admin API, like https://sso.example.org/admin/realms/lab")
	case cfg.ClientID == "":
		return nil, errors.New("events.client_id: it is needed")
	case cfg.ClientSecret.IsZero():
		return nil, errors.New("events.client_secret_file: it is needed")
	}
	cfg.Every = cmp.Or(cfg.Every, 5*time.Second)
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Keycloak{
		cfg: cfg,
		log: cfg.Log.With("provider", string(cfg.Provider)),
		admin: &admin{
			url: cfg.URL, tokenURL: cfg.URL[:i] + cfg.URL[i+len("/admin"):] + "/protocol/openid-connect/token",
			client: cfg.ClientID, secret: cfg.ClientSecret,
			http: &http.Client{
				Transport: cfg.Transport, Timeout: askWithin,
				// A token must not go anywhere but where the configuration says.
				CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
			},
		},
		feeds: []*feed{{path: "/admin-events", seen: map[string]bool{}}, {path: "/events", types: ofUsers, seen: map[string]bool{}}},
	}, nil
}

// Run reads events and has l look at whom they are about, until ctx ends. It is
// called once.
func (k *Keycloak) Run(ctx context.Context, l Looker) {
	f := newFollower(l, k.cfg.Provider, k.log)
	followed := make(chan struct{})
	go func() { defer close(followed); f.run(ctx) }()
	defer func() { <-followed }()
	for failures := 0; ; {
		err := k.poll(ctx, f.take)
		if ctx.Err() != nil {
			return
		}
		k.say(cmp.Or(err, k.settings))
		if failures++; err == nil {
			failures = 0
		}
		if pause(ctx, k.rest(failures)) != nil {
			return
		}
	}
}

// rest is how long to wait after some failures in a row, less a part that differs
// each time, so that the brokers of a deployment don't ask all at once.
func (k *Keycloak) rest(failures int) time.Duration {
	d := k.cfg.Every << min(failures, 10)
	d = min(d, max(patience, k.cfg.Every))
	return d - rand.N(d/5+1)
}

// say logs trouble when it comes, when it becomes another, and when it is over. Of
// several it says the first.
func (k *Keycloak) say(err error) {
	var t *trouble
	sentence := ""
	if errors.As(err, &t) {
		sentence = t.sentence
	}
	switch {
	case sentence == k.said:
	case sentence == "":
		k.log.Info("Keycloak's events can be read again")
	default:
		k.log.Warn("not all of Keycloak's events can be read; what they would tell is seen by the recheck", "err", t)
	}
	k.said = sentence
}

// poll reads what is new.
func (k *Keycloak) poll(ctx context.Context, take func(hint)) error {
	ctx, cancel := context.WithTimeout(ctx, pollWithin)
	defer cancel()
	now, err := k.admin.now(ctx)
	if err != nil {
		return err
	}
	if k.asked.IsZero() || time.Since(k.asked) >= settingsEvery {
		if k.settings, err = k.keeps(ctx); err != nil {
			return err
		}
		k.asked = time.Now()
	}
	var errs []error
	missed := ""
	for _, f := range k.feeds {
		m, err := k.read(ctx, f, now, take)
		missed = cmp.Or(missed, m)
		errs = append(errs, err)
	}
	if missed != "" {
		take(hint{cause: missed})
	}
	return errors.Join(errs...)
}

// keeps says what is wrong with how the realm keeps events. err: it is not known.
func (k *Keycloak) keeps(ctx context.Context) (wrong, err error) {
	var c struct {
		User  bool     `json:"eventsEnabled"`
		Types []string `json:"enabledEventTypes"`
		Admin bool     `json:"adminEventsEnabled"`
	}
	err = k.admin.get(ctx, "/events/config", nil, func(r io.Reader) error {
		if json.NewDecoder(r).Decode(&c) != nil {
			return errUnreadable
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	var off []string
	if !c.Admin {
		off = append(off, "administrators")
	}
	if !c.User || !slices.Contains(c.Types, "LOGOUT") || !slices.Contains(c.Types, "REVOKE_GRANT") {
		off = append(off, "users (LOGOUT and REVOKE_GRANT at least)")
	}
	if off == nil {
		return nil, nil
	}
	return &trouble{sentence: "the realm does not keep the events of " + strings.Join(off, " and of ") +
		": switch on \"Save events\" in its settings, under Events"}, nil
}

// read hands on what f has that is new. missed says why there may have been more;
// then everybody is to be looked at, from now on: what f has of that time is read
// again.
func (k *Keycloak) read(ctx context.Context, f *feed, now time.Time, take func(hint)) (missed string, err error) {
	from := f.from
	switch {
	case from.IsZero():
		missed = "the broker has started"
	case now.Sub(from) > outage:
		missed = "Keycloak's events could not be read for a while"
	case from.Sub(now) > overlap:
		missed = "Keycloak's clock was set back"
	}
	if missed != "" {
		from = now
	}
	seen, whole, err := k.pages(ctx, f, from.Add(-overlap), take)
	if err != nil {
		return "", err
	}
	if !whole {
		missed = "more events than can be read"
	}
	f.from, f.seen = now, seen
	return missed, nil
}

// pages reads all events since a time, the oldest first, each page from the last
// event of the one before: a page by number would be moved by an event that comes
// late. whole is false if there are too many.
func (k *Keycloak) pages(ctx context.Context, f *feed, since time.Time, take func(hint)) (seen map[string]bool, whole bool, err error) {
	seen = make(map[string]bool)
	at := max(since.UnixMilli(), 0)
	for range maxPages {
		page, all, err := k.page(ctx, f, at, pageSize)
		if err != nil {
			return nil, false, err
		}
		last := at
		for _, e := range page {
			if h, ok := e.hint(); ok && !f.seen[e.ID] {
				take(h)
			}
			f.seen[e.ID], seen[e.ID] = true, true // f's until the poll is done, if it ever is
			last = max(last, e.Time)
		}
		if all < pageSize {
			return seen, true, nil
		}
		if last == at {
			break // more of one moment than a page holds
		}
		at = last
	}
	return seen, false, nil
}

// page reads up to n events since a moment of Keycloak's clock.
func (k *Keycloak) page(ctx context.Context, f *feed, at int64, n int) (events []event, all int, err error) {
	query := url.Values{
		"direction": {"asc"}, "dateFrom": {strconv.FormatInt(at, 10)}, "max": {strconv.Itoa(n)}, "type": f.types,
	}
	err = k.admin.get(ctx, f.path, query, func(r io.Reader) (err error) {
		events, all, err = readEvents(r)
		return err
	})
	if err == nil && len(events) < all && !f.odd {
		f.odd = true
		k.log.Warn("an event of Keycloak's can't be understood and is passed over", "list", f.path)
	}
	return events, all, err
}

// Check says whether events can be read now, and are there to be read.
func (k *Keycloak) Check(ctx context.Context) error {
	wrong, err := k.keeps(ctx)
	if err = cmp.Or(err, wrong); err != nil {
		return fmt.Errorf("events: %w", err)
	}
	for _, f := range k.feeds {
		err := k.admin.get(ctx, f.path, url.Values{"max": {"1"}, "type": f.types}, func(r io.Reader) error {
			_, _, err := readEvents(r)
			return err
		})
		if err != nil {
			return fmt.Errorf("events: %w", err)
		}
	}
	return nil
}
