package integration

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// TestFreeMemory captures a guest that has used and given back much memory: what stands there
// is in an overlay only if that is asked for, and a VM of either is the same to its user.
func TestFreeMemory(t *testing.T) {
	const filled = 64 << 20
	l := newLab(t)
	in := l.start(l.base)
	token := ask(t, in, "GET", "/").Token
	ask(t, in, "POST", "/fill?mib=64&seed=1") // half of it random
	ask(t, in, "POST", "/fill?mib=1&seed=1")

	with := l.capture(in.ID, "--keep-free-memory")
	require.Zero(t, with.Freed)
	require.Greater(t, with.Size, int64(filled/2))
	without := l.capture(in.ID)
	require.Greater(t, without.Freed, int64(filled))
	require.Less(t, without.Size, with.Size-filled/3)
	t.Logf("overlay of %d KiB with free memory, %d KiB without", with.Size>>10, without.Size>>10)
	requireWhole(t, in, token)
	for _, id := range []string{with.ID, without.ID} {
		again := l.start(id)
		requireWhole(t, again, token)
		ask(t, again, "POST", "/fill?mib=64&seed=2") // all of the guest's memory is its own again
		l.ok("rm", "--force", again.ID)
	}

	// A paused guest cannot say what it does not use.
	l.ok("pause", in.ID)
	paused := l.capture(in.ID)
	require.Zero(t, paused.Freed)
}
