//go:build goexperiment.runtimesecret

package broker

import "runtime/secret"

// erasing calls f where refresh tokens are in the clear: its stack is erased when
// it returns, and what it allocated once nobody holds it any more. What f has
// other goroutines do is not covered, as net/http's reading of an answer; those
// buffers are written over by the next request. The experiment is Go's, so no other
// build depends on it.
func erasing(f func()) { secret.Do(f) }
