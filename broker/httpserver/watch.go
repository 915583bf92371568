package httpserver

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"time"

	"tokenbroker/broker"
)

// readWithin is how long a reader may take for one event. It is the same over
// gRPC. Tests shorten it.
var readWithin = 10 * time.Second

// watch serves server-sent events (the text/event-stream of HTML): the event is
// named as in WatchResponse, its data is one line of JSON, the answer of /v1/token
// or a problem. What goes wrong before the first event is answered as everywhere
// else.
func (e edge) watch(w http.ResponseWriter, r *http.Request) {
	p := peerOf(r.Context())
	defer e.survive(w, r, p, "watch")
	_, end, err := e.receive(w, r, http.MethodGet, "")
	if err != nil {
		e.fail(w, r, p, "watch", err)
		return
	}
	defer end()
	want, err := wantOf(r)
	if err != nil {
		e.fail(w, r, p, "watch", err)
		return
	}
	s := events{w: w, control: http.NewResponseController(w)}
	err = e.b.Watch(r.Context(), p, want, s.send)
	var gone *writeError
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		e.b.Refuse(p, "watch", broker.Errorf(broker.Limited, "what the token broker tells is not read within %s", readWithin))
	case errors.As(err, &gone): // nobody reads
	case !s.begun:
		e.fail(w, r, p, "watch", err)
	default:
		told := e.told(r, p, "watch", err)
		_ = s.send(broker.Update{Event: string(told.Code), Refusal: told}) // and that was it, read or not
	}
}

// events writes server-sent events.
type events struct {
	w       http.ResponseWriter
	control *http.ResponseController
	begun   bool
}

// A writeError says that the reader is gone, or slow.
type writeError struct{ error }

func (e *writeError) Unwrap() error { return e.error }

func (s *events) send(u broker.Update) error {
	var data any = tokenJSON(u.Token)
	if u.Refusal != nil {
		data = problemOf(u.Refusal, statusOf(u.Refusal, nil))
	}
	line, err := json.Marshal(data)
	if err != nil {
		panic(err) // only strings and numbers are ever answered
	}
	if !s.begun {
		s.begun = true
		h := s.w.Header()
		h.Set("Content-Type", "text/event-stream")
		h.Set("Cache-Control", "no-store")
		h.Set("X-Content-Type-Options", "nosniff")
	}
	s.control.SetWriteDeadline(time.Now().Add(readWithin))
	_, err = fmt.Fprintf(s.w, "event: %s\ndata: %s\n\n", u.Event, line)
	if err == nil {
		err = s.control.Flush()
	}
	if err != nil {
		return &writeError{err}
	}
	s.control.SetWriteDeadline(time.Time{}) // the next event may be hours away
	return nil
}
