package overlay

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

// text fills p with something that compresses as programs and their data do: about 3 to 1.
func text(rng *rand.Rand, p []byte) {
	words := []string{"instance ", "\x00\x00\x00\x00\x00\x00\x00\x00", "page=", "\x48\x89\xe5", "static const ", "0x7f"}
	for n := 0; n < len(p); {
		n += copy(p[n:], words[rng.IntN(len(words))])
		if rng.IntN(2) == 0 && n+4 < len(p) {
			for range 4 {
				p[n] = byte(rng.Uint32())
				n++
			}
		}
	}
}

// benchVM makes a base and a launch VM of it with the given numbers of pages.
func benchVM(b *testing.B, pages, modified int) (*Base, vm) {
	rng := rand.New(rand.NewPCG(3, 3))
	v := vm{make([]byte, pages*PageSize), make([]byte, PageSize)}
	text(rng, v[Memory])
	base := newBase(b, v)
	w := v.clone()
	for _, page := range rng.Perm(pages)[:modified] {
		text(rng, w[Memory][page*PageSize:(page+1)*PageSize])
	}
	_, err := base.Fingerprints(b.Context(), nil)
	require.NoError(b, err)
	return base, w
}

// BenchmarkCompare is Create on pages that equal the parent's: MB/s of one core.
func BenchmarkCompare(b *testing.B) {
	base, w := benchVM(b, 64<<10, 0)
	im := newImage(b, base)
	b.SetBytes(int64(len(w[Memory])))
	for b.Loop() {
		_, err := Create(b.Context(), filepath.Join(b.TempDir(), "o"), launch(im, w), CreateOptions{Workers: 1})
		require.NoError(b, err)
	}
}

// BenchmarkCreate is Create on modified pages, by strategy: MB/s of one core.
func BenchmarkCreate(b *testing.B) {
	base, w := benchVM(b, 4<<10, 4<<10)
	im := newImage(b, base)
	for _, name := range Strategies() {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(w[Memory])))
			for b.Loop() {
				made, err := Create(b.Context(), filepath.Join(b.TempDir(), "o"), launch(im, w), CreateOptions{Workers: 1, Strategy: strategy(b, name)})
				require.NoError(b, err)
				b.ReportMetric(float64(made.Size)/float64(len(w[Memory])), "ratio")
			}
		})
	}
}

// BenchmarkRead reads a whole launch image in order, every page modified: MB/s of one core,
// decoding and verifying included.
func BenchmarkRead(b *testing.B) {
	base, w := benchVM(b, 4<<10, 4<<10)
	for _, name := range Strategies() {
		b.Run(name, func(b *testing.B) {
			path := filepath.Join(b.TempDir(), "o")
			_, err := Create(b.Context(), path, launch(newImage(b, base), w), CreateOptions{Strategy: strategy(b, name)})
			require.NoError(b, err)
			data, err := os.ReadFile(path)
			require.NoError(b, err)
			r := openBytes(b, data)
			buf := make([]byte, 128<<10)
			b.SetBytes(int64(len(w[Memory])))
			for b.Loop() {
				im, err := NewImage(base, []*Reader{r}, ImageOptions{})
				require.NoError(b, err)
				for off := int64(0); off < im.Size(Memory); off += int64(len(buf)) {
					require.NoError(b, im.ReadPages(b.Context(), Memory, buf, off))
				}
				require.NoError(b, im.Close())
			}
		})
	}
}

// BenchmarkOpen opens an overlay by its number of pages.
func BenchmarkOpen(b *testing.B) {
	for _, pages := range []int{1000, 100000} {
		b.Run(fmt.Sprint(pages), func(b *testing.B) {
			base, w := benchVM(b, pages, pages)
			data, _ := create(b, launch(newImage(b, base), w), CreateOptions{Strategy: strategy(b, "fast")})
			for b.Loop() {
				openBytes(b, data)
			}
		})
	}
}

// BenchmarkQuick is what a guest waits for when it is handed off: the overlay of 300 pages with
// a device state and a profile.
func BenchmarkQuick(b *testing.B) {
	base, w := benchVM(b, 64<<10, 300)
	state := make([]byte, 384<<10)
	text(rand.New(rand.NewPCG(4, 4)), state[:100<<10])
	l := launch(newImage(b, base), w)
	l.State, l.Memory.Extents = state, nil
	for page := range int64(16384) {
		l.Profile = append(l.Profile, MakeAddr(Memory, page*3))
	}
	for _, page := range rand.New(rand.NewPCG(3, 3)).Perm(64 << 10)[:300] {
		l.Memory.Extents = append(l.Memory.Extents, Extent{Off: int64(page) * PageSize, Len: PageSize})
	}
	slices.SortFunc(l.Memory.Extents, func(a, b Extent) int { return cmp.Compare(a.Off, b.Off) })
	fast, err := ParseStrategy("fast")
	require.NoError(b, err)
	dir := b.TempDir()
	for b.Loop() {
		_, err := Create(b.Context(), filepath.Join(dir, "o"), l, CreateOptions{Quick: true, Strategy: fast})
		require.NoError(b, err)
	}
}
