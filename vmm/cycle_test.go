package vmm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"cloudlet/integration/need"
)

// guestFiles finds the test guest, or skips.
func guestFiles(t *testing.T) (kernel, initrd, disk string) {
	t.Helper()
	dir := os.Getenv("CLOUDLET_GUEST")
	if dir == "" {
		dir = "../build/guest"
	}
	kernel, initrd, disk = filepath.Join(dir, "vmlinuz"), filepath.Join(dir, "initrd"), filepath.Join(dir, "disk.raw")
	for _, f := range []string{kernel, initrd, disk} {
		_, err := os.Stat(f)
		need.No(t, err, os.ErrNotExist) // no test guest
	}
	return kernel, initrd, disk
}

const guestAppend = "console=ttyS0 quiet panic=-1"

// answer is what the guest's application says.
type answer struct {
	Token   string `json:"token"`
	Counter int    `json:"counter"`
	SHA256  string `json:"sha256"`
	Table   string `json:"table"`
	File    string `json:"file"`
}

// ask asks the guest's application, again until it answers.
func ask(t *testing.T, vm *VM, method, path string) answer {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 20 * time.Second}
	url := fmt.Sprintf("http://127.0.0.1:%d%s", vm.Forwards()[0].Host, path)
	var a answer
	start := time.Now()
	defer func() { t.Logf("%s %s: %v", method, path, time.Since(start)) }()
	err := pollUntil(ctx, func() (bool, error) {
		req, err := http.NewRequestWithContext(ctx, method, url, nil)
		if err != nil {
			return false, err
		}
		resp, err := client.Do(req)
		if err != nil {
			return false, nil
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			return false, nil
		}
		if resp.StatusCode != http.StatusOK {
			return false, fmt.Errorf("%s: %s: %s", url, resp.Status, body)
		}
		_ = json.Unmarshal(body, &a)
		return true, nil
	})
	require.NoError(t, err)
	return a
}

func newDir(t *testing.T, name string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), name)
	require.NoError(t, os.Mkdir(dir, 0o700))
	return dir
}

func copyTo(t *testing.T, to, from string) {
	t.Helper()
	require.NoError(t, exec.CommandContext(t.Context(), "cp", "--sparse=always", from, to).Run())
}

// pair is a VM at rest: files to resume from.
type pair struct {
	memory, disk, state string
}

// rig resumes and captures VMs of the test guest.
type rig struct {
	q              hypervisor
	machine        Machine
	kernel, initrd string
}

func newRig(t *testing.T) (rig, string) {
	t.Helper()
	kernel, initrd, disk := guestFiles(t)
	q := testQEMU(t, "")
	host, err := q.Probe(t.Context())
	need.No(t, err, ErrNoQEMU)
	m, err := host.Machine(TCG, 256<<20, 1)
	require.NoError(t, err)
	m.Kernel, m.Initrd, m.Append = true, true, guestAppend
	return rig{q: q, machine: m, kernel: kernel, initrd: initrd}, disk
}

func (r rig) bootSpec(p pair) BootSpec {
	return BootSpec{Machine: r.machine, Memory: p.memory, Disk: p.disk, DiskFormat: "raw",
		Kernel: r.kernel, Initrd: r.initrd, Forwards: []Forward{{Guest: 8080}}}
}

func (r rig) resumeSpec(t *testing.T, p pair) ResumeSpec {
	t.Helper()
	state, err := os.ReadFile(p.state)
	require.NoError(t, err)
	return ResumeSpec{Machine: r.machine, Memory: p.memory, Disk: p.disk, State: state,
		Kernel: r.kernel, Initrd: r.initrd, Forwards: []Forward{{Guest: 8080}}}
}

func (r rig) boot(t *testing.T, p pair) *VM {
	t.Helper()
	vm, err := r.q.Boot(t.Context(), newDir(t, "boot"), r.bootSpec(p))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, vm.Destroy(context.Background())) })
	return vm
}

func (r rig) resume(t *testing.T, p pair) *VM {
	t.Helper()
	start := time.Now()
	vm, err := r.q.Resume(t.Context(), newDir(t, "resume"), r.resumeSpec(t, p),
		func(e string) { t.Logf("%s after %v", e, time.Since(start)) })
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, vm.Destroy(context.Background())) })
	return vm
}

func newPair(t *testing.T) pair {
	dir := t.TempDir()
	return pair{filepath.Join(dir, "memory"), filepath.Join(dir, "disk"), filepath.Join(dir, "state")}
}

// copyPair copies the images of a VM at rest.
func copyPair(t *testing.T, from pair) pair {
	t.Helper()
	to := newPair(t)
	copyTo(t, to.memory, from.memory)
	copyTo(t, to.disk, from.disk)
	copyTo(t, to.state, from.state)
	return to
}

// merge applies a residue to copies of a pair.
func merge(t *testing.T, from pair, r *Residue) pair {
	t.Helper()
	to := copyPair(t, from)
	apply(t, to, r)
	return to
}

// apply applies a residue to a pair.
func apply(t *testing.T, to pair, r *Residue) {
	t.Helper()
	if r.State != "" {
		copyTo(t, to.state, r.State)
	}
	write := func(path string, extents []Extent, read func([]byte, int64) error) {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		require.NoError(t, err)
		defer f.Close()
		buf := make([]byte, 1<<20)
		for _, e := range extents {
			for off := e.Off; off < e.Off+e.Len; {
				p := buf[:min(e.Off+e.Len-off, int64(len(buf)))]
				require.NoError(t, read(p, off))
				_, err := f.WriteAt(p, off)
				require.NoError(t, err)
				off += int64(len(p))
			}
		}
	}
	write(to.memory, r.MemoryExtents(), r.ReadMemory)
	write(to.disk, r.DiskExtents(), r.ReadDisk)
}

func total(es []Extent) (changed, zero int64) {
	for _, e := range es {
		if e.Zero {
			zero += e.Len
		}
		changed += e.Len
	}
	return changed, zero
}

// requireEqualMemory compares a merged image with what QEMU itself says is in the guest's
// memory. The range of video memory and firmware is no RAM to the guest.
func requireEqualMemory(t *testing.T, vm *VM, image string) {
	t.Helper()
	saved := filepath.Join(t.TempDir(), "pmem")
	require.NoError(t, vm.Monitor(t.Context(), "pmemsave", map[string]any{"val": 0, "size": vm.Machine().Memory, "filename": saved}, nil))
	requireEqualFiles(t, saved, image, 0, 0xa0000, 0)
	requireEqualFiles(t, saved, image, 0x100000, vm.Machine().Memory, 0x100000)
	regions, err := memoryRegions(vm.PID(), vm.info)
	require.NoError(t, err)
	for _, r := range regions {
		requireEqualFiles(t, fmt.Sprintf("/proc/%d/mem", vm.PID()), image, int64(r.start), int64(r.end), r.off)
	}
}

// requireEqualFiles compares the bytes of a from..to with those of b at off.
func requireEqualFiles(t *testing.T, a, b string, from, to, off int64) {
	t.Helper()
	fa, err := os.Open(a)
	require.NoError(t, err)
	defer fa.Close()
	fb, err := os.Open(b)
	require.NoError(t, err)
	defer fb.Close()
	pa, pb := make([]byte, 1<<20), make([]byte, 1<<20)
	for from < to {
		n := min(to-from, int64(len(pa)))
		_, err := fa.ReadAt(pa[:n], from)
		require.NoError(t, err)
		_, err = fb.ReadAt(pb[:n], off)
		require.NoError(t, err)
		if !bytes.Equal(pa[:n], pb[:n]) {
			require.Fail(t, "bytes differ", "%s and %s, within %d bytes at %d", a, b, n, off)
		}
		from, off = from+n, off+n
	}
}

// requireEqualDisk compares a merged image with what qemu-img reads through the layers.
func requireEqualDisk(t *testing.T, vm *VM, image string) {
	t.Helper()
	raw := filepath.Join(t.TempDir(), "raw")
	_, err := output(t.Context(), "qemu-img", "convert", "-U", "-O", "raw", filepath.Join(vm.Dir(), activeLayer(t, vm)), raw)
	require.NoError(t, err)
	fi, err := os.Stat(image)
	require.NoError(t, err)
	require.Equal(t, vm.info.DiskSize, fi.Size())
	requireEqualFiles(t, raw, image, 0, fi.Size(), 0)
}

// activeLayer returns the name of the layer that a VM writes to.
func activeLayer(t *testing.T, vm *VM) string {
	t.Helper()
	var blocks []struct {
		Device   string `json:"device"`
		QDev     string `json:"qdev"`
		Inserted struct {
			File string `json:"file"`
		} `json:"inserted"`
	}
	require.NoError(t, vm.Monitor(t.Context(), "query-block", nil, &blocks))
	for _, b := range blocks {
		if b.Device == diskID || strings.Contains(b.QDev, aliasPrefix+diskID) {
			return filepath.Base(b.Inserted.File)
		}
	}
	require.Fail(t, "no disk")
	return ""
}

// requireSameScan compares the two ways to find changed pages.
func requireSameScan(t *testing.T, vm *VM) {
	t.Helper()
	regions, err := memoryRegions(vm.PID(), vm.info)
	require.NoError(t, err)
	f, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", vm.PID()))
	require.NoError(t, err)
	defer f.Close()
	var scanned, read []span
	for _, r := range regions {
		start := time.Now()
		scanned, err = scanRegion(f, r, scanned)
		if errors.Is(err, unix.ENOTTY) {
			t.Log("this kernel has no PAGEMAP_SCAN")
			return
		}
		require.NoError(t, err)
		mid := time.Now()
		read, err = readRegion(f, r, read)
		require.NoError(t, err)
		t.Logf("scan %v, page map %v, %d spans", mid.Sub(start), time.Since(mid), len(read))
	}
	require.Equal(t, read, scanned)
}

// requireNoHugePages checks that QEMU's advice for huge pages did not reach the kernel.
func requireNoHugePages(t *testing.T, vm *VM) {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", vm.PID()))
	require.NoError(t, err)
	_, after, found := strings.Cut(string(data), vm.info.Memory)
	require.True(t, found)
	flags := strings.SplitN(after[strings.Index(after, "VmFlags:"):], "\n", 2)[0]
	require.NotContains(t, strings.Fields(flags), "hg")
}

// A VM that was left stopped by a capture whose process was killed runs again once adopted.
func TestAdoptAfterKilledCapture(t *testing.T) { onDrivers(t, testAdoptAfterKilledCapture) }

func testAdoptAfterKilledCapture(t *testing.T, newRig func(*testing.T) (rig, string)) {
	r, disk := newRig(t)
	base := newPair(t)
	copyTo(t, base.disk, disk)
	vm := r.boot(t, base)
	require.NoError(t, vm.SaveBase(t.Context(), base.state))
	vm = r.resume(t, base)
	// What a capture does before it is killed, the lock free afterwards.
	require.NoError(t, r.q.createLayer(t.Context(), filepath.Join(vm.Dir(), layerName(1)), vm.file(topLayer), "qcow2", vm.info.DiskSize))
	require.NoError(t, writeJSON(vm.Dir(), stoppedFile, struct{}{}))
	require.NoError(t, vm.monitor(t.Context(), func(c *qmp) error {
		if err := c.execute(t.Context(), "stop", nil, nil); err != nil {
			return err
		}
		return freeze(t.Context(), c, layerName(1))
	}))
	adopted, err := r.q.Adopt(t.Context(), vm.Dir())
	require.NoError(t, err)
	status, err := adopted.Status(t.Context())
	require.NoError(t, err)
	require.Equal(t, Running, status.State)
	require.NoFileExists(t, filepath.Join(vm.Dir(), stoppedFile))
	// The next capture merges the layers that were left.
	res, err := adopted.Capture(t.Context(), newDir(t, "out"))
	require.NoError(t, err)
	require.NotZero(t, res.Pause)
	require.NoError(t, res.Release(t.Context()))
	require.NoFileExists(t, filepath.Join(vm.Dir(), layerName(1)))
	// A residue outlives its VM.
	res, err = adopted.Capture(t.Context(), newDir(t, "out"))
	require.NoError(t, err)
	require.NoError(t, vm.Destroy(t.Context()))
	e := res.MemoryExtents()[0]
	require.NoError(t, res.ReadMemory(make([]byte, e.Len), e.Off))
	require.NoError(t, res.Release(t.Context()))
	require.NoFileExists(t, res.State)
	_, err = adopted.Capture(t.Context(), newDir(t, "out"))
	require.ErrorIs(t, err, ErrEnded)
}

// A capture that is given up at any moment leaves the VM running and no file.
func TestCaptureCancelled(t *testing.T) { onDrivers(t, testCaptureCancelled) }

func testCaptureCancelled(t *testing.T, newRig func(*testing.T) (rig, string)) {
	r, disk := newRig(t)
	base := newPair(t)
	copyTo(t, base.disk, disk)
	vm := r.boot(t, base)
	require.NoError(t, vm.SaveBase(t.Context(), base.state))
	vm = r.resume(t, base)
	for after := time.Millisecond; ; after += after / 2 {
		require.Less(t, after, time.Minute)
		out := newDir(t, "out")
		ctx, cancel := context.WithTimeout(t.Context(), after)
		res, err := vm.Capture(ctx, out)
		cancel()
		if err == nil {
			require.NoError(t, res.Release(t.Context()))
			break
		}
		require.ErrorIs(t, err, context.DeadlineExceeded)
		t.Logf("after %v: %v", after, err)
		entries, rerr := os.ReadDir(out)
		require.NoError(t, rerr)
		require.Empty(t, entries)
		status, serr := vm.Status(t.Context())
		require.NoError(t, serr)
		require.Equal(t, Running, status.State)
		require.NoFileExists(t, filepath.Join(vm.Dir(), layerName(1)), "%v", err)
		require.NoFileExists(t, filepath.Join(vm.Dir(), stoppedFile), "%v", err)
	}
}

func TestCycle(t *testing.T) { onDrivers(t, testCycle) }

func testCycle(t *testing.T, newRig func(*testing.T) (rig, string)) {
	r, disk := newRig(t)
	base := newPair(t)
	copyTo(t, base.disk, disk)

	start := time.Now()
	vm := r.boot(t, base)
	booted := ask(t, vm, "GET", "/")
	t.Logf("first answer after %v: %+v", time.Since(start), booted)
	start = time.Now()
	require.NoError(t, vm.SaveBase(t.Context(), base.state))
	t.Logf("saved in %v", time.Since(start))
	exit, err := vm.Wait(t.Context())
	require.NoError(t, err)
	require.Equal(t, "QEMU ended on request (quit)", exit.Reason)

	start = time.Now()
	vm = r.resume(t, base)
	again := ask(t, vm, "GET", "/")
	t.Logf("first answer after %v", time.Since(start))
	require.Equal(t, booted.Token, again.Token)
	require.Equal(t, booted.Counter+1, again.Counter)

	requireNoHugePages(t, vm)

	// A paused VM, with discards: captured twice it stays paused and equal.
	ask(t, vm, "POST", "/write?mib=4&seed=1")
	ask(t, vm, "POST", "/write?mib=8&seed=2")
	ask(t, vm, "POST", "/delete?seed=1")
	require.NoError(t, vm.Pause(t.Context()))
	requireSameScan(t, vm)
	for range 2 {
		res, err := vm.Capture(t.Context(), newDir(t, "out"))
		require.NoError(t, err)
		_, err = vm.Capture(t.Context(), newDir(t, "out"))
		require.ErrorIs(t, err, ErrBusy)
		status, err := vm.Status(t.Context())
		require.NoError(t, err)
		require.Equal(t, Paused, status.State)
		changed, zero := total(res.MemoryExtents())
		t.Logf("memory: %d KiB changed, %d zero, %d extents", changed>>10, zero>>10, len(res.MemoryExtents()))
		changed, zero = total(res.DiskExtents())
		t.Logf("disk: %d KiB changed, %d zero, %d extents", changed>>10, zero>>10, len(res.DiskExtents()))
		merged := merge(t, base, res)
		requireEqualMemory(t, vm, merged.memory)
		requireEqualDisk(t, vm, merged.disk)
		require.NoError(t, res.Release(t.Context()))
		require.NoError(t, res.Release(t.Context()))
		require.ErrorIs(t, res.ReadMemory(make([]byte, pageSize), 0), ErrReleased)
		require.NoFileExists(t, filepath.Join(vm.Dir(), layerName(1)))
		require.NoFileExists(t, res.State)
	}
	require.NoError(t, vm.Continue(t.Context()))

	// A VM that writes, captured while it runs, then resumed from the merged images: twice,
	// so that a chain is made.
	parent := base
	before := ask(t, vm, "GET", "/verify")
	for round := range 2 {
		ask(t, vm, "POST", "/dirty?mib=16")
		ask(t, vm, "POST", "/load?on=1")
		res, err := vm.Capture(t.Context(), newDir(t, "out"))
		require.NoError(t, err)
		changed, _ := total(res.MemoryExtents())
		t.Logf("round %d: pause %v, memory %d KiB", round, res.Pause, changed>>10)
		merged := merge(t, parent, res)
		require.NoError(t, res.Release(t.Context()))
		ask(t, vm, "GET", "/")
		require.NoError(t, vm.Destroy(t.Context()))
		vm = r.resume(t, merged)
		ask(t, vm, "POST", "/load?on=0")
		after := ask(t, vm, "GET", "/verify")
		require.Equal(t, before.Token, after.Token)
		require.Equal(t, before.Table, after.Table)
		require.Equal(t, before.File, after.File)
		require.Greater(t, after.Counter, 0)
		parent = merged
	}

	adopted, err := r.q.Adopt(t.Context(), vm.Dir())
	require.NoError(t, err)
	require.Equal(t, vm.Forwards(), adopted.Forwards())
	require.NoError(t, adopted.Reset(t.Context()))
	fresh := ask(t, adopted, "GET", "/")
	require.NotEqual(t, booted.Token, fresh.Token)
	require.NoError(t, adopted.Destroy(t.Context()))
	exit, err = vm.Wait(t.Context())
	require.NoError(t, err)
	require.Equal(t, "QEMU was killed on request (destroy)", exit.Reason)
	status, err := vm.Status(t.Context())
	require.NoError(t, err)
	require.Equal(t, Ended, status.State)
}
