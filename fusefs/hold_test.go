package fusefs

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// failFrom makes reads that begin at off or later fail.
func failFrom(from int64) func(int64) error {
	return func(off int64) error {
		if off >= from {
			return fmt.Errorf("read frame: %w", errBroken)
		}
		return nil
	}
}

func waitHeld(t *testing.T, s *Server) []HeldRead {
	t.Helper()
	eventually(t, "a held read", func() bool { return len(s.Stats().Held) > 0 })
	return s.Stats().Held
}

func TestDiskErrorIsAnsweredAtOnce(t *testing.T) {
	disk := newTestFile(1 << 20)
	disk.failWith(failFrom(0))
	s, dir := mount(t, Options{Disk: disk})
	require.Equal(t, "error EIO", client(t, "pread", filepath.Join(dir, DiskName), "0", "10"))
	require.Positive(t, s.Stats().Disk.Errors)
	require.Empty(t, s.Stats().Held)
	disk.failWith(nil)
	require.Equal(t, disk.hash(), client(t, "hash", filepath.Join(dir, DiskName), "read"))
}

func TestPanicBecomesEIO(t *testing.T) {
	disk := newTestFile(1 << 20)
	disk.failWith(func(int64) error { panic("boom") })
	s, dir := mount(t, Options{Disk: disk})
	require.Equal(t, "error EIO", client(t, "pread", filepath.Join(dir, DiskName), "0", "10"))
	require.Positive(t, s.Stats().Disk.Errors)
}

func TestMemoryErrorIsHeldUntilAbort(t *testing.T) {
	for _, advice := range []string{"normal", "random"} {
		t.Run(advice, func(t *testing.T) {
			memory := newTestFile(1 << 20)
			memory.failWith(failFrom(0))
			s, dir := mount(t, Options{Memory: memory})
			p := start(t, "touch", filepath.Join(dir, MemoryName), "4096", advice)
			require.Equal(t, "ready", p.line(t))
			h := waitHeld(t, s)[0]
			require.Equal(t, MemoryName, h.File)
			require.Contains(t, h.Error, "frame 7 is broken")
			require.NotZero(t, h.PID)
			calls := memory.calls.Load()
			select {
			case <-p.exited:
				require.Fail(t, "an error reached the reader")
			case <-time.After(200 * time.Millisecond):
			}
			require.Equal(t, calls, memory.calls.Load(), "nothing is retried")
			s.Abort()
			s.Abort()
			require.Equal(t, "fault", p.line(t))
			require.True(t, s.Stats().Aborted)
			require.Empty(t, s.Stats().Held)
			require.Equal(t, "error EIO", client(t, "pread", filepath.Join(dir, MemoryName), "0", "10"), "later reads fail")
			memory.failWith(nil)
			require.Equal(t, memory.hash(), client(t, "hash", filepath.Join(dir, MemoryName), "read"), "good reads go on")
		})
	}
}

func TestStuckReadIsVisibleAndAborted(t *testing.T) {
	memory := newTestFile(1 << 20)
	memory.block.Store(0)
	s, dir := mount(t, Options{Memory: memory})
	p := start(t, "touch", filepath.Join(dir, MemoryName), "4096", "normal")
	require.Equal(t, "ready", p.line(t))
	h := waitHeld(t, s)[0]
	require.Empty(t, h.Error)
	require.GreaterOrEqual(t, time.Since(h.Since), heldAfter)
	require.GreaterOrEqual(t, s.Stats().Memory.LongestWaitSeconds, 1.0)
	s.Abort()
	require.Equal(t, "fault", p.line(t))
}

func TestKilledReaderDies(t *testing.T) {
	for _, c := range []struct {
		name, advice string
		stuck        bool
		signal       os.Signal
	}{
		{"failed fault", "random", false, syscall.SIGKILL},
		{"failed fault, read ahead", "normal", false, syscall.SIGKILL},
		{"stuck fault", "random", true, syscall.SIGKILL},
		{"stuck fault, read ahead", "normal", true, syscall.SIGKILL},
		{"terminated", "random", true, syscall.SIGTERM},
	} {
		t.Run(c.name, func(t *testing.T) {
			memory := newTestFile(1 << 20)
			if c.stuck {
				memory.block.Store(0)
			} else {
				memory.failWith(failFrom(0))
			}
			s, dir := mount(t, Options{Memory: memory})
			p := start(t, "touch", filepath.Join(dir, MemoryName), "8192", c.advice)
			require.Equal(t, "ready", p.line(t))
			eventually(t, "read in flight", func() bool { return s.Stats().Memory.InFlight > 0 })
			began := time.Now()
			require.NoError(t, p.Process.Signal(c.signal))
			p.dies(t)
			require.Less(t, time.Since(began), 2*time.Second)
			if c.advice == "random" {
				eventually(t, "no read left", func() bool { return s.Stats().Memory.InFlight == 0 })
			}
			require.NoError(t, s.Unmount(t.Context()), "held reads ahead do not keep the mount")
		})
	}
}

// A vCPU thread is signalled all the time; a page fault answered EINTR
// starts anew or is a SIGBUS.
func TestHarmlessSignalDoesNotEndRead(t *testing.T) {
	for _, advice := range []string{"normal", "random"} {
		t.Run(advice, func(t *testing.T) {
			memory := newTestFile(1 << 20)
			memory.block.Store(0)
			s, dir := mount(t, Options{Memory: memory})
			p := start(t, "touch", filepath.Join(dir, MemoryName), "8192", advice)
			require.Equal(t, "ready", p.line(t))
			eventually(t, "read in flight", func() bool { return s.Stats().Memory.InFlight > 0 })
			tid := waitHeld(t, s)[0].PID
			for range 5 {
				require.NoError(t, syscall.Tgkill(p.Process.Pid, tid, syscall.SIGUSR1))
				time.Sleep(2 * killedPoll) // the time in which a wrong answer would come
			}
			select {
			case <-p.exited:
				require.Fail(t, "reader ended", p.line(t))
			default:
			}
			close(memory.release)
			require.Equal(t, fmt.Sprintf("%02x", memory.content[8192]), p.line(t))
		})
	}
}

func TestKilledAfterHarmlessSignal(t *testing.T) {
	memory := newTestFile(1 << 20)
	memory.block.Store(0)
	s, dir := mount(t, Options{Memory: memory})
	p := start(t, "touch", filepath.Join(dir, MemoryName), "8192", "random")
	require.Equal(t, "ready", p.line(t))
	tid := waitHeld(t, s)[0].PID
	require.NoError(t, syscall.Tgkill(p.Process.Pid, tid, syscall.SIGUSR1))
	time.Sleep(2 * killedPoll) // the kernel reports this signal and no later one
	require.NoError(t, p.Process.Kill())
	p.dies(t)
}

func TestAbortConnection(t *testing.T) {
	needFUSE(t)
	t.Run("nothing mounted", func(t *testing.T) {
		require.NoError(t, AbortConnection(t.TempDir()))
		require.NoError(t, AbortConnection(filepath.Join(t.TempDir(), "none", "none")))
	})
	t.Run("not ours", func(t *testing.T) {
		require.ErrorContains(t, AbortConnection("/proc"), "proc")
	})
	t.Run("server killed", func(t *testing.T) {
		dir := t.TempDir()
		t.Cleanup(func() { require.NoError(t, AbortConnection(dir)) })
		server := start(t, "serve", dir)
		require.Equal(t, "ready", server.line(t))
		p := start(t, "touch", filepath.Join(dir, MemoryName), fmt.Sprint(1<<20), "normal")
		require.Equal(t, "ready", p.line(t))
		require.NoError(t, server.Process.Kill())
		server.dies(t)
		_, err := Mount(dir, Options{Memory: bytesFile("m"), Disk: bytesFile("d")})
		require.ErrorIs(t, err, ErrMounted)
		require.ErrorContains(t, err, "umount -l")
		require.NoError(t, AbortConnection(dir))
		require.Equal(t, "fault", p.line(t))
		p.dies(t)
		_, found, err := findMount(dir)
		require.NoError(t, err)
		require.False(t, found)
		require.NoError(t, AbortConnection(dir), "twice")
	})
	t.Run("server stopped", func(t *testing.T) {
		dir := t.TempDir()
		t.Cleanup(func() { require.NoError(t, AbortConnection(dir)) })
		server := start(t, "serve", dir)
		require.Equal(t, "ready", server.line(t))
		p := start(t, "touch", filepath.Join(dir, MemoryName), fmt.Sprint(1<<20), "random")
		require.Equal(t, "ready", p.line(t))
		require.NoError(t, server.Process.Signal(syscall.SIGSTOP))
		waitStopped(t, server.Process.Pid)
		require.NoError(t, AbortConnection(dir))
		require.Equal(t, "fault", p.line(t))
	})
}

func waitStopped(t *testing.T, pid int) {
	t.Helper()
	eventually(t, "process stopped", func() bool {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		return err == nil && strings.Contains(string(status), "State:\tT")
	})
}
