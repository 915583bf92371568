package redisstore_test

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
	"tokenbroker/broker/redisstore"
)

// refuses checks that each line of an error names Redis, and that one of them
// says each want.
func refuses(t *testing.T, s *redisstore.Store, wants ...string) {
	t.Helper()
	err := s.Check(t.Context())
	if err == nil {
		t.Errorf("Check: got no error, want %q", wants)
		return
	}
	for line := range strings.Lines(err.Error()) {
		if !strings.HasPrefix(line, "Redis at ") {
			t.Errorf("Check: got %q, which doesn't say where", line)
		}
		if strings.Contains(line, "%!") || strings.Contains(line, "{user}") || strings.Contains(line, password) {
			t.Errorf("Check: got %q, which is no sentence", line)
		}
	}
	for _, want := range wants {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("Check: got %q, want it to say %q", err, want)
		}
	}
	t.Log(err)
}

func accepts(t *testing.T, s *redisstore.Store) {
	t.Helper()
	if err := s.Check(t.Context()); err != nil {
		t.Errorf("Check: %v", err)
	}
}

func TestCheckRefusesARedisThatLosesRecords(t *testing.T) {
	for _, tt := range []struct {
		why      string
		settings []string
		allow    bool
		want     string // empty: it is accepted
	}{
		{"evicts any key", []string{"maxmemory-policy allkeys-lru"}, false, `set "maxmemory-policy noeviction"`},
		{"evicts keys that have a life", []string{"maxmemory-policy volatile-ttl"}, false, "volatile-ttl"},
		{"evicts, and may forget at a restart", []string{"maxmemory-policy allkeys-lru", "appendonly no"}, true, "allkeys-lru"},
		{"no append-only file", []string{"appendonly no"}, false, `set "appendonly yes"`},
		{"no append-only file but snapshots", []string{"appendonly no", "save 1 1"}, false, `set "appendonly yes"`},
		{"no append-only file, which is allowed", []string{"appendonly no"}, true, ""},
		{"no memory left", []string{"maxmemory 1mb"}, false, "raise its maxmemory"},
		{"a replica", []string{"replicaof 127.0.0.1 1", "replica-serve-stale-data yes"}, false, "name the primary"},
		{"a replica without its primary", []string{"replicaof 127.0.0.1 1", "replica-serve-stale-data no"}, false, "name the primary"},
		{"too few replicas", []string{"min-replicas-to-write 1"}, false, "start them"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			server := brokertest.StartRedis(t, tt.settings...)
			s := open(t, redisstore.Config{Socket: server.Socket, AllowNoPersistence: tt.allow})
			if tt.want == "" {
				accepts(t, s)
				return
			}
			refuses(t, s, tt.want)
		})
	}
}

func TestCheckSaysEverythingThatIsWrongAtOnce(t *testing.T) {
	port := freePort(t)
	brokertest.StartRedis(t, fmt.Sprint("port ", port), "maxmemory-policy allkeys-lru", "appendonly no")
	s := open(t, redisstore.Config{Addr: fmt.Sprint("127.0.0.1:", port)})
	refuses(t, s, "noeviction", "appendonly yes", "requirepass")
}

func TestCheckLeavesNothingBehind(t *testing.T) {
	server := brokertest.StartRedis(t)
	accepts(t, open(t, redisstore.Config{Socket: server.Socket}))
	keys, err := raw(t, &redis.Options{Network: "unix", Addr: server.Socket}).Keys(t.Context(), "*").Result()
	if err != nil || len(keys) != 0 {
		t.Errorf("got keys %q, %v; want none", keys, err)
	}
}

func TestCheckRefusesARedisThatIsOpenToStrangers(t *testing.T) {
	for _, tt := range []struct {
		why      string
		settings []string
		cfg      redisstore.Config
		want     string // empty: it is accepted
	}{
		{"no password", nil, redisstore.Config{}, "requirepass"},
		{"a password", []string{"requirepass " + password}, redisstore.Config{Password: broker.NewSecret(password)}, ""},
		{
			"we have a password but strangers need none",
			[]string{"user default on nopass ~* &* +@all", "user broker on >" + password + " ~* &* +@all"},
			redisstore.Config{User: "broker", Password: broker.NewSecret(password)},
			"switch its user default off",
		},
		{
			"strangers may do nothing but ping",
			[]string{"user default on nopass -@all +ping", "user broker on >" + password + " ~* &* +@all"},
			redisstore.Config{User: "broker", Password: broker.NewSecret(password)},
			"",
		},
		{"no password of ours", []string{"requirepass " + password}, redisstore.Config{}, "set password_file"},
		{"a wrong password", []string{"requirepass " + password}, redisstore.Config{Password: broker.NewSecret("wrong")}, "correct user and password_file"},
		{"an unknown user", []string{"requirepass " + password}, redisstore.Config{User: "nobody", Password: broker.NewSecret(password)}, `password of user nobody`},
		{"a database that isn't there", []string{"requirepass " + password}, redisstore.Config{Password: broker.NewSecret(password), DB: 99}, "correct db"},
		{"another database", []string{"requirepass " + password}, redisstore.Config{Password: broker.NewSecret(password), DB: 3}, ""},
	} {
		t.Run(tt.why, func(t *testing.T) {
			port := freePort(t)
			brokertest.StartRedis(t, append([]string{fmt.Sprint("port ", port)}, tt.settings...)...)
			tt.cfg.Addr = fmt.Sprint("127.0.0.1:", port)
			s := open(t, tt.cfg)
			if tt.want == "" {
				accepts(t, s)
				return
			}
			refuses(t, s, tt.want)
		})
	}
}

func TestCheckRefusesASocketThatStrangersMayOpen(t *testing.T) {
	chmod := func(mode os.FileMode) func(t *testing.T, dir, socket string) {
		return func(t *testing.T, dir, socket string) {
			os.Chmod(dir, 0o755)
			os.Chmod(socket, mode)
		}
	}
	for _, tt := range []struct {
		why   string
		setUp func(t *testing.T, dir, socket string)
		want  string // empty: it is accepted
	}{
		{"only its owner", chmod(0o700), ""},
		{"its group too", chmod(0o770), ""},
		{"others may look but not connect", chmod(0o775), ""},
		{"everybody", chmod(0o777), "its mode is 0777"},
		{"everybody, but for its directory", func(_ *testing.T, dir, socket string) {
			os.Chmod(socket, 0o777)
			os.Chmod(dir, 0o750)
		}, ""},
		{"in a directory where everybody may put another", func(_ *testing.T, dir, socket string) {
			os.Chmod(dir, 0o777)
		}, "everybody may write to"},
		{"in a sticky directory where everybody may be first", func(_ *testing.T, dir, socket string) {
			os.Chmod(dir, 0o777|os.ModeSticky)
		}, "everybody may write to"},
	} {
		t.Run(tt.why, func(t *testing.T) {
			server := brokertest.StartRedis(t)
			tt.setUp(t, server.Dir, server.Socket)
			s := open(t, redisstore.Config{Socket: server.Socket})
			if tt.want == "" {
				accepts(t, s)
				return
			}
			refuses(t, s, tt.want, "unixsocketperm")
		})
	}

	t.Run("everybody, but it wants a password", func(t *testing.T) {
		server := brokertest.StartRedis(t, "requirepass "+password)
		chmod(0o777)(t, server.Dir, server.Socket)
		accepts(t, open(t, redisstore.Config{Socket: server.Socket, Password: broker.NewSecret(password)}))
	})

	t.Run("a link is judged by where it leads", func(t *testing.T) {
		server := brokertest.StartRedis(t)
		link := filepath.Join(server.Dir, "link")
		os.Symlink(server.Socket, link)
		chmod(0o777)(t, server.Dir, server.Socket)
		refuses(t, open(t, redisstore.Config{Socket: link}), "its mode is 0777")
	})
}

func TestCheckNamesTheRightThatIsMissing(t *testing.T) {
	all := strings.Fields(documentedRights(t))
	server := brokertest.StartRedis(t, "user default off", fmt.Sprintf("user broker on >%s -@all %s", password, strings.Join(all, " ")), "user admin on >admin ~* +@all")
	admin := raw(t, &redis.Options{Network: "unix", Addr: server.Socket, Username: "admin", Password: "admin"})
	set := func(t *testing.T, rules ...string) {
		t.Helper()
		args := []any{"ACL", "SETUSER", "broker"}
		for _, rule := range rules {
			args = append(args, rule)
		}
		if err := admin.Do(t.Context(), args...).Err(); err != nil {
			t.Fatal(err)
		}
	}
	cfg := redisstore.Config{Deployment: "lab", Socket: server.Socket, User: "broker", Password: broker.NewSecret(password), DB: 1}
	accepts(t, open(t, cfg))

	for _, right := range all {
		command, ok := strings.CutPrefix(right, "+")
		if !ok {
			continue
		}
		t.Run(right, func(t *testing.T) {
			set(t, "-"+command)
			defer set(t, right)
			refuses(t, open(t, cfg), "ACL SETUSER broker "+right)
		})
	}
	t.Run("keys", func(t *testing.T) {
		set(t, "resetkeys")
		defer set(t, all[0])
		refuses(t, open(t, cfg), "ACL SETUSER broker ~tokenbroker:*")
	})
	t.Run("channels", func(t *testing.T) {
		set(t, "resetchannels")
		defer set(t, all[1])
		refuses(t, open(t, cfg), "ACL SETUSER broker &tokenbroker:*")
	})
	accepts(t, open(t, cfg))
}

func TestCheckOverTLS(t *testing.T) {
	ca, config := certificates(t)
	port := freePort(t)
	addr := fmt.Sprint("localhost:", port)
	server := brokertest.StartRedis(t, append(config, fmt.Sprint("tls-port ", port), "tls-auth-clients yes")...)
	trusting := &tls.Config{RootCAs: ca.RootCAs}

	// Here the certificate is what strangers don't have.
	accepts(t, open(t, redisstore.Config{Addr: addr, TLS: ca}))
	refuses(t, open(t, redisstore.Config{Addr: addr, TLS: trusting}), "by TLS")
	refuses(t, open(t, redisstore.Config{Addr: addr, TLS: &tls.Config{RootCAs: x509.NewCertPool()}}), "ca_file", "unknown authority")
	refuses(t, open(t, redisstore.Config{Addr: addr}), "can't be reached")

	admin := raw(t, &redis.Options{Network: "unix", Addr: server.Socket})
	if err := admin.ConfigSet(t.Context(), "tls-auth-clients", "no").Err(); err != nil {
		t.Fatal(err)
	}
	refuses(t, open(t, redisstore.Config{Addr: addr, TLS: ca}), "requirepass")
}

func TestCheckSaysWhyRedisCannotBeReached(t *testing.T) {
	dir := t.TempDir()
	nobody := filepath.Join(dir, "nobody")
	l, err := net.Listen("unix", nobody)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()

	refuses(t, open(t, redisstore.Config{Socket: filepath.Join(dir, "absent")}), filepath.Join(dir, "absent"), "start it, or correct socket")
	refuses(t, open(t, redisstore.Config{Socket: nobody}), "start it, or correct socket")
	refuses(t, open(t, redisstore.Config{Addr: fmt.Sprint("127.0.0.1:", freePort(t))}), "start it, or correct address")
	refuses(t, open(t, redisstore.Config{Addr: "redis.invalid:6379"}), "redis.invalid", "correct address")
}

func TestCheckTellsAForbiddenSocketFromAnAbsentOne(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Skip("root may open everything")
	}
	server := brokertest.StartRedis(t)
	os.Chmod(server.Socket, 0)
	refuses(t, open(t, redisstore.Config{Socket: server.Socket}), "into the socket's group")
}

func TestCheckOfAStandInForRedis(t *testing.T) {
	// miniredis doesn't say what it drops. Who allows losing records, allows this.
	_, cfg := mini(t)
	accepts(t, open(t, cfg))
	cfg.AllowNoPersistence = false
	refuses(t, open(t, cfg), "use a real Redis", "appendonly yes")

	unprotected := miniredis.RunT(t)
	refuses(t, open(t, redisstore.Config{Addr: unprotected.Addr(), AllowNoPersistence: true}), "requirepass")
}
