package broker

import "time"

// A storm of equal refusals must not fill the disk, since without room for the
// audit nobody gets a token. So the first of a kind is written at once, and those
// that come after it within a window are counted; one line at its end says how
// many. Their callers are told the first one's ref. A crash loses what one window
// has counted. Issued tokens and changes are never counted, each has its line.

// maxKinds bounds what is remembered. Beyond it refusals are told apart only by
// what was asked for and by their code.
const maxKinds = 4096

// tallyEvery is how often is looked which windows are over.
const tallyEvery = 10 * time.Second

// A kind is what entries that are alike have in common.
type kind struct {
	action   string
	code     Code
	hub      HubID
	user     UserID
	server   ServerName
	provider ProviderID
	audience string
	who      string
	why      string // a refusal's sentence before the names are put in
}

// coarse is k where there are too many kinds.
func (k kind) coarse() kind { return kind{action: k.action, code: k.code} }

// A run is a window with the entries of one kind.
type run struct {
	kind
	first  *Entry
	ends   time.Time
	count  int // of those after the first
	from   time.Time
	to     time.Time
	reason string // of the last one
}

// once writes e if it is the first of its kind; else it counts e, gives it the ref
// of that one, and fresh is false.
func (a *audit) once(e *Entry, k kind, within time.Duration) (fresh bool, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	r := a.kinds[k]
	if r == nil && len(a.kinds) >= maxKinds {
		k = k.coarse()
		r = a.kinds[k]
	}
	if r == nil {
		if err := a.put(e); err != nil {
			return true, err
		}
		r = &run{kind: k, first: e, ends: e.Time.Add(within)}
		a.kinds[k], a.runs = r, append(a.runs, r)
		return true, nil
	}
	if r.count == 0 {
		r.from = e.Time
	}
	r.count++
	r.to, r.reason, e.Ref = e.Time, e.Reason, r.first.Ref
	return false, nil
}

// tally writes the counts of the windows that are over by now, or of all. What
// can't be written is counted on.
func (a *audit) tally(now time.Time, all bool) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	var open []*run
	var failed error
	for _, r := range a.runs {
		due := all || !now.Before(r.ends)
		if due && failed == nil && r.count > 0 {
			failed = a.put(r.entry(now))
		}
		if !due || failed != nil {
			open = append(open, r)
			continue
		}
		delete(a.kinds, r.kind)
	}
	a.runs = open
	return failed
}

// entry is the line that stands for those which were counted. It says only what
// they have in common.
func (r *run) entry(now time.Time) *Entry {
	f, k := r.first, r.kind
	e := &Entry{
		Time: now, Action: k.action, Outcome: f.Outcome, Code: k.code, Reason: r.reason, Host: f.Host,
		Hub: k.hub, User: k.user, Server: k.server, Provider: k.provider, Audience: k.audience,
		Count: r.count, Like: f.Ref, First: &r.from, Last: &r.to,
	}
	if k != k.coarse() {
		e.By, e.UID, e.Command, e.Container = f.By, f.UID, f.Command, f.Container
	}
	return e
}
