package broker

import "time"

// A storm of equal refusals must not fill the disk, since without room for the
// audit nobody gets a token. So the first of a kind is written at once, and those
// that come after it within a window are counted; one line at its end says how
// many. Their callers are told the first one's ref. A crash loses what one window
// has counted. Issued tokens and changes are never counted, each has its line.
//
// A caller who is refused in ever new ways is as bad: beyond maxDetails his
// refusals are told apart by their code only. Beyond maxKinds of all callers, the
// callers are not told apart either.
const (
	maxDetails = 16
	maxKinds   = 4096
)

// tallyEvery is how often is looked which windows are over.
const tallyEvery = 10 * time.Second

// A kind is what entries that are alike have in common.
type kind struct {
	asker
	code   Code
	detail string // empty: any
}

// An asker is who wants what.
type asker struct {
	action string
	hub    HubID
	user   UserID
	server ServerName
	who    string // which administrator

	command string // of docker exec
}

// A run is a window with the entries of one kind.
type run struct {
	kind
	first    *Entry
	ends     time.Time
	count    int       // of those after the first
	from, to time.Time // when they came
	reason   string    // of the last one
}

// once writes e if it is the first of its kind; else it counts e, gives it the ref
// of that one, and fresh is false.
func (a *audit) once(e *Entry, k kind, within time.Duration) (fresh bool, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	k = a.fit(k)
	r := a.kinds[k]
	if r == nil {
		if err := a.put(e); err != nil {
			return true, err
		}
		a.kinds[k] = &run{kind: k, first: e, ends: e.Time.Add(within)}
		a.details[k.asker]++
		a.runs = append(a.runs, a.kinds[k])
		return true, nil
	}
	if r.count == 0 {
		r.from = e.Time
	}
	r.count++
	r.to, r.reason, e.Ref = e.Time, e.Reason, r.first.Ref
	return false, nil
}

// fit makes k coarser if there are too many kinds.
func (a *audit) fit(k kind) kind {
	if a.kinds[k] == nil && a.details[k.asker] >= maxDetails {
		k.detail = ""
	}
	if a.kinds[k] == nil && len(a.kinds) >= maxKinds {
		k = kind{asker: asker{action: k.action}, code: k.code}
	}
	return k
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
		if a.details[r.asker]--; a.details[r.asker] == 0 {
			delete(a.details, r.asker)
		}
	}
	a.runs = open
	return failed
}

// entry is the line that stands for those which were counted. It says only what
// they have in common.
func (r *run) entry(now time.Time) *Entry {
	f := r.first
	e := &Entry{
		Time: now, Action: r.action, Outcome: f.Outcome, Code: r.code, Reason: r.reason, Host: f.Host,
		Hub: r.hub, User: r.user, Server: r.server, By: r.who, Command: r.command,
		Count: r.count, Like: f.Ref, First: &r.from, Last: &r.to,
	}
	if r.detail != "" {
		e.Provider, e.Audience, e.Container, e.Level, e.Socket = f.Provider, f.Audience, f.Container, f.Level, f.Socket
	}
	return e
}
