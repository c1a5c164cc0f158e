package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"cloudlet/api"
	"cloudlet/integration/guest/table"
	"cloudlet/overlay"

	"github.com/stretchr/testify/require"
)

// requireWhole checks what the guest says of its own memory and disk.
func requireWhole(t *testing.T, in api.Instance, token string) {
	t.Helper()
	a := ask(t, in, "GET", "/verify")
	require.Equal(t, token, a.Token)
	require.Equal(t, table.Hash(token), a.Table)
	require.Equal(t, table.FileHash(token), a.File)
}

// TestProofChain proves a chain of three, link by link: what QEMU's own tools read from the
// paused instance is what the mount of its overlay serves. Then the chain moves to another
// store, through files only.
func TestProofChain(t *testing.T) {
	l := newLab(t)
	l.requireImage(l.base, truth{memory: l.baseFile("memory"), disk: l.baseFile("disk")})

	parent := truth{disk: l.baseFile("disk")}
	ref, token := l.base, ""
	var files []string
	for i, change := range []string{"/write?mib=3&seed=one", "/dirty?mib=5", "/delete?seed=one"} {
		in := l.start(ref)
		a := ask(t, in, "GET", "/?window=1")
		if i == 0 {
			token = a.Token
		}
		require.Equal(t, token, a.Token)
		ask(t, in, "POST", change)
		l.ok("pause", in.ID)
		now := l.witness(in, parent.disk)
		files = append(files, filepath.Join(t.TempDir(), "overlay"))
		o := l.capture(in.ID, "-o", files[i])
		require.Equal(t, i+1, o.Depth)
		require.Equal(t, ref, o.Parent)
		l.requireImage(o.ID, now)
		require.Equal(t, api.Paused, l.inspect(in.ID).State, "a capture leaves a paused instance paused")
		l.ok("rm", "--force", in.ID)
		ref, parent = o.ID, now
	}
	last := l.start(ref)
	requireWhole(t, last, token)

	t.Run("exported", func(t *testing.T) {
		zip := filepath.Join(t.TempDir(), "base.zip")
		l.ok("base", "export", l.base, "-o", zip)
		other := newEmptyLab(t)
		require.Equal(t, l.base, other.ok("base", "import", zip))
		for _, f := range files {
			other.ok("overlay", "import", f)
		}
		other.requireImage(ref, parent)
		requireWhole(t, other.start(ref), token)
	})
}

// TestProofDiscard proves that blocks which the guest has discarded are zero afterwards, though
// the parent holds data there, and that they cost nothing in the overlay.
func TestProofDiscard(t *testing.T) {
	const mib = 24
	l := newLab(t)
	in := l.start(l.base)
	token := ask(t, in, "GET", "/").Token
	ask(t, in, "POST", "/write?mib=24&seed=gone")
	l.ok("pause", in.ID)
	full := l.witness(in, l.baseFile("disk"))
	o := l.capture(in.ID)
	l.requireImage(o.ID, full)

	second := l.start(o.ID)
	require.Equal(t, table.ExtraHash("gone", mib), ask(t, second, "GET", "/verify?seed=gone").Extra)
	ask(t, second, "POST", "/delete?seed=gone")
	l.ok("pause", second.ID)
	now := l.witness(second, full.disk)
	require.GreaterOrEqual(t, now.trimmed, int64(mib)<<20, "the layer holds the discards")
	trimmed := l.capture(second.ID)
	l.requireImage(trimmed.ID, now)

	var stats overlay.Stats
	require.NoError(t, json.Unmarshal(trimmed.Stats, &stats))
	// QEMU drops a discard's two ends that do not fill a cluster of the layer.
	require.GreaterOrEqual(t, stats.Disk.Zero, int64(mib-1)<<20/pageSize, "what the parent holds is zero now")
	require.Less(t, stats.Disk.Stored, int64(1<<20/pageSize), "only what the file system wrote about it is stored")
	requireWhole(t, l.start(trimmed.ID), token)
}

// TestProofWhileWriting captures an instance that writes without rest to memory and disk, and
// was not paused by anybody: the overlay must be one moment of it.
func TestProofWhileWriting(t *testing.T) {
	l := newLab(t)
	in := l.start(l.base)
	token := ask(t, in, "GET", "/").Token
	ask(t, in, "POST", "/load?on=1")
	var before answer
	eventually(t, "the writer has been round its file once", func() bool {
		before = ask(t, in, "POST", "/load?on=1")
		return before.Rounds > 150
	})
	o := l.capture(in.ID)
	after := ask(t, in, "POST", "/load?on=1")
	require.True(t, after.On, "the captured instance writes on")
	l.ok("stop", in.ID)

	// QEMU must see in a VM synthesised from it what the mount serves.
	var launch api.Instance
	l.json(&launch, "run", o.ID, "--paused", "-p", "0:8080")
	image := truth{memory: filepath.Join(t.TempDir(), "memory"), disk: filepath.Join(t.TempDir(), "disk")}
	l.saveMemory(launch, image.memory)
	tool(t, "qemu-img", "convert", "-U", "-O", "raw", l.vmFile(launch, "disk.0.qcow2"), image.disk)
	l.requireImage(o.ID, image)

	l.ok("continue", launch.ID)
	now := ask(t, launch, "POST", "/load?on=0")
	require.GreaterOrEqual(t, now.Rounds, before.Rounds)
	requireWhole(t, launch, token)

	// Its file holds exactly the rounds that its memory counts.
	l.ok("pause", launch.ID)
	l.saveDisk(launch, image.disk, image.disk+".now")
	requireLoad(t, image.disk+".now", token, now.Rounds)
}

// requireLoad reads the load's file out of the file system in a raw image and checks each
// step: it holds the last of the given number of rounds that wrote there.
func requireLoad(t *testing.T, disk, token string, rounds int64) {
	t.Helper()
	const step, steps = 128 << 10, 128
	out := filepath.Join(t.TempDir(), "load.log")
	tool(t, "e2fsck", "-y", "-E", "journal_only", disk) // as the next mount would
	tool(t, "debugfs", "-R", "dump /load.log "+out, disk)
	have, err := os.ReadFile(out)
	require.NoError(t, err)
	require.Len(t, have, step*steps)
	want := make([]byte, step)
	for i := range int64(steps) {
		round := (rounds-1-i)/steps*steps + i
		table.Fill(want, fmt.Sprintf("%s/load/%d", token, round))
		require.True(t, string(want) == string(have[i*step:][:step]), "step %d does not hold round %d of %d", i, round, rounds)
	}
}
