package overlay

import (
	"bytes"
	"context"
	"crypto/subtle"
	"fmt"
	"io"
	"strconv"
	"sync"

	"github.com/klauspost/compress/zstd"
)

// Codec is how the bytes of a frame are compressed; its number is the one in the index.
type Codec uint8

// The codecs of format version 1.
const (
	CodecNone Codec = 0
	CodecZstd Codec = 1
	CodecXZ   Codec = 2
)

var codecNames = []string{"none", "zstd", "xz"}

// zstdLibrary decides an overlay's bytes; held equal to go.mod by a test.
const zstdLibrary = "klauspost/compress v1.20.3"

// String returns "none", "zstd" or "xz".
func (c Codec) String() string { return nameOf(codecNames, uint8(c)) }

// MarshalText implements encoding.TextMarshaler.
func (c Codec) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (c *Codec) UnmarshalText(b []byte) (err error) {
	*c, err = named[Codec](codecNames, "codec", string(b))
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
	dict  bool // zstd has one
	out   []byte

	program tool // encodes instead of zstd
	args    func(size int) []string
	buf     bytes.Buffer
}

// newEncoder returns an encoder of s for frames that reach back over size bytes.
func newEncoder(s *Strategy, size int, t tools) (*encoder, error) {
	e := &encoder{codec: s.Codec}
	switch {
	case s.Codec == CodecXZ:
		e.program, e.args = t.xz, xzArgs
		return e, nil
	case s.zstdProgram():
		e.program, e.args = t.zstd, func(size int) []string { return zstdArgs(s.Level, size) }
		return e, nil
	case s.Codec != CodecZstd:
		return e, nil
	}
	window := zstd.MinWindowSize
	for window < size {
		window <<= 1
	}
	var err error
	e.zstd, err = zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.EncoderLevel(s.Level)), zstd.WithEncoderConcurrency(1),
		zstd.WithEncoderCRC(false), zstd.WithWindowSize(window), zstd.WithSingleSegment(true), zstd.WithLowerEncoderMem(true))
	if err != nil {
		return nil, fmt.Errorf("make zstd encoder: %w", err)
	}
	return e, nil
}

// encode returns p compressed, valid until the next call, and the codec that was used: none
// where compression does not make p smaller.
func (e *encoder) encode(ctx context.Context, p []byte) (_ []byte, _ Codec, err error) {
	switch {
	case e.args != nil:
		if err = e.program.run(ctx, &e.buf, p, nil, e.args(len(p))...); err != nil {
			return nil, 0, err
		}
		e.out = e.buf.Bytes()
	case e.codec == CodecZstd:
		if e.dict {
			if err := e.zstd.ResetWithOptions(nil, zstd.WithEncoderDictDelete()); err != nil {
				return nil, 0, fmt.Errorf("drop dictionary: %w", err)
			}
			e.dict = false
		}
		e.out = e.zstd.EncodeAll(p, e.out[:0])
	default:
		return p, CodecNone, nil
	}
	if len(e.out) >= len(p) {
		return p, CodecNone, nil
	}
	return e.out, e.codec, nil
}

// zstdArgs are the arguments with which the zstd program writes what [zstdDecoder] reads: one
// frame that tells its size.
func zstdArgs(level, size int) []string {
	return []string{"-" + strconv.Itoa(level), "--ultra", "--no-check", "--single-thread", "--stream-size=" + strconv.Itoa(size), "--quiet", "--stdout"}
}

// encodeDict returns p compressed with zstd and dict as its history, valid until the next
// call. It may be larger than p.
func (e *encoder) encodeDict(p, dict []byte) ([]byte, error) {
	if err := e.zstd.ResetWithOptions(nil, zstd.WithEncoderDictRaw(0, dict)); err != nil {
		return nil, fmt.Errorf("set dictionary: %w", err)
	}
	e.dict = true
	e.out = e.zstd.EncodeAll(p, e.out[:0])
	return e.out, nil
}

// zstdDecoder decodes whole zstd frames; safe for concurrent use.
type zstdDecoder struct {
	dec   *zstd.Decoder
	dicts sync.Pool // of *zstd.Decoder, one for a frame with a dictionary at a time
}

// newZstdDecoder returns a decoder that allocates limit bytes at most for one frame.
func newZstdDecoder(limit uint64) (*zstdDecoder, error) {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecoderMaxMemory(limit),
		zstd.WithDecoderMaxWindow(max(limit, zstd.MinWindowSize)), zstd.WithDecodeAllCapLimit(true))
	if err != nil {
		return nil, fmt.Errorf("make zstd decoder: %w", err)
	}
	return &zstdDecoder{dec: d}, nil
}

// decodeSlack is capacity behind dst with which the decoder takes its faster way.
const decodeSlack = 64

// decode fills dst from the one zstd frame src, which must hold exactly that many bytes. It
// may write to the capacity behind dst.
func (d *zstdDecoder) decode(dst, src []byte) error { return decodeZstd(d.dec, dst, src) }

// decodeDict is decode for a frame whose history begins with dict.
func (d *zstdDecoder) decodeDict(dst, src, dict []byte) error {
	dec, _ := d.dicts.Get().(*zstd.Decoder)
	if dec == nil {
		var err error
		const limit = MaxFramePages * PageSize
		dec, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(limit),
			zstd.WithDecoderMaxWindow(limit), zstd.WithDecodeAllCapLimit(true))
		if err != nil {
			return fmt.Errorf("make zstd decoder: %w", err)
		}
	}
	defer d.dicts.Put(dec)
	if err := dec.ResetWithOptions(nil, zstd.WithDecoderDictRaw(0, dict)); err != nil {
		return fmt.Errorf("set dictionary: %w", err)
	}
	return decodeZstd(dec, dst, src)
}

func decodeZstd(dec *zstd.Decoder, dst, src []byte) error {
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
	out, err := dec.DecodeAll(src, dst[:0])
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
