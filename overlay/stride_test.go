package overlay

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"
)

// fillRecords fills a page with records of size bytes: a number that counts up from first, one
// that counts down, and words that are the same in each.
func fillRecords(page []byte, size int, first uint32) {
	for off := 0; off < len(page); off += 4 {
		n := uint32(off / size)
		word := 0x20202000 + uint32(off%size)
		switch off % size {
		case 0:
			word = first + n
		case 4:
			word = 0x00040fff - n
		}
		binary.LittleEndian.PutUint32(page[off:], word)
	}
}

// stridePages counts the pages of an overlay in frames with DeltaStride.
func stridePages(r *Reader) (n int) {
	for _, f := range r.index.frames {
		if f.delta == DeltaStride {
			n += int(f.pages)
		}
	}
	return n
}

// TestStrideInverse: differences are those of the definition, and adding up gives back all,
// for every distance.
func TestStrideInverse(t *testing.T) {
	rng := newRand(t)
	for _, pages := range []int{1, 3} {
		p := make([]byte, pages*PageSize)
		noise(rng, p)
		copy(p[100:], bytes.Repeat([]byte{0xff, 0xff, 0xff, 0x7f, 0, 0, 0, 0x80}, 20)) // carries
		for n := wordSize; n < PageSize; n += wordSize {
			want := bytes.Clone(p)
			for i := n; i < len(p); i += 4 {
				binary.LittleEndian.PutUint32(want[i:], binary.LittleEndian.Uint32(p[i:])-binary.LittleEndian.Uint32(p[i-n:]))
			}
			q := bytes.Clone(p)
			subtractStride(q, n)
			require.True(t, bytes.Equal(want, q), n)
			addStride(q, n)
			require.True(t, bytes.Equal(p, q), n)
		}
	}
}

// TestStrideOf: records are found by their size, and nothing else is taken for them.
func TestStrideOf(t *testing.T) {
	rng := newRand(t)
	fill := func(f func(i int) uint32) (p []byte) {
		for i := range pageWords {
			p = binary.LittleEndian.AppendUint32(p, f(i))
		}
		return p
	}
	for name, tt := range map[string]struct {
		page []byte
		want int
	}{
		"zeros":     {zeroPage[:], 0},
		"one value": {bytes.Repeat([]byte{0x20}, PageSize), 0},
		"noise":     {fill(func(int) uint32 { return rng.Uint32() }), 0},
		"words":     {bytes.Repeat([]byte("a page of text, again and again "), PageSize/32), 0},
		"pointers":  {fill(func(i int) uint32 { return []uint32{0x1000*rng.Uint32N(40) + 0x7f000000, 0x7f12}[i%2] }), 0},
		"counter":   {fill(func(i int) uint32 { return 70000 + 3*uint32(i) }), 1},
		"sorted":    {fill(func(i int) uint32 { return 0x10000*uint32(i) + rng.Uint32N(0x8000) }), 1},
		"pairs":     {fill(func(i int) uint32 { return []uint32{0x01000000, 0xa0000000}[i%2] + uint32(i)*300 + rng.Uint32N(200) }), 2},
	} {
		require.Equal(t, tt.want, strideOf(tt.page), name)
	}
	for _, words := range strides[2:] {
		p := make([]byte, PageSize)
		fillRecords(p, words*wordSize, 0x12345)
		require.Equal(t, words, strideOf(p), "%d words", words)
	}
}

// recordsVM is a VM whose base has nothing where the launch has records of 16 and of 128 bytes
// between pages of noise.
func recordsVM(t *testing.T) (base *Base, w vm, records map[Addr]int) {
	rng := newRand(t)
	v := newVM(rng, 300, 8)
	clear(v[Memory])
	base, w, records = newBase(t, v), v.clone(), map[Addr]int{}
	for a := range Addr(300) {
		switch a % 3 {
		case 0:
			noise(rng, w.page(a))
		case 1:
			records[a] = 16
		case 2:
			records[a] = 128
		}
		if size := records[a]; size > 0 {
			fillRecords(w.page(a), size, uint32(a)*1000)
		}
	}
	return base, w, records
}

// TestStride: pages of records of the same size share frames, whatever lies between them, and
// become smaller by that.
func TestStride(t *testing.T) {
	base, w, records := recordsVM(t)
	l := launch(newImage(t, base), w)
	for _, with := range []string{"codec=zstd", "codec=xz,frame=1M", "level=19", "delta=dict,frame=4K", "delta=none,frame=4M"} {
		t.Run(with, func(t *testing.T) {
			plain, first := create(t, l, CreateOptions{Strategy: strategy(t, "balanced,order=similar,stride=no,"+with)})
			b, made := create(t, l, CreateOptions{Strategy: strategy(t, "balanced,order=similar,"+with), Workers: 1})
			again, _ := create(t, l, CreateOptions{Strategy: strategy(t, "balanced,order=similar,"+with), Workers: 3})
			require.True(t, bytes.Equal(b, again), "the same bytes, however many work")
			require.Equal(t, first.ID, made.ID)
			r := openBytes(t, b)
			requireImage(t, newImage(t, base, r), w)
			require.NoError(t, newImage(t, base, r).Verify(t.Context(), nil))
			found := 0
			for i := range r.index.frames {
				f := &r.index.frames[i]
				if f.delta != DeltaStride {
					continue
				}
				encoded, err := r.readFrame(t.Context(), i, nil, nil)
				require.NoError(t, err)
				for _, a := range r.index.stored[f.first:][:f.pages] {
					require.EqualValues(t, records[a], binary.LittleEndian.Uint16(encoded))
					found++
				}
			}
			require.Equal(t, len(records), found)
			size := func(b []byte) int { return len(b) - 100*PageSize } // without the noise
			if with != "delta=dict,frame=4K" {                          // where heads and tables of frames are most
				require.Less(t, size(b), size(plain)/2)
			}
		})
	}
	t.Run("by address", func(t *testing.T) {
		for _, text := range []string{"balanced", "balanced,order=address"} {
			b, _ := create(t, l, CreateOptions{Strategy: strategy(t, text)})
			for _, f := range openBytes(t, b).index.frames {
				require.Equal(t, DeltaNone, f.delta)
			}
		}
	})
	t.Run("no codec", func(t *testing.T) { // differences alone save nothing
		b, _ := create(t, l, CreateOptions{Strategy: strategy(t, "balanced,order=similar,codec=none")})
		r := openBytes(t, b)
		for _, f := range r.index.frames {
			require.Equal(t, DeltaNone, f.delta)
			require.Equal(t, CodecNone, f.codec)
		}
		requireImage(t, newImage(t, base, r), w)
	})
}

// TestStrideRefused: distances that are none, and frames that end early.
func TestStrideRefused(t *testing.T) {
	base, w, _ := recordsVM(t)
	b, _ := create(t, launch(newImage(t, base), w), CreateOptions{Strategy: strategy(t, "balanced,order=similar")})
	r := openBytes(t, b)
	i := 0
	for r.index.frames[i].delta != DeltaStride {
		i++
	}
	encoded, err := r.readFrame(t.Context(), i, nil, nil)
	require.NoError(t, err)
	right, err := r.decodePages(i, encoded, base, nil)
	require.NoError(t, err)
	refuse := func(b []byte, want string) {
		_, err := r.decodePages(i, b, base, nil)
		var damaged *CorruptFrameError
		require.ErrorAs(t, err, &damaged)
		require.ErrorContains(t, err, want)
	}
	for _, n := range []uint16{0, 1, 2, 6, 4095, 4096, 4098, 65535} {
		refuse(append(binary.LittleEndian.AppendUint16(nil, n), encoded[strideHead:]...), fmt.Sprintf("stride of %d bytes", n))
	}
	for n := strideHead + 1; n < len(encoded); n++ {
		refuse(encoded[:n], "")
	}
	// Any other distance gives other pages, which is for the frame's hash to find.
	other, err := r.decodePages(i, append([]byte{8, 1}, encoded[strideHead:]...), base, nil)
	require.NoError(t, err)
	require.NotEqual(t, right, other)
}

// TestStrideInManifest: a strategy without is written as it was before there was one.
func TestStrideInManifest(t *testing.T) {
	for text, want := range map[string]bool{"balanced": true, "small": true, "fast": false, "balanced,stride=no": false} {
		b, err := json.Marshal(strategy(t, text))
		require.NoError(t, err)
		require.Equal(t, want, bytes.Contains(b, []byte(`"stride":true`)), text)
		require.Equal(t, want, bytes.Contains(b, []byte(`"stride":`)), text)
	}
}

func BenchmarkStrideOf(b *testing.B) {
	rng := rand.New(rand.NewPCG(1, 1))
	pages := map[string][]byte{"noise": make([]byte, PageSize), "records": make([]byte, PageSize), "text": bytes.Repeat([]byte("a page of text, again and again "), PageSize/32)}
	noise(rng, pages["noise"])
	fillRecords(pages["records"], 16, 1000)
	for name, p := range pages {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(PageSize)
			for b.Loop() {
				strideOf(p)
			}
		})
	}
}

func BenchmarkAddStride(b *testing.B) {
	p := make([]byte, 64<<10)
	for _, n := range []int{4, 8, 16, 20, 128} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.SetBytes(int64(len(p)))
			for b.Loop() {
				addStride(p, n)
			}
		})
	}
}
