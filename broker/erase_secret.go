//go:build goexperiment.runtimesecret

package broker

import "runtime/secret"

// Erasing calls f where refresh tokens are in the clear: its stack is erased when
// it returns, and what it allocated by the first collection of garbage, each two
// minutes at least, after nobody holds it any more. What f has other goroutines do
// is not covered. The experiment is Go's, so no other build depends on it.
func Erasing(f func()) { secret.Do(f) }
