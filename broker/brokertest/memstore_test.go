package brokertest_test

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"tokenbroker/broker"
	"tokenbroker/broker/brokertest"
)

func TestMemStoreKeepsTheContract(t *testing.T) {
	brokertest.TestStore(t, func(*testing.T) broker.Store { return brokertest.NewMemStore() })
}

var k = broker.Key{Kind: "test", Parts: []string{"a"}}

func TestMemStoreFollowsTheTimeOfABubble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := brokertest.NewMemStore()
		s.Put(t.Context(), k, 0, []byte("x"), time.Hour)
		start, _ := s.Pulse(t.Context())

		time.Sleep(time.Hour - time.Nanosecond)
		if _, err := s.Get(t.Context(), k); err != nil {
			t.Errorf("just before its end: %v", err)
		}
		time.Sleep(time.Nanosecond)
		if _, err := s.Get(t.Context(), k); !errors.Is(err, broker.ErrAbsent) {
			t.Errorf("at its end: got %v, want ErrAbsent", err)
		}
		now, _ := s.Pulse(t.Context())
		if got := now.Now.Sub(start.Now); got != time.Hour {
			t.Errorf("got %v later, want an hour", got)
		}

		// A clock that falls back, as a fail-over may bring: the revision stays.
		before, _ := s.Move(t.Context())
		s.Advance(-24 * time.Hour)
		after, _ := s.Move(t.Context())
		if after != before+1 {
			t.Errorf("Move: got %d, want %d", after, before+1)
		}
	})
}

func TestMemStoreFailsAsTold(t *testing.T) {
	ctx, broken := t.Context(), errors.New("broken")
	s := brokertest.NewMemStore()

	s.Fail(broken)
	if err := s.Put(ctx, k, 0, nil, 0); !errors.Is(err, broken) {
		t.Errorf("Put: got %v, want the failure", err)
	}
	s.Fail(nil)
	if _, err := s.Get(ctx, k); !errors.Is(err, broker.ErrAbsent) {
		t.Errorf("the Put that failed left something: %v", err)
	}

	lost := errors.New("answer lost")
	s.After(func(method string, _ broker.Key) error {
		if method == "Put" {
			return lost
		}
		return nil
	})
	if err := s.Put(ctx, k, 0, []byte("x"), 0); !errors.Is(err, lost) {
		t.Errorf("Put: got %v, want that the answer is lost", err)
	}
	s.After(nil)
	if r, err := s.Get(ctx, k); err != nil || r.Revision != 1 {
		t.Errorf("the Put whose answer was lost: got %v, %v", r, err)
	}
	if got := s.Calls("Put"); got != 2 {
		t.Errorf("Calls: got %d puts, want 2", got)
	}
}

func TestMemStoreLetsSomebodyInBetween(t *testing.T) {
	ctx := t.Context()
	s := brokertest.NewMemStore()
	s.Before(func(method string, _ broker.Key) error {
		if method != "Put" {
			return nil
		}
		s.Before(nil)
		return s.Put(ctx, k, 0, []byte("theirs"), 0)
	})
	if err := s.Put(ctx, k, 0, []byte("ours"), 0); !errors.Is(err, broker.ErrStale) {
		t.Errorf("got %v, want ErrStale", err)
	}

	s.Tamper(k, []byte("forged"))
	var boxes []string
	s.Each(func(_ broker.Key, r broker.Record) { boxes = append(boxes, string(r.Box)) })
	if len(boxes) != 1 || boxes[0] != "forged" {
		t.Errorf("Each: got %q, want the forged box", boxes)
	}
}
