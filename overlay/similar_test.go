package overlay

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

// alike returns n families of k pages each; the pages of a family differ in a few bytes and are
// shifted against one another, and families are far apart.
func alike(t *testing.T, n, k int) (pages [][]byte, family []int) {
	rng := newRand(t)
	root := make([][]byte, n)
	for i := range root {
		root[i] = make([]byte, PageSize+64)
		noise(rng, root[i])
	}
	for j := range k {
		for i := range root {
			p := bytes.Clone(root[i][j%64:][:PageSize])
			for range 8 {
				p[rng.IntN(PageSize)]++
			}
			pages, family = append(pages, p), append(family, i)
		}
	}
	return pages, family
}

// TestChain: every page once, similar ones beside one another, others in their order.
func TestChain(t *testing.T) {
	pages, family := alike(t, 100, 7)
	list := make([]sketched, len(pages))
	for i, p := range pages {
		list[i].sketch = newSketch(p)
	}
	order := chain(list)
	sorted := slices.Clone(order)
	slices.Sort(sorted)
	for i, page := range sorted {
		require.EqualValues(t, i, page)
	}
	together := 0
	for i := 1; i < len(order); i++ {
		if family[order[i]] == family[order[i-1]] {
			together++
		}
	}
	require.Greater(t, together, 100*6*9/10)

	for i := range list {
		list[i].sketch = newSketch(make([]byte, PageSize)) // has no values: nothing is similar to it
	}
	require.True(t, slices.IsSorted(chain(list)))
	require.Empty(t, chain(nil))
}

// TestSketchShift: a page and the same bytes shifted share values; other pages do not.
func TestSketchShift(t *testing.T) {
	rng := newRand(t)
	long := make([]byte, 3*PageSize)
	noise(rng, long)
	share := func(a, b sketch) (n int) {
		for k := range a {
			if a[k] == b[k] {
				n++
			}
		}
		return n
	}
	require.Positive(t, share(newSketch(long[:PageSize]), newSketch(long[37:][:PageSize])))
	require.Zero(t, share(newSketch(long[:PageSize]), newSketch(long[PageSize+64:][:PageSize])))
}

// TestShareWords: what a page has in common with another counts in the same place only, and
// zeros do not.
func TestShareWords(t *testing.T) {
	p := make([]byte, PageSize)
	noise(newRand(t), p)
	q := bytes.Clone(p)
	for i := 0; i < PageSize; i += 16 {
		q[i]++
	}
	require.True(t, shareWords(p, q))
	require.False(t, shareWords(p, append(p[8:PageSize:PageSize], p[:8]...)))
	require.False(t, shareWords(zeroPage[:], zeroPage[:]))
	few := make([]byte, PageSize)
	copy(few, p[:8*(sharedWords-1)])
	require.False(t, shareWords(p, few))
	require.False(t, shareWords(few, few))
	copy(few, p[:8*sharedWords])
	require.True(t, shareWords(p, few))
}

// TestOrder: pages that resemble one another and lie far apart take less in one frame; without
// a profile OrderCold is OrderAddress, with one it leaves the profile's frames alone.
func TestOrder(t *testing.T) {
	pages, _ := alike(t, 64, 8)
	rng := newRand(t)
	v := newVM(rng, len(pages)+64, 64)
	for i := range 32 {
		noise(rng, v[Memory][(len(pages)+i)*PageSize:][:PageSize])
	}
	base := newBase(t, v)
	w := v.clone()
	for i, p := range pages {
		copy(w[Memory][i*PageSize:], p)
	}
	for i := range 32 { // these resemble what the base has there
		a := (len(pages) + i) * PageSize
		noise(rng, w[Memory][a:][:64])
	}
	l := launch(newImage(t, base), w)
	size := func(text string) (int, *Reader) {
		b, _ := create(t, l, CreateOptions{Strategy: strategy(t, text)})
		r := openBytes(t, b)
		requireImage(t, newImage(t, base, r), w)
		return len(b), r
	}
	address, x := size("balanced,order=address")
	similar, y := size("balanced,order=similar")
	require.Less(t, similar, address/3)
	require.Equal(t, x.ID(), y.ID())
	require.True(t, slices.IsSorted(x.index.stored))
	require.False(t, slices.IsSorted(y.index.stored))
	deltas := map[Delta]int{}
	for _, f := range y.index.frames {
		deltas[f.delta] += int(f.pages)
	}
	require.Equal(t, map[Delta]int{DeltaXOR: 32, DeltaNone: len(pages)}, deltas)
	cold, z := size("balanced")
	require.InDelta(t, address, cold, 32)
	require.Equal(t, x.index.stored, z.index.stored)

	l.Profile = []Addr{400, 3, 200}
	cold, z = size("balanced")
	require.Less(t, cold, address/3)
	require.Equal(t, l.Profile, z.index.stored[:3])
}

// TestOrderInManifest: overlays from before there were orders are read, and written, as they
// are.
func TestOrderInManifest(t *testing.T) {
	b, err := json.Marshal(strategy(t, "fast"))
	require.NoError(t, err)
	require.NotContains(t, string(b), "order")
	b, err = json.Marshal(strategy(t, "small"))
	require.NoError(t, err)
	require.Contains(t, string(b), `"order":"similar"`)
}

func BenchmarkSketch(b *testing.B) {
	p := make([]byte, PageSize)
	noise(newRand(b), p)
	b.SetBytes(PageSize)
	for b.Loop() {
		newSketch(p)
	}
}

func noise(rng *rand.Rand, p []byte) {
	for i := range p {
		p[i] = byte(rng.Uint32())
	}
}
