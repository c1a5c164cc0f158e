package vmm

import (
	"context"
	"fmt"
	"os"
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
	// A guest that has changed little is left in peace: what it would note weighs more.
	dropped, err := vm.DropFree(t.Context(), nil)
	require.NoError(t, err)
	require.Less(t, dropped, int64(16<<20))
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
	dropped, err = vm.DropFree(t.Context(), func(done, total int64) {
		require.GreaterOrEqual(t, done, last)
		last, all = done, total
	})
	require.NoError(t, err)
	without := captured()
	t.Logf("dropped %d MiB in %v: captures %d MiB, before %d", dropped>>20, time.Since(start), without>>20, with>>20)
	require.Greater(t, dropped, int64(filled))
	require.Equal(t, all, last)
	require.Less(t, without, with-filled*3/4)
	requireNothingLent(t, vm)

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

	// Given up: the guest has its memory.
	fill()
	ctx, cancel := context.WithCancel(t.Context())
	_, err = vm.DropFree(ctx, func(done, total int64) { cancel() })
	require.ErrorIs(t, err, context.Canceled)
	requireNothingLent(t, vm)

	// Killed half way: it has its memory once it is adopted.
	require.NoError(t, writeJSON(vm.Dir(), balloonFile, lent{Interval: 7}))
	require.NoError(t, vm.Monitor(t.Context(), "qom-set", property(pollingInterval, 1), nil))
	require.NoError(t, vm.Monitor(t.Context(), "balloon", toHave(rig.machine.Memory*3/4), nil))
	requireMemory(t, vm, rig.machine.Memory*3/4)
	adopted, err := rig.q.Adopt(t.Context(), vm.Dir())
	require.NoError(t, err)
	require.NoFileExists(t, filepath.Join(vm.Dir(), balloonFile))
	requireMemory(t, adopted, rig.machine.Memory)
	var interval int64
	require.NoError(t, vm.Monitor(t.Context(), "qom-get", property(pollingInterval), &interval))
	require.Equal(t, int64(7), interval)

	after := ask(t, vm, "GET", "/verify")
	require.Equal(t, before.Token, after.Token)
	require.Equal(t, before.Table, after.Table)
	require.Equal(t, before.File, after.File)
	require.NoError(t, vm.Destroy(t.Context()))
	dropped, err = vm.DropFree(t.Context(), nil)
	require.NoError(t, err)
	require.Zero(t, dropped, "it has ended")
}

// requireNothingLent checks that the guest has what it had before it was asked for memory.
func requireNothingLent(t *testing.T, vm *VM) {
	t.Helper()
	requireMemory(t, vm, vm.Machine().Memory)
	require.NoFileExists(t, filepath.Join(vm.Dir(), balloonFile))
	var interval int64
	require.NoError(t, vm.Monitor(t.Context(), "qom-get", property(pollingInterval), &interval))
	require.Zero(t, interval)
}

// requireMemory waits until the guest has so much memory.
func requireMemory(t *testing.T, vm *VM, bytes int64) {
	t.Helper()
	require.Eventually(t, func() bool {
		now, err := vm.ballooned(t.Context())
		return err == nil && now == bytes
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
	r.machine.Append += " module_blacklist=virtio_balloon"
	vm, _ = r.resumed(t, disk)
	ask(t, vm, "POST", "/dirty?mib=8")
	_, err = vm.DropFree(t.Context(), nil)
	require.ErrorIs(t, err, ErrNoBalloon)
	require.ErrorContains(t, err, "virtio_balloon")
}

// What the device and the guest say is the guest's word.
func TestDropFreeAnswers(t *testing.T) {
	const size, free, changed = 64 << 20, 50 << 20, 16 << 20
	all := func(int) int64 { return size }
	for name, tt := range map[string]struct {
		free    int64
		refused bool // the first word to the balloon
		give    func(step int) int64
		back    func(step int) int64
		cancel  bool // once it gives
		dropped int64
		err     string
	}{
		"as asked":        {free: free, give: func(step int) int64 { return size - min(int64(step)*10<<20, changed) }, back: all, dropped: changed},
		"refused":         {free: free, refused: true, give: all, back: all, err: "no such device"},
		"gives nothing":   {free: free, give: all, back: all},
		"boasts":          {free: free, give: func(step int) int64 { return size - min(int64(step), 1)<<44 }, back: all, dropped: changed},
		"was reset":       {free: free, give: func(step int) int64 { return size - 10<<20 - min(int64(step), 1)<<20 }, back: all, dropped: 1 << 20},
		"takes back late": {free: free, give: func(step int) int64 { return size - min(int64(step), 1)<<24 }, back: func(step int) int64 { return 48<<20 + int64(step)<<12 }, dropped: changed},
		"given up":        {free: free, give: func(step int) int64 { return size - min(int64(step)<<20, changed) }, back: all, cancel: true, err: "context canceled"},
		"nothing free":    {free: 1 << 20, give: all, back: all},
		"too much free":   {free: size + 1, give: all, back: all, err: "67108865 of 67108864 bytes are free"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			info, mem := mapPrivately(t, size/pageSize)
			for p := range changed / pageSize {
				mem[p*pageSize]++
			}
			info.Resumed, info.Machine = true, testMachine()
			info.Machine.Memory = size
			gets, asked, step := 0, 0, 0
			var last int64
			dir := fakeMonitor(t, commands(func(command string, args map[string]any, id int) string {
				text := `{}`
				switch command {
				case "query-status":
					text = `{"status":"running","running":true}`
				case "qom-get":
					if text = "0"; gets > 0 {
						text = fmt.Sprintf(`{"stats":{"stat-free-memory":%d},"last-update":%d}`, tt.free, gets)
					}
					gets++
				case "query-balloon":
					actual := tt.give
					if asked > 1 {
						actual = tt.back
					}
					text = fmt.Sprintf(`{"actual":%d}`, actual(step))
					step++
				case "balloon":
					asked++
					last = int64(args["value"].(float64))
					if step = 1; asked == 1 && tt.refused {
						return fmt.Sprintf(`{"error":{"class":"GenericError","desc":"no such device"},"id":%d}`, id)
					}
				}
				return fmt.Sprintf(`{"return":%s,"id":%d}`, text, id)
			}))
			self, err := identify(os.Getpid())
			require.NoError(t, err)
			vm := &VM{q: testQEMU(t, ""), dir: dir, info: info, procs: processes{QEMU: self}}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			dropped, err := vm.DropFree(ctx, func(done, total int64) {
				if tt.cancel && done > 0 {
					cancel()
				}
			})
			require.NoFileExists(t, filepath.Join(dir, balloonFile))
			require.Equal(t, int64(size), last, "it is told to have all of its memory")
			if tt.err != "" {
				require.ErrorContains(t, err, tt.err)
				return
			}
			require.NoError(t, err)
			require.Equal(t, tt.dropped, dropped)
		})
	}
}
