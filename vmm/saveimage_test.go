package vmm

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestSaveImage: the head as libvirt reads it, then the state as a QEMU without x-ignore-shared
// would have written it.
func TestSaveImage(t *testing.T) {
	var with, without testStream
	with.header().config("pc-q35-7.2", true).ram(true).device()
	without.header().config("pc-q35-7.2", false).ram(false).device()
	require.NotEqual(t, with.b, without.b)
	var image bytes.Buffer
	require.NoError(t, saveImage(&image, "<domain/>", with.b))
	b := image.Bytes()
	require.Equal(t, saveMagic, string(b[:16]))
	var words [saveWords]uint32
	require.NoError(t, binary.Read(bytes.NewReader(b[16:]), binary.LittleEndian, &words))
	require.Equal(t, [saveWords]uint32{2, 10}, words)
	b = b[16+4*saveWords:]
	require.Equal(t, "<domain/>\x00", string(b[:10]))
	require.Equal(t, without.b, b[10:])

	var plain bytes.Buffer
	require.NoError(t, plainState(&plain, without.b), "a state that is plain already")
	require.Equal(t, without.b, plain.Bytes())
}

func TestPlainStateRefuses(t *testing.T) {
	var s testStream
	s.header().config("pc-q35-7.2", true).ram(true).device()
	for n := range len(s.b) - 1 {
		err := plainState(&bytes.Buffer{}, s.b[:n])
		if _, perr := parsePrefix(bytes.NewReader(s.b[:n])); perr != nil {
			require.ErrorIs(t, err, errState, n)
		}
	}
	var other testStream
	other.header().u8(typeConfiguration).u32(1).raw("m")
	other.u8(typeSubsection).name("configuration/capabilities").u32(1).u32(2).name(capIgnoreShared).name("x-other")
	other.ram(true).device()
	require.ErrorContains(t, plainState(&bytes.Buffer{}, other.b), "x-other")
}
