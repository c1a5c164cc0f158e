package vmm

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A kvm that opens and does not run the guest is found at boot. Where kvm works, the boot
// succeeds.
func TestBootUnderKVM(t *testing.T) {
	r, disk := newRig(t)
	host, err := r.q.Probe(t.Context())
	require.NoError(t, err)
	base := newPair(t)
	copyTo(t, base.disk, disk)
	r.machine.Accelerator, r.machine.CPU = KVM, "Nehalem"
	if err := r.machine.Runnable(host); err != nil {
		require.ErrorContains(t, err, "--accel tcg")
		return
	}
	dir := newDir(t, "boot")
	vm, err := r.q.Boot(t.Context(), dir, r.bootSpec(base))
	if host.Default == KVM {
		require.NoError(t, err)
		require.NoError(t, vm.Destroy(t.Context()))
		return
	}
	if err == nil { // an implementation that works after all
		require.NoError(t, vm.Destroy(t.Context()))
		return
	}
	require.ErrorContains(t, err, "use --accel tcg")
	requireNothingLeft(t, r.q, dir)
	require.NoFileExists(t, base.memory)
}

// requireNothingLeft checks that a failed start left no process.
func requireNothingLeft(t *testing.T, q hypervisor, dir string) {
	t.Helper()
	p, err := readProcesses(dir)
	require.NoError(t, err)
	for _, p := range []process{p.Launcher, p.QEMU} {
		alive, err := p.alive()
		require.NoError(t, err)
		require.False(t, alive)
	}
}

func TestBootPortInUse(t *testing.T) {
	r, disk := newRig(t)
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	base := newPair(t)
	copyTo(t, base.disk, disk)
	spec := r.bootSpec(base)
	spec.Forwards[0].Host = l.Addr().(*net.TCPAddr).Port
	dir := newDir(t, "boot")
	_, err = r.q.Boot(t.Context(), dir, spec)
	require.ErrorContains(t, err, "choose another with -p")
	require.ErrorContains(t, err, l.Addr().String())
	requireNothingLeft(t, r.q, dir)
	require.NoFileExists(t, base.memory)
}

// A start that is given up at any moment leaves no process.
func TestBootCancelled(t *testing.T) {
	r, disk := newRig(t)
	for _, after := range []time.Duration{0, time.Millisecond, 5 * time.Millisecond, 15 * time.Millisecond, 30 * time.Millisecond, 50 * time.Millisecond} {
		t.Run(after.String(), func(t *testing.T) {
			base := newPair(t)
			copyTo(t, base.disk, disk)
			dir := newDir(t, "boot")
			ctx, cancel := context.WithTimeout(t.Context(), after)
			defer cancel()
			vm, err := r.q.Boot(ctx, dir, r.bootSpec(base))
			if err == nil { // QEMU was faster; it never is at the first step
				require.Positive(t, after)
				require.NoError(t, vm.Destroy(t.Context()))
				return
			}
			require.ErrorIs(t, err, context.DeadlineExceeded)
			requireNothingLeft(t, r.q, dir)
			require.NoFileExists(t, base.memory)
		})
	}
}

func TestResumeRefusesBadState(t *testing.T) {
	r, disk := newRig(t)
	base := newPair(t)
	copyTo(t, base.disk, disk)
	require.NoError(t, createMemory(base.memory, r.machine.Memory))
	var s testStream
	s.header().config("pc-q35-7.2", true).ram(true).device()
	require.NoError(t, os.WriteFile(base.state, s.b, 0o600))
	dir := newDir(t, "resume")
	_, err := r.q.Resume(t.Context(), dir, r.resumeSpec(t, base), nil)
	require.ErrorContains(t, err, "start QEMU: exit code 1")
	requireNothingLeft(t, r.q, dir)
	vm, err := r.q.Adopt(t.Context(), dir)
	require.NoError(t, err)
	exit, err := vm.Wait(t.Context())
	require.NoError(t, err)
	require.Contains(t, exit.Reason, "QEMU ended with code 1")

	require.NoError(t, os.Truncate(base.memory, 4096))
	_, err = r.q.Resume(t.Context(), newDir(t, "resume"), r.resumeSpec(t, base), nil)
	require.ErrorContains(t, err, "has 4096 bytes, the machine has")
	require.NoError(t, os.Remove(base.state))
}

// The launcher's death does not harm the VM, and QEMU's is reported.
func TestLauncherKilled(t *testing.T) {
	r, disk := newRig(t)
	base := newPair(t)
	copyTo(t, base.disk, disk)
	vm := r.boot(t, base)
	require.NoError(t, vm.launcher.Kill())
	<-vm.reaped
	adopted, err := r.q.Adopt(t.Context(), vm.Dir())
	require.NoError(t, err)
	require.NoError(t, adopted.Pause(t.Context()))
	status, err := adopted.Status(t.Context())
	require.NoError(t, err)
	require.Equal(t, Paused, status.State)
	require.NoError(t, adopted.procs.QEMU.signal(9))
	exit, err := adopted.Wait(t.Context())
	require.NoError(t, err)
	require.Equal(t, "the launcher was killed, so how QEMU ended is not known", exit.Reason)
	require.ErrorIs(t, adopted.Continue(t.Context()), ErrEnded)
}

func TestQEMUKilled(t *testing.T) {
	r, disk := newRig(t)
	base := newPair(t)
	copyTo(t, base.disk, disk)
	vm := r.boot(t, base)
	require.NoError(t, vm.procs.QEMU.signal(7))
	exit, err := vm.Wait(t.Context())
	require.NoError(t, err)
	require.Equal(t, "SIGBUS", exit.Signal)
	require.Contains(t, exit.Reason, "a page of its memory could not be read")
	status, err := vm.Status(t.Context())
	require.NoError(t, err)
	require.Equal(t, Status{State: Ended, Reason: exit.Reason}, status)
	require.FileExists(t, filepath.Join(vm.Dir(), serialLog))
	fi, err := os.Stat(filepath.Join(vm.Dir(), serialLog))
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), fi.Mode().Perm())
}
