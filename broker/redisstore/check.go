package redisstore

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
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
	open, err := s.checkSentinels(ctx)
	if err != nil {
		return err
	}
	all, err := s.primaries(ctx)
	if err != nil {
		return s.sentence(err)
	}
	if err := s.writable(ctx, all); err != nil {
		return err
	}
	errs, ids := []error{open}, make([]string, len(all))
	for i, p := range all {
		id, err := s.keeping(ctx, p)
		ids[i] = id
		errs = append(errs, err, s.protected(ctx, p))
	}
	s.first(ids)
	return errors.Join(errs...)
}

// checkSentinels asks the Sentinels, if there are any, who the primary is. One
// that knows is enough. open is about those that answer strangers.
func (s *Store) checkSentinels(ctx context.Context) (open, err error) {
	var known bool
	var all, opens []error
	for _, addr := range s.cfg.Sentinel.Addrs {
		where := fmt.Sprintf("Redis at %s: the Sentinel at %s", s.cfg.Sentinel.Master, addr)
		err := s.askSentinel(ctx, addr, s.cfg.Sentinel.User, s.cfg.Sentinel.Password.Reveal())
		known = known || err == nil
		all = append(all, s.sentinelSentence(where, err))
		if err == nil && s.askSentinel(ctx, addr, "", "") == nil {
			opens = append(opens, fmt.Errorf("%s serves anybody without a password, who could have it send us to a Redis of his own, and us our password: set \"requirepass\" in its configuration, and sentinel.password_file here", where))
		}
	}
	if len(all) == 0 || known {
		return errors.Join(opens...), nil
	}
	return nil, errors.Join(all...)
}

func (s *Store) askSentinel(ctx context.Context, addr, user, password string) error {
	o := s.cfg.options()
	o.Addr, o.Username, o.Password, o.DB, o.PoolSize = addr, user, password, 0, 1
	if user == "" && password == "" {
		o.TLSConfig, _ = anonymous(o.TLSConfig)
	}
	c := redis.NewSentinelClient(o)
	defer c.Close()
	return c.GetMasterAddrByName(ctx, s.cfg.Sentinel.Master).Err()
}

func (s *Store) sentinelSentence(where string, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, redis.Nil) {
		return fmt.Errorf("%s knows no master of that name: correct sentinel.master", where)
	}
	err = s.clean(err)
	var answer refusal
	switch {
	case errors.As(err, &answer) && (answer.is("NOAUTH") || answer.is("WRONGPASS") || answer.is("invalid password")):
		return fmt.Errorf("%s doesn't accept our password: correct sentinel.user and sentinel.password_file", where)
	case errors.As(err, &answer):
		return fmt.Errorf("%s doesn't work for us: %w", where, answer)
	}
	return fmt.Errorf("%s can't be reached: start it, or correct sentinel.addresses (%w)", where, err)
}

func (s *Store) user() string {
	if s.cfg.User == "" {
		return "default"
	}
	return s.cfg.User
}

// writable does everything that a broker will do, on keys that mean nothing,
// so that a missing right shows now and not at the first revocation. The keys
// are anywhere in a cluster, so each of its masters also gets one of its own.
func (s *Store) writable(ctx context.Context, all []primary) error {
	for _, p := range all {
		if err := tryPrimary(ctx, p); err != nil {
			return s.sentenceAt(p.where, err)
		}
	}
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
	return s.sentence(s.do(ctx, "DEL", revision).Err())
}

// tryPrimary runs the commands that have no key, and one that changes something.
func tryPrimary(ctx context.Context, p primary) error {
	if err := p.client.Ping(ctx).Err(); err != nil {
		return err
	}
	if err := p.client.Time(ctx).Err(); err != nil {
		return err
	}
	if err := p.client.Scan(ctx, 0, p.key, 1).Err(); err != nil {
		return err
	}
	if err := p.client.Set(ctx, p.key, "1", time.Minute).Err(); err != nil {
		return err
	}
	if err := p.client.Del(ctx, p.key).Err(); err != nil {
		return err
	}
	return tryNotes(ctx, p)
}

// tryCommands runs what our scripts run, because of a script Redis doesn't say
// which of its commands the user may not run. It runs a script by its text, too:
// those that Redis knows already are called by their sums.
func (s *Store) tryCommands(ctx context.Context, probe string) error {
	for _, command := range [][]any{
		{"EVAL", "return 'done'", 1, probe},
		{"SET", probe, "1", "PX", 60_000},
		{"GET", probe},
		{"DEL", probe},
		{"HSET", probe, "r", "1"},
		{"PEXPIRE", probe, 60_000},
		{"HGET", probe, "r"},
		{"PERSIST", probe},
		{"DEL", probe},
	} {
		if err := s.do(ctx, command...).Err(); err != nil {
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
func (s *Store) keeping(ctx context.Context, p primary) (id string, err error) {
	text, err := p.client.Info(ctx).Result()
	if err != nil {
		return "", s.sentenceAt(p.where, err)
	}
	info := parseInfo(text)
	return identity(info), errors.Join(s.checkEviction(p, info), s.checkPersistence(p, info), s.checkWait(ctx, p))
}

// checkWait looks whether we may ask replicas what they have; see Settle. A
// stand-in for Redis need not know how.
func (s *Store) checkWait(ctx context.Context, p primary) error {
	if s.cfg.AllowNoPersistence {
		return nil
	}
	return s.sentenceAt(p.where, p.client.Do(ctx, "WAIT", 0, 1).Err())
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

func (s *Store) checkEviction(p primary, info map[string]string) error {
	policy, told := info["maxmemory_policy"]
	switch {
	case !told && s.cfg.AllowNoPersistence:
		return nil // a stand-in for Redis, like the demo's; it may lose everything anyway
	case !told:
		return fmt.Errorf("%s does not say whether it drops records when its memory is full: use a real Redis, or accept losing grants with allow_no_persistence", p.where)
	case policy != "noeviction":
		return fmt.Errorf("%s drops records when its memory is full (maxmemory-policy %s): set \"maxmemory-policy noeviction\" in its configuration", p.where, policy)
	}
	return nil
}

func (s *Store) checkPersistence(p primary, info map[string]string) error {
	if s.cfg.AllowNoPersistence {
		return nil
	}
	if info["aof_enabled"] != "1" {
		return fmt.Errorf("%s forgets records when it restarts (appendonly no), and everyone would have to log in again: set \"appendonly yes\" in its configuration, or accept that with allow_no_persistence", p.where)
	}
	if status := info["aof_last_write_status"]; status != "" && status != "ok" {
		return fmt.Errorf("%s can't write its append-only file: look at its disk and its log", p.where)
	}
	return nil
}

// protected asks for a key like a stranger, without name, password and
// certificate. That proves more than a look at our own configuration: a server
// whose default user is open takes any password of us and is open all the same.
func (s *Store) protected(ctx context.Context, p primary) error {
	c := s.cfg
	c.User, c.Password = "", broker.Secret{}
	tls, certified := anonymous(c.TLS)
	c.TLS = tls
	if len(c.Cluster) > 0 {
		c.Cluster, c.Addr = nil, p.client.Options().Addr
	}
	stranger := c.connect()
	defer stranger.Close()

	err := stranger.Get(ctx, p.key).Err()
	if err == nil || errors.Is(err, redis.Nil) {
		return s.open(p)
	}
	var answer refusal
	if errors.As(s.clean(err), &answer) || certified {
		return nil
	}
	return s.sentenceAt(p.where, err)
}

// anonymous is c without our certificate; certified says that there was one.
func anonymous(c *tls.Config) (_ *tls.Config, certified bool) {
	if c == nil || len(c.Certificates) == 0 && c.GetClientCertificate == nil {
		return c, false
	}
	c = c.Clone()
	c.Certificates, c.GetClientCertificate = nil, nil
	return c, true
}

// open judges a Redis that asks for no password.
func (s *Store) open(p primary) error {
	if s.cfg.Socket == "" {
		return fmt.Errorf("%s serves anybody without a password: set \"requirepass\", or switch its user default off, and set password_file here; or use a Unix socket", p.where)
	}
	why, err := exposed(s.cfg.Socket)
	if err != nil {
		return fmt.Errorf("%s: who may open it can't be seen: let the broker's user search the socket's directories (%w)", p.where, err)
	}
	if why == "" {
		return nil
	}
	return fmt.Errorf("%s serves anybody on this host without a password (%s): set \"unixsocketperm 770\" in its configuration and put the broker's user into its group, or set a password", p.where, why)
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

const noChannels = "doesn't let user {user} have our channels: give the right by ACL SETUSER {user} &tokenbroker:*"

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
	{"MOVED", "is part of a Redis Cluster: name it as cluster instead of address"},
	{"CLUSTERDOWN", "is part of a Redis Cluster that does not serve: look at \"redis-cli cluster info\" there"},
	{"cluster support disabled", "is no Redis Cluster: name it as address instead of cluster"},
	{"DB index is out of range", "has fewer databases: correct db"},
	{"access a key", "doesn't let user {user} have our keys: give the right by ACL SETUSER {user} ~tokenbroker:*"},
	{"access a channel", noChannels},
	{"access one of the channels", noChannels},
	{"access one of the keys", "doesn't let user {user} have our keys: give the right by ACL SETUSER {user} ~tokenbroker:*"},
}

var missingRight = regexp.MustCompile(`permissions to run the '([^']+)' command`)

// sentence turns an error into what an administrator is told; nil stays nil.
func (s *Store) sentence(err error) error { return s.sentenceAt(s.where(), err) }

// sentenceAt is sentence about one of several servers.
func (s *Store) sentenceAt(where string, err error) error {
	if err == nil {
		return nil
	}
	err = s.clean(err)
	var answer refusal
	if !errors.As(err, &answer) {
		return s.unreachable(where, err)
	}
	if m := missingRight.FindStringSubmatch(string(answer)); m != nil {
		return fmt.Errorf("%s doesn't let user %s run %s: give the right by ACL SETUSER %[2]s +%[3]s", where, s.user(), m[1])
	}
	for _, a := range advice {
		if answer.is(a.kind) {
			return errors.New(where + " " + strings.ReplaceAll(a.sentence, "{user}", s.user()))
		}
	}
	return fmt.Errorf("%s doesn't work for us: %w", where, answer)
}

// unreachable is for errors that Redis didn't answer.
func (s *Store) unreachable(where string, err error) error {
	switch {
	case errors.Is(err, fs.ErrPermission) && s.cfg.Socket != "":
		return fmt.Errorf("%s may not be opened by us (uid %d): put the broker's user into the socket's group (%w)", where, os.Geteuid(), err)
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%s did not answer in time: look whether it runs (%w)", where, err)
	case len(s.cfg.Cluster) > 0:
		return fmt.Errorf("%s can't be reached: start it, or correct cluster.addresses, tls and ca_file (%w)", where, err)
	case s.cfg.TLS != nil:
		return fmt.Errorf("%s can't be reached by TLS: look whether it runs, and at address, tls and ca_file (%w)", where, err)
	case s.cfg.Sentinel.isSet():
		return fmt.Errorf("%s can't be reached where the Sentinels say it is: look whether it runs (%w)", where, err)
	case s.cfg.Socket != "":
		return fmt.Errorf("%s can't be reached: start it, or correct socket (%w)", where, err)
	}
	return fmt.Errorf("%s can't be reached: start it, or correct address (%w)", where, err)
}
