package vmm

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// resumed boots the test guest, makes a base of it and resumes that.
func (r rig) resumed(t *testing.T, disk string) (*VM, pair) {
	t.Helper()
	base := newPair(t)
	copyTo(t, base.disk, disk)
	vm := r.boot(t, base)
	ask(t, vm, "GET", "/")
	require.NoError(t, vm.SaveBase(t.Context(), base.state))
	return r.resume(t, base), base
}

// requireLayers checks which layers stand above the top layer, in the folder and in QEMU.
func requireLayers(t *testing.T, vm *VM, want ...string) {
	t.Helper()
	names, err := layerNames(vm.Dir())
	require.NoError(t, err)
	require.ElementsMatch(t, want, names)
}

// requireState checks whether a VM runs.
func requireState(t *testing.T, vm *VM, want string) {
	t.Helper()
	status, err := vm.Status(t.Context())
	require.NoError(t, err)
	require.Equal(t, want, status.State)
}

// logRound says what a round has taken.
func logRound(t *testing.T, name string, took time.Duration, res *Residue) {
	t.Helper()
	mem, memZero := total(res.MemoryExtents())
	disk, diskZero := total(res.DiskExtents())
	t.Logf("%s: %v, pause %v, memory %d KiB (zero %d), disk %d KiB (zero %d)", name, took, res.Pause, mem>>10, memZero>>10, disk>>10, diskZero>>10)
}

// The residues of all rounds, laid over the base in order, are the paused VM: with a guest
// that writes all the time, discards, a round without changes, and releases in any order.
func TestRounds(t *testing.T) { onDrivers(t, testRounds) }

func testRounds(t *testing.T, newRig func(*testing.T) (rig, string)) {
	rig, disk := newRig(t)
	vm, base := rig.resumed(t, disk)
	images := copyPair(t, base)
	rounds, err := vm.Rounds(t.Context())
	require.NoError(t, err)
	for name, begin := range map[string]func() error{
		"rounds":  func() error { _, err := vm.Rounds(t.Context()); return err },
		"capture": func() error { _, err := vm.Capture(t.Context(), newDir(t, "out")); return err },
		"merge":   func() error { return vm.Merge(t.Context()) },
	} {
		require.ErrorIs(t, begin(), ErrBusy, name)
	}

	ask(t, vm, "POST", "/load?on=1")
	var held []*Residue
	for i := range 4 {
		ask(t, vm, "POST", fmt.Sprintf("/write?mib=4&seed=%d", i))
		ask(t, vm, "POST", "/dirty?mib=8")
		if i == 2 {
			ask(t, vm, "POST", "/delete?seed=0")
		}
		start := time.Now()
		res, err := rounds.Next(t.Context(), newDir(t, "out"))
		require.NoError(t, err)
		logRound(t, fmt.Sprintf("round %d", i), time.Since(start), res)
		require.Empty(t, res.State)
		requireState(t, vm, Running)
		apply(t, images, res)
		held = append(held, res)
	}
	requireLayers(t, vm, layerName(1), layerName(2), layerName(3), layerName(4), layerName(5))
	_, err = rounds.Last(t.Context(), newDir(t, "out"))
	require.ErrorContains(t, err, "pause it before")
	require.NoError(t, held[1].Release(t.Context())) // waits for the first
	requireLayers(t, vm, layerName(1), layerName(2), layerName(3), layerName(4), layerName(5))
	require.NoError(t, held[0].Release(t.Context()))
	requireLayers(t, vm, layerName(2), layerName(3), layerName(4), layerName(5))
	require.NoError(t, held[0].Release(t.Context()))
	require.NoError(t, held[3].Release(t.Context()))
	require.NoError(t, held[2].Release(t.Context()))
	// The third has discards, which only Close can merge as such.
	require.Greater(t, held[2].blocks.zeros(), int64(maxZeros))
	requireLayers(t, vm, layerName(2), layerName(4), layerName(5))

	last := func() *Residue {
		require.NoError(t, vm.Pause(t.Context()))
		start := time.Now()
		res, err := rounds.Last(t.Context(), newDir(t, "out"))
		require.NoError(t, err)
		logRound(t, "last", time.Since(start), res)
		require.Zero(t, res.Pause)
		requireState(t, vm, Paused)
		apply(t, images, res)
		requireEqualMemory(t, vm, images.memory)
		requireEqualDisk(t, vm, images.disk)
		return res
	}
	require.NoError(t, last().Release(t.Context()))

	// Nothing has changed since.
	for i := range 2 {
		res, err := rounds.Next(t.Context(), newDir(t, "out"))
		require.NoError(t, err)
		if i > 0 {
			require.Empty(t, res.MemoryExtents())
		}
		require.Empty(t, res.DiskExtents())
		require.NoError(t, res.Release(t.Context()))
	}
	requireState(t, vm, Paused)

	// The handoff is given up: the guest goes on, and is handed off after all.
	require.NoError(t, vm.Continue(t.Context()))
	ask(t, vm, "POST", "/write?mib=2&seed=9")
	ask(t, vm, "POST", "/delete?seed=1")
	before := ask(t, vm, "GET", "/verify")
	res := last()
	require.NoError(t, rounds.Close(t.Context())) // releases it
	require.ErrorIs(t, res.ReadMemory(make([]byte, pageSize), 0), ErrReleased)
	require.NoFileExists(t, res.State)
	require.NoError(t, res.Release(t.Context()))
	require.NoError(t, rounds.Close(t.Context()))
	_, err = rounds.Next(t.Context(), newDir(t, "out"))
	require.ErrorIs(t, err, errClosed)
	requireLayers(t, vm)
	requireState(t, vm, Paused)
	requireEqualDisk(t, vm, images.disk)

	// What a capture takes now is the same, and another VM runs on from it.
	res, err = vm.Capture(t.Context(), newDir(t, "out"))
	require.NoError(t, err)
	require.Greater(t, res.blocks.zeros(), int64(maxZeros))
	whole := merge(t, base, res)
	requireEqualFiles(t, whole.memory, images.memory, 0, res.MemorySize, 0)
	requireEqualFiles(t, whole.disk, images.disk, 0, res.DiskSize, 0)
	require.NoError(t, res.Release(t.Context()))
	moved := rig.resume(t, images)
	ask(t, moved, "POST", "/load?on=0")
	after := ask(t, moved, "GET", "/verify")
	require.Equal(t, before.Token, after.Token)
	require.Equal(t, before.Table, after.Table)
	require.Equal(t, before.File, after.File)
}
