package redisstore_test

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/redis/go-redis/v9"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
	"tokenbroker/broker/redisstore"
)

// watched is a store on a primary with a replica under Sentinel.
func watched(set *brokertest.RedisSet) redisstore.Config {
	password := broker.NewSecret(set.Password)
	return redisstore.Config{
		Sentinel: redisstore.Sentinel{Master: set.Master, Addrs: brokertest.Addrs(set.Sentinels), Password: password},
		Password: password,
	}
}

// clustered is a store on a cluster, of which it knows one node.
func clustered(set *brokertest.RedisSet) redisstore.Config {
	return redisstore.Config{Cluster: brokertest.Addrs(set.Nodes[1:2]), Password: broker.NewSecret(set.Password)}
}

func grantKey(i int) broker.Key { return broker.Key{Kind: "grant", Parts: []string{fmt.Sprint(i)}} }

// fill writes many records, which in a cluster lie everywhere.
func fill(t *testing.T, s *redisstore.Store, n int) {
	t.Helper()
	for i := range n {
		if err := s.Put(t.Context(), grantKey(i), 0, []byte("settled"), 0); err != nil {
			t.Fatal(err)
		}
	}
}

// survives checks that all records that settled are there, and that they can be
// changed.
func survives(t *testing.T, s *redisstore.Store, n int) {
	t.Helper()
	for i := range n {
		r, err := s.Get(t.Context(), grantKey(i))
		if err != nil || r.Revision != 1 || string(r.Box) != "settled" {
			t.Errorf("record %d after the fail-over: got revision %d %q, %v", i, r.Revision, r.Box, err)
			continue
		}
		if err := s.Put(t.Context(), grantKey(i), 1, []byte("after"), 0); err != nil {
			t.Errorf("record %d after the fail-over: Put: %v", i, err)
		}
	}
}

func TestSentinel(t *testing.T) {
	t.Parallel()
	set := brokertest.StartSentinels(t)
	t.Run("keeps the contract", func(t *testing.T) {
		brokertest.TestStore(t, func(t *testing.T) broker.Store { return open(t, watched(set)) })
	})
	t.Run("Check says what is wrong", func(t *testing.T) { sentinelCheck(t, set) })
	t.Run("what has settled outlives the primary", func(t *testing.T) { sentinelFailover(t, set) })
}

func sentinelCheck(t *testing.T, set *brokertest.RedisSet) {
	cfg := watched(set)
	cfg.Sentinel.Addrs = append([]string{fmt.Sprint("127.0.0.1:", freePort(t))}, cfg.Sentinel.Addrs[0])
	accepts(t, open(t, cfg)) // one that answers is enough

	cfg.Sentinel.Addrs = cfg.Sentinel.Addrs[:1]
	refuses(t, open(t, cfg), "the Sentinel at "+cfg.Sentinel.Addrs[0]+" can't be reached", "sentinel.addresses")
	cfg = watched(set)
	cfg.Sentinel.Master = "lib"
	refuses(t, open(t, cfg), "knows no master of that name: correct sentinel.master")
	cfg = watched(set)
	cfg.Sentinel.Password = broker.NewSecret("wrong")
	refuses(t, open(t, cfg), "sentinel.password_file")
	cfg.Sentinel.Password = broker.Secret{}
	refuses(t, open(t, cfg), "sentinel.password_file")
	cfg = watched(set)
	cfg.Password = broker.Secret{}
	refuses(t, open(t, cfg), "set password_file")

	sentinel := raw(t, &redis.Options{Addr: set.Sentinels[0].Addr, Password: set.Password})
	if err := sentinel.Do(t.Context(), "ACL", "SETUSER", "default", "nopass").Err(); err != nil {
		t.Fatal(err)
	}
	defer sentinel.Do(t.Context(), "ACL", "SETUSER", "default", "resetpass", ">"+set.Password)
	refuses(t, open(t, watched(set)), "the Sentinel at "+set.Sentinels[0].Addr+" serves anybody without a password")
}

func sentinelFailover(t *testing.T, set *brokertest.RedisSet) {
	ctx, n := t.Context(), 50
	s := open(t, watched(set))
	if err := s.Check(ctx); err != nil {
		t.Fatal(err)
	}
	fill(t, s, n)
	revision, err := s.Move(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Settle(ctx); err != nil {
		t.Fatal(err)
	}
	notes := listen(t, s)
	hears(t, notes, "")

	set.Sentinels[0].Kill() // of the same machine
	set.Nodes[0].Kill()
	if _, err := s.Get(ctx, grantKey(0)); err == nil || errors.Is(err, broker.ErrAbsent) {
		t.Errorf("without a primary: got %v, want an error that is no answer", err)
	}
	eventually(t, "the promoted replica takes changes", func() error { return s.Put(ctx, broker.Key{Kind: "new"}, 0, nil, 0) })
	survives(t, s, n)
	hearsAgain(t, s, notes)
	if p, err := s.Pulse(ctx); err != nil || p.Revision != revision {
		t.Errorf("Pulse: got %+v, %v; want revision %d", p, err, revision)
	}

	// The new primary alone is not what Sentinels are for.
	if err := s.Settle(ctx); err == nil || !strings.Contains(err.Error(), "no replica") {
		t.Errorf("Settle without a replica: %v", err)
	}
	set.Nodes[0].Start()
	refuted := false
	eventually(t, "Settle with the old primary as a replica", func() error {
		err := s.Settle(ctx)
		refuted = refuted || err != nil && strings.Contains(err.Error(), "another took its place")
		return err
	})
	if !refuted {
		t.Error("Settle did not say that another server answers than before")
	}
	accepts(t, s)
}

func TestCluster(t *testing.T) {
	t.Parallel()
	set := brokertest.StartCluster(t)
	t.Run("keeps the contract", func(t *testing.T) {
		brokertest.TestStore(t, func(t *testing.T) broker.Store { return open(t, clustered(set)) })
	})
	t.Run("Check says what is wrong", func(t *testing.T) { clusterCheck(t, set) })
	t.Run("a slot that moves takes its records along", func(t *testing.T) { clusterMove(t, set) })
	t.Run("what has settled outlives a master", func(t *testing.T) { clusterFailover(t, set) })
}

func clusterCheck(t *testing.T, set *brokertest.RedisSet) {
	last := raw(t, &redis.Options{Addr: set.Nodes[2].Addr, Password: set.Password})
	if err := last.ConfigSet(t.Context(), "maxmemory-policy", "allkeys-lru").Err(); err != nil {
		t.Fatal(err)
	}
	refuses(t, open(t, clustered(set)), "Redis at "+set.Nodes[2].Addr+" (of the cluster) drops records")
	if err := last.ConfigSet(t.Context(), "maxmemory-policy", "noeviction").Err(); err != nil {
		t.Fatal(err)
	}
	cfg := clustered(set)
	cfg.Cluster = append([]string{fmt.Sprint("127.0.0.1:", freePort(t))}, cfg.Cluster...)
	accepts(t, open(t, cfg))

	cfg.Cluster = cfg.Cluster[:1]
	refuses(t, open(t, cfg), "can't be reached", "cluster.addresses")
	cfg = clustered(set)
	cfg.Password = broker.Secret{}
	refuses(t, open(t, cfg), "set password_file")
	cfg = redisstore.Config{Addr: set.Nodes[0].Addr, Password: broker.NewSecret(set.Password)}
	refuses(t, open(t, cfg), "name it as cluster instead of address")

	port := freePort(t)
	brokertest.StartRedis(t, fmt.Sprint("port ", port), "requirepass "+password)
	cfg = redisstore.Config{Cluster: []string{fmt.Sprint("127.0.0.1:", port)}, Password: broker.NewSecret(password)}
	refuses(t, open(t, cfg), "name it as address instead of cluster")
}

// clusterMove has a slot move from one master to another while its record is
// changed: the client is sent after it, first for one command, then for good.
func clusterMove(t *testing.T, set *brokertest.RedisSet) {
	ctx := t.Context()
	from, to := set.Nodes[0], set.Nodes[1]
	do := func(r *brokertest.Redis, command ...string) string {
		t.Helper()
		answer, err := r.Ask(set.Password, command...)
		if err != nil {
			t.Fatalf("%q: %v", command, err)
		}
		return answer
	}
	k, name := broker.Key{Kind: "test"}, "tokenbroker:moving:record:test:"
	var slot string
	for i := 0; ; i++ { // a key of ours that is of the first master, alone in its slot
		k.Parts = []string{fmt.Sprint(i)}
		slot = do(from, "CLUSTER", "KEYSLOT", name+k.Parts[0])
		n, err := strconv.Atoi(slot)
		if err == nil && n < 16384/3 && do(from, "CLUSTER", "COUNTKEYSINSLOT", slot) == "0" {
			break
		}
	}
	cfg := clustered(set)
	cfg.Deployment = "moving"
	s := open(t, cfg)
	fromID, toID := do(from, "CLUSTER", "MYID"), do(to, "CLUSTER", "MYID")
	do(to, "CLUSTER", "SETSLOT", slot, "IMPORTING", fromID)
	do(from, "CLUSTER", "SETSLOT", slot, "MIGRATING", toID)
	for was := range int64(3) {
		if err := s.Put(ctx, k, was, []byte("x"), 0); err != nil {
			t.Errorf("Put while the slot moves: %v", err)
		}
	}
	if n := do(to, "CLUSTER", "COUNTKEYSINSLOT", slot); n != "1" {
		t.Errorf("the other master has %s records of the slot, want 1", n)
	}
	for _, r := range []*brokertest.Redis{to, from, set.Nodes[2]} {
		do(r, "CLUSTER", "SETSLOT", slot, "NODE", toID)
	}
	if err := s.Put(ctx, k, 3, []byte("y"), 0); err != nil {
		t.Errorf("Put once the slot has moved: %v", err)
	}
	if r, err := s.Get(ctx, k); err != nil || r.Revision != 4 {
		t.Errorf("Get: revision %d, %v; want 4", r.Revision, err)
	}
}

func clusterFailover(t *testing.T, set *brokertest.RedisSet) {
	ctx, n := t.Context(), 50
	s := open(t, clustered(set))
	if err := s.Check(ctx); err != nil {
		t.Fatal(err)
	}
	fill(t, s, n)
	set.Nodes[3].Freeze()
	if err := s.Settle(ctx); err == nil || !strings.Contains(err.Error(), "0 of 1 have confirmed") {
		t.Errorf("Settle while a master's replica hangs: %v", err)
	}
	set.Nodes[3].Thaw()
	eventually(t, "every master has settled", func() error { return s.Settle(ctx) })
	for _, r := range set.Nodes[:3] {
		node := raw(t, &redis.Options{Addr: r.Addr, Password: set.Password})
		if keys := node.Keys(ctx, "*:record:grant:*").Val(); len(keys) < 5 {
			t.Errorf("%s has %d of the records: they don't spread", r.Addr, len(keys))
		}
		if keys := node.Keys(ctx, "*:settled:*").Val(); len(keys) == 0 {
			t.Errorf("%s was not asked whether it has settled", r.Addr)
		}
	}

	listener := ofFirst(t, set)
	notes := listen(t, listener)
	hears(t, notes, "")

	set.Nodes[0].Kill()
	eventually(t, "all slots are served again", func() error {
		for i := range n {
			if _, err := s.Get(ctx, grantKey(i)); err != nil {
				return err
			}
		}
		_, err := s.Move(ctx)
		return err
	})
	survives(t, s, n)
	hearsAgain(t, listener, notes)
	if err := s.Settle(ctx); err == nil || !strings.Contains(err.Error(), "another took its place") {
		t.Errorf("Settle after the fail-over: got %v, want that another server answers than before", err)
	}
}

// ofFirst is a store that listens at the first node, which has its channel's slot.
func ofFirst(t *testing.T, set *brokertest.RedisSet) *redisstore.Store {
	t.Helper()
	cfg := clustered(set)
	for i := 0; ; i++ {
		cfg.Deployment = fmt.Sprint("notes", i)
		slot, err := set.Nodes[0].Ask(set.Password, "CLUSTER", "KEYSLOT", "tokenbroker:"+cfg.Deployment+":notes")
		if err != nil {
			t.Fatal(err)
		}
		if n, err := strconv.Atoi(slot); err == nil && n < 16384/3 {
			return open(t, cfg)
		}
	}
}

// The node says that it is where the proxy is.
func TestAWriteToAClusterWhoseAnswerIsLostIsNotSentAgain(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	port := freePort(t)
	var lose atomic.Bool
	between := proxy(t, fmt.Sprint("127.0.0.1:", port), &lose)
	_, announced, _ := strings.Cut(between, ":")
	server := brokertest.StartRedis(t, fmt.Sprint("port ", port), "cluster-enabled yes", "cluster-announce-ip 127.0.0.1", "cluster-announce-port "+announced)
	if _, err := server.Ask("", "CLUSTER", "ADDSLOTSRANGE", "0", "16383"); err != nil {
		t.Fatal(err)
	}
	s := open(t, redisstore.Config{Cluster: []string{between}})
	eventually(t, "the cluster serves", func() error { _, err := s.Pulse(ctx); return err })
	if err := s.Put(ctx, grantKey(1), 0, []byte("x"), 0); err != nil {
		t.Fatal(err)
	}
	lose.Store(true)
	err := s.Put(ctx, grantKey(1), 1, []byte("y"), 0)
	if err == nil || errors.Is(err, broker.ErrStale) {
		t.Errorf("got %v, want that the answer was lost", err)
	}
	if lose.Load() {
		t.Fatal("no answer was lost: the write went past the proxy")
	}
	if r, err := s.Get(ctx, grantKey(1)); err != nil || r.Revision != 2 {
		t.Errorf("got revision %d, %v; want that the write had happened, once", r.Revision, err)
	}
}
