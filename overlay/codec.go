package overlay

import (
	"bytes"
	"crypto/subtle"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// Codec is how the bytes of a frame are compressed; its number is the one in the index.
type Codec uint8

// The codecs of format version 1.
const (
	CodecNone Codec = 0
	CodecZstd Codec = 1
	CodecXZ   Codec = 2
)

// Delta is what the pages of a frame are subtracted from before compression.
type Delta uint8

// The deltas of format version 1.
const (
	DeltaNone Delta = 0
	DeltaXOR  Delta = 1 // XOR with the base's page of the same address
)

var (
	codecNames = []string{"none", "zstd", "xz"}
	deltaNames = []string{"none", "xor"}
	// The libraries whose versions decide an overlay's bytes; held equal to go.mod by a test.
	encoders = []string{"", "klauspost/compress v1.20.3", "ulikunitz/xz v0.5.17"}
)

// String returns "none", "zstd" or "xz".
func (c Codec) String() string { return nameOf(codecNames, uint8(c)) }

// String returns "none" or "xor".
func (d Delta) String() string { return nameOf(deltaNames, uint8(d)) }

// MarshalText implements encoding.TextMarshaler.
func (c Codec) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// MarshalText implements encoding.TextMarshaler.
func (d Delta) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (c *Codec) UnmarshalText(b []byte) (err error) {
	*c, err = named[Codec](codecNames, "codec", string(b))
	return err
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Delta) UnmarshalText(b []byte) (err error) {
	*d, err = named[Delta](deltaNames, "delta", string(b))
	return err
}

func nameOf(names []string, i uint8) string {
	if int(i) < len(names) {
		return names[i]
	}
	return fmt.Sprintf("unknown(%d)", i)
}

// encoder compresses frames; one goroutine uses it at a time.
type encoder struct {
	codec Codec
	zstd  *zstd.Encoder
	out   []byte
}

func newEncoder(c Codec, level, size int) (*encoder, error) {
	e := &encoder{codec: c}
	if c != CodecZstd {
		return e, nil
	}
	window := zstd.MinWindowSize
	for window < size {
		window <<= 1
	}
	var err error
	e.zstd, err = zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.EncoderLevel(level)), zstd.WithEncoderConcurrency(1),
		zstd.WithEncoderCRC(false), zstd.WithWindowSize(window), zstd.WithSingleSegment(true), zstd.WithLowerEncoderMem(true))
	if err != nil {
		return nil, fmt.Errorf("make zstd encoder: %w", err)
	}
	return e, nil
}

// encode returns p compressed, valid until the next call, and the codec that was used: none
// where compression does not make p smaller.
func (e *encoder) encode(p []byte) ([]byte, Codec, error) {
	switch e.codec {
	case CodecZstd:
		e.out = e.zstd.EncodeAll(p, e.out[:0])
	case CodecXZ:
		var b bytes.Buffer
		w, err := xz.WriterConfig{DictCap: max(len(p), 4096), NoCheckSum: true}.NewWriter(&b)
		if err != nil {
			return nil, 0, fmt.Errorf("make xz encoder: %w", err)
		}
		if _, err := w.Write(p); err != nil {
			return nil, 0, fmt.Errorf("encode xz: %w", err)
		}
		if err := w.Close(); err != nil {
			return nil, 0, fmt.Errorf("encode xz: %w", err)
		}
		e.out = b.Bytes()
	default:
		return p, CodecNone, nil
	}
	if len(e.out) >= len(p) {
		return p, CodecNone, nil
	}
	return e.out, e.codec, nil
}

// zstdDecoder decodes whole zstd frames; safe for concurrent use.
type zstdDecoder struct{ dec *zstd.Decoder }

// newZstdDecoder returns a decoder that allocates limit bytes at most for one frame.
func newZstdDecoder(limit uint64) (*zstdDecoder, error) {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecoderMaxMemory(limit),
		zstd.WithDecoderMaxWindow(max(limit, zstd.MinWindowSize)), zstd.WithDecodeAllCapLimit(true))
	if err != nil {
		return nil, fmt.Errorf("make zstd decoder: %w", err)
	}
	return &zstdDecoder{d}, nil
}

// decodeSlack is capacity behind dst with which the decoder takes its faster way.
const decodeSlack = 64

// decode fills dst from the one zstd frame src, which must hold exactly that many bytes. It
// may write to the capacity behind dst.
func (d *zstdDecoder) decode(dst, src []byte) error {
	var h zstd.Header
	if err := h.Decode(src); err != nil {
		return fmt.Errorf("decode zstd header: %w", err)
	}
	if h.Skippable || !h.HasFCS || h.FrameContentSize != uint64(len(dst)) {
		return fmt.Errorf("decode zstd: frame announces %d bytes, want %d", h.FrameContentSize, len(dst))
	}
	if n := uint64(len(dst)); !h.SingleSegment && h.WindowSize > max(zstd.MinWindowSize, n+n/8) { // windows come in steps of 1/8
		return fmt.Errorf("decode zstd: frame of %d bytes has a window of %d", n, h.WindowSize)
	}
	if err := checkZstdEnd(src, &h); err != nil {
		return fmt.Errorf("decode zstd: %w", err)
	}
	out, err := d.dec.DecodeAll(src, dst[:0])
	if err != nil {
		return fmt.Errorf("decode zstd: %w", err)
	}
	if len(out) != len(dst) || len(out) > 0 && &out[0] != &dst[0] {
		return fmt.Errorf("decode zstd: have %d bytes, want %d", len(out), len(dst))
	}
	return nil
}

// checkZstdEnd refuses src unless it ends where its first zstd frame does: the decoder
// would go on with the next, and says nothing of one without content.
func checkZstdEnd(src []byte, h *zstd.Header) error {
	rest := src[h.HeaderSize:]
	for last := false; !last; {
		if len(rest) < 3 {
			return io.ErrUnexpectedEOF
		}
		block := uint32(rest[0]) | uint32(rest[1])<<8 | uint32(rest[2])<<16
		last = block&1 != 0
		n := int(block >> 3)
		if block>>1&3 == 1 { // one byte, repeated
			n = 1
		}
		if len(rest) < 3+n {
			return io.ErrUnexpectedEOF
		}
		rest = rest[3+n:]
	}
	sum := 0
	if h.HasCheckSum {
		sum = 4
	}
	if len(rest) != sum {
		return fmt.Errorf("%d bytes behind the blocks of the frame, want %d", len(rest), sum)
	}
	return nil
}

// decodeFrame decodes the encoded bytes of a frame into dst, whose length is the pages'.
func (d *zstdDecoder) decodeFrame(c Codec, dst, src []byte) error {
	switch c {
	case CodecNone:
		if len(src) != len(dst) {
			return fmt.Errorf("plain frame has %d bytes, want %d", len(src), len(dst))
		}
		copy(dst, src)
		return nil
	case CodecZstd:
		return d.decode(dst, src)
	case CodecXZ:
		return decodeXZ(dst, src)
	}
	return fmt.Errorf("unknown codec %d", c)
}

// xorBytes sets dst to dst XOR with.
func xorBytes(dst, with []byte) { subtle.XORBytes(dst, dst, with) }

// isZero reports whether p is all zero, at memory speed.
func isZero(p []byte) bool {
	const n = 4096
	for len(p) > n {
		if !bytes.Equal(p[:n], zeroPage[:]) {
			return false
		}
		p = p[n:]
	}
	return bytes.Equal(p, zeroPage[:len(p)])
}

var zeroPage [PageSize]byte
