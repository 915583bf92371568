package broker

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"
)

// An Entry is one line of the audit: who asked for what, and what came of it.
// It holds no secret; a token is named by its fingerprint.
type Entry struct {
	Ref       string     `json:"ref"`
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
	Container string     `json:"container,omitempty"`
	Level     string     `json:"level,omitempty"`
	Posture   []string   `json:"posture,omitempty"`
	PID       int32      `json:"pid,omitempty"`
	UID       *uint32    `json:"uid,omitempty"`
	Provider  ProviderID `json:"provider,omitempty"`
	Sub       string     `json:"sub,omitempty"`
	Audience  string     `json:"audience,omitempty"`
	Scopes    []string   `json:"scopes,omitempty"`
	Rule      int        `json:"rule,omitempty"` // counted from 1
	Epoch     int64      `json:"epoch,omitempty"`
	Token     string     `json:"token,omitempty"` // SHA-256, hex
	ExpiresAt *time.Time `json:"expires_at,omitempty"`
	Cached    bool       `json:"cached,omitempty"`
}

// audit writes entries, one JSON line each, in the order of their refs.
type audit struct {
	mu  sync.Mutex // guards what follows
	w   io.Writer
	buf bytes.Buffer // holds one line at a time
	run string       // tells this run's refs from another's
	n   int64
}

func newAudit(w io.Writer) *audit {
	return &audit{w: w, run: rand.Text()[:8]}
}

// write numbers e and writes it. Whoever acts for e must not go on if it fails:
// no record, no token.
func (a *audit) write(e *Entry) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.n++
	e.Ref = fmt.Sprintf("%s-%d", a.run, a.n)
	a.buf.Reset()
	if err := json.NewEncoder(&a.buf).Encode(e); err != nil {
		return fmt.Errorf("write audit: %w", err)
	}
	if _, err := a.w.Write(a.buf.Bytes()); err != nil {
		return fmt.Errorf("write audit: %w", err)
	}
	return nil
}

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
	}
	return e
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
	if werr := b.audit.write(e); werr != nil {
		b.cfg.Log.Error("the audit can't be written", "err", werr)
		return public(Errorf(Unavailable, "the token broker can't write its audit").Because(werr), b.cfg.Contact, e.Ref)
	}
	if told == nil {
		return nil
	}
	told.Ref = e.Ref
	b.cfg.Log.Log(ctx, level(told.Code), "refused", "action", e.Action, "ref", e.Ref, "code", e.Code,
		"hub", e.Hub, "user", e.User, "server", e.Server, "reason", e.Reason)
	return told
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
