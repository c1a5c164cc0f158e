package overlay

import (
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"math/bits"
)

// Much of a guest's memory are arrays of records: rows and index entries of a database, page
// structures of a kernel, relocations and symbols of programs. Their words grow from one record
// to the next, which no codec that looks for repetition sees, and each costs it bytes. Less the
// word one record before, they are small or all the same: DeltaStride. (Filters of images, as
// PNG's, and the delta filters of archivers do the same with bytes.)

// strideHead is the size of what stands before the codec's bytes in a frame with DeltaStride:
// the distance in bytes.
const strideHead = 2

const (
	wordSize  = 4
	pageWords = PageSize / wordSize
)

// strides are the distances in words that are looked for, ascending, by three real guests.
var strides = [...]int{1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 18, 24, 32}

const maxStrideWords = 32

// Of the words of a page one in strideSample is looked at, to choose the strides that are tried,
// strideTries at most. One is taken where it saves a share of 1/strideShare of the page, and
// strideBits more.
const (
	strideSample = 11
	strideTries  = 2
	strideShare  = 7
	strideBits   = 256
)

// strideOf returns the distance in words, one of strides, at which differences make the page
// smaller, 0 where none does by much.
func strideOf(page []byte) int {
	var w [pageWords]uint32
	for i := range w {
		w[i] = binary.LittleEndian.Uint32(page[wordSize*i:])
	}
	var saved [len(strides)]int // bits of the sampled words, as saved
	all := 0
	for i := maxStrideWords; i < pageWords; i += strideSample {
		v := w[i]
		n := significant(v)
		if n < 9 || repeats(&w, i) { // costs a codec little as it is
			continue
		}
		all += 8 + n
		for j, s := range strides {
			if less := n - significant(v-w[i-s]); less > 7 {
				saved[j] += less
			}
		}
	}
	best, cost := 0, -1
	for range strideTries {
		j := 0
		for k := range saved {
			if saved[k] > saved[j] {
				j = k
			}
		}
		if saved[j]*strideSample < strideBits || saved[j] < all/(strideShare+1) {
			break
		}
		if cost < 0 {
			cost = wordCost(&w, 0, math.MaxInt)
			cost -= strideBits + cost/strideShare
		}
		if c := wordCost(&w, strides[j], cost); c < cost {
			best, cost = strides[j], c
		}
		saved[j] = 0
	}
	return best
}

// repeats reports whether word i is equal to one at one of the strides before it.
func repeats(w *[pageWords]uint32, i int) bool {
	for _, s := range strides {
		if w[i] == w[i-s] {
			return true
		}
	}
	return false
}

// significant is the number of bits that tell v from its sign.
func significant(v uint32) int { return bits.Len32(v ^ uint32(int32(v)>>31)) }

// wordCost estimates what a codec makes of the words, less those stride words before where it
// is not 0, in bits: a word that has been there costs nothing, another one a byte and its
// significant bits. It gives up beyond limit.
func wordCost(w *[pageWords]uint32, stride, limit int) (cost int) {
	var seen [1024]uint32 // zero has always been there
	for i, v := range w {
		if i >= stride && stride > 0 {
			v -= w[i-stride]
		}
		if h := v * 0x9E3779B1 >> 22; seen[h] != v {
			seen[h] = v
			if cost += 8 + significant(v); cost > limit {
				break
			}
		}
	}
	return cost
}

// subtractStride takes from each word of p the one n bytes before it. Both are multiples of
// the size of a word.
func subtractStride(p []byte, n int) {
	for i := len(p) - wordSize; i >= n; i -= wordSize {
		binary.LittleEndian.PutUint32(p[i:], binary.LittleEndian.Uint32(p[i:])-binary.LittleEndian.Uint32(p[i-n:]))
	}
}

// addStride undoes subtractStride.
func addStride(p []byte, n int) {
	if n%8 == 0 { // two words at a time: the carry from the lower one ends at its highest bit
		const high = 1<<63 | 1<<31
		for i := n; i+8 <= len(p); i += 8 {
			a, b := binary.LittleEndian.Uint64(p[i-n:]), binary.LittleEndian.Uint64(p[i:])
			binary.LittleEndian.PutUint64(p[i:], (a&^high+b&^high)^(a^b)&high)
		}
		return
	}
	for i := n; i+wordSize <= len(p); i += wordSize {
		binary.LittleEndian.PutUint32(p[i:], binary.LittleEndian.Uint32(p[i-n:])+binary.LittleEndian.Uint32(p[i:]))
	}
}

// encodeStride is encodeFrame for pages of records of stride words. Where that does not make
// them smaller they are encoded as they are.
func (e *frameEncoder) encodeStride(ctx context.Context, f *frame, pages []byte, stride int) ([]byte, error) {
	n := stride * wordSize
	subtractStride(pages, n)
	b, codec, err := e.encode(ctx, pages)
	if err != nil {
		return nil, err
	}
	if codec == CodecNone || strideHead+len(b) >= len(pages) {
		addStride(pages, n)
		f.delta = DeltaNone
		b, f.codec, err = e.encode(ctx, pages)
		return b, err
	}
	f.codec, f.delta = codec, DeltaStride
	e.framed = append(binary.LittleEndian.AppendUint16(e.framed[:0], uint16(n)), b...)
	return e.framed, nil
}

// decodeStride is decodePages for DeltaStride.
func (r *Reader) decodeStride(f *frame, pages, encoded []byte) error {
	n := int(binary.LittleEndian.Uint16(encoded))
	if n < wordSize || n >= PageSize || n%wordSize != 0 {
		return fmt.Errorf("stride of %d bytes: want a multiple of %d below %d", n, wordSize, PageSize)
	}
	if err := r.dec.decodeFrame(f.codec, pages, encoded[strideHead:]); err != nil {
		return err
	}
	addStride(pages, n)
	return nil
}
