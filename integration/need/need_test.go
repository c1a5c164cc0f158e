package need

import (
	"errors"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
)

// fake notes how a test would have ended first.
type fake struct {
	testing.TB
	end string
}

func (f *fake) Helper()      {}
func (f *fake) Fatal(...any) { f.ends("failed") }
func (f *fake) Skip(...any)  { f.ends("skipped") }

func (f *fake) ends(how string) {
	if f.end == "" {
		f.end = how
	}
}

// TestSkip: what is missing is a reason to skip, or where that is not allowed, a failure.
func TestSkip(t *testing.T) {
	reason := errors.New("no such thing")
	for _, tt := range []struct {
		name, env, end string
	}{{"empty", "", "skipped"}, {"off", "0", "skipped"}, {"on", "1", "failed"}, {"another word", "true", "failed"}} {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv("CLOUDLET_NO_SKIP", tt.env)
			for _, missing := range []func(t testing.TB){
				func(t testing.TB) { No(t, reason, reason) },
				func(t testing.TB) { No(t, fmt.Errorf("look: %w", reason), errors.ErrUnsupported, reason) },
				func(t testing.TB) { Program(t, "/no/such/program") },
			} {
				var f fake
				missing(&f)
				require.Equal(t, tt.end, f.end)
			}
			var f fake
			No(&f, reason, errors.ErrUnsupported)
			require.Equal(t, "failed", f.end, "that is not missing, but wrong")
			f = fake{}
			No(&f, nil, reason)
			require.Equal(t, "/bin/sh", Program(&f, "/bin/sh"))
			require.Empty(t, f.end)
		})
	}
}
