package vmm

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// launchScript starts a shell script in QEMU's place and returns it as an adopted VM.
func launchScript(t *testing.T, argv ...string) *VM {
	t.Helper()
	dir := newDir(t, "vm")
	require.NoError(t, writeJSON(dir, vmFile, vmInfo{Version: 1, Machine: testMachine()}))
	require.NoError(t, writeJSON(dir, launchFile, launch{Argv: argv}))
	vm := &VM{q: testQEMU(t, ""), dir: dir}
	require.NoError(t, vm.launch())
	t.Cleanup(func() {
		p, err := readProcesses(dir)
		require.NoError(t, err)
		require.NoError(t, p.QEMU.signal(unix.SIGKILL))
		<-vm.reaped
	})
	// The launcher's first record may be a moment away; Adopt waits from there.
	require.NoError(t, pollUntil(t.Context(), func() (bool, error) {
		p, err := readProcesses(dir)
		return p.Launcher.PID != 0, err
	}))
	adopted, err := vm.q.Adopt(t.Context(), dir)
	require.NoError(t, err)
	adopted.launcher, adopted.reaped = vm.launcher, vm.reaped
	return adopted
}

func TestLauncherRecordsExit(t *testing.T) {
	for _, tt := range []struct {
		name, script string
		code         int
		signal       string
		reason       string
	}{
		{"zero", "exit 0", 0, "", "the guest powered off"},
		{"code", "echo first >&2; echo 'qemu: bad thing' >&2; exit 3", 3, "", "QEMU ended with code 3: qemu: bad thing"},
		{"sigbus", "kill -BUS $$", -1, "SIGBUS", "QEMU was killed by SIGBUS: a page of its memory could not be read; the mount that serves it failed or has ended"},
		{"sigkill", "kill -KILL $$", -1, "SIGKILL", "QEMU was killed by SIGKILL: by somebody, or by the kernel for want of memory"},
		{"sigsegv", "kill -SEGV $$", -1, "SIGSEGV", "QEMU was killed by SIGSEGV"},
		{"told", "echo 'qemu: terminating on signal 15 from pid 1' >&2", 0, "", "QEMU was told to end: qemu: terminating on signal 15 from pid 1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			vm := launchScript(t, "/bin/sh", "-c", tt.script)
			exit, err := vm.Wait(t.Context())
			require.NoError(t, err)
			require.Equal(t, tt.code, exit.Code)
			require.Equal(t, tt.signal, exit.Signal)
			require.Equal(t, tt.reason, exit.Reason)
			require.False(t, exit.At.IsZero())
			again, err := vm.q.Adopt(t.Context(), vm.Dir())
			require.NoError(t, err)
			later, err := again.Wait(t.Context())
			require.NoError(t, err)
			require.Equal(t, exit.Reason, later.Reason)
			require.NoError(t, again.Destroy(t.Context()))
			status, err := again.Status(t.Context())
			require.NoError(t, err)
			require.Equal(t, Status{State: Ended, Reason: tt.reason}, status)
		})
	}
}

// TestAdoptAwaitsLauncher: whoever adopts a VM whose starter was killed at once must not
// take it for one that was never started.
func TestAdoptAwaitsLauncher(t *testing.T) {
	dir := newDir(t, "vm")
	require.NoError(t, writeJSON(dir, vmFile, vmInfo{Version: 1, Machine: testMachine()}))
	require.NoError(t, writeJSON(dir, launchFile, launch{Argv: []string{"/bin/sleep", "60"}}))
	q := testQEMU(t, "")
	q.Launcher = append([]string{"/bin/sh", "-c", `sleep 0.3; exec "$@"`, "sh"}, q.Launcher...)
	vm := &VM{q: q, dir: dir}
	require.NoError(t, vm.launch())
	adopted, err := q.Adopt(t.Context(), dir)
	require.NoError(t, err)
	require.NotZero(t, adopted.PID())
	require.NoError(t, adopted.Destroy(t.Context()))
	<-vm.reaped
}

func TestLauncherProgramMissing(t *testing.T) {
	vm := launchScript(t, "/nonexistent/qemu")
	exit, err := vm.Wait(t.Context())
	require.NoError(t, err)
	require.Contains(t, exit.Reason, "QEMU was not started: start QEMU: fork/exec /nonexistent/qemu")
	require.Zero(t, vm.PID())
}

func TestLauncherBoundsStderr(t *testing.T) {
	vm := launchScript(t, "/bin/sh", "-c", "i=0; while [ $i -lt 3000 ]; do echo line $i >&2; i=$((i+1)); done; exit 1")
	exit, err := vm.Wait(t.Context())
	require.NoError(t, err)
	require.LessOrEqual(t, len(exit.Stderr), maxStderr)
	require.True(t, strings.HasSuffix(exit.Stderr, "line 2999"))
}

// What the launcher starts gets the filter, the folder, a session and no descriptors.
func TestLauncherEnvironment(t *testing.T) {
	vm := launchScript(t, "/bin/sh", "-c", `exec >out; pwd; umask; grep -h Seccomp: /proc/self/status; ls /proc/self/fd | tr '\n' ' '; readlink /proc/self/fd/0`)
	_, err := vm.Wait(t.Context())
	require.NoError(t, err)
	data, err := os.ReadFile(filepath.Join(vm.Dir(), "out"))
	require.NoError(t, err)
	// ls itself holds 3, the folder it lists.
	require.Equal(t, vm.Dir()+"\n0077\nSeccomp:\t2\n0 1 2 3 /dev/null\n", string(data))
}

// SIGTERM to the launcher ends QEMU in order; SIGHUP and SIGINT do nothing.
func TestLauncherSignals(t *testing.T) {
	vm := launchScript(t, "/bin/sh", "-c", `trap 'kill $!; exit 7' TERM; touch ready; sleep 1000 & wait`)
	require.NoError(t, pollUntil(t.Context(), func() (bool, error) {
		if err := vm.check(); err != nil { // it ended before it was ready
			return false, err
		}
		_, err := os.Stat(filepath.Join(vm.Dir(), "ready"))
		return err == nil, nil
	}))
	require.NoError(t, vm.procs.Launcher.signal(unix.SIGHUP))
	require.NoError(t, vm.procs.Launcher.signal(unix.SIGINT))
	alive, err := vm.procs.QEMU.alive()
	require.NoError(t, err)
	require.True(t, alive)
	require.NoError(t, vm.procs.Launcher.signal(unix.SIGTERM))
	exit, err := vm.Wait(t.Context())
	require.NoError(t, err)
	require.Equal(t, 7, exit.Code)
}

func TestDestroyIsIdempotent(t *testing.T) {
	vm := launchScript(t, "/bin/sh", "-c", "exec sleep 1000")
	for range 2 {
		require.NoError(t, vm.Destroy(t.Context()))
	}
	exit, err := vm.Wait(t.Context())
	require.NoError(t, err)
	require.Equal(t, "QEMU was killed on request (destroy)", exit.Reason)
	require.ErrorIs(t, vm.Pause(t.Context()), ErrEnded)
}

func TestAdoptRefuses(t *testing.T) {
	q := testQEMU(t, "")
	_, err := q.Adopt(t.Context(), t.TempDir())
	require.ErrorContains(t, err, "holds none")
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, vmFile), nil, 0o600)) // after a power failure
	_, err = q.Adopt(t.Context(), dir)
	require.ErrorContains(t, err, "holds none")
	require.NoError(t, q.DestroyIn(t.Context(), dir))
	require.NoError(t, writeJSON(dir, vmFile, vmInfo{Version: 2, Machine: testMachine()}))
	_, err = q.Adopt(t.Context(), dir)
	require.ErrorContains(t, err, "newer program")
	require.NoError(t, writeJSON(dir, vmFile, vmInfo{Version: 1, Machine: testMachine()}))
	vm, err := q.Adopt(t.Context(), dir)
	require.NoError(t, err)
	exit, err := vm.Wait(t.Context())
	require.NoError(t, err)
	require.Contains(t, exit.Reason, "never started")
}

func TestParseStat(t *testing.T) {
	start, state, err := parseStat("42 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 777 20\n")
	require.NoError(t, err)
	require.Equal(t, uint64(777), start)
	require.Equal(t, byte('S'), state)
	for _, bad := range []string{"", "42 (a)", "42 (a) S 1", "42 a S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 777"} {
		_, _, err := parseStat(bad)
		require.Error(t, err, bad)
	}
}

// A pid that means another process now is never signalled.
func TestProcessIdentity(t *testing.T) {
	self, err := identify(os.Getpid())
	require.NoError(t, err)
	alive, err := self.alive()
	require.NoError(t, err)
	require.True(t, alive)
	for name, p := range map[string]process{
		"start": {self.PID, self.Start + 1, self.Boot},
		"boot":  {self.PID, self.Start, "another"},
		"zero":  {},
		"init":  {1, self.Start, self.Boot},
	} {
		t.Run(name, func(t *testing.T) {
			alive, err := p.alive()
			require.NoError(t, err)
			require.False(t, alive)
			require.NoError(t, p.signal(unix.SIGKILL))
			require.NoError(t, p.wait(t.Context()))
		})
	}
}

func TestRemedies(t *testing.T) {
	for stderr, want := range map[string]string{
		"Could not access KVM kernel module: Permission denied":           "--accel tcg",
		"cannot set up guest memory 'mem': Cannot allocate memory":        "not enough memory",
		`Failed to get "write" lock`:                                      "in use by another process",
		"Could not set up host forwarding rule 'tcp:127.0.0.1:60001-:80'": "with -p",
		"Could not set up host forwarding rule 'tcp:192.0.2.1:8080-:80'":  "not on this host",
		"can't open backing store m for guest RAM: Permission denied":     "owner and mode",
		"qemu: error while writing: No space left on device":              "free some space",
		"something never seen":                                            "",
	} {
		require.Contains(t, remedyFor(stderr), want, stderr)
	}
	require.Empty(t, remedyFor("something never seen"))
}

// TestDestroyInBeforeMonitor: a VM whose starter was killed before QEMU's monitor was there
// cannot be asked for its ports, and ends all the same.
func TestDestroyInBeforeMonitor(t *testing.T) {
	dir := newDir(t, "vm")
	q := testQEMU(t, "")
	require.NoError(t, q.DestroyIn(t.Context(), dir), "nothing there")
	info := vmInfo{Version: 1, Machine: testMachine(), Forwards: []Forward{{Addr: "127.0.0.1", Guest: 80}}}
	require.NoError(t, writeJSON(dir, vmFile, info))
	require.NoError(t, writeJSON(dir, launchFile, launch{Argv: []string{"/bin/sleep", "60"}}))
	vm := &VM{q: q, dir: dir}
	require.NoError(t, vm.launch())
	require.NoError(t, q.DestroyIn(t.Context(), dir))
	<-vm.reaped
	p, err := readProcesses(dir)
	require.NoError(t, err)
	require.NotZero(t, p.QEMU.PID)
	alive, err := p.QEMU.alive()
	require.NoError(t, err)
	require.False(t, alive)
}
