package integration

import (
	"testing"

	"cloudlet/integration/guest/table"

	"github.com/stretchr/testify/require"
)

// TestMainJob is the main job as a user does it: base, instance, overlay, synthesis.
func TestMainJob(t *testing.T) {
	l := newLab(t)
	work := l.start(l.base, "--name", "work")
	first := ask(t, work, "GET", "/?window=3")
	require.Equal(t, table.WindowHash(first.Token, 3), first.SHA256)
	o := l.capture("work")
	require.Equal(t, l.base, o.Parent)

	launch := l.start(o.ID)
	again := ask(t, launch, "GET", "/?window=5")
	require.Equal(t, first.Token, again.Token, "the launch VM goes on where it was captured")
	require.Equal(t, first.Counter+1, again.Counter)
	require.Equal(t, table.WindowHash(first.Token, 5), again.SHA256)
	whole := ask(t, launch, "GET", "/verify")
	require.Equal(t, table.Hash(first.Token), whole.Table)
	require.Equal(t, table.FileHash(first.Token), whole.File)

	require.Equal(t, first.Counter+1, ask(t, work, "GET", "/").Counter, "the captured instance goes on too")
}
