//go:build !race

package handoff

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// TestSeamMutations sees that wrong ways at the seams of the machines are noticed. Some need
// every second fault tried, which the race detector makes too slow.
func TestSeamMutations(t *testing.T) {
	for _, tc := range []struct {
		name  string
		rules mutations
	}{
		{"go is sent before it is on record", mutations{drop: "source store going"}},
		{"it runs before that is on record", mutations{drop: "destination store went"}},
		{"the pause is not on record", mutations{drop: "source store pausing"}},
		{"accepted without a record", mutations{drop: "destination store accepted"}},
		{"discarded before that is on record", mutations{drop: "source store discarding"}},
		{"resumed before that is on record", mutations{drop: "source store resuming"}},
		{"prepare lets the guest run", mutations{runEarly: true}},
		{"silence is taken for never", mutations{answer: func(m Message, a Answer, err error) (Answer, error) {
			if err != nil && m.Kind == KindGo {
				return Answer{Version: Version, Handoff: m.Handoff, Epoch: m.Epoch, State: Never}, nil
			}
			return a, err
		}}},
		{"running is taken for complete", mutations{answer: func(m Message, a Answer, err error) (Answer, error) {
			if a.State == Running {
				a.State = Complete
			}
			return a, err
		}}},
		{"silence is taken for running", mutations{answer: func(m Message, a Answer, err error) (Answer, error) {
			if err != nil && m.Kind == KindGo {
				return Answer{Version: Version, Handoff: m.Handoff, Epoch: m.Epoch, State: Running}, nil
			}
			return a, err
		}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, bad := explore(t.Context(), 1, tc.rules, 1)
			if len(bad) == 0 {
				_, bad = explore(t.Context(), 2, tc.rules, 1)
			}
			require.NotEmpty(t, bad)
		})
	}
}
