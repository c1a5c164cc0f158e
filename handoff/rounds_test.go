package handoff

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestAnother(t *testing.T) {
	const mib = 1 << 20
	full := Round{Dirty: 128 * mib, Bytes: 60 * mib, Made: time.Second, Sent: 12 * time.Second}
	for _, tc := range []struct {
		name   string
		limits Limits
		done   []Round
		spent  time.Duration
		known  Rates
		again  bool
		why    string
	}{
		{"the first", Limits{}, nil, 0, Rates{}, true, "first"},
		{"none wanted", Limits{Rounds: -1}, nil, 0, Rates{}, false, "0 rounds"},
		{"nothing known", Limits{}, []Round{full}, 13 * time.Second, Rates{}, true, "not known"},
		{"idle guest", Limits{}, []Round{full}, 13 * time.Second, Rates{Dirty: 1024}, false, "a pause of"},
		{"shrinks", Limits{}, []Round{full}, 13 * time.Second, Rates{Dirty: mib}, true, "in the last"},
		{"does not shrink", Limits{}, []Round{full}, 13 * time.Second, Rates{Dirty: 10 * mib}, false, "not shrink"},
		{"number", Limits{Rounds: 1}, []Round{full}, 13 * time.Second, Rates{Dirty: mib}, false, "limit of 1 rounds"},
		{"time is over", Limits{Time: 10 * time.Second}, []Round{full}, 13 * time.Second, Rates{Dirty: mib}, false, "10s is met"},
		{"time would be over", Limits{Time: 14 * time.Second}, []Round{full}, 13 * time.Second, Rates{Dirty: mib}, false, "within 14s"},
		{"bytes are met", Limits{Bytes: 10 * mib}, []Round{full}, 13 * time.Second, Rates{Dirty: mib}, false, "bytes is met"},
		{"bytes would be met", Limits{Bytes: 61 * mib}, []Round{full}, 13 * time.Second, Rates{Dirty: mib}, false, "exceed"},
		{"measured: shrinks", Limits{}, []Round{full, {Dirty: 40 * mib, Bytes: 18 * mib, Made: time.Second, Sent: 4 * time.Second}}, 18 * time.Second, Rates{}, true, "in the last"},
		{"measured: does not", Limits{}, []Round{full, {Dirty: 127 * mib, Bytes: 60 * mib, Made: time.Second, Sent: 12 * time.Second}}, 26 * time.Second, Rates{}, false, "not shrink"},
		{"link slower than measured", Limits{}, []Round{full}, 13 * time.Second, Rates{Dirty: 0.05 * mib, Bandwidth: 0.1 * mib}, true, "in the last"},
		{"round without bytes", Limits{}, []Round{full, {}}, 13 * time.Second, Rates{}, false, "a pause of 0s"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			again, why := tc.limits.Another(tc.done, tc.spent, tc.known)
			require.Equal(t, tc.again, again, why)
			require.Contains(t, why, tc.why)
		})
	}
}

func TestMeasure(t *testing.T) {
	done := []Round{{Dirty: 100, Bytes: 50, Made: time.Second, Sent: time.Second}, {Dirty: 20, Bytes: 10, Made: time.Second, Sent: 2 * time.Second}}
	require.Equal(t, Rates{Bandwidth: 5, Dirty: 10}, Measure(done, Rates{}))
	require.Equal(t, Rates{Bandwidth: 1, Dirty: 2}, Measure(done, Rates{Bandwidth: 1, Dirty: 2}))
	require.Equal(t, Rates{}, Measure(nil, Rates{}))
}

// TestAnotherEnds sees that the rounds of any guest end.
func TestAnotherEnds(t *testing.T) {
	for _, rate := range []float64{0, 1, 1e6, 1e9, 1e15} {
		var done []Round
		spent := time.Duration(0)
		for range MaxRounds + 1 {
			again, _ := Limits{Rounds: 99}.Another(done, spent, Rates{Dirty: rate})
			if !again {
				break
			}
			done = append(done, Round{Dirty: 1 << 30, Bytes: 1 << 29, Made: time.Second, Sent: time.Second})
			spent += 2 * time.Second
		}
		require.Less(t, len(done), MaxRounds, "rate %g", rate)
	}
}

// TestNoRounds: a source fills in the defaults of its limits, and Another does so again.
func TestNoRounds(t *testing.T) {
	again, _ := Limits{Rounds: -1}.withDefaults().Another(nil, 0, Rates{})
	require.False(t, again)
}
