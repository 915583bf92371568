package redisstore

import (
	"context"
	"errors"
	"net/url"
	"reflect"
	"strings"

	"github.com/redis/go-redis/v9"

	"tokenbroker/broker"
)

// scanned is how many keys Redis looks at for one answer, so that it is not kept
// from others for long.
const scanned = 500

// errSlotsMoved is for a list of a cluster's records in which some may be missing.
var errSlotsMoved = errors.New("the cluster has moved slots meanwhile: once it is done, do this again")

// Records implements broker.Store. Redis promises that SCAN comes by each key that
// is there all the time; it comes by those of others as well.
func (s *Store) Records(ctx context.Context, f func(broker.Key) error) error {
	before, err := s.slots(ctx)
	if err != nil {
		return s.explain("list the records", err)
	}
	all, err := s.primaries(ctx)
	if err != nil {
		return s.explain("list the records", err)
	}
	for _, p := range all {
		if err := s.recordsAt(ctx, p, f); err != nil {
			return err
		}
	}
	after, err := s.slots(ctx)
	if err == nil && !reflect.DeepEqual(before, after) {
		err = errSlotsMoved
	}
	if err != nil {
		return s.explain("list the records", err)
	}
	return nil
}

// slots says who has which slots of a cluster; nil: it is none.
func (s *Store) slots(ctx context.Context) (slots map[int][]string, err error) {
	c, ok := s.client.(*redis.ClusterClient)
	if !ok {
		return nil, ctx.Err()
	}
	//lint:ignore SA1019 CLUSTER SHARDS, which is to replace it, needs Redis 7; we serve 6.2
	ranges, err := c.ClusterSlots(ctx).Result()
	slots = make(map[int][]string)
	for _, r := range ranges {
		if len(r.Nodes) > 0 {
			slots[r.Start] = append(slots[r.Start], r.Nodes[0].ID)
		}
	}
	return slots, err
}

func (s *Store) recordsAt(ctx context.Context, p primary, f func(broker.Key) error) error {
	start := prefix(s.cfg.Deployment) + "record:"
	for cursor := uint64(0); ; {
		names, next, err := p.client.Scan(ctx, cursor, start+"*", scanned).Result()
		if err != nil {
			return s.explain("list the records", err)
		}
		for _, name := range names {
			k, ok := parse(strings.TrimPrefix(name, start))
			if !ok {
				continue // nothing that we wrote
			}
			if err := f(k); err != nil {
				return err
			}
		}
		if cursor = next; cursor == 0 {
			return nil
		}
	}
}

// parse is the inverse of what name makes of a key.
func parse(name string) (k broker.Key, ok bool) {
	kind, rest, more := strings.Cut(name, ":")
	if k.Kind, ok = unescape(kind); !ok {
		return k, false
	}
	for more {
		var part string
		part, rest, more = strings.Cut(rest, ":")
		if part, ok = unescape(part); !ok {
			return k, false
		}
		k.Parts = append(k.Parts, part)
	}
	return k, true
}

func unescape(s string) (string, bool) {
	plain, err := url.PathUnescape(s)
	return plain, err == nil && escape(plain) == s
}
