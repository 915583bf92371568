package redisstore_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
	"tokenbroker/broker/redisstore"
)

func TestSettleOnDisk(t *testing.T) {
	t.Parallel()
	s := open(t, redisstore.Config{Socket: brokertest.StartRedis(t).Socket})
	if err := s.Settle(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestSettleSaysThatMemoryAloneIsNotEnough(t *testing.T) {
	s := open(t, redisstore.Config{Socket: brokertest.StartRedis(t, "appendonly no").Socket})
	if err := s.Settle(t.Context()); err == nil || !strings.Contains(err.Error(), "in memory only") {
		t.Errorf("Settle: %v", err)
	}
}

func TestSettleWaitsForTheReplicas(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	primary := brokertest.StartRedis(t, fmt.Sprintf("port %d", port), "bind 127.0.0.1", "protected-mode no", "repl-diskless-sync-delay 0", "appendonly no")
	replica := brokertest.StartRedis(t, fmt.Sprintf("replicaof 127.0.0.1 %d", port), "appendonly no")
	linked(t, primary.Socket)
	s := open(t, redisstore.Config{Socket: primary.Socket})
	if err := s.Put(t.Context(), broker.Key{Kind: "test", Parts: []string{"alice"}}, 0, []byte("box"), 0); err != nil {
		t.Fatal(err)
	}
	if err := s.Settle(t.Context()); err != nil {
		t.Fatalf("with a replica that listens: %v", err)
	}
	copied := raw(t, &redis.Options{Network: "unix", Addr: replica.Socket})
	if n := copied.DBSize(t.Context()).Val(); n < 2 {
		t.Errorf("the replica has %d keys after Settle", n)
	}
	replica.Freeze()
	defer replica.Thaw()
	if err := s.Settle(t.Context()); err == nil || !strings.Contains(err.Error(), "0 of 1 have confirmed") {
		t.Errorf("with a replica that hangs: %v", err)
	}
}

func TestReplicatedWaitsForTheReplicasThatThereAre(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	primary := brokertest.StartRedis(t, fmt.Sprintf("port %d", port), "bind 127.0.0.1", "protected-mode no", "repl-diskless-sync-delay 0")
	s := open(t, redisstore.Config{Socket: primary.Socket})
	if err := s.Replicated(t.Context()); err != nil {
		t.Errorf("with none: %v", err)
	}
	replica := brokertest.StartRedis(t, fmt.Sprintf("replicaof 127.0.0.1 %d", port))
	linked(t, primary.Socket)
	if err := s.Put(t.Context(), broker.Key{Kind: "test"}, 0, []byte("box"), 0); err != nil {
		t.Fatal(err)
	}
	if err := s.Replicated(t.Context()); err != nil {
		t.Errorf("with one that listens: %v", err)
	}
	if n := raw(t, &redis.Options{Network: "unix", Addr: replica.Socket}).DBSize(t.Context()).Val(); n < 2 {
		t.Errorf("the replica has %d keys", n)
	}
	replica.Freeze()
	defer replica.Thaw()
	if err := s.Replicated(t.Context()); err == nil || !strings.Contains(err.Error(), "0 of 1 have confirmed") {
		t.Errorf("with one that hangs: %v", err)
	}
}

// A primary that keeps nothing on disk comes back empty, and its replica follows.
func TestSettleSaysOnceThatTheServerIsNotWhatItWas(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	primary := brokertest.StartRedis(t, fmt.Sprintf("port %d", port), "bind 127.0.0.1", "protected-mode no", "repl-diskless-sync-delay 0", "appendonly no")
	brokertest.StartRedis(t, fmt.Sprintf("replicaof 127.0.0.1 %d", port), "appendonly no")
	linked(t, primary.Socket)
	s := open(t, redisstore.Config{Socket: primary.Socket})
	s.Check(t.Context()) // what is said before a first Settle counts as well
	if err := s.Put(t.Context(), broker.Key{Kind: "test"}, 0, []byte("box"), 0); err != nil {
		t.Fatal(err)
	}
	before, err := s.Pulse(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	primary.Kill()
	primary.Start()
	linked(t, primary.Socket)
	if after, err := s.Pulse(t.Context()); err != nil || after.Server == before.Server || before.Server == "" {
		t.Errorf("the pulse is of server %q before the restart and of %q after it, %v", before.Server, after.Server, err)
	}
	s.Check(t.Context()) // it is not what takes note of the new one
	if err := s.Settle(t.Context()); err == nil || !strings.Contains(err.Error(), "look again what is there") {
		t.Errorf("Settle after a restart that lost everything: %v", err)
	}
	if err := s.Settle(t.Context()); err != nil {
		t.Errorf("Settle once the caller knows: %v", err)
	}
}

// linked waits until the primary's one replica follows it.
func linked(t *testing.T, socket string) {
	t.Helper()
	c := raw(t, &redis.Options{Network: "unix", Addr: socket})
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if strings.Contains(c.Info(t.Context(), "replication").Val(), "state=online") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("the replica does not follow the primary")
		}
	}
}
