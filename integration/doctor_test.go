package integration

import (
	"testing"

	"cloudlet/api"

	"github.com/stretchr/testify/require"
)

// TestDoctor: a host on which these tests run is well, and one without QEMU is told so.
func TestDoctor(t *testing.T) {
	l := newEmptyLab(t)
	var checks []api.Check
	l.json(&checks, "doctor")
	require.Len(t, checks, 7)
	for _, c := range checks {
		require.True(t, c.OK, "%s: %s", c.Name, c.Detail)
	}
	t.Setenv("PATH", "/nonexistent")
	r := l.fails(6, "this host lacks", "doctor")
	require.Contains(t, r.stdout, "install qemu-system-x86")
}
