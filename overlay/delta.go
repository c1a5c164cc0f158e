package overlay

import (
	"context"
	"encoding/binary"
	"fmt"
	"slices"

	"cloudlet/overlay/vcdiff"
)

// Delta is what the pages of a frame are subtracted from before compression.
type Delta uint8

// The deltas of format version 1. All but DeltaStride refer to the base's pages of the same
// addresses.
const (
	DeltaNone   Delta = 0
	DeltaXOR    Delta = 1 // XOR, page by page
	DeltaVCDIFF Delta = 2 // RFC 3284, the frame's pages from the base's, encoded by xdelta3
	DeltaDict   Delta = 3 // the base's pages are the dictionary of the codec, which is zstd
	DeltaStride Delta = 4 // each word from the one a record before it: see Strategy.Stride
)

// deltaNames are those of the deltas by their numbers; a strategy's delta is one of the first
// strategyDeltas.
var deltaNames = []string{"none", "xor", "vcdiff", "dict", "stride"}

const strategyDeltas = 4

// String returns "none", "xor", "vcdiff", "dict" or "stride".
func (d Delta) String() string { return nameOf(deltaNames, uint8(d)) }

// MarshalText implements encoding.TextMarshaler.
func (d Delta) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Delta) UnmarshalText(b []byte) (err error) {
	*d, err = named[Delta](deltaNames[:strategyDeltas], "delta", string(b))
	return err
}

// vcdiffHead is the size of what stands before the codec's bytes in a frame with DeltaVCDIFF:
// the delta's size, which the codec must give.
const vcdiffHead = 4

// frameEncoder makes frames of pages; one goroutine uses it at a time.
type frameEncoder struct {
	*encoder
	delta  Delta
	differ *differ // nil but for DeltaVCDIFF
	framed []byte  // a head and the codec's bytes
}

func newFrameEncoder(s *Strategy, size int, t tools) (*frameEncoder, error) {
	window := size
	if s.Delta == DeltaDict {
		window *= 2 // reaches over the frame to the base's pages before it
	}
	e, err := newEncoder(s, window, t)
	if err != nil {
		return nil, err
	}
	f := &frameEncoder{encoder: e, delta: s.Delta}
	if s.Delta == DeltaVCDIFF {
		f.differ, err = newDiffer(t.xdelta3)
	}
	return f, err
}

// Close ends what the encoder holds beside memory.
func (e *frameEncoder) Close() error {
	if e == nil || e.differ == nil {
		return nil
	}
	return e.differ.Close()
}

// encodeFrame sets the codec and the delta of f and returns its bytes, valid until the next
// call. base are the base's pages of the same addresses, or nil where the delta needs none;
// pages is overwritten.
func (e *frameEncoder) encodeFrame(ctx context.Context, f *frame, pages, base []byte) (b []byte, err error) {
	f.delta = e.delta
	if base == nil || isZero(base) {
		f.delta = DeltaNone // a delta to zero pages is none: the reader need not read them
	}
	switch f.delta {
	case DeltaXOR:
		xorBytes(pages, base)
	case DeltaDict:
		if b, err = e.encodeDict(pages, base); err != nil || len(b) < len(pages) {
			f.codec = CodecZstd
			return b, err
		}
		f.delta = DeltaNone
	case DeltaVCDIFF:
		if b, err = e.encodeVCDIFF(ctx, f, pages, base); err != nil || len(b) < len(pages) {
			return b, err
		}
		f.delta = DeltaNone
	}
	b, f.codec, err = e.encode(ctx, pages)
	return b, err
}

// encodeVCDIFF returns the frame as a delta, which may turn out larger than the pages.
func (e *frameEncoder) encodeVCDIFF(ctx context.Context, f *frame, pages, base []byte) ([]byte, error) {
	delta, err := e.differ.diff(ctx, base, pages)
	if err != nil || len(delta) > len(pages) {
		return delta, err
	}
	b, codec, err := e.encode(ctx, delta)
	if err != nil {
		return nil, err
	}
	f.codec = codec
	e.framed = append(binary.LittleEndian.AppendUint32(e.framed[:0], uint32(len(delta))), b...)
	return e.framed, nil
}

// decodeDelta is decodePages for the deltas that need the base's pages first.
func (r *Reader) decodeDelta(f *frame, pages, encoded []byte, base *Base) error {
	from, put := r.scratch(len(pages))
	defer put()
	if err := readPages(from, r.index.stored[f.first:f.first+int(f.pages)], base.ReadVerified); err != nil {
		return &baseError{err}
	}
	if f.delta == DeltaDict {
		return r.dec.decodeDict(pages, encoded, from)
	}
	n := binary.LittleEndian.Uint32(encoded)
	if n < 1 || uint64(n) > uint64(len(pages)) {
		return fmt.Errorf("delta of %d pages announces %d bytes", f.pages, n)
	}
	delta, put := r.scratch(int(n))
	defer put()
	if err := r.dec.decodeFrame(f.codec, delta, encoded[vcdiffHead:]); err != nil {
		return err
	}
	return vcdiff.Apply(pages, from, delta)
}

// baseError is an error of the base below a frame that is not known to be damaged.
type baseError struct{ error }

// Unwrap returns the cause.
func (e *baseError) Unwrap() error { return e.error }

// scratch returns a buffer of n bytes and what gives it back.
func (r *Reader) scratch(n int) ([]byte, func()) {
	buf, _ := r.encoded.Get().(*[]byte)
	if buf == nil {
		buf = new([]byte)
	}
	*buf = slices.Grow((*buf)[:0], n+decodeSlack)[:n]
	return *buf, func() { r.encoded.Put(buf) }
}

// readPages fills dst with the pages at addrs, a run of neighbours at a time.
func readPages(dst []byte, addrs []Addr, read func(Space, []byte, int64) error) error {
	for i, n := 0, 0; i < len(addrs); i += n {
		n = runLength(addrs[i:], len(addrs))
		if err := read(addrs[i].Space(), dst[i*PageSize:(i+n)*PageSize], addrs[i].Offset()); err != nil {
			return err
		}
	}
	return nil
}
