// Package redisstore keeps a deployment's records in Redis: broker.Store on
// go-redis. It needs Redis 6.2 or newer, or Valkey: one server, a primary with
// replicas under Sentinel, or a Redis Cluster.
//
// What lies there, for a deployment called lab:
//
//	tokenbroker:lab:record:<kind>:<part>:…   hash: r the revision, b the sealed box
//	tokenbroker:lab:set:<kind>:<part>:…      set
//	tokenbroker:lab:revision                 one number
//
// and the channel tokenbroker:lab:notes, over which brokers tell each other.
// Kind and parts are percent-encoded, so every key can be read by people, no
// two keys meet, and none holds a brace: in a Redis Cluster keys spread over
// the slots. Each change is one script on one key.
//
// An ACL user needs these rights and no others; Check names one that is
// missing:
//
//	~tokenbroker:* &tokenbroker:* +ping +select +info +eval +evalsha +time +publish +subscribe
//	+get +set +hget +hmget +hset +del +persist +pexpire +sadd +srem +smembers +wait +scan
//
// and +cluster|slots in a cluster. Of the Sentinels it needs
// +sentinel|get-master-addr-by-name +sentinel|sentinels +subscribe and the
// channels &+switch-master &+replica-reconf-done.
package redisstore

import (
	"context"
	"crypto/sha1" // what Redis names scripts by; nothing is protected by it
	"crypto/tls"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/logging"

	"tokenbroker/broker"
)

var _ broker.Store = (*Store)(nil)

// Config says where Redis is: one of Socket, Addr, Sentinel and Cluster is
// needed.
type Config struct {
	Deployment string // part of every key
	Socket     string // path of a Unix socket
	Addr       string // host:port
	Sentinel   Sentinel
	Cluster    []string    // host:port of some nodes of a Redis Cluster; they know the others
	TLS        *tls.Config // for Sentinels and all nodes, too
	User       string      // ACL user; empty: default
	Password   broker.Secret
	DB         int // not for a cluster

	// AllowNoPersistence makes Check accept a Redis that forgets everything
	// when it restarts: everyone logs in again.
	AllowNoPersistence bool
}

// A Store is a broker.Store on Redis.
type Store struct {
	cfg    Config
	client redis.UniversalClient // knows one server, the one that Sentinels name, or a cluster
	quiet  time.Duration         // the constant, but for tests

	mu   sync.Mutex // guards seen
	seen string     // which servers Settle spoke to last; see sameAs
}

// How long Redis may take. A healthy one answers within a millisecond; one
// that forks for a snapshot or waits for its disk stalls for a second or two.
const (
	dialTimeout = 2 * time.Second
	callTimeout = 4 * time.Second
)

// Open makes a store. It does not dial; Check does.
func Open(cfg Config) (*Store, error) {
	if err := cfg.check(); err != nil {
		return nil, fmt.Errorf("open the Redis store: %w", err)
	}
	// go-redis has one logger for the whole process. It writes free text to
	// stderr about errors that we return anyway, past the broker's own log and
	// its rules. Nothing else in the broker uses go-redis.
	redis.SetLogger(&logging.VoidLogger{})
	return &Store{cfg: cfg, client: cfg.connect(), quiet: quiet}, nil
}

// Close closes the connections. Calls under way return an error.
func (s *Store) Close() error {
	if err := s.client.Close(); err != nil {
		return fmt.Errorf("close the Redis store: %w", err)
	}
	return nil
}

// A script is Lua for Redis, and the sum that Redis knows it by.
type script struct{ text, sum string }

func newScript(text string) script {
	return script{text, fmt.Sprintf("%x", sha1.Sum([]byte(text)))}
}

// Scripts. Each touches KEYS[1] and nothing else. Numbers go in and out as
// strings, because Redis' Lua prints those above 10^14 rounded.
var (
	putScript = newScript(`
if (redis.call('HGET', KEYS[1], 'r') or '0') ~= ARGV[1] then return 'stale' end
redis.call('HSET', KEYS[1], 'r', ARGV[2], 'b', ARGV[3])
if ARGV[4] == 'keep' then return 'done' end
if ARGV[4] == '0' then redis.call('PERSIST', KEYS[1]) else redis.call('PEXPIRE', KEYS[1], ARGV[4]) end
return 'done'`)

	deleteScript = newScript(`
local r = redis.call('HGET', KEYS[1], 'r')
if r and r ~= ARGV[1] then return 'stale' end
redis.call('DEL', KEYS[1])
return 'done'`)

	// Above 2^53 adding one changes nothing any more, and a revision that does
	// not move hides revocations: better an error.
	moveScript = newScript(`
local t = redis.call('TIME')
local old = tonumber(redis.call('GET', KEYS[1]) or '0')
if not old or old >= 9007199254740991 then return redis.error_reply('ERR the revision is not a number that can rise') end
local new = math.max(old + 1, t[1] * 1000000 + t[2])
redis.call('SET', KEYS[1], string.format('%.0f', new))
return string.format('%.0f', new)`)

	// A stand-in for Redis need not know INFO.
	pulseScript = newScript(`
local t, info = redis.call('TIME'), redis.pcall('INFO', 'server')
local server = type(info) == 'string' and string.match(info, 'run_id:(%x+)') or ''
return {redis.call('GET', KEYS[1]) or '0', t[1], t[2], server}`)
)

// Get implements broker.Store.
func (s *Store) Get(ctx context.Context, k broker.Key) (broker.Record, error) {
	fields, err := s.do(ctx, "HMGET", s.record(k), "r", "b").Slice()
	if err != nil {
		return broker.Record{}, s.wrap("get", k, err)
	}
	if fields[0] == nil && fields[1] == nil {
		return broker.Record{}, broker.ErrAbsent
	}
	revision, ok := fields[0].(string)
	box, ok2 := fields[1].(string)
	n, err := strconv.ParseInt(revision, 10, 64)
	if !ok || !ok2 || err != nil {
		return broker.Record{}, s.wrap("get", k, errors.New("what lies there is not a record of ours"))
	}
	return broker.Record{Revision: n, Box: []byte(box)}, nil
}

// Put implements broker.Store.
func (s *Store) Put(ctx context.Context, k broker.Key, was int64, box []byte, life time.Duration) error {
	answer, err := s.run(ctx, putScript, s.record(k), was, was+1, box, ending(life)).Text()
	return s.changed("put", k, answer, err)
}

// Delete implements broker.Store.
func (s *Store) Delete(ctx context.Context, k broker.Key, was int64) error {
	answer, err := s.run(ctx, deleteScript, s.record(k), was).Text()
	return s.changed("delete", k, answer, err)
}

// changed reads the answer of a script that may find another revision.
func (s *Store) changed(what string, k broker.Key, answer string, err error) error {
	switch {
	case err != nil:
		return s.wrap(what, k, err)
	case answer == "stale":
		return broker.ErrStale
	}
	return nil
}

// Add implements broker.Store.
func (s *Store) Add(ctx context.Context, k broker.Key, member string) error {
	return s.wrap("add to", k, s.do(ctx, "SADD", s.set(k), member).Err())
}

// Remove implements broker.Store.
func (s *Store) Remove(ctx context.Context, k broker.Key, member string) error {
	return s.wrap("remove from", k, s.do(ctx, "SREM", s.set(k), member).Err())
}

// Members implements broker.Store.
func (s *Store) Members(ctx context.Context, k broker.Key) ([]string, error) {
	members, err := s.do(ctx, "SMEMBERS", s.set(k)).StringSlice()
	if err != nil {
		return nil, s.wrap("list", k, err)
	}
	return members, nil
}

// Move implements broker.Store.
func (s *Store) Move(ctx context.Context) (int64, error) {
	revision, err := s.run(ctx, moveScript, s.revision()).Int64()
	if err != nil {
		return 0, s.explain("move the revision", err)
	}
	return revision, nil
}

// Pulse implements broker.Store. It is one round trip.
func (s *Store) Pulse(ctx context.Context) (broker.Pulse, error) {
	answer, err := s.run(ctx, pulseScript, s.revision()).StringSlice()
	if err != nil {
		return broker.Pulse{}, s.explain("read the revision", err)
	}
	if len(answer) != 4 {
		return broker.Pulse{}, fmt.Errorf("read the revision from Redis: got %d values, want 4", len(answer))
	}
	var n [3]int64
	for i := range n {
		if n[i], err = strconv.ParseInt(answer[i], 10, 64); err != nil {
			return broker.Pulse{}, fmt.Errorf("read the revision from Redis: %q is no number", answer[i])
		}
	}
	return broker.Pulse{Revision: n[0], Now: time.Unix(n[1], n[2]*1000), Server: answer[3]}, nil
}

// run runs a script on one key. That it may be sent twice is no retry: the
// first time Redis didn't know it yet.
func (s *Store) run(ctx context.Context, sc script, key string, args ...any) *redis.Cmd {
	cmd := s.do(ctx, slices.Concat([]any{"EVALSHA", sc.sum, 1, key}, args)...)
	if !redis.HasErrorPrefix(cmd.Err(), "NOSCRIPT") {
		return cmd
	}
	return s.do(ctx, slices.Concat([]any{"EVAL", sc.text, 1, key}, args)...)
}

// ending is a life for putScript: milliseconds, 0 for none. A shorter one than
// Redis can count is rounded up.
func ending(life time.Duration) any {
	switch {
	case life == broker.KeepLife:
		return "keep"
	case life <= 0:
		return 0
	}
	return max(1, life.Milliseconds())
}
