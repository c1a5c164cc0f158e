package overlay

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// part hands some pages of an image to Create as changes, each with a chance of one in n, and
// all that differ from before.
func part(t testing.TB, p, before []byte, n int) Changes {
	rng := newRand(t)
	c := whole(p)
	c.Extents = nil
	for off := 0; off < len(p); off += PageSize {
		if rng.IntN(n) == 0 || string(p[off:off+PageSize]) != string(before[off:off+PageSize]) {
			c.Extents = append(c.Extents, Extent{Off: int64(off), Len: PageSize})
		}
	}
	return c
}

// TestBelow makes an overlay of changes of an image that is more than the parent: the result
// is what Create makes of the whole image on that parent, for every parent in the chain.
func TestBelow(t *testing.T) {
	rng := newRand(t)
	v := newVM(rng, 300, 200)
	base := newBase(t, v)
	vms, chain := []vm{v}, []*Reader{}
	for range 3 {
		w := vms[len(vms)-1].clone()
		w.mutate(rng, 4)
		b, _ := create(t, launch(newImage(t, base, chain...), w), CreateOptions{})
		chain, vms = append(chain, openBytes(t, b)), append(vms, w)
	}
	mounted, before := newImage(t, base, chain...), vms[len(vms)-1]
	now := before.clone()
	now.mutate(rng, 5)
	copy(now.page(7), v.page(7)) // back to the base's
	for depth := range 4 {
		parent := newImage(t, base, chain[:depth]...)
		_, want := create(t, launch(parent, now), CreateOptions{})
		l := launch(parent, now)
		l.Below, l.Memory, l.Disk = mounted, part(t, now[Memory], before[Memory], 6), part(t, now[Disk], before[Disk], 6)
		for _, quick := range []bool{false, true} {
			b, made := create(t, l, CreateOptions{Quick: quick})
			if !quick { // what is quick takes pages of memory that are the parent's as well
				require.Equal(t, want.ID, made.ID, "depth %d", depth)
			}
			requireImage(t, newImage(t, base, append(chain[:depth:depth], openBytes(t, b))...), now)
			require.Equal(t, quick, made.Manifest.Stats.Memory.Base == 0, "quick looks nowhere else")
		}
	}
	l := launch(mounted, now)
	l.Below = newImage(t, base, chain[0])
	_, err := Create(t.Context(), t.TempDir()+"/o", l, CreateOptions{})
	require.ErrorIs(t, err, ErrParent)
}
