package vmm

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/stretchr/testify/require"
)

// testStream builds device states.
type testStream struct{ b []byte }

func (s *testStream) u8(v byte) *testStream { s.b = append(s.b, v); return s }
func (s *testStream) u32(v uint32) *testStream {
	s.b = binary.BigEndian.AppendUint32(s.b, v)
	return s
}
func (s *testStream) u64(v uint64) *testStream {
	s.b = binary.BigEndian.AppendUint64(s.b, v)
	return s
}
func (s *testStream) raw(v string) *testStream  { s.b = append(s.b, v...); return s }
func (s *testStream) name(v string) *testStream { return s.u8(byte(len(v))).raw(v) }

func (s *testStream) header() *testStream { return s.raw(streamMagic).u32(streamVersion) }

func (s *testStream) config(machine string, caps bool) *testStream {
	s.u8(typeConfiguration).u32(uint32(len(machine))).raw(machine)
	s.u8(typeSubsection).name("configuration/target-page-bits").u32(1).u32(12)
	if caps {
		s.u8(typeSubsection).name("configuration/capabilities").u32(1).u32(1).name(capIgnoreShared)
	}
	return s
}

// ram adds the sections of RAM: two blocks, the small one with a page and a zero page.
func (s *testStream) ram(ignoreShared bool) *testStream {
	s.u8(typeStart).u32(2).name("ram").u32(0).u32(4)
	s.u64((256<<20 + 8192) | ramMemSize)
	for _, b := range []struct {
		name string
		size uint64
	}{{"mem", 256 << 20}, {"pc.bios", 8192}} {
		s.name(b.name).u64(b.size)
		if ignoreShared {
			s.u64(0xfffc0000)
		}
	}
	s.u64(ramEnd).u8(typeFooter).u32(2)
	s.u8(typePart).u32(2)
	s.u64(ramPage).name("pc.bios").raw(string(bytes.Repeat([]byte{7}, pageSize)))
	s.u64(4096 | ramZero | ramContinue).u8(0)
	s.u64(ramEnd).u8(typeFooter).u32(2)
	return s.u8(typeEnd).u32(2).u64(ramEnd).u8(typeFooter).u32(2)
}

func (s *testStream) device() *testStream {
	return s.u8(typeFull).u32(0).name("timer").u32(0).u32(2).raw("data")
}

func stateStream(ignoreShared bool) (stream []byte, prefix int64) {
	var s testStream
	s.header().config("pc-q35-7.2", ignoreShared).ram(ignoreShared)
	prefix = int64(len(s.b))
	return s.device().b, prefix
}

func TestParsePrefix(t *testing.T) {
	for _, ignore := range []bool{false, true} {
		b, want := stateStream(ignore)
		got, err := parsePrefix(bytes.NewReader(b))
		require.NoError(t, err)
		require.Equal(t, want, got)
		for n := range int(want) + 1 {
			_, err := parsePrefix(bytes.NewReader(b[:n]))
			require.ErrorIs(t, err, errState, "cut at %d", n)
		}
	}
}

func TestParsePrefixRefuses(t *testing.T) {
	tests := map[string]func(s *testStream){
		"magic":              func(s *testStream) { s.raw("QEVN").u32(3) },
		"version":            func(s *testStream) { s.raw("QEVM").u32(2) },
		"section type":       func(s *testStream) { s.header().u8(9) },
		"long machine name":  func(s *testStream) { s.header().u8(typeConfiguration).u32(1 << 31) },
		"unknown subsection": func(s *testStream) { s.header().config("m", true).u8(typeSubsection).name("configuration/x").u32(1) },
		"many capabilities": func(s *testStream) {
			s.header().config("m", false).u8(typeSubsection).name("configuration/capabilities").u32(1).u32(1 << 30)
		},
		"section not of ram": func(s *testStream) { s.header().u8(typeStart).u32(1).name("dirty-bitmap").u32(0).u32(1) },
		"part before start":  func(s *testStream) { s.header().u8(typePart).u32(0).u64(ramEnd) },
		"part of another":    func(s *testStream) { s.header().ram(false).u8(typePart).u32(3).u64(ramEnd) },
		"foreign footer": func(s *testStream) {
			s.header().u8(typeStart).u32(1).name("ram").u32(0).u32(4).u64(ramEnd).u8(typeFooter).u32(2)
		},
		"unknown ram flags": func(s *testStream) { s.header().u8(typeStart).u32(1).name("ram").u32(0).u32(4).u64(0x100) },
		"block above total": func(s *testStream) {
			s.header().u8(typeStart).u32(1).name("ram").u32(0).u32(4).u64(4096 | ramMemSize).name("a").u64(8192)
		},
		"block of zero length": func(s *testStream) {
			s.header().u8(typeStart).u32(1).name("ram").u32(0).u32(4).u64(4096 | ramMemSize).name("a").u64(0)
		},
	}
	for name, build := range tests {
		t.Run(name, func(t *testing.T) {
			var s testStream
			build(&s)
			_, err := parsePrefix(bytes.NewReader(append(s.b, make([]byte, 64)...)))
			require.ErrorIs(t, err, errState)
		})
	}
}

func TestSplice(t *testing.T) {
	b, prefix := stateStream(true)
	var xen testStream
	xen.header().device()
	var out bytes.Buffer
	require.NoError(t, splice(&out, bytes.NewReader(b), prefix, bytes.NewReader(xen.b)))
	require.Equal(t, b, out.Bytes())
	for name, bad := range map[string][]byte{
		"empty": nil, "only a header": xen.b[:8], "magic": append([]byte("QEVN"), xen.b[4:]...),
		"not a device": append(append([]byte{}, xen.b[:8]...), typeStart),
	} {
		t.Run(name, func(t *testing.T) {
			require.Error(t, splice(&bytes.Buffer{}, bytes.NewReader(b), prefix, bytes.NewReader(bad)))
		})
	}
}

func FuzzParsePrefix(f *testing.F) {
	for _, ignore := range []bool{false, true} {
		b, prefix := stateStream(ignore)
		f.Add(b)
		f.Add(b[:prefix/2])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		n, err := parsePrefix(bytes.NewReader(b))
		if err != nil {
			require.ErrorIs(t, err, errState)
			return
		}
		require.Less(t, n, int64(len(b)))
		require.Equal(t, byte(typeFull), b[n])
	})
}
