package overlay

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"cloudlet/overlay/source"
)

// TestKeptPages: a frame is decoded once, however little is kept in memory, and the source
// is not asked for it again.
func TestKeptPages(t *testing.T) {
	rng := newRand(t)
	v := newVM(rng, 300, 200)
	base := newBase(t, v)
	w := v.clone()
	w.mutate(rng, 2)
	b, _ := create(t, launch(newImage(t, base), w), CreateOptions{Strategy: strategy(t, "balanced,frame=16K")})
	one := openLink(t, &link{bytesSource: b}, nil)
	x := w.clone()
	x.mutate(rng, 3)
	b, _ = create(t, launch(newImage(t, base, one), x), CreateOptions{Strategy: strategy(t, "small,frame=64K")})
	l := &link{bytesSource: b}
	chain := []*Reader{one, openLink(t, l, nil)}

	file := emptyCache(t, 0)
	im, err := NewImage(base, chain, ImageOptions{FrameCache: 1, Decoded: file})
	require.NoError(t, err)
	requireImage(t, im, x)
	im.kept.writes.Wait()
	stats := im.Stats()
	require.Positive(t, stats.DecodedKept)
	used := 0
	for _, level := range im.kept.has {
		for i := range level {
			if level[i].Load() {
				used++
			}
		}
	}
	require.EqualValues(t, used, stats.DecodedKept)
	requireImage(t, im, x)
	again := im.Stats()
	require.Equal(t, stats.FramesDecoded, again.FramesDecoded)
	require.Equal(t, stats.Fetched, again.Fetched)
	info, err := file.Stat()
	require.NoError(t, err)
	require.LessOrEqual(t, info.Size(), int64(len(chain[0].index.stored)+len(chain[1].index.stored))*PageSize)

	im.kept.off.Store(true)
	require.NoError(t, file.Truncate(0)) // what cannot be read is decoded again
	requireImage(t, im, x)
	require.NoError(t, im.Close())
}

// TestKeptOff: a file that takes no writes, or is slow, costs no read.
func TestKeptOff(t *testing.T) {
	base, w, b := farVM(t, 100, "none,frame=16K")
	full, err := os.OpenFile("/dev/full", os.O_RDWR, 0)
	require.NoError(t, err)
	defer full.Close()
	im, err := NewImage(base, []*Reader{openBytes(t, b)}, ImageOptions{FrameCache: 1, Decoded: full})
	require.NoError(t, err)
	requireImage(t, im, w)
	requireImage(t, im, w)
	require.NoError(t, im.Close())
	require.Zero(t, im.Stats().DecodedKept)
	require.True(t, im.kept.off.Load())

	im, err = NewImage(base, []*Reader{openBytes(t, b)}, ImageOptions{FrameCache: 1, Decoded: emptyCache(t, 0)})
	require.NoError(t, err)
	im.kept.pending.Store(keptPending)
	requireImage(t, im, w)
	require.NoError(t, im.Close())
	require.Zero(t, im.Stats().DecodedKept)
}

// TestReadWhileUploading: an image on an overlay of which only the beginning has come
// answers what stands there, and the rest when it comes.
func TestReadWhileUploading(t *testing.T) {
	base, w, b := farVM(t, 400, "none,frame=16K")
	path := filepath.Join(t.TempDir(), "upload")
	half := len(b) / 2
	require.NoError(t, os.WriteFile(path, b[:half], 0o600))
	g, err := source.OpenGrowing(path, int64(len(b)))
	require.NoError(t, err)
	r, err := OpenWith(t.Context(), g, OpenOptions{})
	require.NoError(t, err)
	defer r.Close()
	im := newImage(t, base, r)
	p := make([]byte, PageSize)
	require.NoError(t, im.ReadPages(t.Context(), Memory, p, 0))
	require.Equal(t, w.page(0), p)
	require.False(t, r.Complete())
	require.False(t, im.Local())
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, im.ReadPages(ctx, Memory, p, 399*PageSize), context.DeadlineExceeded)
	fetched := make(chan error, 1)
	go func() { fetched <- im.Fetch(t.Context(), nil, FetchOptions{}) }()
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	require.NoError(t, err)
	_, err = f.Write(b[half:])
	require.NoError(t, err)
	require.NoError(t, f.Close())
	requireImage(t, im, w)
	require.NoError(t, <-fetched)
	require.True(t, r.Complete())
	require.True(t, im.Local())
}

// BenchmarkPage reads single pages of different frames, none in memory: decoded each time,
// or read back.
func BenchmarkPage(b *testing.B) {
	base, w := benchVM(b, 4<<10, 4<<10)
	for _, text := range []string{"fast,frame=256K", "small,frame=256K"} {
		data, _ := create(b, launch(newImage(b, base), w), CreateOptions{Strategy: strategy(b, text)})
		for _, kept := range []bool{false, true} {
			b.Run(fmt.Sprintf("%s/kept=%v", text, kept), func(b *testing.B) {
				path := filepath.Join(b.TempDir(), "o")
				require.NoError(b, os.WriteFile(path, data, 0o600))
				src, err := source.OpenFile(path)
				require.NoError(b, err)
				r, err := Open(b.Context(), src)
				require.NoError(b, err)
				defer r.Close()
				o := ImageOptions{FrameCache: 1}
				if kept {
					o.Decoded = emptyCache(b, 0)
				}
				im, err := NewImage(base, []*Reader{r}, o)
				require.NoError(b, err)
				defer im.Close()
				p := make([]byte, PageSize)
				if kept {
					for n := int64(0); n < 4<<10; n += 64 {
						require.NoError(b, im.ReadPages(b.Context(), Memory, p, n*PageSize))
						im.kept.writes.Wait()
					}
				}
				n := int64(0)
				for b.Loop() {
					n = (n + 64) % (4 << 10)
					require.NoError(b, im.ReadPages(b.Context(), Memory, p, n*PageSize))
				}
			})
		}
	}
}
