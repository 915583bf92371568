package redisstore

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/redis/go-redis/v9"
)

// settleWait is for how long replicas may take to have what they are sent.
const settleWait = 2 * time.Second

// diskEvery is how often Redis syncs its append-only file unless it does so
// with each write (appendfsync everysec), doubled: a sync that takes longer
// than a second delays the next.
const diskEvery = 2 * time.Second

// errNotKept is for a Redis that has neither replicas nor an append-only file.
var errNotKept = errors.New("it keeps what it is given in memory only")

// Settle implements broker.Store. Replication is one stream, so a write of this
// connection that the replicas have confirmed (WAIT) says that they have all
// that came before it, whichever connection wrote it.
func (s *Store) Settle(ctx context.Context) error {
	c := s.client.Conn()
	defer c.Close()
	if err := c.Set(ctx, prefix(s.cfg.Deployment)+"settled", "1", time.Minute).Err(); err != nil {
		return s.explain("settle", err)
	}
	text, err := c.Info(ctx).Result()
	if err != nil {
		return s.explain("settle", err)
	}
	info := parseInfo(text)
	replicas, _ := strconv.Atoi(info["connected_slaves"])
	disk := info["aof_enabled"] == "1"
	if replicas == 0 && !disk {
		return s.explain("settle", errNotKept)
	}
	if replicas > 0 {
		if err := s.replicated(ctx, c, replicas); err != nil {
			return err
		}
	}
	if !disk {
		return nil
	}
	return s.onDisk(ctx, c)
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
