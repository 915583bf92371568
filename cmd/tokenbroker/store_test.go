package main

import (
	"path/filepath"
	"strings"
	"testing"

	"tokenbroker/broker/brokertest"
)

// What the file says about Sentinels and clusters reaches the store.
func TestTheStoreIsFoundWhereTheFileSays(t *testing.T) {
	for _, tt := range []struct {
		why   string
		start func(testing.TB) *brokertest.RedisSet
		redis func(*brokertest.RedisSet) string
	}{
		{"Sentinels", brokertest.StartSentinels, func(s *brokertest.RedisSet) string {
			return "sentinel: {master: lab, addresses: ['" + strings.Join(brokertest.Addrs(s.Sentinels), "', '") + "'], password_file: password}"
		}},
		{"a cluster", brokertest.StartCluster, func(s *brokertest.RedisSet) string {
			return "cluster: {addresses: ['" + s.Nodes[2].Addr + "']}"
		}},
	} {
		t.Run(tt.why, func(t *testing.T) {
			set := tt.start(t)
			path := site(t, minimal+"store: {redis: {password_file: password, "+tt.redis(set)+"}}\n")
			write(t, filepath.Join(filepath.Dir(path), "password"), set.Password, 0o400)
			cfg, err := load(path)
			if err != nil {
				t.Fatal(err)
			}
			s, err := openStore(cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if err := s.Check(t.Context()); err != nil {
				t.Error(err)
			}
			if _, err := s.Move(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}
