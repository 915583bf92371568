package httpserver

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"math"
	"mime"
	"net/http"
	"net/url"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

const (
	maxBody     = 64 << 10
	bodyTimeout = 10 * time.Second
)

// readBody reads the body of a request of one content type.
func readBody(w http.ResponseWriter, r *http.Request, contentType string) ([]byte, error) {
	if got, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || got != contentType {
		return nil, refusal(http.StatusUnsupportedMediaType, "the header Content-Type must be %s", contentType)
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if errors.As(err, new(*http.MaxBytesError)) {
		return nil, refusal(http.StatusRequestEntityTooLarge, "the request is larger than %d bytes", maxBody)
	}
	if err != nil {
		return nil, refusal(http.StatusBadRequest, "the body did not arrive whole")
	}
	http.NewResponseController(w).SetReadDeadline(time.Time{})
	return body, nil
}

// decodeJSON reads one object into v and nothing besides. What it says never
// quotes a value: bodies hold secrets.
func decodeJSON(body []byte, v any) error {
	if !utf8.Valid(body) { // encoding/json would make one user of several
		return refusal(http.StatusBadRequest, "the body is not valid UTF-8")
	}
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return jsonError(err)
	}
	if _, err := d.Token(); err != io.EOF {
		return refusal(http.StatusBadRequest, "the body goes on after the JSON object")
	}
	return nil
}

// jsonError says what is wrong with a body in words of ours.
func jsonError(err error) error {
	if name, ok := strings.CutPrefix(err.Error(), "json: unknown field "); ok {
		return unknown("field", strings.Trim(name, `"`))
	}
	var wrong *json.UnmarshalTypeError
	if errors.As(err, &wrong) && wrong.Field != "" {
		return refusal(http.StatusBadRequest, "%s must be %s", wrong.Field, kindName(wrong.Type))
	}
	if errors.As(err, &wrong) {
		return refusal(http.StatusBadRequest, "the body must be a JSON object")
	}
	return refusal(http.StatusBadRequest, "the body is not valid JSON")
}

// kindName is what JSON calls the values of a type.
func kindName(t reflect.Type) string {
	switch t.Kind() {
	case reflect.String:
		return "a string"
	case reflect.Bool:
		return "true or false"
	case reflect.Slice:
		return "a list"
	case reflect.Int64, reflect.Uint32:
		return "a whole number"
	}
	return "of another type"
}

// word is what the name of a field looks like. A longer one may be a token that
// somebody pasted in the wrong place, and is not repeated.
var word = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,32}$`)

func unknown(what, name string) error {
	if !word.MatchString(name) {
		return refusal(http.StatusBadRequest, "there is an unknown %s", what)
	}
	return refusal(http.StatusBadRequest, "there is no %s %q", what, name)
}

// query reads the parameters of a request, which may be no others than known.
// Only scope may be repeated.
func query(r *http.Request, known ...string) (url.Values, error) {
	if r.URL.RawQuery == "" {
		return nil, nil
	}
	q, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, refusal(http.StatusBadRequest, "the query of the URL is malformed")
	}
	for name, values := range q {
		if !slices.Contains(known, name) {
			return nil, unknown("parameter", name)
		}
		if len(values) > 1 && name != "scope" {
			return nil, refusal(http.StatusBadRequest, "%s is given more than once", name)
		}
	}
	return q, nil
}

// form reads a body of parameters. Unknown ones are nobody's business (RFC
// 6749, section 3.2), known ones may be there once.
func form(body []byte, known ...string) (url.Values, error) {
	all, err := url.ParseQuery(string(body))
	if err != nil {
		return nil, refusal(http.StatusBadRequest, "the form is malformed")
	}
	f := make(url.Values)
	for _, name := range known {
		if len(all[name]) > 1 {
			return nil, refusal(http.StatusBadRequest, "%s is given more than once", name)
		}
		if v := all.Get(name); v != "" {
			f.Set(name, v)
		}
	}
	return f, nil
}

// missing says which parameter a request lacks.
func missing(name string) error {
	return refusal(http.StatusBadRequest, "%s is missing", name)
}

// seconds reads a number of seconds. One that is too large for us is as good
// as the largest.
func seconds(name, s string) (time.Duration, error) {
	if s == "" {
		return 0, nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil && !errors.Is(err, strconv.ErrRange) {
		return 0, refusal(http.StatusBadRequest, "%s must be a whole number of seconds", name)
	}
	const most = math.MaxInt64 / int64(time.Second)
	return time.Duration(min(max(n, -most), most)) * time.Second, nil
}
