// Package faults proves that the broker never loses a grant: real broker
// processes on a real redis-server, with real journals, against a provider that
// takes a second use of a refresh token for theft, are killed, frozen, hung up on
// and overrun, and their Redis is cut off, filled, restarted and replaced by a
// replica that lags.
//
//	go test -tags failpoints ./deploy/faults                                            the short form, a minute
//	go test -tags failpoints -count=1 -v -timeout 2h ./deploy/faults -args -long        the long form; prints a table
//
// It needs redis-server 7. The brokers are this test's own binary, started again
// (child_test.go); the provider is broker/devidp, served by the test itself, or one
// of two that none of us wrote (provider_test.go), which deploy/setup installs:
// Keycloak, which starts while other tests run, and npm's oidc-provider.
//
//	kill_test.go       SIGKILL at each step of a refresh, over three kinds of provider
//	pause_test.go      SIGSTOP of a broker past its lease, then SIGCONT
//	storm_test.go      many callers on two and three brokers, and callers who hang up
//	timeback_test.go   a Redis that forgets: killed, flushed, restored, a stale one promoted
//	epochs_test.go     roles and disconnects that race refreshes and cached reads
//	fleet_test.go      2,100 users on three brokers: how soon a disconnect counts, what
//	                   the confirmation costs, and whether outstanding_until is true
//	strangers_test.go  callers, hubs, kills and lost answers at the providers of others
//	trouble_test.go    Redis that takes no changes, forgets, or falls back
//	schedule_test.go   random trouble; the answers are checked against a model.
//	                   -args -seed N runs one schedule again
//	soak_test.go       all of it at once for ten minutes, and what a broker then holds
//	control_test.go    how it is commonly done, in a few lines, and what it loses here
//
// Every kill test is of a process, not of a machine: what was written to a file
// but not yet synced survives it.
package faults_test

import (
	"os/exec"
	"strings"
	"testing"
)

// The steps at which a broker can be killed are compiled in only where somebody
// asks for it.
func TestNormalBuildsHaveNoFailpoints(t *testing.T) {
	for tags, want := range map[string]string{"": "failpoint.go", "failpoints": "failpoint_on.go"} {
		out, err := exec.Command("go", "list", "-tags", tags, "-f", `{{join .GoFiles "\n"}}`, "tokenbroker/broker").Output()
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for name := range strings.Lines(string(out)) {
			if strings.HasPrefix(name, "failpoint") {
				got = append(got, strings.TrimSpace(name))
			}
		}
		if len(got) != 1 || got[0] != want {
			t.Errorf("with the tags %q, broker is built of %v, want %s", tags, got, want)
		}
	}
}
