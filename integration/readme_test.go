package integration

import (
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestReadme runs the walk of the README as it would be pasted, with a store of its own.
func TestReadme(t *testing.T) {
	l := newEmptyLab(t)
	text, err := os.ReadFile("../README.md")
	require.NoError(t, err)
	blocks := regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(string(text), -1)
	require.Len(t, blocks, 1)
	const state = "CLOUDLET_STATE=$PWD/build/state"
	require.Contains(t, blocks[0][1], state)
	script := strings.ReplaceAll(blocks[0][1], state, "CLOUDLET_STATE="+l.state)
	cmd := exec.CommandContext(t.Context(), "bash", "-euo", "pipefail", "-c", script)
	cmd.Dir = ".."
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	for _, want := range []string{"manifest.json", "the disk is the same", "first answer", "PORTS"} {
		require.Contains(t, string(out), want)
	}
	require.Empty(t, l.leftovers())
}
