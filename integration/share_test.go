package integration

import (
	"net/http"
	"testing"

	"cloudlet/api"
	"cloudlet/integration/guest/table"

	"github.com/stretchr/testify/require"
)

// TestSecondInstance runs one overlay twice: the second instance finds what the first has read
// in the kernel's page cache, and otherwise neither knows of the other.
func TestSecondInstance(t *testing.T) {
	l := newLab(t)
	work := l.start(l.base)
	ask(t, work, "POST", "/dirty?mib=4")
	captured := ask(t, work, "GET", "/")
	o := l.capture(work.ID)
	l.ok("rm", "--force", work.ID)

	first := l.start(o.ID)
	a := ask(t, first, "GET", "/?window=7")
	require.Equal(t, captured.Counter+1, a.Counter)
	// The first goes on for a while as guests do, then stands still: what is read from now
	// on, the second reads.
	for range 20 {
		try(t, first, "/healthz")
	}
	l.ok("pause", first.ID)
	before := l.inspect(first.ID).Mount
	second := l.start(o.ID)
	b := ask(t, second, "GET", "/?window=7")
	after := l.inspect(second.ID).Mount
	l.ok("continue", first.ID)
	require.Equal(t, before.PID, after.PID, "one mount serves both")
	read := after.MemoryBytes + after.DiskBytes - before.MemoryBytes - before.DiskBytes
	t.Logf("first instance: %d bytes of memory, %d of disk; second: %d", before.MemoryBytes, before.DiskBytes, read)
	require.Less(t, read, int64(1<<20))
	require.Equal(t, a, b, "the second starts where the first did")

	ask(t, first, "GET", "/")
	require.Equal(t, b.Counter+2, ask(t, first, "GET", "/").Counter)
	require.Equal(t, b.Counter+1, ask(t, second, "GET", "/").Counter)
	ask(t, second, "POST", "/write?mib=2&seed=mine")
	require.Equal(t, table.ExtraHash("mine", 2), ask(t, second, "GET", "/verify?seed=mine").Extra)
	code, _ := try(t, first, "/verify?seed=mine")
	require.Equal(t, http.StatusNotFound, code)

	l.ok("rm", "--force", first.ID)
	requireWhole(t, second, captured.Token)
	require.Equal(t, api.Running, l.inspect(second.ID).State)
}
