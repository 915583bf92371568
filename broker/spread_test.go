package broker_test

import (
	"context"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"sync"
	"testing"
	"time"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
)

// A clocked provider notes when it was asked for what.
type clocked struct {
	*brokertest.Provider
	mu  sync.Mutex // guards the two below
	who map[string]int
	at  map[int64]int // second → requests
}

func (c *clocked) note(what, who string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.who[what+" "+who]++
	c.at[time.Now().Unix()]++
}

func (c *clocked) Refresh(ctx context.Context, refresh broker.Secret, sub string, scopes []string) (broker.Identity, broker.Issued, error) {
	c.note("refresh", sub)
	return c.Provider.Refresh(ctx, refresh, sub, scopes)
}

func (c *clocked) Exchange(ctx context.Context, access broker.Secret, t broker.Target) (broker.Issued, error) {
	c.note("exchange", fmt.Sprint(t))
	return c.Provider.Exchange(ctx, access, t)
}

// Look is not what this is about.
func (c *clocked) Look(context.Context, broker.Secret, string) (broker.Identity, error) {
	return broker.Identity{}, &broker.ProviderError{Class: broker.Misconfigured, Reason: "unsupported"}
}

// TestTwoThousandGrantsMadeAtOnceDoNotExpireAsOneStorm has 2,000 notebooks ask
// every twelve seconds, each in its own beat, while all their tokens come to an end.
func TestTwoThousandGrantsMadeAtOnceDoNotExpireAsOneStorm(t *testing.T) {
	const every = 12 * time.Second
	users := 2000
	if raced() {
		users = 400 // enough to race, and slow enough
	}
	c := &clocked{who: make(map[string]int), at: make(map[int64]int)}
	inBubble(t, func(r *rig) {
		peers := make([]*broker.Peer, users)
		for i := range peers {
			user := broker.UserID(fmt.Sprintf("user%04d", i))
			r.provider.SetRoles(string(user), "researcher")
			r.loggedIn(user)
			peers[i] = r.running(user, int32(100+i))
			r.token(peers[i], broker.Want{})
		}
		clear(c.who)
		clear(c.at)
		var all sync.WaitGroup
		for i, p := range peers {
			all.Go(func() {
				time.Sleep(180*time.Second + time.Duration(i)*every/time.Duration(users))
				for range 9 {
					// Never below the margin, with a token of five minutes and all of
					// it to be had.
					if tok, err := r.Token(context.Background(), p, broker.Want{}); err != nil || tok.ExpiresIn < 30*time.Second {
						t.Errorf("%s: a token for %v, error %v", p.Server.User, tok.ExpiresIn, err)
					}
					time.Sleep(every)
				}
			})
		}
		all.Wait()
		most := 0
		for _, n := range c.at {
			most = max(most, n)
		}
		t.Logf("the most in a second: %d refreshes and exchanges", most)
		// One of each, in pairs, over a quarter of five minutes; and four deviations.
		if mean := 2 * float64(users) / 75; float64(most) > mean+4*math.Sqrt(2*mean) {
			t.Errorf("%d requests in one second, want %.0f and a few more", most, mean)
		}
		for _, p := range peers {
			if n := c.who["refresh "+string(p.Server.User)]; n != 1 {
				t.Errorf("%d refreshes for %s, want 1", n, p.Server.User)
			}
		}
		if n := c.who[fmt.Sprint("exchange ", broker.Target{Audience: "storage", Scopes: []string{"read", "write"}})]; n != users {
			t.Errorf("%d exchanges, want %d", n, users)
		}
	}, func(cfg *broker.Config) {
		c.Provider = cfg.Providers[0].(*brokertest.Provider)
		cfg.Providers = []broker.Provider{c}
		cfg.Journal = inMemory(t)
	})
}

// raced says whether the race detector looks on.
func raced() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

// inMemory is a place for a journal on no disk: 4,000 syncs take their time.
func inMemory(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "journal")
	if err != nil {
		dir = t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "journal")
}
