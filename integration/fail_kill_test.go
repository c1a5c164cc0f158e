package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cloudlet/api"
	"cloudlet/integration/cloudlets"
	"cloudlet/integration/guest"

	"github.com/stretchr/testify/require"
)

func TestKillLauncher(t *testing.T) {
	file := launchFile(t)
	l := newLab(t)
	in := l.start(file)
	kill(t, pidOf(t, "launcher", l.state))
	require.Equal(t, api.Running, l.inspect(in.ID).State, "QEMU does not need its launcher")
	ask(t, in, "GET", "/")
	l.ok("pause", in.ID)
	l.ok("continue", in.ID)
	kill(t, in.PID)
	now := l.inspect(in.ID)
	require.Equal(t, api.Stopped, now.State)
	require.Contains(t, now.Reason, "the launcher was killed")
	l.ok("logs", in.ID)
	l.clear("after the launcher was killed")
}

func TestKillQEMU(t *testing.T) {
	file := launchFile(t)
	l := newLab(t)
	in := l.start(file)
	kill(t, in.PID)
	var living []api.Instance
	l.json(&living, "ps")
	require.Empty(t, living)
	now := l.inspect(in.ID)
	require.Equal(t, api.Stopped, now.State)
	require.Contains(t, now.Reason, "SIGKILL")
	require.False(t, now.Ended.IsZero())
	l.ok("logs", in.ID)
	mounts, err := os.ReadDir(filepath.Join(l.state, "mounts"))
	require.NoError(t, err)
	require.Empty(t, mounts, "the mount of an ended instance is released by the next command")
	l.fails(4, "has ended", "pause", in.ID)
	l.fails(4, "has ended", "overlay", "create", in.ID)
	l.clear("after QEMU was killed")
}

func TestKillMount(t *testing.T) {
	file := launchFile(t)
	l := newLab(t)
	in := l.start(file, "--name", "first")
	require.NotNil(t, l.inspect(in.ID).Mount)
	kill(t, l.inspect(in.ID).Mount.PID)
	stuck := watchStuck(t, l.state)
	within(t, 20*time.Second, "ps after the mount's death", func() {
		now := l.inspect(in.ID)
		require.Equal(t, api.Lost, now.State)
		require.Contains(t, now.Reason, "mount process")
		require.Contains(t, now.Reason, "has died")
		_, log, _ := strings.Cut(now.Reason, "; see ")
		log, _, _ = strings.Cut(log, "; ")
		require.FileExists(t, log, "what the reason points to outlives the mount's folder")
	})
	require.Zero(t, state(in.PID), "QEMU is gone")
	require.Empty(t, stuck(), "a process hung in the kernel")
	require.NotContains(t, string(read(t, "/proc/self/mounts")), l.state, "the mountpoint is cleaned")
	l.fails(4, "has died", "continue", in.ID)
	l.ok("stop", in.ID)
	again := l.start(file)
	ask(t, again, "GET", "/verify")
	l.clear("after the mount was killed")
}

// TestKillMountUnderRun kills the mount process under a run that waits for its probe.
func TestKillMountUnderRun(t *testing.T) {
	file := launchFile(t)
	l := newLab(t)
	cmd := l.command("run", file, "--probe", "9/", "--timeout", "60s")
	var said strings.Builder
	cmd.Stderr = &said
	require.NoError(t, cmd.Start())
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	var in api.Instance
	eventually(t, "the instance does not run", func() bool {
		list := l.list()
		if len(list) == 1 {
			in = list[0]
		}
		return in.State == api.Running && in.Mount != nil
	})
	kill(t, in.Mount.PID)
	within(t, 30*time.Second, "ps", func() { l.list() })
	err := l.await(cmd, ended, []string{"run"})
	require.Error(t, err, said.String())
	l.clear("after the mount was killed under run")
}

// watchStuck looks for processes of a folder in uninterruptible sleep. The result of the
// call that it returns names those that were seen so for over a second.
func watchStuck(t *testing.T, dir string) func() []string {
	stop, done := make(chan struct{}), make(chan []string)
	go func() {
		since := map[int]time.Time{}
		long := map[string]bool{}
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for {
			for pid, args := range cloudlets.Processes("") {
				if !strings.Contains(args, dir) || state(pid) != 'D' {
					delete(since, pid)
				} else if since[pid].IsZero() {
					since[pid] = time.Now()
				} else if time.Since(since[pid]) > time.Second {
					long[fmt.Sprintf("process %d: %s", pid, args)] = true
				}
			}
			select {
			case <-tick.C:
			case <-stop:
				var list []string
				for s := range long {
					list = append(list, s)
				}
				done <- list
				return
			}
		}
	}()
	return func() []string { close(stop); return <-done }
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	return b
}

// TestKillPushingMount kills the mount process while it pushes pages into the kernel's cache,
// some of which QEMU waits for: nothing may hang in the kernel.
func TestKillPushingMount(t *testing.T) {
	l := newLab(t)
	work := l.start(l.base)
	ask(t, work, "POST", "/dirty?mib=16")
	o := l.capture(work.ID, "--strategy", "small,frame=256K") // slow to decode: the push takes long
	l.ok("rm", "--force", work.ID)
	stuck := watchStuck(t, l.state)
	for i := range 4 {
		cmd := l.command("run", o.ID, "--probe", fmt.Sprintf("%d/?window=%d", guest.Port, i), "--prefetch", "overlay")
		require.NoError(t, cmd.Start())
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		var m *api.Mount
		eventually(t, "the mount pushes", func() bool {
			for _, in := range l.list() {
				if in.Mount != nil {
					m = in.Mount
				}
			}
			return m != nil && m.MemoryPushed > int64(i)<<20
		})
		kill(t, m.PID)
		within(t, 30*time.Second, "ps", func() { l.list() })
		l.await(cmd, ended, []string{"run"})
		for _, in := range l.list() {
			require.NotEqual(t, api.Running, in.State)
			l.ok("rm", "--force", in.ID)
		}
		require.NotContains(t, string(read(t, "/proc/self/mounts")), l.state, "the mountpoint is cleaned")
	}
	require.Empty(t, stuck(), "a process hung in the kernel")
}
