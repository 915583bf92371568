package broker_test

import (
	"context"
	"io"
	"testing"

	"tokenbroker/broker"
)

// BenchmarkToken is the straight line from the cache, without any wire: what the
// broker itself costs of a request. broker/httpserver measures the whole.
func BenchmarkToken(b *testing.B) {
	r := newRig(b, func(c *broker.Config) { c.Audit = io.Discard })
	var err error
	if r.Broker, err = broker.New(r.cfg); err != nil {
		b.Fatal(err)
	}
	if err := r.Start(context.Background()); err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	r.loggedIn("alice")
	if _, err := r.Register(context.Background(), "main", broker.RegisterRequest{User: "alice", ContainerName: "jupyter-alice"}); err != nil {
		b.Fatal(err)
	}
	r.attestor.Run("jupyter-alice", 100)
	p := r.peer("alice", 100)
	r.token(p, broker.Want{})
	b.ReportAllocs()
	for b.Loop() {
		r.token(p, broker.Want{})
	}
}
