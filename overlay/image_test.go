package overlay

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestConcurrentImage reads a chain from many goroutines through a cache that holds next to
// nothing, some of them giving up, until the image is closed under them.
func TestConcurrentImage(t *testing.T) {
	rng := newRand(t)
	v := newVM(rng, 400, 100)
	base := newBase(t, v)
	var chain []*Reader
	for range 3 {
		v = v.clone()
		v.mutate(rng, 3)
		b, _ := create(t, launch(newImage(t, base, chain...), v), CreateOptions{Strategy: strategy(t, "fast,frame=16K")})
		chain = append(chain, openBytes(t, b))
	}
	im, err := NewImage(base, chain, ImageOptions{FrameCache: 40 << 10})
	require.NoError(t, err)
	var wg sync.WaitGroup
	errs := make([]error, 8)
	for i := range errs {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(*seed, uint64(i)))
			for n := 0; errs[i] == nil; n++ {
				s := Space(rng.IntN(2))
				off := rng.Int64N(im.Size(s)/PageSize) * PageSize
				p := make([]byte, min(1+rng.Int64N(8), (im.Size(s)-off)/PageSize)*PageSize)
				ctx, cancel := context.WithCancel(t.Context())
				if rng.IntN(4) == 0 {
					cancel()
				}
				err := im.ReadPages(ctx, s, p, off)
				cancel()
				switch {
				case err == nil && !bytes.Equal(p, v[s][off:off+int64(len(p))]):
					errs[i] = errors.New("wrong bytes")
				case err != nil && !errors.Is(err, context.Canceled):
					errs[i] = err
				case n == 500 && i == 0:
					errs[i] = im.Close()
				}
			}
		})
	}
	wg.Wait()
	for _, err := range errs {
		require.ErrorIs(t, err, ErrClosed)
	}
	require.ErrorIs(t, im.ReadPages(t.Context(), Memory, make([]byte, PageSize), 0), ErrClosed)
}

// TestLoadPanics: a decoder that panics costs the readers of its frame an error, no more.
func TestLoadPanics(t *testing.T) {
	c := newFrameCache(10)
	defer c.close()
	_, err := c.get(t.Context(), t.Context(), frameKey{}, false, func(context.Context) ([]byte, error) { panic("index out of range") })
	require.ErrorContains(t, err, "panic: index out of range")
	p, err := c.get(t.Context(), t.Context(), frameKey{}, false, func(context.Context) ([]byte, error) { return []byte{1}, nil })
	require.NoError(t, err)
	require.Equal(t, []byte{1}, p)
}

// TestDedupBound: pages over the bound of the tables are stored, and right, and the id is
// the same.
func TestDedupBound(t *testing.T) {
	rng := newRand(t)
	v := newVM(rng, 100, 4)
	base := newBase(t, v)
	w := v.clone()
	for n := range Addr(40) { // 20 new pages, each twice
		copy(w.page(n), bytes.Repeat([]byte{200, byte(n % 20)}, PageSize/2))
	}
	first, all := create(t, launch(newImage(t, base), w), CreateOptions{})
	require.EqualValues(t, 20, all.Manifest.Stats.Memory.Self)
	b, made := create(t, launch(newImage(t, base), w), CreateOptions{dedup: 5})
	require.EqualValues(t, 5, made.Manifest.Stats.Memory.Self)
	require.EqualValues(t, 35, made.Manifest.Stats.Memory.Stored)
	require.Equal(t, all.ID, made.ID)
	require.NoError(t, check(t, b, base))
	requireImage(t, newImage(t, base, openBytes(t, b)), w)

	x := w.clone()
	for n := range Addr(20) { // the parent's pages, moved
		copy(x.page(50+n), w.page(n))
	}
	r := openBytes(t, first)
	_, all = create(t, launch(newImage(t, base, r), x), CreateOptions{})
	require.EqualValues(t, 20, all.Manifest.Stats.Memory.Parent)
	b, made = create(t, launch(newImage(t, base, r), x), CreateOptions{dedup: 5, Strategy: strategy(t, "balanced,frame=16K")})
	require.Equal(t, all.ID, made.ID)
	requireImage(t, newImage(t, base, r, openBytes(t, b)), x)
}
