// Package brokertest holds the test implementations of the domain's interfaces
// and the suites that any implementation must pass. They behave, they don't
// script calls: a test that passes with them says something about production.
//
// Only tests import it.
package brokertest
