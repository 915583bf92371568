package broker

import (
	"context"
	"errors"
	"math"
	"time"
)

// A Store keeps the deployment's records. Brokers on several hosts share one.
//
// It sees nothing but sealed bytes: the domain seals each record whole and
// binds it to its key and revision, so whoever can write to the store can lose
// records but not make or move one. Changes are compare-and-swap on a record's
// revision; each call touches one key, so a Redis Cluster serves it too.
//
// All methods may be called from many goroutines at once. They don't retry.
// If the back end can't answer they return an error that is neither ErrAbsent
// nor ErrStale; a write may then have happened or not.
type Store interface {
	// Get returns the record at k, or ErrAbsent.
	Get(ctx context.Context, k Key) (Record, error)

	// Put stores box at k as revision was+1, if the record there still has
	// revision was; 0 means that there is none. Otherwise it changes nothing
	// and returns ErrStale. A positive life lets the store drop the record
	// after it, and KeepLife when it would have dropped the one before;
	// correctness never relies on that.
	Put(ctx context.Context, k Key, was int64, box []byte, life time.Duration) error

	// Delete removes the record at k if it still has revision was, and returns
	// ErrStale if it has another one. An absent record is no error.
	Delete(ctx context.Context, k Key, was int64) error

	// Add and Remove change the set at k, and Members lists it in no order.
	// Doing either twice is no error; a set nobody added to is empty. Sets say
	// where to look; what is found there is believed only once it is opened.
	Add(ctx context.Context, k Key, member string) error
	Remove(ctx context.Context, k Key, member string) error
	Members(ctx context.Context, k Key) ([]string, error)

	// Records calls f with the key of each record that is there from the call to
	// the return, perhaps twice, and of some that come or go meanwhile. It stops
	// at f's error and returns it. It takes long: it is for the administrator's
	// work on all records, and no request waits for it.
	Records(ctx context.Context, f func(Key) error) error

	// Move raises the deployment's revision to the larger of its value plus one
	// and the store's time in microseconds, so that a fail-over to an older
	// copy doesn't bring a used value back, and returns it.
	Move(ctx context.Context) (int64, error)

	// Pulse returns the deployment's revision, 0 if it never moved, the store's
	// time, which is the one clock of the deployment, and who answered.
	Pulse(ctx context.Context) (Pulse, error)

	// Tell passes note on to those who listen, on all brokers of the deployment,
	// this one too. It is a hint and never a fact: a note may get lost, arrive
	// late or twice, and whoever can write to the store can forge one, so whoever
	// hears it looks for himself, and what nobody hears is found out some other
	// way. That Tell returns no error doesn't say that anybody heard. An empty
	// note is none.
	Tell(ctx context.Context, note string) error

	// Listen calls heard with the notes that arrive, one after the other, until
	// ctx ends; then it returns ctx's error, and never another. If it loses its
	// connection it makes a new one by itself. It calls heard("") whenever it
	// begins to listen, at first and after each loss: what was told before may
	// have been missed. heard must not wait.
	Listen(ctx context.Context, heard func(note string)) error

	// Replicated returns nil once the replicas that the back end has now, if it
	// has any, have every change that was made before the call. An error says that
	// this is not so, or not known: a fail-over may take those changes back. It
	// takes a moment, and is for what must not be taken back once it is acted upon.
	Replicated(ctx context.Context) error

	// Settle returns nil once every change that was made before the call will
	// outlive what the back end is built to outlive: its replicas have it, or
	// its disk. It may take seconds. An error says that this is not so, or not
	// known.
	Settle(ctx context.Context) error

	// Check says whether the back end can be trusted with grants: reachable,
	// writable, evicting nothing, persistent, protected. The error is a
	// sentence for the administrator.
	Check(ctx context.Context) error
}

// KeepLife is the life of a record that changes nothing about when it ends.
const KeepLife time.Duration = math.MinInt64

// A Key says where a record or set lies: its kind and the parts that name it.
// Parts may hold any bytes; a Store encodes them without loss.
type Key struct {
	Kind  string
	Parts []string
}

// A Record is sealed bytes and the number of writes that led to them.
type Record struct {
	Revision int64
	Box      []byte
}

// A Pulse is the store's state as of one moment.
type Pulse struct {
	Revision int64
	Now      time.Time
	// Server is another one after a restart of the back end, or when a replica has
	// taken its place: whatever it has, it may have forgotten something. Empty: not
	// known.
	Server string
}

// Answers of a Store.
var (
	ErrAbsent = errors.New("no such record")
	ErrStale  = errors.New("the record changed meanwhile")
)
