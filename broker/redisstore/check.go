package redisstore

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"

	"tokenbroker/broker"
)

// Check implements broker.Store. Whatever is wrong with how Redis is set up is
// said at once, a line each.
func (s *Store) Check(ctx context.Context) error {
	if err := s.reachable(ctx); err != nil {
		return err
	}
	if err := s.writable(ctx); err != nil {
		return err
	}
	return errors.Join(s.keeping(ctx), s.protected(ctx))
}

// where says where Redis is, for sentences.
func (s *Store) where() string {
	if s.cfg.Socket != "" {
		return "Redis at " + s.cfg.Socket
	}
	return "Redis at " + s.cfg.Addr
}

func (s *Store) user() string {
	if s.cfg.User == "" {
		return "default"
	}
	return s.cfg.User
}

func (s *Store) reachable(ctx context.Context) error {
	return s.sentence(s.client.Ping(ctx).Err())
}

// writable does everything that a broker will do, on keys that mean nothing,
// so that a missing right shows now and not at the first revocation.
func (s *Store) writable(ctx context.Context) error {
	record := broker.Key{Kind: "probe", Parts: []string{rand.Text()}}
	if err := s.tryCommands(ctx, s.record(record)); err != nil {
		return s.sentence(err)
	}
	if err := s.tryRecord(ctx, record); err != nil {
		return s.sentence(err)
	}
	// One set and one key for all brokers: what a crash leaves is left once.
	set, member := broker.Key{Kind: "probe"}, rand.Text()
	if err := s.Add(ctx, set, member); err != nil {
		return s.sentence(err)
	}
	if _, err := s.Members(ctx, set); err != nil {
		return s.sentence(err)
	}
	if err := s.Remove(ctx, set, member); err != nil {
		return s.sentence(err)
	}
	if _, err := s.Pulse(ctx); err != nil {
		return s.sentence(err)
	}
	revision := prefix(s.cfg.Deployment) + "probe"
	if err := s.run(ctx, moveScript, revision).Err(); err != nil {
		return s.sentence(err)
	}
	return s.sentence(s.client.Del(ctx, revision).Err())
}

// tryCommands runs what our scripts run, because of a script Redis doesn't say
// which of its commands the user may not run. It runs a script by its text, too:
// those that Redis knows already are called by their sums.
func (s *Store) tryCommands(ctx context.Context, probe string) error {
	for _, command := range [][]any{
		{"EVAL", "return 'done'", 1, probe},
		{"TIME"},
		{"SET", probe, "1", "PX", 60_000},
		{"GET", probe},
		{"DEL", probe},
		{"HSET", probe, "r", "1"},
		{"PEXPIRE", probe, 60_000},
		{"HGET", probe, "r"},
		{"PERSIST", probe},
		{"DEL", probe},
	} {
		if err := s.client.Do(ctx, command...).Err(); err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) tryRecord(ctx context.Context, k broker.Key) error {
	for was, life := range []time.Duration{0, time.Minute} {
		box := []byte(rand.Text())
		if err := s.Put(ctx, k, int64(was), box, life); err != nil {
			return err
		}
		got, err := s.Get(ctx, k)
		if errors.Is(err, broker.ErrAbsent) || err == nil && !bytes.Equal(got.Box, box) {
			return refusal("it doesn't return what was just written: look what is between it and the broker")
		}
		if err != nil {
			return err
		}
	}
	return s.Delete(ctx, k, 2)
}

// keeping checks that Redis drops nothing, neither for want of memory nor at a
// restart. INFO tells both, so the right to use CONFIG isn't needed.
func (s *Store) keeping(ctx context.Context) error {
	text, err := s.client.Info(ctx).Result()
	if err != nil {
		return s.sentence(err)
	}
	info := parseInfo(text)
	return errors.Join(s.checkEviction(info), s.checkPersistence(info), s.checkWait(ctx))
}

// checkWait looks whether we may ask replicas what they have; see Settle. A
// stand-in for Redis need not know how.
func (s *Store) checkWait(ctx context.Context) error {
	if s.cfg.AllowNoPersistence {
		return nil
	}
	return s.sentence(s.client.Do(ctx, "WAIT", 0, 1).Err())
}

func parseInfo(text string) map[string]string {
	info := make(map[string]string)
	for line := range strings.Lines(text) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), ":"); ok {
			info[name] = value
		}
	}
	return info
}

func (s *Store) checkEviction(info map[string]string) error {
	policy, told := info["maxmemory_policy"]
	switch {
	case !told && s.cfg.AllowNoPersistence:
		return nil // a stand-in for Redis, like the demo's; it may lose everything anyway
	case !told:
		return fmt.Errorf("%s does not say whether it drops records when its memory is full: use a real Redis, or accept losing grants with allow_no_persistence", s.where())
	case policy != "noeviction":
		return fmt.Errorf("%s drops records when its memory is full (maxmemory-policy %s): set \"maxmemory-policy noeviction\" in its configuration", s.where(), policy)
	}
	return nil
}

func (s *Store) checkPersistence(info map[string]string) error {
	if s.cfg.AllowNoPersistence {
		return nil
	}
	if info["aof_enabled"] != "1" {
		return fmt.Errorf("%s forgets records when it restarts (appendonly no), and everyone would have to log in again: set \"appendonly yes\" in its configuration, or accept that with allow_no_persistence", s.where())
	}
	if status := info["aof_last_write_status"]; status != "" && status != "ok" {
		return fmt.Errorf("%s can't write its append-only file: look at its disk and its log", s.where())
	}
	return nil
}

// protected asks for our revision like a stranger, without name, password and
// certificate. That proves more than a look at our own configuration: a server
// whose default user is open takes any password of us and is open all the same.
func (s *Store) protected(ctx context.Context) error {
	o := s.cfg.options()
	o.Username, o.Password = "", ""
	o.PoolSize = 1
	certified := o.TLSConfig != nil && (len(o.TLSConfig.Certificates) > 0 || o.TLSConfig.GetClientCertificate != nil)
	if certified {
		o.TLSConfig = o.TLSConfig.Clone()
		o.TLSConfig.Certificates, o.TLSConfig.GetClientCertificate = nil, nil
	}
	stranger := redis.NewClient(o)
	defer stranger.Close()

	err := stranger.Get(ctx, s.revision()).Err()
	if err == nil || errors.Is(err, redis.Nil) {
		return s.open()
	}
	var answer refusal
	if errors.As(s.clean(err), &answer) || certified {
		return nil
	}
	return s.sentence(err)
}

// open judges a Redis that asks for no password.
func (s *Store) open() error {
	if s.cfg.Socket == "" {
		return fmt.Errorf("%s serves anybody without a password: set \"requirepass\", or switch its user default off, and set password_file here; or use a Unix socket", s.where())
	}
	why, err := exposed(s.cfg.Socket)
	if err != nil {
		return fmt.Errorf("%s: who may open it can't be seen: let the broker's user search the socket's directories (%w)", s.where(), err)
	}
	if why == "" {
		return nil
	}
	return fmt.Errorf("%s serves anybody on this host without a password (%s): set \"unixsocketperm 770\" in its configuration and put the broker's user into its group, or set a password", s.where(), why)
}

// exposed says how others than a socket's owner and group could open it, or put
// their own in its place; empty: they can't.
func exposed(socket string) (string, error) {
	path, err := filepath.Abs(socket)
	if err != nil {
		return "", err
	}
	path, err = filepath.EvalSymlinks(path)
	if err != nil {
		return "", err
	}
	info, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	closed := info.Mode().Perm()&0o002 == 0 // to connect is to write
	why := fmt.Sprintf("its mode is %04o", info.Mode().Perm())

	for dir := filepath.Dir(path); ; dir = filepath.Dir(dir) {
		info, err := os.Stat(dir)
		if err != nil {
			return "", err
		}
		mode := info.Mode()
		if mode.Perm()&0o001 == 0 { // others don't get past it, whatever lies below
			return "", nil
		}
		// In a sticky directory, like /tmp, they can't replace what is there,
		// but can be there first.
		if mode.Perm()&0o002 != 0 && (mode&fs.ModeSticky == 0 || dir == filepath.Dir(path)) {
			closed, why = false, fmt.Sprintf("everybody may write to %s", dir)
		}
		if dir == filepath.Dir(dir) {
			break
		}
	}
	if closed {
		return "", nil
	}
	return why, nil
}

// advice is what to do about Redis' refusals.
var advice = []struct{ kind, sentence string }{
	{"NOAUTH", "wants a password: set password_file"},
	{"WRONGPASS", "doesn't accept the password of user {user}: correct user and password_file"},
	{"invalid password", "doesn't accept the password of user {user}: correct user and password_file"},
	{"LOADING", "is still reading its records from disk: wait until it has"},
	{"READONLY", "is a replica, which takes no changes: name the primary"},
	{"MASTERDOWN", "is a replica without its primary: name the primary"},
	{"MISCONF", "takes no changes because it can't write to its disk: look at its disk and its log"},
	{"OOM ", "takes no changes because its memory is full: raise its maxmemory"},
	{"NOREPLICAS", "takes no changes because it has too few replicas: start them, or lower min-replicas-to-write"},
	{"max number of clients", "has too many clients: raise its maxclients"},
	{"MOVED", "is part of a Redis Cluster, which is not served yet: name a Redis without cluster mode"},
	{"CLUSTERDOWN", "is part of a Redis Cluster, which is not served yet: name a Redis without cluster mode"},
	{"DB index is out of range", "has fewer databases: correct db"},
	{"access a key", "doesn't let user {user} have our keys: give the right by ACL SETUSER {user} ~tokenbroker:*"},
	{"access one of the keys", "doesn't let user {user} have our keys: give the right by ACL SETUSER {user} ~tokenbroker:*"},
}

var missingRight = regexp.MustCompile(`permissions to run the '([^']+)' command`)

// sentence turns an error into what an administrator is told; nil stays nil.
func (s *Store) sentence(err error) error {
	if err == nil {
		return nil
	}
	err = s.clean(err)
	var answer refusal
	if !errors.As(err, &answer) {
		return s.unreachable(err)
	}
	if m := missingRight.FindStringSubmatch(string(answer)); m != nil {
		return fmt.Errorf("%s doesn't let user %s run %s: give the right by ACL SETUSER %[2]s +%[3]s", s.where(), s.user(), m[1])
	}
	for _, a := range advice {
		if answer.is(a.kind) {
			return errors.New(s.where() + " " + strings.ReplaceAll(a.sentence, "{user}", s.user()))
		}
	}
	return fmt.Errorf("%s doesn't work for us: %w", s.where(), answer)
}

// unreachable is for errors that Redis didn't answer.
func (s *Store) unreachable(err error) error {
	switch {
	case errors.Is(err, fs.ErrPermission) && s.cfg.Socket != "":
		return fmt.Errorf("%s may not be opened by us (uid %d): put the broker's user into the socket's group (%w)", s.where(), os.Geteuid(), err)
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%s did not answer in time: look whether it runs (%w)", s.where(), err)
	case s.cfg.TLS != nil:
		return fmt.Errorf("%s can't be reached by TLS: look whether it runs, and at address, tls and ca_file (%w)", s.where(), err)
	case s.cfg.Socket != "":
		return fmt.Errorf("%s can't be reached: start it, or correct socket (%w)", s.where(), err)
	}
	return fmt.Errorf("%s can't be reached: start it, or correct address (%w)", s.where(), err)
}
