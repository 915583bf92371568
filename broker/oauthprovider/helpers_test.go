package oauthprovider_test

import (
	"encoding/json"
	"errors"
	"testing"

	"tokenbroker/broker"
)

// wantClass fails unless err is a ProviderError of class and reason.
func wantClass(t *testing.T, err error, class broker.ProviderClass, reason string) *broker.ProviderError {
	t.Helper()
	var e *broker.ProviderError
	if !errors.As(err, &e) {
		t.Fatalf("got error %v, want a ProviderError", err)
	}
	if e.Class != class || e.Reason != reason {
		t.Fatalf("got %s (%s): %v, want %s (%s)", e.Class, e.Reason, err, class, reason)
	}
	return e
}

func mustJSON(t *testing.T, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
