package overlay

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestDeltas: each delta is used where the base has content, and there only, and pays.
func TestDeltas(t *testing.T) {
	rng := newRand(t)
	v := newVM(rng, 512, 8)
	clear(v[Memory][256*PageSize:])
	for i := range v[Memory][:256*PageSize] {
		v[Memory][i] = byte(rng.Uint32())
	}
	base := newBase(t, v)
	w := v.clone()
	for page := range 512 {
		w[Memory][page*PageSize+rng.IntN(PageSize)]++
	}
	plain, _ := create(t, launch(newImage(t, base), w), CreateOptions{Strategy: strategy(t, "balanced,delta=none")})
	for _, delta := range deltaNames[1:strategyDeltas] {
		t.Run(delta, func(t *testing.T) {
			text := "balanced,frame=64K,delta=" + delta // no frame has pages of both kinds
			b, made := create(t, launch(newImage(t, base), w), CreateOptions{Strategy: strategy(t, text)})
			require.Less(t, len(b), len(plain)/10)
			r := openBytes(t, b)
			have := map[Delta]int{}
			for _, f := range r.index.frames {
				have[f.delta] += int(f.pages)
			}
			require.Equal(t, 256, have[r.manifest.Strategy.Delta])
			require.Equal(t, len(r.index.stored)-256, have[DeltaNone])
			if delta == "vcdiff" {
				require.Contains(t, made.Manifest.Strategy.Encoder, "klauspost/compress v")
				require.Contains(t, made.Manifest.Strategy.Encoder, ", xdelta3 3")
			}
		})
	}
}

// TestDeltaOnChain: what a chain changes is told from the base, not from the overlay below.
func TestDeltaOnChain(t *testing.T) {
	for _, text := range []string{"balanced,delta=dict", "elijah"} {
		t.Run(text, func(t *testing.T) {
			rng := newRand(t)
			v := newVM(rng, 100, 100)
			base := newBase(t, v)
			var chain []*Reader
			for range 3 {
				v.mutate(rng, 2)
				b, _ := create(t, launch(newImage(t, base, chain...), v), CreateOptions{Strategy: strategy(t, text)})
				chain = append(chain, openBytes(t, b))
				im := newImage(t, base, chain...)
				requireImage(t, im, v)
				require.NoError(t, im.Verify(t.Context(), nil))
			}
		})
	}
}

// TestDeltaFallsBack: pages that a delta makes larger are stored as they are, and what looks
// like a compressed file is not taken apart.
func TestDeltaFallsBack(t *testing.T) {
	for _, text := range []string{"none,delta=vcdiff", "elijah,hot=4K,frame=4K", "balanced,delta=dict,frame=4K"} {
		t.Run(text, func(t *testing.T) {
			rng := newRand(t)
			v := vm{make([]byte, 20*PageSize), make([]byte, PageSize)}
			for i := range v[Memory] {
				v[Memory][i] = byte(rng.Uint32())
			}
			base := newBase(t, v)
			w := v.clone()
			for i := range w[Memory] {
				w[Memory][i] = byte(rng.Uint32())
			}
			copy(w[Memory], "\x1f\x8b\x08\x00")
			copy(w[Memory][PageSize:], "\xfd7zXZ\x00")
			b, _ := create(t, launch(newImage(t, base), w), CreateOptions{Strategy: strategy(t, text)})
			r := openBytes(t, b)
			requireImage(t, newImage(t, base, r), w)
			for _, f := range r.index.frames {
				require.Equal(t, DeltaNone, f.delta)
				require.Equal(t, CodecNone, f.codec)
			}
		})
	}
}

// TestDeltaRefused: frames whose delta is not one, or one of other pages.
func TestDeltaRefused(t *testing.T) {
	rng := newRand(t)
	v := newVM(rng, 64, 8)
	for i := range v[Memory] {
		v[Memory][i] = byte(rng.Uint32())
	}
	base := newBase(t, v)
	w := v.clone()
	for page := range 64 {
		w[Memory][page*PageSize+5]++
	}
	for _, text := range []string{"elijah,hot=64K,frame=64K", "none,delta=vcdiff", "balanced,delta=dict"} {
		t.Run(text, func(t *testing.T) {
			b, _ := create(t, launch(newImage(t, base), w), CreateOptions{Strategy: strategy(t, text)})
			r := openBytes(t, b)
			encoded, err := r.readFrame(t.Context(), 0, nil, nil)
			require.NoError(t, err)
			encoded = bytes.Clone(encoded)
			right, err := r.decodePages(0, encoded, base, nil)
			require.NoError(t, err)
			refuse := func(name string, b []byte) {
				p, err := r.decodePages(0, b, base, nil)
				if err == nil { // a changed literal is for the frame's hash to find
					require.NotEqual(t, right, p, name)
					return
				}
				var damaged *CorruptFrameError
				require.ErrorAs(t, err, &damaged, name)
			}
			for n := vcdiffHead + 1; n < len(encoded); n++ {
				refuse("cut", encoded[:n])
			}
			if r.index.frames[0].delta == DeltaVCDIFF {
				for _, head := range [][]byte{{0, 0, 0, 0}, {255, 255, 255, 255}, {1, 0, 1, 0}} {
					refuse("size", append(head, encoded[4:]...))
				}
			}
			other := newVM(newRand(t), 64, 8) // a base that is not the one of the delta
			p, err := r.decodePages(0, encoded, newBase(t, other), nil)
			require.True(t, err != nil || !bytes.Equal(p, right))
		})
	}
}

// TestWithout: pages of a class that is off are stored, and all else stays.
func TestWithout(t *testing.T) {
	rng := newRand(t)
	v := newVM(rng, 300, 100)
	base := newBase(t, v)
	w := v.clone()
	w.mutate(rng, 2)
	for page := range 5 { // moved, of the base
		copy(w[Memory][page*PageSize:], v[Disk][(50+page)*PageSize:][:PageSize])
	}
	parent, _ := create(t, launch(newImage(t, base), w), CreateOptions{})
	one := openBytes(t, parent)
	x := w.clone()
	x.mutate(rng, 2)
	copy(x.page(7), w.page(one.index.stored[0])) // moved, of the parent
	clear(x.page(one.index.stored[1]))
	copy(x.page(8), x.page(9))
	for i := range x.page(10) {
		x.page(10)[i], x.page(11)[i] = byte(i*7), byte(i*7) // twice
	}
	all, made := create(t, launch(newImage(t, base, one), x), CreateOptions{})
	for name, off := range map[string]Classes{"zero": {Zero: true}, "base": {Base: true}, "parent": {Parent: true}, "self": {Self: true}, "all": {true, true, true, true}} {
		t.Run(name, func(t *testing.T) {
			b, again := create(t, launch(newImage(t, base, one), x), CreateOptions{Without: off})
			require.Equal(t, made.ID, again.ID)
			r := openBytes(t, b)
			requireImage(t, newImage(t, base, one, r), x)
			before, after := openBytes(t, all).manifest.Stats.Memory, r.manifest.Stats.Memory
			require.Equal(t, before.Modified, after.Modified)
			for _, c := range []struct {
				off           bool
				before, after int64
			}{{off.Zero, before.Zero, after.Zero}, {off.Base, before.Base, after.Base}, {off.Parent, before.Parent, after.Parent}, {off.Self, before.Self, after.Self}} {
				require.Positive(t, c.before)
				if c.off {
					require.Zero(t, c.after)
				}
			}
		})
	}
}

// TestStoredPages: what is stored, decoded, with the base's pages, once each.
func TestStoredPages(t *testing.T) {
	rng := newRand(t)
	v := newVM(rng, 300, 100)
	base := newBase(t, v)
	w := v.clone()
	w.mutate(rng, 2)
	b, _ := create(t, launch(newImage(t, base), w), CreateOptions{})
	r := openBytes(t, b)
	im := newImage(t, base, r)
	var have []Addr
	require.NoError(t, im.StoredPages(t.Context(), func(a Addr, page, from []byte) error {
		require.Equal(t, w.page(a), page)
		require.Equal(t, v.page(a), from)
		have = append(have, a)
		return nil
	}))
	require.Equal(t, r.index.stored, have)
	n, err := im.DecodeFrames(t.Context())
	require.NoError(t, err)
	require.EqualValues(t, len(have)*PageSize, n)
	n, err = newImage(t, base).DecodeFrames(t.Context())
	require.NoError(t, err)
	require.Zero(t, n)
}
