package integration

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"cloudlet/integration/guest"

	"github.com/stretchr/testify/require"
)

// softDirtyInit is the first process of the guest: it runs the tests of package vmm that
// need soft-dirty bits, says how they ended, and turns the machine off.
const softDirtyInit = `#!/bin/busybox sh
bb=/bin/busybox
$bb mount -t proc proc /proc
$bb mount -t devtmpfs devtmpfs /dev
$bb mkdir -p /tmp
$bb mount -t tmpfs tmpfs /tmp
cd /tmp
/vmm.test -test.v -test.run '^Test(Tracker|ChangedSpans$|Spans)'
echo "verdict: $?"
$bb poweroff -f
`

// TestSoftDirtyInGuest proves the tracker that reads soft-dirty bits on a kernel that keeps
// them, Debian's, whether or not this machine's does.
func TestSoftDirtyInGuest(t *testing.T) {
	needVMs(t)
	g, err := guest.Build(t.Context(), *guestDir, os.Stderr)
	require.NoError(t, err)
	dir := t.TempDir()
	binary := filepath.Join(dir, "vmm.test")
	build := exec.CommandContext(t.Context(), "go", "test", "-c", "-o", binary, "cloudlet/vmm")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	out, err := build.CombinedOutput()
	require.NoError(t, err, "%s", out)

	// The kernel unpacks archives one after the other: the guest's brings the shell.
	var initrd bytes.Buffer
	read := func(path string) []byte {
		data, err := os.ReadFile(path)
		require.NoError(t, err)
		return data
	}
	initrd.Write(read(g.Initrd))
	writeArchive(&initrd, "softdirty", []byte(softDirtyInit))
	writeArchive(&initrd, "vmm.test", read(binary))
	initrdPath := filepath.Join(dir, "initrd")
	require.NoError(t, os.WriteFile(initrdPath, initrd.Bytes(), 0o600))

	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	serial := filepath.Join(dir, "serial")
	start := time.Now()
	vm := exec.CommandContext(ctx, "qemu-system-x86_64", "-accel", "tcg", "-m", "512M", "-smp", "2", "-nodefaults", "-display", "none",
		"-no-reboot", "-serial", "file:"+serial, "-kernel", g.Kernel, "-initrd", initrdPath, "-append", guest.Append+" rdinit=/softdirty")
	out, err = vm.CombinedOutput()
	log, _ := os.ReadFile(serial)
	require.NoError(t, err, "%s\n%s", out, log)
	t.Logf("the guest ran for %v", time.Since(start))
	t.Logf("%s", log)
	require.Contains(t, string(log), "verdict: 0")
	for _, name := range []string{"TestTrackerRounds", "TestTrackerLosesNothing", "TestTrackerWhileWriting"} {
		for _, tracker := range []string{"hash", "soft-dirty"} {
			require.Contains(t, string(log), fmt.Sprintf("--- PASS: %s/%s", name, tracker))
		}
	}
}

// writeArchive writes an archive of one program, in the format of initial file systems.
func writeArchive(w *bytes.Buffer, name string, data []byte) {
	entry := func(name string, mode uint32, data []byte) {
		// ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
		n, _ := fmt.Fprintf(w, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
			1, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0, name)
		w.Write(make([]byte, -n&3))
		w.Write(data)
		w.Write(make([]byte, -len(data)&3))
	}
	entry(name, 0o100755, data)
	entry("TRAILER!!!", 0, nil)
}
