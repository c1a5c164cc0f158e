package overlay

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"cloudlet/integration/need"
)

var (
	update = flag.Bool("update", false, "write the golden files anew")
	seed   = flag.Uint64("seed", 1, "seed of the random tests")
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// vm is both images of a VM as plain bytes: what every path is compared with.
type vm [2][]byte

func (v vm) clone() vm { return vm{bytes.Clone(v[0]), bytes.Clone(v[1])} }

func (v vm) page(a Addr) []byte { return v[a.Space()][a.Offset() : a.Offset()+PageSize] }

// newVM makes images with zero, repeated, compressible and random pages.
func newVM(rng *rand.Rand, memPages, diskPages int) vm {
	v := vm{make([]byte, memPages*PageSize), make([]byte, diskPages*PageSize)}
	for s := range v {
		for off := 0; off < len(v[s]); off += PageSize {
			fillPage(rng, v[s][off:off+PageSize])
		}
	}
	return v
}

func fillPage(rng *rand.Rand, p []byte) {
	switch rng.IntN(4) {
	case 0:
		clear(p)
	case 1:
		for i := range p {
			p[i] = byte(i/64) + byte(rng.IntN(3))
		}
	case 2:
		copy(p, bytes.Repeat([]byte{byte(rng.IntN(3)), 7}, PageSize/2))
	default:
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
	}
}

// mutate changes about one page in every n, in all the ways that have a class of their own.
func (v vm) mutate(rng *rand.Rand, n int) {
	for s := range v {
		for off := 0; off < len(v[s]); off += PageSize {
			if rng.IntN(n) > 0 {
				continue
			}
			p := v[s][off : off+PageSize]
			switch rng.IntN(4) {
			case 0: // a page moved here from elsewhere in either image
				o := rng.IntN(2)
				copy(p, v[o][rng.IntN(len(v[o])/PageSize)*PageSize:][:PageSize])
			case 1: // a few bytes written
				p[rng.IntN(PageSize)]++
			default:
				fillPage(rng, p)
			}
		}
	}
}

func newRand(t testing.TB) *rand.Rand {
	t.Logf("seed %d", *seed)
	return rand.New(rand.NewPCG(*seed, 2))
}

var testMachine = json.RawMessage(`{"type":"pc-q35-7.2","memory":1}`)

func newBase(t testing.TB, v vm) *Base {
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "memory"), v[Memory], 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "disk"), v[Disk], 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "state"), []byte("base state"), 0o600))
	b, err := SealBase(t.Context(), dir, testMachine, nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, b.Close()) })
	return b
}

// whole hands all of an image to Create as changes.
func whole(p []byte) Changes {
	return Changes{
		Extents: []Extent{{Len: int64(len(p))}},
		Read:    func(b []byte, off int64) error { copy(b, p[off:]); return nil },
	}
}

func launch(im *Image, v vm) Launch {
	return Launch{Parent: im, Machine: testMachine, State: []byte("launch state"), Memory: whole(v[Memory]), Disk: whole(v[Disk])}
}

func newImage(t testing.TB, b *Base, chain ...*Reader) *Image {
	im, err := NewImage(b, chain, ImageOptions{})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, im.Close()) })
	return im
}

// strategy parses text; without the programs that it needs the test is skipped.
func strategy(t testing.TB, text string) Strategy {
	t.Helper()
	s, err := ParseStrategy(text)
	require.NoError(t, err)
	need.No(t, s.CheckPrograms(t.Context()), ErrNoProgram)
	return s
}

// bytesSource is a Source from memory.
type bytesSource []byte

func (b bytesSource) Size() int64  { return int64(len(b)) }
func (b bytesSource) Close() error { return nil }

func (b bytesSource) String() string { return "bytes" }

func (b bytesSource) ReadAt(_ context.Context, p []byte, off int64) (int, error) {
	return bytes.NewReader(b).ReadAt(p, off)
}

func openBytes(t testing.TB, b []byte) *Reader {
	r, err := Open(t.Context(), bytesSource(b))
	require.NoError(t, err)
	return r
}

// create makes an overlay and returns the bytes of its file.
func create(t testing.TB, l Launch, o CreateOptions) ([]byte, *Created) {
	dir := t.TempDir()
	path := filepath.Join(dir, "o.overlay")
	made, err := Create(t.Context(), path, l, o)
	require.NoError(t, err)
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	require.EqualValues(t, len(b), made.Size)
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, entries, 1, "temporary files are left")
	return b, made
}

func requireImage(t testing.TB, im *Image, want vm) {
	t.Helper()
	for _, s := range Spaces {
		have := make([]byte, len(want[s]))
		n, err := im.File(s).ReadAt(t.Context(), have, 0)
		require.NoError(t, err)
		require.Equal(t, len(have), n)
		for off := 0; off < len(have); off += PageSize {
			if !bytes.Equal(have[off:off+PageSize], want[s][off:off+PageSize]) {
				t.Fatalf("%s page %d differs", s, off/PageSize)
			}
		}
	}
}

// everyStrategy returns the presets, and every delta with every codec that it goes with.
func everyStrategy() []string {
	list := append(Strategies(), "balanced,order=similar,frame=16K")
	for _, delta := range deltaNames[:strategyDeltas] {
		for _, codec := range codecNames {
			if text := fmt.Sprintf("balanced,delta=%s,codec=%s", delta, codec); delta != "dict" || codec == "zstd" {
				list = append(list, text)
			}
		}
	}
	return list
}

// TestRoundTrip: every strategy gives back every byte, whole and page by page.
func TestRoundTrip(t *testing.T) {
	for _, text := range append(everyStrategy(), "balanced,level=19", "fast,level=22,frame=4M,hot=4K", "balanced,delta=none,frame=4K", "small,frame=64K", "fast,frame=4M", "fast,delta=dict,frame=4M",
		"balanced,delta=dict,level=4,frame=256K", "balanced,delta=dict,level=2,frame=4K", "elijah,frame=4M") {
		t.Run(text, func(t *testing.T) {
			rng := newRand(t)
			v := newVM(rng, 700, 500)
			base := newBase(t, v)
			w := v.clone()
			w.mutate(rng, 3)
			b, made := create(t, launch(newImage(t, base), w), CreateOptions{Strategy: strategy(t, text)})
			r := openBytes(t, b)
			require.Equal(t, made.ID, r.ID())
			require.Equal(t, made.Digest, r.Digest())
			im := newImage(t, base, r)
			for range 30 { // in no order: a page costs its frame alone
				a, page := MakeAddr(Spaces[rng.IntN(2)], int64(rng.IntN(500))), make([]byte, PageSize)
				require.NoError(t, im.ReadPages(t.Context(), a.Space(), page, a.Offset()))
				require.Equal(t, w.page(a), page)
			}
			requireImage(t, im, w)
			require.NoError(t, im.Verify(t.Context(), nil))
			require.NoError(t, r.Verify(t.Context(), nil))
			state, err := im.State()
			require.NoError(t, err)
			require.Equal(t, "launch state", string(state))
			for _, s := range Spaces {
				var differ int64
				for off := 0; off < len(v[s]); off += PageSize {
					if !bytes.Equal(v[s][off:off+PageSize], w[s][off:off+PageSize]) {
						differ++
					}
				}
				require.Equal(t, differ, r.Manifest().Stats.of(s).Modified)
			}
		})
	}
}

// TestSizes covers overlays with few pages around the size of a frame.
func TestSizes(t *testing.T) {
	const framePages = 4
	for _, n := range []int{0, 1, framePages - 1, framePages, framePages + 1, 2*framePages + 3} {
		rng := newRand(t)
		v := newVM(rng, 32, 16)
		base := newBase(t, v)
		w := v.clone()
		for i := range n {
			for k := range PageSize {
				w[Memory][i*PageSize+k] = byte(rng.Uint32())
			}
		}
		b, made := create(t, launch(newImage(t, base), w), CreateOptions{Strategy: strategy(t, "balanced,frame=16K")})
		require.EqualValues(t, n, made.Manifest.Stats.Memory.Stored)
		require.Equal(t, (n+framePages-1)/framePages, made.Manifest.Stats.Frames)
		im := newImage(t, base, openBytes(t, b))
		requireImage(t, im, w)
		require.NoError(t, im.Verify(t.Context(), nil))
	}
}

// TestClasses puts one page of each class into an overlay and looks at what it became.
func TestClasses(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 5))
	random := func(p []byte) {
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
	}
	v := vm{make([]byte, 16*PageSize), make([]byte, 16*PageSize)}
	random(v[Memory])
	random(v[Disk])
	base := newBase(t, v)
	w := v.clone()
	clear(w.page(3))                           // zero
	copy(w.page(4), v.page(MakeAddr(Disk, 9))) // base, across images
	random(w.page(5))                          // stored
	copy(w.page(MakeAddr(Disk, 2)), w.page(5)) // self, across images
	b, made := create(t, launch(newImage(t, base), w), CreateOptions{})
	s := made.Manifest.Stats
	require.Equal(t, PageStats{Modified: 3, Zero: 1, Base: 1, Stored: 1}, s.Memory)
	require.Equal(t, PageStats{Modified: 1, Self: 1}, s.Disk)

	r := openBytes(t, b)
	im := newImage(t, base, r)
	x := w.clone()
	copy(x.page(7), w.page(5)) // in the parent overlay at another offset
	copy(x.page(3), v.page(3)) // back to the base's
	copy(x.page(5), x.page(6)) // the parent's stored page goes, to a base page
	b2, made := create(t, launch(im, x), CreateOptions{})
	require.Equal(t, PageStats{Modified: 3, Base: 2, Parent: 1}, made.Manifest.Stats.Memory)
	require.Equal(t, PageStats{}, made.Manifest.Stats.Disk)
	requireImage(t, newImage(t, base, r, openBytes(t, b2)), x)
}

func TestChainAndFlatten(t *testing.T) {
	rng := newRand(t)
	v := newVM(rng, 300, 200)
	base := newBase(t, v)
	var chain []*Reader
	for depth := 1; depth <= MaxDepth; depth++ {
		v = v.clone()
		v.mutate(rng, 8)
		b, made := create(t, launch(newImage(t, base, chain...), v), CreateOptions{})
		require.Equal(t, depth, made.Manifest.Depth)
		chain = append(chain, openBytes(t, b))
		im := newImage(t, base, chain...)
		requireImage(t, im, v)
		require.NoError(t, im.Verify(t.Context(), nil))
	}
	parent := newImage(t, base, chain...)
	w := v.clone()
	w.mutate(rng, 8)
	clear(w.page(8))
	l := launch(parent, w)
	l.Memory.Extents = nil // only what differs, as a residue has it
	for off := int64(0); off < int64(len(w[Memory])); off += PageSize {
		if p := w[Memory][off : off+PageSize]; !bytes.Equal(p, v[Memory][off:off+PageSize]) {
			l.Memory.Extents = append(l.Memory.Extents, Extent{off, PageSize, isZero(p)})
		}
	}
	b, made := create(t, l, CreateOptions{})
	require.Equal(t, 1, made.Manifest.Depth)
	require.Equal(t, base.ID(), made.Manifest.Parent)
	requireImage(t, newImage(t, base, openBytes(t, b)), w)

	_, err := NewImage(base, append(chain, chain[0]), ImageOptions{})
	require.ErrorIs(t, err, ErrParent)
	_, err = NewImage(base, chain[1:], ImageOptions{})
	require.ErrorIs(t, err, ErrParent)
	other := newBase(t, newVM(rng, 300, 200))
	_, err = NewImage(other, chain[:1], ImageOptions{})
	require.ErrorIs(t, err, ErrParent)
	require.ErrorContains(t, err, base.ID().String()[:12])
}

// TestDeterministic: the same input gives the same bytes whatever the number of workers,
// and the same id whatever the strategy and order.
func TestDeterministic(t *testing.T) {
	rng := newRand(t)
	v := newVM(rng, 3000, 1000)
	base := newBase(t, v)
	w := v.clone()
	w.mutate(rng, 3)
	l := launch(newImage(t, base), w)
	first, made := create(t, l, CreateOptions{Workers: 1})
	for _, workers := range []int{2, 3, 8} {
		b, _ := create(t, l, CreateOptions{Workers: workers})
		require.True(t, bytes.Equal(first, b), "%d workers", workers)
	}
	for _, text := range []string{"balanced,delta=dict", "fast,delta=vcdiff,frame=1M", "fast,delta=dict", "balanced,delta=dict,level=4", "balanced,order=similar"} {
		t.Run(text, func(t *testing.T) {
			one, again := create(t, l, CreateOptions{Workers: 1, Strategy: strategy(t, text)})
			two, _ := create(t, l, CreateOptions{Workers: 3, Strategy: strategy(t, text)})
			require.True(t, bytes.Equal(one, two))
			require.Equal(t, made.ID, again.ID)
		})
	}
	small, again := create(t, l, CreateOptions{Strategy: strategy(t, "small")})
	require.Equal(t, made.ID, again.ID)
	require.NotEqual(t, made.Digest, again.Digest)
	require.Less(t, len(small), len(first))

	x := openBytes(t, first).index
	l.Profile = []Addr{x.stored[len(x.stored)-1], x.stored[3], x.refs[0].addr, x.stored[50], x.stored[4]}
	b, again := create(t, l, CreateOptions{})
	require.Equal(t, made.ID, again.ID)
	require.NotEqual(t, made.Digest, again.Digest)
	r := openBytes(t, b)
	p, err := r.Profile()
	require.NoError(t, err)
	require.Equal(t, l.Profile, p)
	requireImage(t, newImage(t, base, r), w)
	hot := []Addr{l.Profile[0], l.Profile[1], l.Profile[3], l.Profile[4]}
	require.Equal(t, hot, r.index.stored[:len(hot)], "stored pages of the profile come first, in its order")

	l.State = []byte("another state")
	_, again = create(t, l, CreateOptions{})
	require.NotEqual(t, made.ID, again.ID)
}

// TestFileChanges makes the overlay from a pair of sparse files, holes included.
func TestFileChanges(t *testing.T) {
	rng := newRand(t)
	v := newVM(rng, 2000, 64)
	base := newBase(t, v)
	w := v.clone()
	w.mutate(rng, 5)
	clear(w[Memory][100*PageSize : 900*PageSize])
	l := launch(newImage(t, base), w)
	for _, s := range Spaces {
		f, err := os.Create(filepath.Join(t.TempDir(), s.String()))
		require.NoError(t, err)
		t.Cleanup(func() { f.Close() })
		require.NoError(t, f.Truncate(int64(len(w[s]))))
		for off := 0; off < len(w[s]); off += PageSize {
			if p := w[s][off : off+PageSize]; !isZero(p) {
				_, err := f.WriteAt(p, int64(off))
				require.NoError(t, err)
			}
		}
		c, err := FileChanges(f)
		require.NoError(t, err)
		if s == Memory {
			l.Memory = c
			hole := slices.IndexFunc(c.Extents, func(e Extent) bool { return e.Off <= 100*PageSize && e.Off+e.Len >= 900*PageSize && e.Zero })
			require.GreaterOrEqual(t, hole, 0, "the hole is known")
		} else {
			l.Disk = c
		}
	}
	b, _ := create(t, l, CreateOptions{})
	requireImage(t, newImage(t, base, openBytes(t, b)), w)
	plain, _ := create(t, launch(newImage(t, base), w), CreateOptions{})
	require.True(t, bytes.Equal(plain, b), "holes and zeros give the same overlay")
}

func TestImageReadAt(t *testing.T) {
	rng := newRand(t)
	v := newVM(rng, 64, 32)
	base := newBase(t, v)
	w := v.clone()
	w.mutate(rng, 2)
	b, _ := create(t, launch(newImage(t, base), w), CreateOptions{})
	im := newImage(t, base, openBytes(t, b))
	f := im.File(Memory)
	for range 500 {
		off := rng.Int64N(f.Size() + 100)
		p := make([]byte, rng.IntN(3*PageSize))
		n, err := f.ReadAt(t.Context(), p, off)
		want := w[Memory][min(off, f.Size()):min(off+int64(len(p)), f.Size())]
		require.True(t, bytes.Equal(want, p[:n]), "%d bytes at %d", len(p), off)
		if n < len(p) {
			require.Equal(t, io.EOF, err)
		} else if err != io.EOF {
			require.NoError(t, err)
		}
	}
	_, err := f.ReadAt(t.Context(), make([]byte, 8), -1)
	require.Error(t, err)
	require.NoError(t, im.Close())
	_, err = f.ReadAt(t.Context(), make([]byte, f.Size()), 0)
	require.ErrorIs(t, err, ErrClosed)
}

// TestCreateRefuses: wrong input is named and leaves nothing.
func TestCreateRefuses(t *testing.T) {
	v := newVM(newRand(t), 16, 16)
	base := newBase(t, v)
	for name, tt := range map[string]struct {
		change func(*Launch, *CreateOptions)
		want   string
	}{
		"overlapping": {func(l *Launch, _ *CreateOptions) { l.Disk.Extents = []Extent{{0, 8192, false}, {4096, 4096, false}} }, "changes of disk"},
		"outside":     {func(l *Launch, _ *CreateOptions) { l.Memory.Extents = []Extent{{0, 17 * 4096, false}} }, "changes of memory"},
		"unaligned":   {func(l *Launch, _ *CreateOptions) { l.Memory.Extents = []Extent{{1, 4096, false}} }, "changes of memory"},
		"machine":     {func(l *Launch, _ *CreateOptions) { l.Machine = json.RawMessage(`{`) }, "machine configuration"},
		"state":       {func(l *Launch, _ *CreateOptions) { l.State = make([]byte, MaxStateSize+1) }, "device state"},
		"strategy":    {func(_ *Launch, o *CreateOptions) { o.Strategy = Strategy{Codec: CodecZstd, FrameSize: 1} }, "frame size"},
		"profile":     {func(l *Launch, _ *CreateOptions) { l.Profile = []Addr{1, 1} }, "twice"},
		"profile far": {func(l *Launch, _ *CreateOptions) { l.Profile = []Addr{16} }, "outside"},
		"read": {func(l *Launch, _ *CreateOptions) {
			l.Memory.Read = func([]byte, int64) error { return io.ErrUnexpectedEOF }
		}, "unexpected EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			l, o := launch(newImage(t, base), v), CreateOptions{}
			tt.change(&l, &o)
			dir := t.TempDir()
			_, err := Create(t.Context(), filepath.Join(dir, "x"), l, o)
			require.ErrorContains(t, err, tt.want)
			entries, err := os.ReadDir(dir)
			require.NoError(t, err)
			require.Empty(t, entries)
		})
	}
	t.Run("cancelled", func(t *testing.T) {
		dir := t.TempDir()
		ctx, cancel := context.WithCancel(t.Context())
		l := launch(newImage(t, base), v)
		l.Memory.Read = func([]byte, int64) error { cancel(); return nil }
		_, err := Create(ctx, filepath.Join(dir, "x"), l, CreateOptions{})
		require.ErrorIs(t, err, context.Canceled)
		entries, err := os.ReadDir(dir)
		require.NoError(t, err)
		require.Empty(t, entries)
	})
}
