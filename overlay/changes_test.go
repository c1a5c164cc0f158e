package overlay

import (
	"bytes"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// randomExtents returns ascending extents in an image of n pages.
func randomExtents(rng *rand.Rand, n int64) (ext []Extent) {
	for off := rng.Int64N(4); off < n; {
		l := min(1+rng.Int64N(5), n-off)
		ext = append(ext, Extent{Off: off * PageSize, Len: l * PageSize, Zero: rng.IntN(3) == 0})
		off += l + rng.Int64N(5)
	}
	return ext
}

// TestOver holds changes laid over others to a model: page by page, what is where, and that
// a read of any range gives it.
func TestOver(t *testing.T) {
	rng := newRand(t)
	const pages = 40
	fill := func(value byte) func([]byte, int64) error {
		return func(p []byte, off int64) error {
			for i := range p {
				p[i] = value + byte((off+int64(i))/PageSize)
			}
			return nil
		}
	}
	for range 300 {
		top := Changes{Extents: randomExtents(rng, pages), Read: fill(100)}
		below := Changes{Extents: randomExtents(rng, pages), Read: fill(1)}
		var listed, want [pages]byte
		for i := range want {
			want[i] = byte(1 + i)
		}
		mark := func(ext []Extent, bit byte) {
			for _, e := range ext {
				for n := e.Off / PageSize; n < (e.Off+e.Len)/PageSize; n++ {
					listed[n] |= bit
					if bit == 1 && e.Zero {
						want[n] = 0
					} else if bit == 1 {
						want[n] = 100 + byte(n)
					}
				}
			}
		}
		mark(below.Extents, 2)
		mark(top.Extents, 1)
		out := top.over(below)
		require.NoError(t, out.check(Memory, pages*PageSize))
		mark(out.Extents, 4)
		for n, bits := range listed {
			require.Equal(t, bits&3 != 0, bits&4 != 0, "page %d", n)
		}
		from := rng.Int64N(pages)
		p := make([]byte, (1+rng.Int64N(pages-from))*PageSize)
		require.NoError(t, out.Read(p, from*PageSize))
		for i := 0; i < len(p); i += PageSize {
			require.Equal(t, want[from+int64(i/PageSize)], p[i])
		}
	}
}

// TestManyExtents: the cost of a flattened overlay does not grow with the square of the
// pieces that changed.
func TestManyExtents(t *testing.T) {
	const n = 1 << 18
	below := Changes{Extents: []Extent{{Off: 0, Len: 2 * n * PageSize}}}
	top := Changes{Read: func([]byte, int64) error { return nil }}
	for i := range int64(n) {
		top.Extents = append(top.Extents, Extent{Off: 2 * i * PageSize, Len: PageSize})
	}
	below.Read = top.Read
	start := time.Now()
	out := top.over(below)
	require.Len(t, out.Extents, 2*n)
	p := make([]byte, 1<<20)
	for range 1000 {
		require.NoError(t, out.Read(p, (2*n-256)*PageSize))
	}
	require.Less(t, time.Since(start), 10*time.Second)
}

// sparseFile makes a file of the given size with pages of data.
func sparseFile(t *testing.T, path string, size int64, pages map[int64][]byte) *os.File {
	f, err := os.Create(path)
	require.NoError(t, err)
	t.Cleanup(func() { f.Close() })
	require.NoError(t, f.Truncate(size))
	for n, p := range pages {
		_, err := f.WriteAt(p, n*PageSize)
		require.NoError(t, err)
	}
	return f
}

// TestHolesAreSkipped: what is a hole in the launch VM and in the base is not read; what
// an overlay between them wrote there, and what the base holds there, becomes zero.
func TestHolesAreSkipped(t *testing.T) {
	sizes := [2]int64{64 << 20, 256 << 20}
	if os.Getenv("CLOUDLET_BIG") == "1" {
		sizes = [2]int64{8 << 30, 64 << 30}
	}
	page := func(c byte) []byte { return bytes.Repeat([]byte{c, 1, c}, PageSize)[:PageSize] }
	dir := t.TempDir()
	var last [2]int64
	for _, s := range Spaces {
		last[s] = sizes[s]/PageSize - 1
		sparseFile(t, filepath.Join(dir, s.String()), sizes[s], map[int64][]byte{3: page('a'), 500: page('b'), last[s]: page('c')})
	}
	started := time.Now()
	base, err := SealBase(t.Context(), dir, testMachine, nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, base.Close()) })
	t.Logf("base sealed in %s", time.Since(started))

	var chain []*Reader
	add := func(pages map[int64][]byte, o CreateOptions) *Created {
		l := Launch{Parent: newImage(t, base, chain...), Machine: testMachine}
		files := t.TempDir()
		var err error
		l.Memory, err = FileChanges(sparseFile(t, filepath.Join(files, "memory"), sizes[Memory], pages))
		require.NoError(t, err)
		l.Disk, err = FileChanges(sparseFile(t, filepath.Join(files, "disk"), sizes[Disk], pages))
		require.NoError(t, err)
		started := time.Now()
		b, made := create(t, l, o)
		t.Logf("overlay made in %s", time.Since(started))
		chain = append(chain, openBytes(t, b))
		return made
	}
	first := add(map[int64][]byte{3: page('a'), 1000: page('d'), 5000: page('e')}, CreateOptions{})
	require.Equal(t, PageStats{Modified: 4, Zero: 2, Stored: 2}, first.Manifest.Stats.Memory)
	compared := int64(0)
	progress := func(phase string, done, total int64) {
		if phase == "compare" {
			compared = total
		}
	}
	second := add(map[int64][]byte{3: page('a'), 5000: page('e')}, CreateOptions{Progress: progress})
	require.Equal(t, PageStats{Modified: 1, Zero: 1}, second.Manifest.Stats.Memory)
	require.Equal(t, PageStats{Modified: 1, Zero: 1}, second.Manifest.Stats.Disk)
	require.Positive(t, compared)
	require.Less(t, compared, int64(16<<20), "bytes compared")

	im := newImage(t, base, chain...)
	require.NoError(t, im.Verify(t.Context(), nil))
	for _, s := range Spaces {
		for n, want := range map[int64][]byte{3: page('a'), 500: zeroPage[:], 1000: zeroPage[:], 5000: page('e'), last[s]: zeroPage[:], 7000: zeroPage[:]} {
			var have [PageSize]byte
			_, err := im.File(s).ReadAt(t.Context(), have[:], n*PageSize)
			require.NoError(t, err)
			require.True(t, bytes.Equal(want, have[:]), "%s page %d", s, n)
		}
	}
	_, err = im.File(Disk).ReadAt(t.Context(), []byte{0}, sizes[Disk])
	require.Equal(t, io.EOF, err)
	if os.Getenv("CLOUDLET_BIG") == "1" {
		require.Less(t, peakMemory(t), int64(1<<30))
	}
}

// peakMemory returns the largest resident size the process has had.
func peakMemory(t *testing.T) int64 {
	b, err := os.ReadFile("/proc/self/status")
	require.NoError(t, err)
	_, rest, _ := strings.Cut(string(b), "VmHWM:")
	n, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
	require.NoError(t, err)
	t.Logf("at most %d MiB resident", n>>10)
	return n << 10
}
