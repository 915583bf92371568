package broker_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"tokenbroker/broker"
)

func TestSecretDoesNotPrint(t *testing.T) {
	const word = "hunter2"
	s := broker.NewSecret(word)
	type inside struct{ hidden, Open broker.Secret }
	values := []any{s, &s, inside{s, s}, &inside{s, s}, []broker.Secret{s}, map[string]broker.Secret{"k": s}, broker.Grant{Refresh: s}}
	var log bytes.Buffer
	for _, v := range values {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
			fmt.Fprintf(&log, verb+"\n", v)
		}
		out, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		log.Write(out)
		slog.New(slog.NewJSONHandler(&log, nil)).Info("m", "v", v)
		slog.New(slog.NewTextHandler(&log, nil)).Info("m", "v", v)
	}
	for _, form := range []string{word, fmt.Sprintf("%x", word), fmt.Sprintf("%v", []byte(word))} {
		if strings.Contains(log.String(), form) {
			t.Errorf("the secret was printed as %q", form)
		}
	}
	if s.Reveal() != word || !s.Equal(broker.NewSecret(word)) || s.Equal(broker.NewSecret("other")) {
		t.Error("the secret is not what it was")
	}
	if f := s.Fingerprint(); len(f) != 64 || (broker.Secret{}).Fingerprint() != "" {
		t.Errorf("fingerprint %q", f)
	}
}

func TestErrorTellsCallersLessThanOperators(t *testing.T) {
	cause := errors.New("dial /run/redis.sock: no such file")
	err := broker.Errorf(broker.Unavailable, "the token broker can't reach its store").Because(cause)
	if !errors.Is(err, broker.ErrUnavailable) || errors.Is(err, broker.ErrDenied) || !errors.Is(err, cause) {
		t.Error("errors.Is does not find the code, or finds another")
	}
	if !strings.Contains(err.Error(), "no such file") || strings.Contains(err.Sentence+err.Next, "no such file") {
		t.Errorf("error %q, sentence %q, next %q", err.Error(), err.Sentence, err.Next)
	}
	if err.RetryAfter == 0 {
		t.Error("what may pass does not say when to try again")
	}
}
