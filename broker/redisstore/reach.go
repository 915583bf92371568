package redisstore

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"

	"tokenbroker/broker"
)

// Where Redis is: one server, one that Sentinels name, or a cluster.

// A Sentinel set names the primary of a Redis with replicas, and promotes one
// of those when the primary is gone.
type Sentinel struct {
	Master   string   // the name that the Sentinels know it by
	Addrs    []string // host:port of some Sentinels; they know the others
	User     string   // ACL user of the Sentinels; empty: default
	Password broker.Secret
}

func (c Config) check() error {
	const maxSocket = len(syscall.RawSockaddrUnix{}.Path) - 1
	switch {
	case c.Deployment == "":
		return errors.New("the deployment has no name")
	case c.ways() == 0:
		return errors.New("neither socket nor address, sentinel nor cluster is set: say where Redis is")
	case c.ways() > 1:
		return errors.New("more than one of socket, address, sentinel and cluster is set: leave one")
	case len(c.Socket) > maxSocket:
		return fmt.Errorf("the socket's path %s is longer than %d bytes, which no program can open: choose a shorter one", c.Socket, maxSocket)
	case c.Socket != "" && c.TLS != nil:
		return errors.New("TLS is set for a Unix socket: leave it out")
	case c.User != "" && c.Password.IsZero():
		return fmt.Errorf("the user %q has no password: set password_file", c.User)
	case c.DB < 0:
		return fmt.Errorf("db is %d: it can't be negative", c.DB)
	case len(c.Cluster) > 0 && c.DB != 0:
		return fmt.Errorf("db is %d: a cluster has no other than 0", c.DB)
	}
	if err := c.Sentinel.check(); err != nil {
		return err
	}
	addrs := slices.Concat(c.Sentinel.Addrs, c.Cluster)
	if c.Addr != "" {
		addrs = append(addrs, c.Addr)
	}
	for _, addr := range addrs {
		if host, port, err := net.SplitHostPort(addr); err != nil || host == "" || port == "" {
			return fmt.Errorf("the address %q is not host:port", addr)
		}
	}
	return nil
}

func (s Sentinel) check() error {
	switch {
	case !s.isSet():
		return nil
	case s.Master == "":
		return errors.New("sentinel names no master: set the name that the Sentinels know it by")
	case len(s.Addrs) == 0:
		return errors.New("sentinel has no addresses: say where the Sentinels are")
	case s.User != "" && s.Password.IsZero():
		return fmt.Errorf("the user %q of the Sentinels has no password: set sentinel.password_file", s.User)
	}
	return nil
}

func (s Sentinel) isSet() bool { return s.Master != "" || len(s.Addrs) > 0 }

// ways counts in how many ways c says where Redis is.
func (c Config) ways() (n int) {
	for _, set := range []bool{c.Socket != "", c.Addr != "", c.Sentinel.isSet(), len(c.Cluster) > 0} {
		if set {
			n++
		}
	}
	return n
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

// failover is options for a primary that Sentinels name. They are asked at each
// new connection, and tell when they promote another.
func (c Config) failover() *redis.FailoverOptions {
	o := c.options()
	return &redis.FailoverOptions{
		MasterName:            c.Sentinel.Master,
		SentinelAddrs:         c.Sentinel.Addrs,
		SentinelUsername:      c.Sentinel.User,
		SentinelPassword:      c.Sentinel.Password.Reveal(),
		TLSConfig:             o.TLSConfig,
		Username:              o.Username,
		Password:              o.Password,
		DB:                    o.DB,
		Protocol:              o.Protocol,
		MaxRetries:            o.MaxRetries,
		DialerRetries:         o.DialerRetries,
		DialTimeout:           o.DialTimeout,
		ReadTimeout:           o.ReadTimeout,
		WriteTimeout:          o.WriteTimeout,
		PoolTimeout:           o.PoolTimeout,
		ContextTimeoutEnabled: o.ContextTimeoutEnabled,
		DisableIdentity:       o.DisableIdentity,
	}
}

// cluster is options for a cluster. It follows redirections, which say that a
// command was not carried out; what else it would try again, once forbids.
func (c Config) cluster() *redis.ClusterOptions {
	o := c.options()
	return &redis.ClusterOptions{
		Addrs:                    c.Cluster,
		TLSConfig:                o.TLSConfig,
		Username:                 o.Username,
		Password:                 o.Password,
		Protocol:                 o.Protocol,
		MaxRetries:               o.MaxRetries,
		DialerRetries:            o.DialerRetries,
		DialTimeout:              o.DialTimeout,
		ReadTimeout:              o.ReadTimeout,
		WriteTimeout:             o.WriteTimeout,
		PoolTimeout:              o.PoolTimeout,
		ContextTimeoutEnabled:    o.ContextTimeoutEnabled,
		DisableIdentity:          o.DisableIdentity,
		MaintNotificationsConfig: o.MaintNotificationsConfig,
		// Each of our commands has one key, which says where it belongs; to look
		// up what else there is takes one more right.
		DisableRoutingPolicies: true,
	}
}

// connect makes the client that c asks for. It does not dial.
func (c Config) connect() redis.UniversalClient {
	switch {
	case c.Sentinel.isSet():
		return redis.NewFailoverClient(c.failover())
	case len(c.Cluster) > 0:
		return redis.NewClusterClient(c.cluster())
	}
	return redis.NewClient(c.options())
}

// once is a command that go-redis must not send again after a lost answer. That
// it is sent to the node that a redirection names is no second time.
type once struct{ *redis.Cmd }

// NoRetry implements redis.Cmder.
func (once) NoRetry() bool { return true }

// do runs one command, whose key is where Redis expects it.
func (s *Store) do(ctx context.Context, args ...any) *redis.Cmd {
	cmd := redis.NewCmd(ctx, args...)
	s.unanswered(ctx, s.client.Process(ctx, once{cmd}))
	return cmd
}

// unanswered has the cluster looked at anew if err is no answer of it: who doesn't
// answer may have been replaced.
func (s *Store) unanswered(ctx context.Context, err error) {
	var answer redis.Error
	if c, ok := s.client.(*redis.ClusterClient); ok && err != nil && !errors.As(err, &answer) {
		c.ReloadState(ctx)
	}
}

// A primary is a Redis that takes changes: the only one, or one of a cluster's.
type primary struct {
	where  string // for sentences
	client *redis.Client
	key    string // a key of ours that belongs there
}

// primaries are all that hold our records.
func (s *Store) primaries(ctx context.Context) ([]primary, error) {
	if c, ok := s.client.(*redis.ClusterClient); ok {
		return s.masters(ctx, c)
	}
	return []primary{{s.where(), s.client.(*redis.Client), prefix(s.cfg.Deployment) + "settled"}}, nil
}

// manyKeys is how many keys masters looks at, before it gives up finding one for
// each master: a hundred per slot of the cluster.
const manyKeys = 100 * 16384

// masters asks the cluster anew who its masters are.
func (s *Store) masters(ctx context.Context, c *redis.ClusterClient) ([]primary, error) {
	var mu sync.Mutex // guards found
	found := make(map[*redis.Client]string)
	err := c.ForEachMaster(ctx, func(_ context.Context, node *redis.Client) error {
		mu.Lock()
		defer mu.Unlock()
		found[node] = ""
		return nil
	})
	if err != nil {
		return nil, err
	}
	var all []primary
	for i := 0; len(all) < len(found); i++ {
		key := prefix(s.cfg.Deployment) + "settled:" + strconv.Itoa(i)
		node, err := c.MasterForKey(ctx, key)
		if err != nil {
			return nil, err
		}
		if taken, known := found[node]; known && taken == "" {
			found[node] = key
			all = append(all, primary{"Redis at " + node.Options().Addr + " (of the cluster)", node, key})
		}
		if i > manyKeys {
			return nil, errors.New("a master of the cluster holds no slot that any of our keys lies in")
		}
	}
	return all, nil
}

// where says where Redis is, for sentences.
func (s *Store) where() string {
	switch {
	case s.cfg.Socket != "":
		return "Redis at " + s.cfg.Socket
	case s.cfg.Sentinel.isSet():
		return fmt.Sprintf("Redis at %s (Sentinels %s)", s.cfg.Sentinel.Master, strings.Join(s.cfg.Sentinel.Addrs, ", "))
	case len(s.cfg.Cluster) > 0:
		return fmt.Sprintf("Redis at %s (cluster)", strings.Join(s.cfg.Cluster, ", "))
	}
	return "Redis at " + s.cfg.Addr
}
