package broker

import (
	"fmt"
	"testing"
	"time"
)

// TestATokenIsReplacedEarlyAndNeverLate: between the margin and a quarter of its
// life before that, for each grant at a point of its own.
func TestATokenIsReplacedEarlyAndNeverLate(t *testing.T) {
	issued := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for _, tt := range []struct{ life, margin, over time.Duration }{
		{time.Minute, 20 * time.Second, 15 * time.Second},
		{5 * time.Minute, 30 * time.Second, 75 * time.Second},
		{time.Hour, 30 * time.Second, 2 * time.Minute},
	} {
		tok := cachedToken{IssuedAt: issued, ExpiresAt: issued.Add(tt.life)}
		first, last := tt.life, time.Duration(0)
		for i := range 200 {
			k := GrantKey{"main", "keycloak", fmt.Sprint("user", i)}
			if !tok.lasts(k, issued, tt.life) {
				t.Fatalf("a new token of %v is replaced at once", tt.life)
			}
			age := time.Duration(0)
			for tok.lasts(k, issued.Add(age), 0) {
				age += time.Second
			}
			first, last = min(first, age), max(last, age)
		}
		late, early := tt.life-tt.margin+time.Second, tt.life-tt.margin-tt.over
		if last > late || last < late-tt.over/10 || first < early || first > early+tt.over/10 {
			t.Errorf("200 tokens of %v are replaced between %v and %v, want %v and %v", tt.life, first, last, early, late)
		}
	}
}
