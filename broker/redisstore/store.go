// Package redisstore keeps a deployment's records in Redis: broker.Store on
// go-redis. It needs Redis 6.2 or newer, or Valkey.
//
// What lies there, for a deployment called lab:
//
//	tokenbroker:lab:record:<kind>:<part>:…   hash: r the revision, b the sealed box
//	tokenbroker:lab:set:<kind>:<part>:…      set
//	tokenbroker:lab:revision                 one number
//
// Kind and parts are percent-encoded, so every key can be read by people, no
// two keys meet, and none holds a brace: in a Redis Cluster keys spread over
// the slots. Each change is one script on one key.
//
// An ACL user needs these rights and no others; Check names one that is
// missing:
//
//	~tokenbroker:* +ping +select +info +eval +evalsha +time
//	+get +set +hget +hmget +hset +del +persist +pexpire +sadd +srem +smembers +wait
package redisstore

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strconv"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/logging"
	"github.com/redis/go-redis/v9/maintnotifications"

	"tokenbroker/broker"
)

var _ broker.Store = (*Store)(nil)

// Config says where Redis is. Either Socket or Addr is needed.
type Config struct {
	Deployment string // part of every key
	Socket     string // path of a Unix socket
	Addr       string // host:port
	TLS        *tls.Config
	User       string // ACL user; empty: default
	Password   broker.Secret
	DB         int

	// AllowNoPersistence makes Check accept a Redis that forgets everything
	// when it restarts: everyone logs in again.
	AllowNoPersistence bool
}

// A Store is a broker.Store on Redis.
type Store struct {
	cfg    Config
	client *redis.Client
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
	return &Store{cfg: cfg, client: redis.NewClient(cfg.options())}, nil
}

// Close closes the connections. Calls under way return an error.
func (s *Store) Close() error {
	if err := s.client.Close(); err != nil {
		return fmt.Errorf("close the Redis store: %w", err)
	}
	return nil
}

func (c Config) check() error {
	const maxSocket = len(syscall.RawSockaddrUnix{}.Path) - 1
	switch {
	case c.Deployment == "":
		return errors.New("the deployment has no name")
	case c.Socket == "" && c.Addr == "":
		return errors.New("neither socket nor address is set: say where Redis is")
	case c.Socket != "" && c.Addr != "":
		return errors.New("socket and address are both set: leave one out")
	case len(c.Socket) > maxSocket:
		return fmt.Errorf("the socket's path %s is longer than %d bytes, which no program can open: choose a shorter one", c.Socket, maxSocket)
	case c.Socket != "" && c.TLS != nil:
		return errors.New("TLS is set for a Unix socket: leave it out")
	case c.User != "" && c.Password.IsZero():
		return fmt.Errorf("the user %q has no password: set password_file", c.User)
	case c.DB < 0:
		return fmt.Errorf("db is %d: it can't be negative", c.DB)
	}
	if c.Addr != "" {
		if host, port, err := net.SplitHostPort(c.Addr); err != nil || host == "" || port == "" {
			return fmt.Errorf("the address %q is not host:port", c.Addr)
		}
	}
	return nil
}

// options are go-redis's. It must not try anything twice by itself: a write
// whose answer is lost may have happened, and only the domain knows what then.
func (c Config) options() *redis.Options {
	o := &redis.Options{
		Network:               "tcp",
		Addr:                  c.Addr,
		TLSConfig:             c.TLS,
		Username:              c.User,
		Password:              c.Password.Reveal(),
		DB:                    c.DB,
		Protocol:              2,
		MaxRetries:            -1,
		DialerRetries:         1,
		DialTimeout:           dialTimeout,
		ReadTimeout:           callTimeout,
		WriteTimeout:          callTimeout,
		PoolTimeout:           callTimeout,
		ContextTimeoutEnabled: true,
		// Two more commands per connection which an ACL user would need.
		DisableIdentity:          true,
		MaintNotificationsConfig: &maintnotifications.Config{Mode: maintnotifications.ModeDisabled},
	}
	if c.Socket != "" {
		o.Network, o.Addr = "unix", c.Socket
	}
	return o
}

// Scripts. Each touches KEYS[1] and nothing else. Numbers go in and out as
// strings, because Redis' Lua prints those above 10^14 rounded.
var (
	putScript = redis.NewScript(`
if (redis.call('HGET', KEYS[1], 'r') or '0') ~= ARGV[1] then return 'stale' end
redis.call('HSET', KEYS[1], 'r', ARGV[2], 'b', ARGV[3])
if ARGV[4] == '0' then redis.call('PERSIST', KEYS[1]) else redis.call('PEXPIRE', KEYS[1], ARGV[4]) end
return 'done'`)

	deleteScript = redis.NewScript(`
local r = redis.call('HGET', KEYS[1], 'r')
if r and r ~= ARGV[1] then return 'stale' end
redis.call('DEL', KEYS[1])
return 'done'`)

	// Above 2^53 adding one changes nothing any more, and a revision that does
	// not move hides revocations: better an error.
	moveScript = redis.NewScript(`
local t = redis.call('TIME')
local old = tonumber(redis.call('GET', KEYS[1]) or '0')
if not old or old >= 9007199254740991 then return redis.error_reply('ERR the revision is not a number that can rise') end
local new = math.max(old + 1, t[1] * 1000000 + t[2])
redis.call('SET', KEYS[1], string.format('%.0f', new))
return string.format('%.0f', new)`)

	pulseScript = redis.NewScript(`
local t = redis.call('TIME')
return {redis.call('GET', KEYS[1]) or '0', t[1], t[2]}`)
)

// Get implements broker.Store.
func (s *Store) Get(ctx context.Context, k broker.Key) (broker.Record, error) {
	fields, err := s.client.HMGet(ctx, s.record(k), "r", "b").Result()
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
	answer, err := s.run(ctx, putScript, s.record(k), was, was+1, box, millis(life)).Text()
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
	return s.wrap("add to", k, s.client.SAdd(ctx, s.set(k), member).Err())
}

// Remove implements broker.Store.
func (s *Store) Remove(ctx context.Context, k broker.Key, member string) error {
	return s.wrap("remove from", k, s.client.SRem(ctx, s.set(k), member).Err())
}

// Members implements broker.Store.
func (s *Store) Members(ctx context.Context, k broker.Key) ([]string, error) {
	members, err := s.client.SMembers(ctx, s.set(k)).Result()
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
	n, err := s.run(ctx, pulseScript, s.revision()).Int64Slice()
	if err != nil {
		return broker.Pulse{}, s.explain("read the revision", err)
	}
	if len(n) != 3 {
		return broker.Pulse{}, fmt.Errorf("read the revision from Redis: got %d numbers, want 3", len(n))
	}
	return broker.Pulse{Revision: n[0], Now: time.Unix(n[1], n[2]*1000)}, nil
}

// run runs a script on one key. That it may be sent twice is no retry: the
// first time Redis didn't know it yet.
func (s *Store) run(ctx context.Context, script *redis.Script, key string, args ...any) *redis.Cmd {
	return script.Run(ctx, s.client, []string{key}, args...)
}

// millis is a life for PEXPIRE, 0 for none; a shorter one than Redis can count
// is rounded up.
func millis(life time.Duration) int64 {
	if life <= 0 {
		return 0
	}
	return max(1, life.Milliseconds())
}
