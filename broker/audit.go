package broker

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"os/user"
	"strconv"
	"strings"
	"time"
)

// An Entry is one line of the audit: who asked for what, and what came of it.
// It holds no secret; a token is named by its fingerprint. Seq and Prev hold it in
// its place, see auditchain.go.
type Entry struct {
	Seq       int64      `json:"seq"`
	Ref       string     `json:"ref"`
	Prev      string     `json:"prev,omitempty"`
	Time      time.Time  `json:"time"`
	Action    string     `json:"action"`  // token, providers, login, claim, …
	Outcome   string     `json:"outcome"` // done or refused
	Code      Code       `json:"code,omitempty"`
	Reason    string     `json:"reason,omitempty"` // why it was refused, or what changed, for operators
	By        string     `json:"by,omitempty"`     // which administrator
	Host      HostID     `json:"host"`
	Hub       HubID      `json:"hub,omitempty"`
	User      UserID     `json:"user,omitempty"`
	Server    ServerName `json:"server,omitempty"`
	Container string     `json:"container,omitempty"` // the server's; who is refused need not be in it
	Level     string     `json:"level,omitempty"`
	Posture   []string   `json:"posture,omitempty"`
	PID       int32      `json:"pid,omitempty"`
	UID       *uint32    `json:"uid,omitempty"`
	Socket    string     `json:"socket,omitempty"` // that a process connected to which may not use it
	Provider  ProviderID `json:"provider,omitempty"`
	Sub       string     `json:"sub,omitempty"`
	Audience  string     `json:"audience,omitempty"`
	Scopes    []string   `json:"scopes,omitempty"`
	Rule      int        `json:"rule,omitempty"` // counted from 1
	Epoch     int64      `json:"epoch,omitempty"`
	Token     string     `json:"token,omitempty"` // SHA-256, hex
	ExpiresAt *time.Time `json:"expires_at,omitempty"`
	Cached    bool       `json:"cached,omitempty"`
	Command   string     `json:"command,omitempty"` // of docker exec: the program, without arguments

	// A line with Count stands for that many that were like the one named by Like,
	// which was written at once; see auditstorm.go.
	Count int        `json:"count,omitempty"`
	Like  string     `json:"like,omitempty"`
	First *time.Time `json:"first,omitempty"`
	Last  *time.Time `json:"last,omitempty"`
}

// equalWithin is for how long refusals that are alike are counted, and
// execsWithin commands in a container: a health check is one every few seconds.
const (
	equalWithin = time.Minute
	execsWithin = time.Hour
)

// entry begins the record of an action; p may be nil.
func (b *Broker) entry(action string, p *Peer) *Entry {
	e := &Entry{Action: action, Host: b.cfg.Host}
	if p != nil {
		e.Hub, e.User, e.Server = p.Server.Hub, p.Server.User, p.Server.Server
		if p.Hub != "" {
			e.Hub = p.Hub
		}
		uid := p.UID
		e.PID, e.UID = p.PID, &uid
		if p.Hub == "" && p.Server == (ServerKey{}) {
			e.By = p.Administrator()
		}
	}
	return e
}

// Administrator says who a peer on the administrator's socket is.
func (p *Peer) Administrator() string {
	uid := strconv.FormatUint(uint64(p.UID), 10)
	name := ""
	if u, err := user.LookupId(uid); err == nil {
		name = " (" + u.Username + ")"
	}
	return fmt.Sprintf("uid %s%s, pid %d", uid, name, p.PID)
}

// record ends an action: it writes the audit line and turns err into what the
// caller is told. With err nil it returns an error only if the line could not
// be written; then nothing may be answered.
func (b *Broker) record(ctx context.Context, e *Entry, err error) error {
	e.Time, e.Outcome = b.pulse.now(), "done"
	var told *Error
	if err != nil {
		told = public(err, b.cfg.Contact, "")
		e.Outcome, e.Code, e.Reason = "refused", told.Code, err.Error()
	}
	b.counts.add(Outcome{e.Action, e.Outcome, e.Code})
	fresh, werr := true, error(nil)
	if err == nil {
		werr = b.audit.write(e)
	} else {
		fresh, werr = b.audit.once(e, refusalKind(e), equalWithin)
	}
	switch {
	case werr != nil:
		b.cfg.Log.Error("the audit can't be written", "ref", e.Ref, "err", werr)
		return public(Errorf(Unavailable, "the token broker can't write its audit").Because(werr), b.cfg.Contact, e.Ref)
	case told == nil:
		return nil
	}
	told.Ref = e.Ref
	if fresh { // a storm must not fill the log instead
		b.cfg.Log.Log(ctx, level(told.Code), "refused", "action", e.Action, "ref", e.Ref, "code", e.Code,
			"hub", e.Hub, "user", e.User, "server", e.Server, "reason", e.Reason)
	}
	return told
}

// refusalKind says which refusals are like that of e. Numbers are no part of it:
// they are the caller's, or the moment's. At a socket of ours only the caller's uid
// counts: each attempt can be another process's.
func refusalKind(e *Entry) kind {
	who := asker{action: e.Action, hub: e.Hub, user: e.User, server: e.Server, who: e.By}
	if e.Socket != "" {
		return kind{asker: who, code: e.Code, detail: fmt.Sprint(e.Socket, " ", *e.UID)}
	}
	reason := strings.Map(func(r rune) rune {
		if '0' <= r && r <= '9' {
			return -1
		}
		return r
	}, e.Reason[:min(len(e.Reason), 500)])
	return kind{
		asker:  who,
		code:   e.Code,
		detail: strings.Join([]string{string(e.Provider), e.Audience, e.Container, e.Level, reason}, "\x00"),
	}
}

// level is how loud a refusal is: what an operator should look at is an error,
// what a user did is information.
func level(c Code) slog.Level {
	switch c {
	case Internal, Unavailable:
		return slog.LevelError
	case UnknownPeer, ProviderDown:
		return slog.LevelWarn
	default:
		return slog.LevelInfo
	}
}

// Refuse records a request that an edge could not even read, and returns what
// to answer. action names what was asked for; p may be nil.
func (b *Broker) Refuse(p *Peer, action string, err error) *Error {
	e := b.entry(action, p)
	return public(b.record(context.Background(), e, err), b.cfg.Contact, e.Ref)
}

// Stranger records that a process which may not use a hub's socket, or the
// administrator's, has connected to it. It was not heard, so there is nobody to
// answer.
func (b *Broker) Stranger(p *Peer, socket string, why error) {
	e := b.entry("connect", p)
	e.Socket, e.By = socket, "" // he is no administrator
	_ = b.record(context.Background(), e, Errorf(UnknownPeer, "this socket is another's").Because(why))
}

// Looked records that an administrator has looked at something. He may look also
// while the audit can't be written: perhaps to see why.
func (b *Broker) Looked(p *Peer, action string, hub HubID, user UserID) {
	e := b.entry(action, p)
	e.Hub, e.User, e.Outcome, e.Time = hub, user, "done", b.pulse.now()
	who := "uid " + strconv.FormatUint(uint64(p.UID), 10) // each command is a process of its own
	b.observe(e, kind{asker: asker{action: action, hub: hub, user: user, who: who}}, equalWithin)
}

// observe records something for which nobody waits.
func (b *Broker) observe(e *Entry, k kind, within time.Duration) {
	if _, err := b.audit.once(e, k, within); err != nil {
		b.cfg.Log.Error("the audit can't be written", "ref", e.Ref, "action", e.Action, "err", err)
	}
}

// An Exec is a command that somebody with Docker's socket has run in a container.
// That is allowed, since he could do anything else as well, and must be seen.
type Exec struct {
	Container string // full ID
	Name      string // of the container
	Command   string // the program's name, without arguments, which may be secrets
	Alike     string // the same for equal command lines; not written down

	// Afterwards says why it was not told of when it began; empty: it was.
	Afterwards string
}

// ran records a command in the container of a registered server. Health checks,
// which Docker tells of in the same way, are counted.
func (b *Broker) ran(x Exec) {
	s := b.servers.find(func(s *server) bool {
		return s.Container == x.Container || s.ContainerName != "" && s.ContainerName == x.Name
	})
	if s == nil {
		return
	}
	e := b.serverEntry("exec", s)
	e.Container, e.Command, e.Reason = x.Container, x.Command, x.Afterwards
	e.Outcome, e.Time = "done", b.pulse.now()
	who := asker{action: e.Action, hub: e.Hub, user: e.User, server: e.Server, command: x.Command}
	detail := x.Container + x.Alike
	if x.Afterwards != "" {
		detail += "afterwards" // has a line of its own
	}
	b.observe(e, kind{asker: who, detail: detail}, execsWithin)
}

// life records that this broker begins or ends.
func (b *Broker) life(action string) {
	e := b.entry(action, nil)
	e.Outcome, e.Time, e.Reason = "done", b.pulse.now(), "version "+cmp.Or(b.cfg.Version, "unknown")
	if err := b.audit.write(e); err != nil {
		b.cfg.Log.Error("the audit can't be written", "action", action, "err", err)
	}
}

// tally writes how often what is counted has come, once that is due.
func (b *Broker) tally(context.Context) {
	if err := b.audit.tally(b.pulse.now(), false); err != nil {
		b.cfg.Log.Error("the audit can't be written", "err", err)
	}
}
