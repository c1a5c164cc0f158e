package fusefs

import (
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestContent(t *testing.T) {
	for _, c := range []struct {
		name string
		size int
	}{{"empty", 0}, {"one byte", 1}, {"page", 4096}, {"page and one", 4097}, {"many requests", 5<<20 + 123}} {
		t.Run(c.name, func(t *testing.T) {
			memory, disk := newTestFile(c.size), newTestFile(c.size+7)
			_, dir := mount(t, Options{Memory: memory, Disk: disk, Info: []byte(`{"a":1}`)})
			for name, f := range map[string]*testFile{MemoryName: memory, DiskName: disk} {
				require.Equal(t, f.hash(), client(t, "hash", filepath.Join(dir, name), "read"))
				if f.Size() > 0 {
					require.Equal(t, f.hash(), client(t, "hash", filepath.Join(dir, name), "private"))
					require.Equal(t, f.hash(), client(t, "hash", filepath.Join(dir, name), "shared"))
				}
			}
			require.Equal(t, hex.EncodeToString([]byte(`{"a":1}`)), client(t, "pread", filepath.Join(dir, InfoName), "0", "100"))
		})
	}
}

func TestRandomReads(t *testing.T) {
	memory := newTestFile(3<<20 + 17)
	_, dir := mount(t, Options{Memory: memory})
	rng := rand.New(rand.NewPCG(1, 2))
	for range 20 {
		off, n := rng.IntN(len(memory.content)), rng.IntN(300_000)
		want := memory.content[off:min(off+n, len(memory.content))]
		got := client(t, "pread", filepath.Join(dir, MemoryName), strconv.Itoa(off), strconv.Itoa(n))
		require.Equal(t, hex.EncodeToString(want), got, "offset %d, %d bytes", off, n)
	}
}

func TestChangesAreRefused(t *testing.T) {
	for _, name := range []string{MemoryName, DiskName} {
		t.Run(name, func(t *testing.T) {
			f := newTestFile(1 << 20)
			_, dir := mount(t, Options{Memory: f, Disk: f})
			for _, field := range strings.Fields(client(t, "change", dir, name)) {
				op, got, _ := strings.Cut(field, "=")
				want := "EROFS"
				switch op {
				case "setxattr", "getxattr", "listxattr", "removexattr":
					want = "ENOTSUP"
				case "rmdir":
					want = "ENOENT"
				case "chown", "fsync":
					want = "0"
				}
				require.Equal(t, want, got, op)
			}
			require.Equal(t, f.hash(), client(t, "hash", filepath.Join(dir, name), "read"))
		})
	}
}

// The kernel copies a write into its cache before it asks; that copy must not stay there
// for others who have the page mapped.
func TestRefusedWriteLeavesNoTrace(t *testing.T) {
	memory := newTestFile(1 << 20)
	_, dir := mount(t, Options{Memory: memory})
	require.Equal(t, "write EROFS, content restored", client(t, "scribble", filepath.Join(dir, MemoryName)))
}

func TestPrivateWritesStayPrivate(t *testing.T) {
	memory := newTestFile(1 << 20)
	_, dir := mount(t, Options{Memory: memory})
	require.Equal(t, "ok", client(t, "cow", filepath.Join(dir, MemoryName)))
	require.Equal(t, memory.hash(), client(t, "hash", filepath.Join(dir, MemoryName), "read"))
}

func TestOpenersSharePageCache(t *testing.T) {
	memory := newTestFile(8 << 20)
	s, dir := mount(t, Options{Memory: memory})
	keep := start(t, "keep", filepath.Join(dir, MemoryName))
	require.Equal(t, "ready", keep.line(t))
	require.Equal(t, memory.hash(), client(t, "hash", filepath.Join(dir, MemoryName), "read"))
	first := s.Stats().Memory
	require.Positive(t, first.Reads)
	require.Equal(t, memory.Size(), first.Bytes)
	require.Equal(t, memory.hash(), client(t, "hash", filepath.Join(dir, MemoryName), "private"))
	require.Less(t, s.Stats().Memory.Bytes-first.Bytes, int64(1<<20))
}

func TestReadAhead(t *testing.T) {
	s, _ := mount(t, Options{ReadAheadKiB: 64})
	st := s.Stats()
	if os.Geteuid() != 0 {
		require.Contains(t, st.ReadAheadError, "set read-ahead to 64 KiB")
		return
	}
	require.Equal(t, 64, st.ReadAheadKiB)
	require.Empty(t, st.ReadAheadError)
}

func TestMountErrors(t *testing.T) {
	needFUSE(t)
	dir := t.TempDir()
	full := filepath.Join(dir, "full")
	file := filepath.Join(full, "file")
	require.NoError(t, os.Mkdir(full, 0o700))
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	_, mounted := mount(t, Options{})
	ok := Options{Memory: bytesFile("m"), Disk: bytesFile("d")}
	for _, c := range []struct {
		name, dir string
		o         Options
		is        error
		says      string
	}{
		{"missing", filepath.Join(dir, "none"), ok, os.ErrNotExist, "mkdir"},
		{"parent missing", filepath.Join(dir, "none", "none"), ok, os.ErrNotExist, "none"},
		{"not empty", full, ok, syscall.ENOTEMPTY, "empty directory"},
		{"a file", file, ok, syscall.ENOTDIR, "empty directory"},
		{"mounted", mounted, ok, ErrMounted, "fusermount3 -u"},
		{"mount of another type", "/proc", ok, ErrMounted, "proc"},
		{"no name", "", ok, nil, "empty directory"},
		{"no memory", dir, Options{Disk: ok.Disk}, nil, "no memory file"},
		{"no disk", dir, Options{Memory: ok.Memory}, nil, "no disk file"},
		{"long socket", dir, Options{Memory: ok.Memory, Disk: ok.Disk, Socket: strings.Repeat("x", 200)}, nil, "shorter"},
		{"negative read-ahead", dir, Options{Memory: ok.Memory, Disk: ok.Disk, ReadAheadKiB: -1}, nil, "read-ahead"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, err := Mount(c.dir, c.o)
			require.Error(t, err)
			require.Nil(t, s)
			require.ErrorContains(t, err, c.says)
			if c.is != nil {
				require.ErrorIs(t, err, c.is)
			}
		})
	}
}

func TestMountAtOddNames(t *testing.T) {
	needFUSE(t)
	dir := filepath.Join(t.TempDir(), "a b\t\\c")
	require.NoError(t, os.Mkdir(dir, 0o700))
	link := filepath.Join(t.TempDir(), "link")
	require.NoError(t, os.Symlink(dir, link))
	s, err := Mount(link, Options{Memory: bytesFile("m"), Disk: bytesFile("d"), Name: `a,b\ c`})
	require.NoError(t, err)
	m, found, err := findMount(dir)
	require.NoError(t, err)
	require.True(t, found)
	require.Equal(t, "a_b__c", m.source)
	require.Equal(t, "fuse.cloudlet", m.kind)
	_, err = Mount(link, Options{Memory: bytesFile("m"), Disk: bytesFile("d")})
	require.ErrorIs(t, err, ErrMounted)
	require.NoError(t, s.Unmount(t.Context()))
	_, found, err = findMount(dir)
	require.NoError(t, err)
	require.False(t, found)
}

func TestUnmount(t *testing.T) {
	t.Run("busy", func(t *testing.T) {
		s, dir := mount(t, Options{})
		keep := start(t, "keep", filepath.Join(dir, DiskName))
		require.Equal(t, "ready", keep.line(t))
		require.ErrorIs(t, s.Unmount(t.Context()), ErrBusy)
		require.NotEqual(t, "error", client(t, "hash", filepath.Join(dir, DiskName), "read"))
		require.NoError(t, keep.stdin.Close())
		keep.dies(t)
		require.NoError(t, s.Unmount(t.Context()))
		require.NoError(t, s.Unmount(t.Context()), "twice")
		require.NoError(t, s.Wait())
	})
	t.Run("forced", func(t *testing.T) {
		s, dir := mount(t, Options{})
		keep := start(t, "keep", filepath.Join(dir, DiskName))
		require.Equal(t, "ready", keep.line(t))
		require.NoError(t, s.ForceUnmount(t.Context()))
		require.NoError(t, s.Wait())
	})
	t.Run("from outside", func(t *testing.T) {
		s, dir := mount(t, Options{})
		require.NoError(t, detach(dir, false))
		require.NoError(t, s.Wait())
	})
	t.Run("connection aborted from outside", func(t *testing.T) {
		s, dir := mount(t, Options{})
		require.NoError(t, abortConnection(s.entry))
		require.ErrorContains(t, s.Wait(), "aborted from outside")
		_, found, err := findMount(dir)
		require.NoError(t, err)
		require.False(t, found)
	})
}

var errBroken = errors.New("frame 7 is broken")
