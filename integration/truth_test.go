package integration

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"cloudlet/api"
	"cloudlet/integration/guest"
	"cloudlet/vmm"

	"github.com/stretchr/testify/require"
)

const pageSize = 4096

// truth is what a paused instance holds, as QEMU's own tools tell it: nothing of the program
// that captures or serves images takes part.
type truth struct {
	memory, disk string // files
	trimmed      int64  // bytes of the disk that the instance's own layer says are zero
}

// witness reads a paused instance. Its disk is its own layer over parentDisk, a raw file that
// is known to be right: so the launch image that it runs on is not believed either.
func (l *lab) witness(in api.Instance, parentDisk string) truth {
	l.t.Helper()
	dir := l.t.TempDir()
	tr := truth{memory: filepath.Join(dir, "memory"), disk: filepath.Join(dir, "disk")}
	l.saveMemory(in, tr.memory)
	tr.trimmed = l.saveDisk(in, parentDisk, tr.disk)
	return tr
}

// vm finds the VM of an instance.
func (l *lab) vm(in api.Instance) *vmm.VM {
	l.t.Helper()
	vm, err := new(vmm.QEMU).Adopt(l.t.Context(), l.vmFile(in))
	require.NoError(l.t, err)
	return vm
}

func (l *lab) vmFile(in api.Instance, name ...string) string {
	return filepath.Join(append([]string{l.state, "instances", in.ID, "vm"}, name...)...)
}

// saveMemory writes the memory of a paused instance to path by the monitor's pmemsave, which
// reads physical addresses as the guest's CPU does. That these are the RAM and nothing else,
// without a hole or a window of a device, is checked by QEMU's own memory map.
func (l *lab) saveMemory(in api.Instance, path string) {
	t, vm := l.t, l.vm(in)
	t.Helper()
	const size = guest.MemoryMiB << 20
	var mtree string
	require.NoError(t, vm.Monitor(t.Context(), "human-monitor-command", map[string]any{"command-line": "info mtree -f"}, &mtree))
	require.Equal(t, int64(size), ramEnd(t, mtree), mtree)
	require.NoError(t, vm.Monitor(t.Context(), "pmemsave", map[string]any{"val": 0, "size": size, "filename": path}, nil))
}

// ramEnd returns up to which physical address QEMU's flat memory map leads to the same offset
// of the RAM, without a gap from 0 on.
func ramEnd(t *testing.T, mtree string) (next int64) {
	t.Helper()
	_, view, found := strings.Cut(mtree, `AS "memory", root: system`)
	require.True(t, found, mtree)
	view, _, _ = strings.Cut(view, "\n\n")
	for line := range strings.Lines(view) {
		var start, end, at int64
		if n, _ := fmt.Sscanf(line, " %x-%x ", &start, &end); n != 2 {
			continue
		}
		_, block, _ := strings.Cut(strings.TrimSpace(line), "): ")
		name, offset, moved := strings.Cut(block, " @")
		if moved {
			_, err := fmt.Sscanf(offset, "%x", &at)
			require.NoError(t, err, line)
		}
		if name != "mem" || start != next || at != start {
			break
		}
		next = end + 1
	}
	return next
}

// saveDisk converts the layer of a paused instance over parent to a raw file, and returns how
// many bytes of it the layer itself declares zero. A stopped VM has flushed its layer; -U
// only says that QEMU still holds its lock.
func (l *lab) saveDisk(in api.Instance, parent, path string) (zero int64) {
	t := l.t
	t.Helper()
	layer := func(backing any) string {
		ref, err := json.Marshal(map[string]any{
			"driver": "qcow2", "backing": backing,
			"file": map[string]any{"driver": "file", "filename": l.vmFile(in, "disk.0.qcow2")},
		})
		require.NoError(t, err)
		return "json:" + string(ref)
	}
	raw := map[string]any{"driver": "raw", "file": map[string]any{"driver": "file", "filename": parent}}
	tool(t, "qemu-img", "convert", "-U", "-O", "raw", layer(raw), path)
	var extents []struct {
		Length            int64
		Present, Zero     bool
		Start, Depth, Off int64
	}
	require.NoError(t, json.Unmarshal(tool(t, "qemu-img", "map", "-U", "--output=json", layer(nil)), &extents))
	for _, e := range extents {
		if e.Present && e.Zero {
			zero += e.Length
		}
	}
	return zero
}

// tool runs a program that must succeed.
func tool(t *testing.T, name string, args ...string) []byte {
	t.Helper()
	var stderr bytes.Buffer
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	require.NoError(t, err, "%s %v: %s", name, args, stderr.Bytes())
	return out
}

// baseFile is a file of the base in the store.
func (l *lab) baseFile(name string) string { return filepath.Join(l.state, "bases", l.base, name) }

// mounted mounts ref by hand for the time of f.
func (l *lab) mounted(ref string, f func(dir string)) {
	t := l.t
	t.Helper()
	dir := t.TempDir()
	cmd := l.command("mount", ref, dir)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	require.NoError(t, cmd.Start())
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	defer func() {
		if err := cmd.Process.Signal(os.Interrupt); err != nil {
			t.Errorf("end the mount: %v", err)
		}
		if err := <-ended; err != nil {
			t.Errorf("mount %s: %v: %s", ref, err, stderr.Bytes())
		}
	}()
	eventually(t, "the mount is there", func() bool {
		_, err := os.Stat(filepath.Join(dir, "info.json"))
		return err == nil
	})
	f(dir)
}

// requireImage checks that ref, mounted by hand, is byte for byte what was witnessed.
func (l *lab) requireImage(ref string, want truth) {
	l.t.Helper()
	l.mounted(ref, func(dir string) {
		requireSame(l.t, want.memory, filepath.Join(dir, "memory"))
		requireSame(l.t, want.disk, filepath.Join(dir, "disk"))
	})
}

// requireSame compares two files by their hashes, and names the first page that differs.
func requireSame(t *testing.T, want, have string) {
	t.Helper()
	if hashFile(t, want) != hashFile(t, have) {
		t.Fatalf("%s is not %s: %s", have, want, difference(t, want, have))
	}
}

func hashFile(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	require.NoError(t, err)
	defer f.Close()
	h := sha256.New()
	_, err = io.CopyBuffer(h, struct{ io.Reader }{f}, make([]byte, 1<<20))
	require.NoError(t, err)
	return hex.EncodeToString(h.Sum(nil))
}

// difference says in how many pages two files differ, and which is the first.
func difference(t *testing.T, want, have string) string {
	t.Helper()
	a, err := os.Open(want)
	require.NoError(t, err)
	defer a.Close()
	b, err := os.Open(have)
	require.NoError(t, err)
	defer b.Close()
	ra, rb := bufio.NewReaderSize(a, 1<<20), bufio.NewReaderSize(b, 1<<20)
	first, count := int64(-1), 0
	var detail string
	pa, pb := make([]byte, pageSize), make([]byte, pageSize)
	for page := int64(0); ; page++ {
		na, erra := io.ReadFull(ra, pa)
		nb, errb := io.ReadFull(rb, pb)
		if !bytes.Equal(pa[:na], pb[:nb]) {
			if count++; first < 0 {
				first = page
				detail = fmt.Sprintf("want %.32x..., have %.32x...", pa[:na], pb[:nb])
			}
		}
		if erra != nil || errb != nil {
			return fmt.Sprintf("%d of %d pages differ, the first is page %d: %s", count, page, first, detail)
		}
	}
}
