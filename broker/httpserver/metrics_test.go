package httpserver_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	"tokenbroker/broker"
	"tokenbroker/broker/httpserver"
)

func TestMetricsSayHowTheBrokerDoesAndNameNobody(t *testing.T) {
	s := newStack(t, setup{})
	s.ready()
	peer := &broker.Peer{Server: alice, PID: int32(os.Getpid())}
	for range 2 {
		if _, err := s.b.Token(context.Background(), peer, broker.Want{Audience: "storage"}); err != nil {
			t.Fatal(err)
		}
	}
	for range 3 { // of which the audit has one line
		if _, err := s.b.Token(context.Background(), peer, broker.Want{Audience: "compute"}); err == nil {
			t.Fatal("a token that no rule gives")
		}
	}
	h := httpserver.NewMetrics(s.b, httpserver.Hosts{}, quietLog()).Handler
	read := func() string {
		w := httptest.NewRecorder()
		r := httptest.NewRequest(http.MethodGet, "/metrics", nil)
		r.Host = "127.0.0.1:9464"
		h.ServeHTTP(w, r)
		if w.Code != http.StatusOK {
			t.Fatalf("%d: %s", w.Code, w.Body)
		}
		return w.Body.String()
	}
	text := read()
	for _, want := range []string{
		`tokenbroker_info{deployment="test",host="here",version=""} 1`,
		`tokenbroker_attestation_level{level="pidfd+ns"} 1`,
		`tokenbroker_attestation_level{level="pidfd"} 0`,
		`tokenbroker_part_up{part="store",provider=""} 1`,
		`tokenbroker_part_up{part="provider",provider="gitlab"} 1`,
		`tokenbroker_registrations{state="bound"} 1`,
		`tokenbroker_answers_total{action="token",code="",outcome="done"} 2`,
		`tokenbroker_answers_total{action="token",code="denied",outcome="refused"} 3`,
		"go_goroutines ", "process_open_fds ",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("there is no %s", want)
		}
	}
	for _, user := range []string{"alice", "jupyter-", "researcher"} {
		if strings.Contains(text, user) {
			t.Errorf("the metrics name %s", user)
		}
	}
	before := s.store.Calls("Check")
	read()
	if n := s.store.Calls("Check"); n != before {
		t.Errorf("read again at once, the parts were asked %d times more", n-before)
	}
}
