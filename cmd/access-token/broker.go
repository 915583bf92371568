package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"mime"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	// patience is how long one answer may take. A refresh at a slow provider
	// takes up to 45 s.
	patience = 75 * time.Second
	// maxAnswer bounds what is read of one answer.
	maxAnswer = 1 << 20
	// loginPause is how often to look whether the user has logged in again.
	loginPause = 15 * time.Second
)

// A broker is the other end of the socket.
type broker struct {
	socket string
	http   http.Client
}

func newBroker() *broker {
	b := &broker{socket: cmp.Or(os.Getenv("TOKENBROKER_SOCKET"), "/run/tokenbroker/broker.sock")}
	b.http = http.Client{
		Timeout: patience,
		Transport: &http.Transport{ // no Proxy: the environment has no say here
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", b.socket)
			},
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return b
}

// get reads the JSON at a path of the broker into answer.
func (b *broker) get(ctx context.Context, path string, query url.Values, answer any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://localhost"+path+"?"+query.Encode(), nil)
	if err != nil {
		return err
	}
	resp, err := b.http.Do(req)
	if err != nil {
		return b.unanswered(ctx, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return b.unanswered(ctx, err)
	}
	if resp.StatusCode != http.StatusOK {
		return b.refused(resp, body)
	}
	if err := json.Unmarshal(body, answer); err != nil {
		return b.stranger()
	}
	return nil
}

// A refusal is why there is no answer, as the broker said it or in words of
// our own. The names are those of the broker's problem+json.
type refusal struct {
	Code       string  `json:"code"`
	Sentence   string  `json:"detail"`
	Next       string  `json:"next"`
	Ref        string  `json:"ref"`
	RetryAfter float64 `json:"retry_after"` // seconds; 0: it won't help
}

// Error is the sentence.
func (r *refusal) Error() string { return r.Sentence }

// hint is the next step and the number to quote in it.
func (r *refusal) hint() string {
	if r.Ref == "" {
		return r.Next
	}
	return strings.TrimSpace(r.Next + " (ref " + r.Ref + ")")
}

// exit is the exit code of r; see usage.
func (r *refusal) exit() int {
	switch r.Code {
	case "invalid", "unsatisfiable":
		return 2
	case "denied", "revoked", "unknown_peer":
		return 3
	case "login_required":
		return 4
	case "pending", "broker_down", "provider_down", "unavailable", "limited":
		return 5
	}
	return 1
}

// pause is when to ask again; 0: there is no use in it.
func (r *refusal) pause() time.Duration {
	if r.Code == "login_required" {
		return loginPause
	}
	return time.Duration(min(r.RetryAfter, 60) * float64(time.Second))
}

// refused reads an error of the broker.
func (b *broker) refused(resp *http.Response, body []byte) error {
	kind, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	var r refusal
	if kind != "application/problem+json" || json.Unmarshal(body, &r) != nil || r.Sentence == "" {
		return b.stranger()
	}
	if r.RetryAfter == 0 {
		r.RetryAfter, _ = strconv.ParseFloat(resp.Header.Get("Retry-After"), 64)
	}
	return &r
}

func (b *broker) stranger() error {
	return &refusal{
		Code:     "internal",
		Sentence: fmt.Sprintf("what answers at %s does not speak like a token broker", b.socket),
		Next:     "check TOKENBROKER_SOCKET",
	}
}

// unanswered says why the broker could not be asked.
func (b *broker) unanswered(ctx context.Context, err error) error {
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, fs.ErrPermission):
		return &refusal{Code: "internal", Sentence: "no permission to open " + b.socket, Next: "ask your administrator"}
	case errors.Is(err, syscall.EINVAL):
		return &refusal{Code: "invalid", Sentence: b.socket + " can't be the path of a socket", Next: "check TOKENBROKER_SOCKET"}
	}
	return &refusal{
		Code:       "broker_down",
		Sentence:   fmt.Sprintf("the token broker does not answer at %s; it may be restarting, and nothing is lost", b.socket),
		Next:       "try again within 30 seconds, or with --wait; then ask your administrator",
		RetryAfter: 1,
	}
}

// retry calls ask until it succeeds or waiting makes no sense any more. The
// reason to wait is told on stderr, since somebody may be watching.
func (w wait) retry(ctx context.Context, stderr io.Writer, ask func(context.Context) error) error {
	if w.Duration > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, w.Duration)
		defer cancel()
	}
	var why *refusal
	for {
		err := ask(ctx)
		if why != nil && errors.Is(err, context.DeadlineExceeded) {
			return why
		}
		var r *refusal
		if !w.on || !errors.As(err, &r) || r.pause() == 0 {
			return err
		}
		if why == nil || why.Code != r.Code {
			fmt.Fprintf(stderr, "access-token: waiting: %s\n", r.Sentence)
		}
		why = r
		select {
		case <-ctx.Done():
			return why
		case <-time.After(r.pause()):
		}
	}
}
