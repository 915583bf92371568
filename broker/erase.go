//go:build !goexperiment.runtimesecret

package broker

// erasing calls f. In a build with GOEXPERIMENT=runtimesecret what f leaves on
// the stack and in memory is erased; see erase_secret.go.
func erasing(f func()) { f() }
