package overlay

import (
	"context"
	"errors"
	"path/filepath"
	"testing"

	"cloudlet/overlay/source"

	"github.com/stretchr/testify/require"
)

// TestPrefetch looks at what is pushed, in which order, and that it is the launch VM's.
func TestPrefetch(t *testing.T) {
	rng := newRand(t)
	v := newVM(rng, 700, 500)
	base := newBase(t, v)
	w := v.clone()
	w.mutate(rng, 3)
	b, _ := create(t, launch(newImage(t, base), w), CreateOptions{})
	r := openBytes(t, b)
	im := newImage(t, base, r)

	var order []Addr
	push := func(_ context.Context, s Space, p []byte, off int64) error {
		require.Equal(t, w[s][off:off+int64(len(p))], p)
		for n := range len(p) / PageSize {
			order = append(order, MakeAddr(s, off/PageSize+int64(n)))
		}
		return nil
	}
	require.NoError(t, im.Prefetch(t.Context(), nil, push))
	require.IsIncreasing(t, order)
	for _, e := range r.index.sorted {
		if a := Addr(e >> 32); a.Space() == Memory {
			require.Contains(t, order, a)
		}
	}
	require.NotContains(t, order, MakeAddr(Disk, 0))

	order = nil
	profile := []Addr{9, 300, 8, MakeAddr(Disk, 2), 10}
	require.NoError(t, im.Prefetch(t.Context(), profile, push))
	require.Equal(t, []Addr{8, 9, 10, 300, MakeAddr(Disk, 2)}, order, "a batch is pushed by address")
	require.Equal(t, []Addr{9, 300, 8, MakeAddr(Disk, 2), 10}, profile)

	order, profile = nil, nil
	for n := range Addr(2 * prefetchBatch) {
		profile = append(profile, 2*prefetchBatch-1-n)
	}
	require.NoError(t, im.Prefetch(t.Context(), profile, push))
	require.Equal(t, Addr(prefetchBatch), order[0], "the batch of what was touched first comes first")

	full := errors.New("full")
	require.ErrorIs(t, im.Prefetch(t.Context(), nil, func(context.Context, Space, []byte, int64) error { return full }), full)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.Error(t, im.Prefetch(ctx, nil, func(ctx context.Context, _ Space, _ []byte, _ int64) error { return ctx.Err() }))
}

// TestRepack packs overlays anew: the content and so the id stay, also in a chain.
func TestRepack(t *testing.T) {
	rng := newRand(t)
	v := newVM(rng, 300, 200)
	base := newBase(t, v)
	w := v.clone()
	w.mutate(rng, 3)
	l := launch(newImage(t, base), w)
	l.Profile = []Addr{5, MakeAddr(Disk, 9), 4}
	b, first := create(t, l, CreateOptions{})
	one := openBytes(t, b)
	x := w.clone()
	x.mutate(rng, 5)
	b, second := create(t, launch(newImage(t, base, one), x), CreateOptions{})
	two := openBytes(t, b)

	for name, try := range map[string]struct {
		im      *Image
		made    *Created
		profile []Addr
		want    []Addr
		content vm
	}{
		"strategy":    {newImage(t, base, one), first, nil, l.Profile, w},
		"profile":     {newImage(t, base, one), first, []Addr{7, 3}, []Addr{7, 3}, w},
		"of a chain":  {newImage(t, base, one, two), second, []Addr{MakeAddr(Disk, 1)}, []Addr{MakeAddr(Disk, 1)}, x},
		"to no order": {newImage(t, base, one), first, []Addr{}, nil, w},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "o")
			made, err := Repack(t.Context(), path, try.im, try.profile, CreateOptions{Strategy: strategy(t, "fast,frame=16K")})
			require.NoError(t, err)
			require.Equal(t, try.made.ID, made.ID)
			require.NotEqual(t, try.made.Digest, made.Digest)
			src, err := source.Open(t.Context(), path)
			require.NoError(t, err)
			r, err := Open(t.Context(), src)
			require.NoError(t, err)
			defer r.Close()
			profile, err := r.Profile()
			require.NoError(t, err)
			require.Equal(t, try.want, profile)
			chain := append(try.im.Chain()[:len(try.im.Chain())-1:len(try.im.Chain())-1], r)
			requireImage(t, newImage(t, base, chain...), try.content)
		})
	}
	_, err := Repack(t.Context(), filepath.Join(t.TempDir(), "o"), newImage(t, base), nil, CreateOptions{})
	require.ErrorContains(t, err, "is a base")
}
