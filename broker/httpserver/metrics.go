package httpserver

import (
	"context"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"tokenbroker/broker"
)

// statusAge is how old what the parts say of themselves may be: whoever reads the
// metrics all the time must not have the broker ask its providers all the time.
const statusAge = 10 * time.Second

// NewMetrics answers Prometheus at /metrics. Nothing in it names a user, so it may be
// read by anybody whom the listener, one of Bound's, lets in.
func NewMetrics(b *broker.Broker, hosts Hosts, log *slog.Logger) *http.Server {
	e := edge{b: b, log: log, hosts: hosts}
	r := prometheus.NewRegistry()
	r.MustRegister(
		&metrics{b: b},
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	all := promhttp.HandlerFor(r, promhttp.HandlerOpts{MaxRequestsInFlight: 4})
	mux := e.mux(nil)
	mux.HandleFunc("/metrics", func(w http.ResponseWriter, r *http.Request) {
		if err := e.mayAsk(w, r, http.MethodGet); err != nil {
			e.fail(w, r, nil, "metrics", err)
			return
		}
		all.ServeHTTP(w, r)
	})
	return e.tcp(mux)
}

// What there is. The names are an interface: dashboards and alarms use them.
var (
	infoMetric = prometheus.NewDesc("tokenbroker_info",
		"The broker; always 1.", []string{"version", "deployment", "host"}, nil)
	partMetric = prometheus.NewDesc("tokenbroker_part_up",
		"Whether a part works: store, attestation, provider.", []string{"part", "provider"}, nil)
	levelMetric = prometheus.NewDesc("tokenbroker_attestation_level",
		"What attestation proves on this host; 1 at the level that it has.", []string{"level"}, nil)
	serverMetric = prometheus.NewDesc("tokenbroker_registrations",
		"Servers registered on this host.", []string{"state"}, nil)
	answerMetric = prometheus.NewDesc("tokenbroker_answers_total",
		"Lines of the audit, each refusal counted.", []string{"action", "outcome", "code"}, nil)
)

// A metrics is a prometheus.Collector.
type metrics struct {
	b *broker.Broker

	mu     sync.Mutex // guards the two
	status broker.Status
	asked  time.Time
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(all chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{infoMetric, partMetric, levelMetric, serverMetric, answerMetric} {
		all <- d
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(all chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		all <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	s := m.now()
	gauge(infoMetric, 1, s.Version, s.Deployment, string(s.Host))
	gauge(partMetric, truth(s.Store.OK), "store", "")
	gauge(partMetric, truth(s.Attestation.OK), "attestation", "")
	for _, p := range s.Providers {
		gauge(partMetric, truth(p.OK), "provider", p.Name)
	}
	for _, l := range broker.Levels() {
		gauge(levelMetric, truth(l == s.Level), l)
	}
	for _, state := range []broker.RegistrationState{broker.Reserved, broker.Bound, broker.Stopped} {
		gauge(serverMetric, float64(s.Registrations[state]), string(state))
	}
	for o, n := range m.b.Counts() {
		all <- prometheus.MustNewConstMetric(answerMetric, prometheus.CounterValue, float64(n), o.Action, o.Outcome, string(o.Code))
	}
}

func truth(is bool) float64 {
	if is {
		return 1
	}
	return 0
}

// now is the broker's status, at most statusAge old.
func (m *metrics) now() broker.Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	if time.Since(m.asked) > statusAge {
		m.status, m.asked = m.b.Status(context.Background()), time.Now()
	}
	return m.status
}
