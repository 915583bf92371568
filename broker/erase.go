//go:build !goexperiment.runtimesecret

package broker

// Erasing calls f. In a build with GOEXPERIMENT=runtimesecret what f leaves on
// the stack and in memory is erased; see erase_secret.go.
func Erasing(f func()) { f() }
