package integration

import (
	"os"
	"path/filepath"
	"testing"

	"cloudlet/api"
	"cloudlet/integration/guest/table"

	"github.com/stretchr/testify/require"
)

// TestProfile records a touch profile by trial runs and packs the overlay by it: the id stays,
// later instances hardly ask, and what they see is right.
func TestProfile(t *testing.T) {
	l := newLab(t)
	work := l.start(l.base)
	token := ask(t, work, "GET", "/").Token
	ask(t, work, "POST", "/dirty?mib=24")
	o := l.capture(work.ID, "--name", "app")
	l.ok("rm", "--force", work.ID)

	demand := l.start(o.ID, "--prefetch", "none")
	all := l.inspect(demand.ID).Mount
	require.Zero(t, all.MemoryPushed)
	l.ok("rm", "--force", demand.ID)

	l.fails(2, "--probe", "overlay", "profile", "app")
	l.fails(2, "in the store", "overlay", "profile", exported(t, l, o.ID), "--probe", "8080/", "--repack")
	l.fails(7, "did not answer", "overlay", "profile", "app", "--probe", "9/", "--timeout", "2s")
	require.NoFileExists(t, filepath.Join(l.state, "profiles", o.ID), "a trial without an answer has no profile")
	require.Empty(t, l.list())

	var one, two api.ProfiledOverlay
	l.json(&one, "overlay", "profile", "app", "--probe", "8080/?window=1")
	require.Equal(t, o.Digest, one.Digest)
	require.Positive(t, one.MemoryPages)
	l.json(&two, "overlay", "profile", "app", "--probe", "8080/?window=1", "--probe", "8080/?window=40", "--repack")
	require.Equal(t, o.ID, two.ID)
	require.NotEqual(t, o.Digest, two.Digest)
	require.Greater(t, two.MemoryPages, one.MemoryPages+200, "another request touches another MiB of the table")
	require.Contains(t, l.ok("overlay", "verify", "app"), "every page decoded")
	require.Empty(t, l.list(), "trial runs are removed")

	in := l.start("app", "--probe", "8080/?window=40")
	m := l.inspect(in.ID).Mount
	t.Logf("demand alone: %d reads of %d bytes; by profile: %d reads of %d bytes, %d pushed", all.MemoryReads, all.MemoryBytes, m.MemoryReads, m.MemoryBytes, m.MemoryPushed)
	require.Positive(t, m.MemoryPushed)
	require.LessOrEqual(t, m.MemoryPushed, int64(two.MemoryPages)*4096)
	require.Less(t, m.MemoryReads, all.MemoryReads)
	require.Equal(t, table.WindowHash(token, 40), ask(t, in, "GET", "/?window=40").SHA256)
	requireWhole(t, in, token)

	// A profile is advice: a damaged one is left out, and a trial replaces it.
	l.ok("rm", "--force", in.ID)
	path := filepath.Join(l.state, "profiles", o.ID)
	require.NoError(t, os.WriteFile(path, []byte("not a profile"), 0o600))
	in = l.start("app")
	requireWhole(t, in, token)
	l.ok("rm", "--force", in.ID)
	l.json(&one, "overlay", "profile", "app", "--probe", "8080/?window=1")
	require.Equal(t, two.Digest, one.Digest)

	l.ok("overlay", "rm", "app")
	require.NoFileExists(t, path)
}

// exported writes an overlay of the store to a file.
func exported(t *testing.T, l *lab, id string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(l.state, "overlays", id, "overlay"))
	require.NoError(t, err)
	path := filepath.Join(t.TempDir(), "copy.overlay")
	require.NoError(t, os.WriteFile(path, b, 0o600))
	return path
}
