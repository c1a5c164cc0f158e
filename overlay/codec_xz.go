package overlay

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strconv"

	"github.com/ulikunitz/xz"
)

// xzArgs are the arguments with which the xz program, which finds more than the library that
// decodes does, writes what [decodeXZ] reads: one stream of one block.
func xzArgs(size int) []string {
	const leastDict = 4096
	lzma2 := "--lzma2=preset=9e,dict=" + strconv.Itoa(max(size, leastDict))
	return []string{"--format=xz", "--check=none", "--threads=1", lzma2, "--stdout"}
}

// decodeXZ fills dst from one .xz stream. It looks at the structure first: the decoder
// allocates the dictionary that the header of a block names, up to 4 GiB.
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
	if err := checkXZBlock(src, len(dst)); err != nil {
		return fmt.Errorf("decode xz: %w", err)
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

// xzCheckSizes are the sizes of the check behind a block, by its id in the stream header.
var xzCheckSizes = [16]int{0, 4, 4, 4, 8, 8, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64}

// checkXZBlock follows the LZMA2 chunks of the first block of src, without decoding, and
// refuses it unless they hold size bytes and the stream's index follows: a second block
// would have a header, and a dictionary, of its own.
func checkXZBlock(src []byte, size int) error {
	pos := 12 + 4*(int(src[12])+1) // stream header, block header
	have := 0
	for {
		if pos >= len(src) {
			return io.ErrUnexpectedEOF
		}
		control := src[pos]
		if control == 0 {
			pos++
			break
		}
		if len(src)-pos < 6 {
			return io.ErrUnexpectedEOF
		}
		n := int(binary.BigEndian.Uint16(src[pos+1:])) + 1
		switch {
		case control <= 2: // stored
			have, pos = have+n, pos+3+n
		case control < 0x80:
			return fmt.Errorf("unknown LZMA2 chunk %#x", control)
		default:
			have += int(control&0x1f)<<16 + n
			pos += 5 + int(binary.BigEndian.Uint16(src[pos+3:])) + 1
			if control >= 0xC0 {
				pos++ // new properties
			}
		}
		if have > size {
			return fmt.Errorf("block has more than %d bytes", size)
		}
	}
	pos = (pos+3)&^3 + xzCheckSizes[src[7]&0xf]
	if have != size {
		return fmt.Errorf("block has %d bytes, want %d", have, size)
	}
	if pos >= len(src) || src[pos] != 0 {
		return errors.New("want one block and then the index")
	}
	return nil
}
