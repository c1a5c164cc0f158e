package integration

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"cloudlet/api"
	"cloudlet/integration/guest/table"

	"github.com/stretchr/testify/require"
)

// TestReset presses the reset button of an instance of the base, of an overlay and of a
// chain: each boots anew, from its own disk, with a kernel and firmware that a resumed VM has
// never loaded.
func TestReset(t *testing.T) {
	l := newLab(t)
	instances := []api.Instance{l.start(l.base)}
	token := ask(t, instances[0], "GET", "/").Token
	for _, seed := range []string{"one", "two"} {
		last := instances[len(instances)-1]
		ask(t, last, "POST", "/write?mib=1&seed="+seed)
		instances = append(instances, l.start(l.capture(last.ID).ID))
	}
	for _, in := range instances {
		l.ok("reset", in.ID)
	}
	seen := map[string]bool{token: true}
	for depth, in := range instances {
		var a answer
		eventually(t, "the guest has booted and answers", func() bool {
			code, body := try(t, in, "/?window=9")
			return code == http.StatusOK && json.Unmarshal(body, &a) == nil && a.Token != token
		})
		require.False(t, seen[a.Token], "a new start makes a new token")
		seen[a.Token] = true
		require.Equal(t, table.WindowHash(a.Token, 9), a.SHA256)
		require.Equal(t, api.Running, l.inspect(in.ID).State)
		for i, seed := range []string{"one", "two"}[:depth] {
			require.Equal(t, table.ExtraHash(seed, 1), ask(t, in, "GET", "/verify?seed="+seed).Extra, "file %d", i)
		}
	}

	// A guest that has booted anew can be captured like any other.
	last := instances[2]
	booted := ask(t, last, "GET", "/")
	again := l.start(l.capture(last.ID).ID)
	a := ask(t, again, "GET", "/?window=4")
	require.Equal(t, booted.Token, a.Token)
	require.Equal(t, booted.Counter+1, a.Counter)
	require.Equal(t, table.WindowHash(a.Token, 4), a.SHA256)
}

// TestRepeatedCaptures takes many overlays of one instance, running and paused.
func TestRepeatedCaptures(t *testing.T) {
	l := newLab(t)
	in := l.start(l.base)
	token := ask(t, in, "GET", "/").Token
	depth := l.layers(in)

	ids := map[string]bool{}
	var last api.CreatedOverlay
	for i := range 10 {
		ask(t, in, "POST", fmt.Sprintf("/write?mib=1&seed=n%d", i))
		last = l.capture(in.ID, "--strategy", "fast")
		require.Equal(t, l.base, last.Parent, "every capture is a difference to the image that it runs on")
		require.Positive(t, last.Pause)
		ids[last.ID] = true
		require.Equal(t, api.Running, l.inspect(in.ID).State)
	}
	require.Len(t, ids, 10)
	require.Equal(t, depth, l.layers(in), "captures leave no layers behind")

	l.ok("pause", in.ID)
	now := l.witness(in, l.baseFile("disk"))
	first := l.captureTwice(in.ID)
	require.Zero(t, first.Pause, "it stood still anyway")
	require.Equal(t, api.Paused, l.inspect(in.ID).State)
	l.requireImage(first.ID, now)
	l.ok("continue", in.ID)
	counter := ask(t, in, "GET", "/").Counter
	later := l.capture(in.ID)
	require.NotEqual(t, first.ID, later.ID)

	launch := l.start(later.ID)
	require.Equal(t, counter+1, ask(t, launch, "GET", "/").Counter)
	for _, i := range []int{0, 9} {
		require.Equal(t, table.ExtraHash(fmt.Sprintf("n%d", i), 1), ask(t, launch, "GET", fmt.Sprintf("/verify?seed=n%d", i)).Extra)
	}
	requireWhole(t, launch, token)
}

// layers counts the images of an instance's disk, the raw one at the bottom included.
func (l *lab) layers(in api.Instance) int {
	l.t.Helper()
	var chain []struct{}
	var blocks []struct {
		Inserted struct{ File string }
	}
	require.NoError(l.t, l.vm(in).Monitor(l.t.Context(), "query-block", nil, &blocks))
	require.Len(l.t, blocks, 1)
	top := l.vmFile(in, filepath.Base(blocks[0].Inserted.File))
	require.NoError(l.t, json.Unmarshal(tool(l.t, "qemu-img", "info", "-U", "--backing-chain", "--output=json", top), &chain))
	files, err := filepath.Glob(l.vmFile(in, "*.qcow2"))
	require.NoError(l.t, err)
	require.Len(l.t, files, len(chain)-1, "no layer lies about unused: %v", files)
	return len(chain)
}

// TestStrategiesKeepID encodes one moment of an instance in every way: other bytes, the same
// content and so the same id.
func TestStrategiesKeepID(t *testing.T) {
	l := newLab(t)
	in := l.start(l.base)
	ask(t, in, "POST", "/write?mib=2&seed=s")
	ask(t, in, "POST", "/dirty?mib=2")
	l.ok("pause", in.ID)
	now := l.witness(in, l.baseFile("disk"))

	none := l.capture(in.ID, "--strategy", "none")
	l.requireImage(none.ID, now)
	sizes, digests := map[string]int64{"none": none.Size}, map[string]bool{none.Digest: true}
	for _, strategy := range []string{"fast", "balanced", "balanced,level=19", "small"} {
		file := filepath.Join(t.TempDir(), strategy+".overlay")
		made := l.captureTwice(in.ID, "--strategy", strategy, "-o", file)
		var o api.Overlay
		l.json(&o, "overlay", "show", file)
		require.Equal(t, made.ID, o.ID)
		info, err := os.Stat(file)
		require.NoError(t, err)
		require.Equal(t, info.Size(), o.Size)
		sizes[strategy], digests[o.Digest] = o.Size, true
		l.ok("overlay", "verify", file)
		l.requireImage(file, now)
	}
	require.Len(t, digests, len(sizes))
	// Not that balanced is below fast: of this guest's pages most are random, on the others,
	// without a profile, the two differ by a few hundred bytes in either direction.
	require.Less(t, sizes["fast"], sizes["none"])
	require.Less(t, sizes["balanced"], sizes["none"])
	require.Less(t, sizes["balanced,level=19"], sizes["balanced"])
	require.Less(t, sizes["small"], sizes["balanced,level=19"])
	t.Log(sizes)
}

// captureTwice captures a paused instance, once uncompressed and once with args, until both
// have one id, and returns the second. Nearly always the first two have: the only thing that
// moves in a paused VM is its real-time clock, which goes by the host's and is part of the
// device state.
func (l *lab) captureTwice(id string, args ...string) api.CreatedOverlay {
	l.t.Helper()
	for range 10 {
		first, second := l.capture(id, "--strategy", "none"), l.capture(id, args...)
		if first.ID == second.ID {
			return second
		}
	}
	l.t.Fatalf("no two captures in a row of paused instance %s have one id", id)
	return api.CreatedOverlay{}
}
