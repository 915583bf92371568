package redisstore

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

// settleWait is for how long replicas may take to have what they are sent.
const settleWait = 2 * time.Second

// diskEvery is how often Redis syncs its append-only file unless it does so
// with each write (appendfsync everysec), doubled: a sync that takes longer
// than a second delays the next.
const diskEvery = 2 * time.Second

// What keeps Settle from saying yes.
var (
	errNotKept    = errors.New("it keeps what it is given in memory only")
	errNoReplica  = errors.New("it has no replica, so that what it has would be gone with it")
	errNotTheSame = errors.New("it has restarted, or another took its place, and may have lost what was written before: look again what is there")
)

// Replicated implements broker.Store. A replica that has just come and is still
// given a first copy does not count: nobody promotes it.
func (s *Store) Replicated(ctx context.Context) error {
	all, err := s.primaries(ctx)
	if err != nil {
		return s.explain("wait for the replicas", err)
	}
	errs := make([]error, len(all))
	var asked sync.WaitGroup
	for i, p := range all {
		asked.Go(func() { errs[i] = s.replicatedAt(ctx, p) })
	}
	asked.Wait()
	return errors.Join(errs...)
}

func (s *Store) replicatedAt(ctx context.Context, p primary) error {
	text, err := p.client.Info(ctx).Result() // one section is more than a stand-in for Redis knows
	if err != nil {
		return s.explain("wait for the replicas", err)
	}
	online := strings.Count(text, "state=online")
	if online == 0 {
		return nil
	}
	c := p.client.Conn()
	defer c.Close()
	if err := c.Set(ctx, p.key, "1", time.Minute).Err(); err != nil {
		return s.explain("wait for the replicas", err)
	}
	return s.replicated(ctx, c, online)
}

// Settle implements broker.Store. Replication is one stream, so a write of this
// connection that the replicas have confirmed (WAIT) says that they have all
// that came before it, whichever connection wrote it. In a cluster each master
// is a stream of its own, and all are asked.
func (s *Store) Settle(ctx context.Context) error {
	all, err := s.primaries(ctx)
	if err != nil {
		return s.explain("settle", err)
	}
	ids, errs := make([]string, len(all)), make([]error, len(all))
	var asked sync.WaitGroup
	for i, p := range all {
		asked.Go(func() { ids[i], errs[i] = s.settleAt(ctx, p) })
	}
	asked.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return s.sameAs(ids)
}

// sameAs returns an error if the servers are others than the last time. What
// was written to one that is gone, its successor need not have: it has settled
// what it has, and nobody knows what that is until he reads it.
func (s *Store) sameAs(ids []string) error {
	slices.Sort(ids)
	now := strings.Join(ids, " ")
	s.mu.Lock()
	defer s.mu.Unlock()
	was := s.seen
	s.seen = now
	if was != "" && was != now {
		return s.explain("settle", errNotTheSame)
	}
	return nil
}

// first makes ids what the first Settle is compared with.
func (s *Store) first(ids []string) {
	slices.Sort(ids)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.seen == "" {
		s.seen = strings.Join(ids, " ")
	}
}

// identity names a server's process and its stream of replication, which a
// restart or a promotion begins anew.
func identity(info map[string]string) string { return info["run_id"] + "/" + info["master_replid"] }

// settleAt returns the identity of the server that has settled.
func (s *Store) settleAt(ctx context.Context, p primary) (string, error) {
	c := p.client.Conn()
	defer c.Close()
	if err := c.Set(ctx, p.key, "1", time.Minute).Err(); err != nil {
		return "", s.explain("settle", err)
	}
	text, err := c.Info(ctx).Result()
	if err != nil {
		return "", s.explain("settle", err)
	}
	info := parseInfo(text)
	replicas, _ := strconv.Atoi(info["connected_slaves"])
	disk := info["aof_enabled"] == "1"
	switch {
	case replicas == 0 && s.cfg.Sentinel.isSet():
		// A primary that was cut off from its Sentinels looks like this, too, and
		// still takes changes. (One that is cut off from its cluster does not.)
		return "", s.explain("settle", errNoReplica)
	case replicas == 0 && !disk:
		return "", s.explain("settle", errNotKept)
	}
	if replicas > 0 {
		if err := s.replicated(ctx, c, replicas); err != nil {
			return "", err
		}
	}
	if !disk {
		return identity(info), nil
	}
	return identity(info), s.onDisk(ctx, c)
}

func (s *Store) replicated(ctx context.Context, c *redis.Conn, replicas int) error {
	got, err := c.Wait(ctx, replicas, settleWait).Result()
	if err != nil {
		return s.explain("wait for the replicas", err)
	}
	if int(got) < replicas {
		return s.explain("wait for the replicas", fmt.Errorf("%d of %d have confirmed", got, replicas))
	}
	return nil
}

// onDisk returns once the append-only file has been synced since the call. INFO
// does not say how often that is, so it takes the longer.
func (s *Store) onDisk(ctx context.Context, c *redis.Conn) error {
	t := time.NewTimer(diskEvery)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
		return ctx.Err()
	}
	text, err := c.Info(ctx, "persistence").Result()
	if err != nil {
		return s.explain("settle", err)
	}
	if status := parseInfo(text)["aof_last_write_status"]; status != "" && status != "ok" {
		return s.explain("settle", errors.New("it can't write its append-only file"))
	}
	return nil
}
