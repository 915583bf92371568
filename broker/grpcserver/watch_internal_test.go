package grpcserver

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"tokenbroker/broker"
)

func TestSlowReaderIsDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		read := make(chan struct{})
		err := giveUp(context.Background(), 10*time.Second, func() error { <-read; return nil })
		if !errors.Is(err, broker.ErrLimited) {
			t.Errorf("after nothing was read for 10 s: %v, want limited", err)
		}
		close(read)
		if err := giveUp(context.Background(), 10*time.Second, func() error { return nil }); err != nil {
			t.Errorf("a reader who reads: %v", err)
		}
	})
}
