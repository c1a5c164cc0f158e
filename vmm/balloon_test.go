package vmm

import (
	"context"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// What stands in memory that the guest does not use any more is in no capture after it was
// dropped, the guest has all of its memory, and what it does use is as before.
func TestDropFree(t *testing.T) { onDrivers(t, testDropFree) }

func testDropFree(t *testing.T, newRig func(*testing.T) (rig, string)) {
	const filled = 64 << 20
	rig, disk := newRig(t)
	vm, base := rig.resumed(t, disk)
	images := copyPair(t, base)
	before := ask(t, vm, "GET", "/verify")
	fill := func() { // and forget
		ask(t, vm, "POST", "/fill?mib=64&seed=1")
		ask(t, vm, "POST", "/fill?mib=1&seed=1")
	}
	fill()
	captured := func() int64 {
		res, err := vm.Capture(t.Context(), newDir(t, "out"))
		require.NoError(t, err)
		changed, _ := total(res.MemoryExtents())
		require.NoError(t, res.Release(t.Context()))
		return changed
	}
	with := captured()
	require.Greater(t, with, int64(filled))
	start := time.Now()
	var last, all int64
	dropped, err := vm.DropFree(t.Context(), func(done, total int64) {
		require.GreaterOrEqual(t, done, last)
		last, all = done, total
	})
	require.NoError(t, err)
	without := captured()
	t.Logf("dropped %d MiB in %v: captures %d MiB, before %d", dropped>>20, time.Since(start), without>>20, with>>20)
	require.Greater(t, dropped, int64(filled))
	require.Equal(t, all, last)
	require.Less(t, without, with-filled*3/4)
	requireMemory(t, vm, rig.machine.Memory)
	require.NoFileExists(t, filepath.Join(vm.Dir(), balloonFile))

	// No hole was made in the file, which might be others' too: with what the VM has changed it
	// is the VM's memory.
	requireEqualFiles(t, base.memory, images.memory, 0, rig.machine.Memory, 0)
	require.NoError(t, vm.Pause(t.Context()))
	res, err := vm.Capture(t.Context(), newDir(t, "out"))
	require.NoError(t, err)
	requireEqualMemory(t, vm, merge(t, base, res).memory)
	_, err = vm.DropFree(t.Context(), nil)
	require.ErrorIs(t, err, ErrBusy)
	require.NoError(t, res.Release(t.Context()))
	dropped, err = vm.DropFree(t.Context(), nil)
	require.NoError(t, err)
	require.Zero(t, dropped, "it is paused")
	require.NoError(t, vm.Continue(t.Context()))

	// Given up half way: the guest has its memory.
	fill()
	ctx, cancel := context.WithCancel(t.Context())
	_, err = vm.DropFree(ctx, func(done, total int64) {
		if done > 0 {
			cancel()
		}
	})
	require.ErrorIs(t, err, context.Canceled)
	requireMemory(t, vm, rig.machine.Memory)
	require.NoFileExists(t, filepath.Join(vm.Dir(), balloonFile))

	// Killed half way: it has its memory once it is adopted.
	require.NoError(t, writeJSON(vm.Dir(), balloonFile, struct{}{}))
	require.NoError(t, vm.balloon(t.Context(), rig.machine.Memory/2, func(int64) {}))
	adopted, err := rig.q.Adopt(t.Context(), vm.Dir())
	require.NoError(t, err)
	require.NoFileExists(t, filepath.Join(vm.Dir(), balloonFile))
	requireMemory(t, adopted, rig.machine.Memory)

	after := ask(t, vm, "GET", "/verify")
	require.Equal(t, before.Token, after.Token)
	require.Equal(t, before.Table, after.Table)
	require.Equal(t, before.File, after.File)
	require.NoError(t, vm.Destroy(t.Context()))
	dropped, err = vm.DropFree(t.Context(), nil)
	require.NoError(t, err)
	require.Zero(t, dropped, "it has ended")
}

// requireMemory waits until the guest has so much memory.
func requireMemory(t *testing.T, vm *VM, bytes int64) {
	t.Helper()
	var now struct {
		Actual int64 `json:"actual"`
	}
	require.Eventually(t, func() bool {
		require.NoError(t, vm.Monitor(t.Context(), "query-balloon", nil, &now))
		return now.Actual == bytes
	}, 20*time.Second, 50*time.Millisecond)
}

// Guests that cannot say what they do not use are told apart from errors.
func TestDropFreeCannot(t *testing.T) {
	r, disk := newRig(t)
	r.machine.Devices = []string{DeviceSerial, DeviceDisk, DeviceNet}
	vm, _ := r.resumed(t, disk)
	_, err := vm.DropFree(t.Context(), nil)
	require.ErrorIs(t, err, ErrNoBalloon)
	require.ErrorContains(t, err, "make a new base")

	r.machine.Devices = DefaultDevices()
	base := newPair(t)
	copyTo(t, base.disk, disk)
	vm = r.boot(t, base) // nobody has loaded a driver yet
	require.NoError(t, vm.Pause(t.Context()))
	require.NoError(t, vm.SaveBase(t.Context(), base.state))
	_, err = vm.DropFree(t.Context(), nil)
	require.ErrorContains(t, err, "booted, not resumed")
	spec := r.resumeSpec(t, base)
	vm, err = r.q.Resume(t.Context(), newDir(t, "resume"), spec, nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, vm.Destroy(context.Background())) })
	require.NoError(t, vm.Reset(t.Context()))
	_, err = vm.DropFree(t.Context(), nil)
	require.ErrorIs(t, err, ErrNoBalloon)
	require.ErrorContains(t, err, "virtio_balloon")
}
