package httpserver

import (
	"encoding/json"
	"errors"
	"net/http"
	"strconv"
	"time"

	"tokenbroker/broker"
)

// statuses is what HTTP calls the domain's codes (DESIGN.md, section 8).
var statuses = map[broker.Code]int{
	broker.Pending:       http.StatusServiceUnavailable,
	broker.UnknownPeer:   http.StatusUnauthorized,
	broker.Denied:        http.StatusForbidden,
	broker.LoginRequired: http.StatusConflict,
	broker.Revoked:       http.StatusForbidden,
	broker.Invalid:       http.StatusBadRequest,
	broker.Unsatisfiable: http.StatusUnprocessableEntity,
	broker.ProviderDown:  http.StatusServiceUnavailable,
	broker.Unavailable:   http.StatusServiceUnavailable,
	broker.Limited:       http.StatusTooManyRequests,
	broker.Internal:      http.StatusInternalServerError,
}

// A requestError is a refusal for which HTTP has a status of its own.
type requestError struct {
	status int
	oauth  string // its name at the token endpoint, if it has one there
	err    *broker.Error
}

func (e *requestError) Error() string { return e.err.Error() }
func (e *requestError) Unwrap() error { return e.err }

// refusal makes an invalid request's error with a status.
func refusal(status int, sentence string, args ...any) error {
	return &requestError{status: status, err: broker.Errorf(broker.Invalid, sentence, args...)}
}

// statusOf returns the status of an answer; err is where told came from.
func statusOf(told *broker.Error, err error) int {
	var r *requestError
	if errors.As(err, &r) {
		return r.status
	}
	if status, ok := statuses[told.Code]; ok {
		return status
	}
	return http.StatusInternalServerError
}

// A problem is an error as RFC 9457 writes it.
type problem struct {
	Title      string      `json:"title"`
	Status     int         `json:"status"`
	Detail     string      `json:"detail"`
	Code       broker.Code `json:"code"`
	Next       string      `json:"next"`
	Ref        string      `json:"ref"`
	RetryAfter int64       `json:"retry_after,omitempty"`
}

// fail answers a request that was not served.
func (e edge) fail(w http.ResponseWriter, r *http.Request, p *broker.Peer, action string, err error) {
	told := e.told(r, p, action, err)
	status := statusOf(told, err)
	setRetryAfter(w, told)
	writeJSON(w, status, "application/problem+json", problemOf(told, status))
}

func problemOf(told *broker.Error, status int) problem {
	return problem{
		Title:      http.StatusText(status),
		Status:     status,
		Detail:     told.Sentence,
		Code:       told.Code,
		Next:       told.Next,
		Ref:        told.Ref,
		RetryAfter: wholeSeconds(told.RetryAfter),
	}
}

// writeJSON answers with v. It gives the length, so that HTTP/1.0 clients, too,
// know where the answer ends.
func writeJSON(w http.ResponseWriter, status int, contentType string, v any) {
	body, err := json.Marshal(v)
	if err != nil {
		panic(err) // only strings and numbers are ever answered
	}
	h := w.Header()
	h["Content-Type"] = []string{contentType}
	h["Content-Length"] = []string{strconv.Itoa(len(body))}
	h["Cache-Control"] = []string{"no-store"}
	h["X-Content-Type-Options"] = []string{"nosniff"}
	w.WriteHeader(status)
	w.Write(body)
}

func setRetryAfter(w http.ResponseWriter, told *broker.Error) {
	if s := wholeSeconds(told.RetryAfter); s > 0 {
		w.Header().Set("Retry-After", strconv.FormatInt(s, 10))
	}
}

// wholeSeconds rounds up: whoever comes too early has to come again.
func wholeSeconds(d time.Duration) int64 {
	return int64((d + time.Second - 1) / time.Second)
}

// timestamp is a time of ours in RFC 3339.
func timestamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// list keeps an empty list from becoming null.
func list[S ~[]E, E any](s S) S {
	if s == nil {
		return S{}
	}
	return s
}
