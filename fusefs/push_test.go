package fusefs

import (
	"context"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// lookUp makes the kernel know the files of a mount, by another process.
func lookUp(t *testing.T, dir string) {
	t.Helper()
	for _, name := range []string{MemoryName, DiskName} {
		require.Equal(t, "", client(t, "pread", filepath.Join(dir, name), "0", "0"))
	}
}

func TestPush(t *testing.T) {
	memory, disk := newTestFile(4<<20), newTestFile(1<<20)
	s, dir := mount(t, Options{Memory: memory, Disk: disk})
	_, err := s.Push(t.Context(), MemoryName, memory.content[:4096], 0)
	require.ErrorIs(t, err, ErrNotLookedUp)
	lookUp(t, dir)

	for off := 0; off < len(memory.content); off += 64 << 10 {
		n, err := s.Push(t.Context(), MemoryName, memory.content[off:][:64<<10], int64(off))
		require.NoError(t, err)
		require.Equal(t, 64<<10, n)
	}
	for _, how := range []string{"private", "shared", "read"} {
		require.Equal(t, memory.hash(), client(t, "hash", filepath.Join(dir, MemoryName), how))
	}
	st := s.Stats()
	require.Zero(t, st.Memory.Reads, "what was pushed is not asked for")
	require.Equal(t, memory.Size(), st.Memory.Pushed)

	n, err := s.Push(t.Context(), MemoryName, memory.content, 0)
	require.NoError(t, err)
	require.Zero(t, n, "what the kernel was given is not pushed again")

	want := client(t, "pread", filepath.Join(dir, DiskName), "524288", "4096")
	n, err = s.Push(t.Context(), DiskName, disk.content, 0)
	require.NoError(t, err)
	require.Positive(t, n)
	require.LessOrEqual(t, n, len(disk.content)-4096, "what the kernel has asked for is not pushed")
	require.Equal(t, want, client(t, "pread", filepath.Join(dir, DiskName), "524288", "4096"))
	require.Equal(t, disk.hash(), client(t, "hash", filepath.Join(dir, DiskName), "read"))
}

func TestPushRefuses(t *testing.T) {
	s, dir := mount(t, Options{})
	lookUp(t, dir)
	page := make([]byte, 4096)
	for name, try := range map[string]struct {
		file string
		p    []byte
		off  int64
	}{
		"no such file": {"state", page, 0}, "info": {InfoName, page, 0}, "odd offset": {MemoryName, page, 1},
		"odd length": {MemoryName, page[:100], 0}, "negative": {MemoryName, page, -4096}, "behind the end": {MemoryName, page, 1 << 20},
	} {
		t.Run(name, func(t *testing.T) {
			n, err := s.Push(t.Context(), try.file, try.p, try.off)
			require.Error(t, err)
			require.Zero(t, n)
		})
	}
}

// TestIdle: before a guest runs nobody knows what it wants, however long nothing is read.
func TestIdle(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	s, dir := mount(t, Options{Socket: socket})
	idle, running := s.Idle()
	require.False(t, running)
	require.Zero(t, idle)
	before := time.Now()
	require.NoError(t, Dial(socket).Begin(t.Context()))
	require.Eventually(t, func() bool {
		idle, running := s.Idle()
		require.True(t, running)
		return idle > time.Millisecond
	}, 10*time.Second, time.Millisecond)
	idle, _ = s.Idle()
	require.LessOrEqual(t, idle, time.Since(before), "the time before it ran does not count")
	before = time.Now()
	client(t, "pread", filepath.Join(dir, MemoryName), "0", "4096")
	idle, _ = s.Idle()
	require.LessOrEqual(t, idle, time.Since(before), "since the last read")
}

// slowFile is a file as over a slow link.
type slowFile struct {
	File
	answered atomic.Int64
}

func (f *slowFile) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	time.Sleep(300 * time.Millisecond)
	n, err := f.File.ReadAt(ctx, p, off)
	f.answered.Store(time.Now().UnixNano())
	return n, err
}

// TestIdleSlowRead: a guest that has just got what it waited for long is not at rest.
func TestIdleSlowRead(t *testing.T) {
	memory := &slowFile{File: newTestFile(1 << 20)}
	s, dir := mount(t, Options{Memory: memory})
	s.Begin()
	client(t, "pread", filepath.Join(dir, MemoryName), "0", "4096")
	idle, _ := s.Idle()
	require.LessOrEqual(t, idle, time.Since(time.Unix(0, memory.answered.Load())))
}

// TestPushBesideHeldRead pushes around a read that has no answer: its pages are locked by the
// kernel, and a push of them would wait as long as it does.
func TestPushBesideHeldRead(t *testing.T) {
	memory := newTestFile(1 << 20)
	s, dir := mount(t, Options{Memory: memory})
	lookUp(t, dir)
	memory.failWith(failFrom(512 << 10))
	p := start(t, "touch", filepath.Join(dir, MemoryName), "786432", "normal")
	require.Equal(t, "ready", p.line(t))
	held := waitHeld(t, s)[0]
	begin := time.Now()
	n, err := s.Push(t.Context(), MemoryName, memory.content, 0)
	require.NoError(t, err)
	require.Equal(t, len(memory.content)-held.Length, n)
	require.Less(t, time.Since(begin), patience)
	s.Abort()
	require.Equal(t, "fault", p.line(t))
}

// TestPushAfterTheEnd pushes into a mount whose connection has ended.
func TestPushAfterTheEnd(t *testing.T) {
	s, dir := mount(t, Options{})
	lookUp(t, dir)
	require.NoError(t, s.ForceUnmount(t.Context()))
	n, err := s.Push(t.Context(), MemoryName, make([]byte, 4096), 0)
	require.Error(t, err)
	require.NotErrorIs(t, err, os.ErrInvalid)
	require.Zero(t, n)
}

func TestPageSet(t *testing.T) {
	var b pageSet
	gap := func(at, end int64) [2]int64 {
		from, to := b.gap(at, end)
		return [2]int64{from, to}
	}
	require.Equal(t, [2]int64{0, 200}, gap(0, 200))
	b.add(60, 10)
	require.Equal(t, [2]int64{0, 60}, gap(0, 200))
	require.Equal(t, [2]int64{70, 200}, gap(60, 200))
	require.Equal(t, [2]int64{70, 70}, gap(60, 70))
	b.add(0, 60)
	b.add(128, 64)
	require.Equal(t, [2]int64{70, 128}, gap(0, 192))
	require.Equal(t, [2]int64{192, 192}, gap(130, 192))
}
