package overlay

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"math/rand/v2"
	"runtime"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/stretchr/testify/require"

	"cloudlet/integration/need"
)

// testEncoder returns what Create would compress frames of size bytes with.
func testEncoder(t testing.TB, c Codec, level, size int) *encoder {
	t.Helper()
	s := &Strategy{Codec: c, Level: level}
	programs, err := s.tools(t.Context())
	need.No(t, err, ErrNoProgram)
	e, err := newEncoder(s, size, programs)
	require.NoError(t, err)
	return e
}

// encodeTest compresses p as Create would.
func encodeTest(t *testing.T, c Codec, level int, p []byte) []byte {
	b, have, err := testEncoder(t, c, level, max(len(p), PageSize)).encode(t.Context(), p)
	require.NoError(t, err)
	require.Equal(t, c, have)
	return bytes.Clone(b)
}

// requireAlloc fails where f allocates more than limit bytes.
func requireAlloc(t *testing.T, limit uint64, f func()) {
	t.Helper()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	require.LessOrEqual(t, after.TotalAlloc-before.TotalAlloc, limit)
}

// TestXZSecondBlock: the dictionary of a block behind the first is as large as that block
// says, so that there must be none.
func TestXZSecondBlock(t *testing.T) {
	page := bytes.Repeat([]byte("abcd"), PageSize/4)
	one := encodeTest(t, CodecXZ, 0, page)
	end := len(one) - 12 - 4*(1+int(binary.LittleEndian.Uint32(one[len(one)-8:]))) // of the block
	block := bytes.Clone(one[12:end])
	block[4] = 36 // a dictionary of 1 GiB
	binary.LittleEndian.PutUint32(block[8:], crc32.ChecksumIEEE(block[:8]))
	two := append(append(bytes.Clone(one[:end]), block...), one[end:]...)
	dst := make([]byte, 2*PageSize)
	requireAlloc(t, 16<<20, func() { require.Error(t, decodeXZ(dst, two)) })
	require.NoError(t, decodeXZ(dst[:PageSize], one))
	for n := range one {
		require.Error(t, decodeXZ(dst[:PageSize], one[:n]), "cut at %d", n)
	}
}

// TestZstdTrailing: what stands behind the one zstd frame is refused, and is not decoded.
func TestZstdTrailing(t *testing.T) {
	d, err := newZstdDecoder(maxIndex)
	require.NoError(t, err)
	page := bytes.Repeat([]byte("abcd"), PageSize/4)
	one := encodeTest(t, CodecZstd, 3, page)
	require.NoError(t, d.decode(make([]byte, PageSize), one))
	w, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithZeroFrames(true))
	require.NoError(t, err)
	defer w.Close()
	bomb := w.EncodeAll(make([]byte, 128<<20), nil)
	for name, tail := range map[string][]byte{
		"skippable": {0x50, 0x2A, 0x4D, 0x18, 3, 0, 0, 0, 'x', 'y', 'z'},
		"empty":     w.EncodeAll(nil, nil),
		"bomb":      bomb,
		"zeros":     make([]byte, 3),
	} {
		t.Run(name, func(t *testing.T) {
			dst := make([]byte, PageSize, PageSize+decodeSlack)
			requireAlloc(t, 16<<20, func() { require.Error(t, d.decode(dst, append(bytes.Clone(one), tail...))) })
		})
	}
	t.Run("window", func(t *testing.T) {
		w, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(64<<20), zstd.WithSingleSegment(false))
		require.NoError(t, err)
		defer w.Close()
		b := bytes.Clone(one)
		_ = w
		// Frame header descriptor, window descriptor of 64 MiB, content size of 2 bytes.
		var h zstd.Header
		require.NoError(t, h.Decode(one))
		wide := append([]byte{0x28, 0xB5, 0x2F, 0xFD, 0x40, 16 << 3}, binary.LittleEndian.AppendUint16(nil, PageSize-256)...)
		wide = append(wide, b[h.HeaderSize:]...)
		require.ErrorContains(t, d.decode(make([]byte, PageSize), wide), "window")
		wide[5] = 2 << 3 // 4 KiB
		require.NoError(t, d.decode(make([]byte, PageSize), wide))
	})
	t.Run("foreign encoders", func(t *testing.T) {
		rng := rand.New(rand.NewPCG(1, 1))
		for _, n := range []int{1, 100, 255, 256, 4096, 70000, 300000} {
			p := make([]byte, n)
			text(rng, p)
			for level := zstd.SpeedFastest; level <= zstd.SpeedBestCompression; level++ {
				w, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(level), zstd.WithEncoderCRC(true), zstd.WithSingleSegment(true))
				require.NoError(t, err)
				dst := make([]byte, n)
				require.NoError(t, d.decode(dst, w.EncodeAll(p, nil)))
				require.Equal(t, p, dst)
				require.NoError(t, w.Close())
			}
		}
	})
}
