package overlay

import (
	"bytes"
	"crypto/subtle"
	"errors"
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
		zstd.WithDecoderMaxWindow(max(limit, zstd.MinWindowSize)))
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
	out, err := d.dec.DecodeAll(src, dst[:0])
	if err != nil {
		return fmt.Errorf("decode zstd: %w", err)
	}
	if len(out) != len(dst) || len(out) > 0 && &out[0] != &dst[0] {
		return fmt.Errorf("decode zstd: have %d bytes, want %d", len(out), len(dst))
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

// decodeXZ fills dst from one .xz stream. It looks at the block header first: the decoder
// allocates the dictionary that the header names, up to 4 GiB.
func decodeXZ(dst, src []byte) error {
	// Stream header 12 bytes; block header: size, flags (0: one filter, no sizes), filter
	// 0x21 (LZMA2), one property byte: the dictionary, 2|(b&1) << (b/2+11) bytes.
	const dictOff = 16
	if len(src) <= dictOff {
		return errors.New("decode xz: stream is too short")
	}
	if src[13] != 0 || src[14] != 0x21 || src[15] != 1 {
		return errors.New("decode xz: want one block with the LZMA2 filter alone")
	}
	b := src[dictOff]
	if b > 40 || uint64(2|b&1)<<(b/2+11) > MaxFramePages*PageSize {
		return fmt.Errorf("decode xz: dictionary code %d is over the limit", b)
	}
	in := bytes.NewReader(src)
	r, err := xz.ReaderConfig{SingleStream: true, DictCap: 4096}.NewReader(in)
	if err != nil {
		return fmt.Errorf("decode xz: %w", err)
	}
	if _, err := io.ReadFull(r, dst); err != nil {
		return fmt.Errorf("decode xz: %w", err)
	}
	var more [1]byte
	if n, err := r.Read(more[:]); n != 0 || err != io.EOF {
		return fmt.Errorf("decode xz: stream goes on behind %d bytes (%v)", len(dst), err)
	}
	if in.Len() != 0 {
		return fmt.Errorf("decode xz: %d bytes behind the stream", in.Len())
	}
	return nil
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
