package integration

import (
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"cloudlet/integration/need"
)

// TestReadme runs the walk of the README as it would be pasted, with a store of its own.
func TestReadme(t *testing.T) {
	pasted(t, 0, "manifest.json", "the disk is the same", "first answer", "PORTS")
}

// TestReadmeService does so with the lines about the service.
func TestReadmeService(t *testing.T) {
	need.Program(t, "jq")
	pasted(t, 1, `{"kind":"create-overlay","state":"done","error":null}`, `{"kind":"import-overlay","state":"done","error":null}`,
		"event: operation", `"name":"first answer"`, "cloudlet_first_response", `"code":"not_found"`, `{"name":"one","state":"stopped"}`)
}

// TestOpenStackClient does so with the lines about OpenStack: Debian's client as it is resumes a
// base, synthesises an overlay from a URL, pauses and deletes.
func TestOpenStackClient(t *testing.T) {
	for _, program := range []string{"openstack", "jq", "python3"} {
		need.Program(t, program)
	}
	out := pasted(t, 2, "base-memhash", "ACTIVE", "PAUSED")
	require.Regexp(t, `c10d1e70-[0-9a-f-]+ +\| one +\| ACTIVE`, out)
	require.Regexp(t, `"token":"[0-9a-f]{32}"`, out, "the guest answers")
}

// pasted runs a block of the README, which must print these words and leave nothing.
func pasted(t *testing.T, block int, words ...string) string {
	l := newEmptyLab(t)
	text, err := os.ReadFile("../README.md")
	require.NoError(t, err)
	blocks := regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(string(text), -1)
	require.Len(t, blocks, 3)
	const state = "CLOUDLET_STATE=$PWD/build/state"
	require.Contains(t, blocks[block][1], state)
	script := strings.ReplaceAll(blocks[block][1], state, "CLOUDLET_STATE="+l.state)
	script = "trap 'jobs -p | xargs -r kill' EXIT\n" + script // where a line fails
	cmd := exec.CommandContext(t.Context(), "bash", "-euo", "pipefail", "-c", script)
	cmd.Dir = ".."
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	for _, want := range words {
		require.Contains(t, string(out), want)
	}
	require.Empty(t, l.leftovers())
	return string(out)
}
