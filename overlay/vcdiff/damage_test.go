package vcdiff

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/adler32"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"
)

// raw puts a delta together from one window with the given fields, right or wrong.
type raw struct {
	head             []byte // nil: the plain one
	flags            byte
	size, start      int
	target           int
	compressed       byte
	data, inst, addr []byte
	sum              []byte
	more             int // added to the window's length
	tail             []byte
}

func (r raw) bytes() []byte {
	p := program{}
	out := r.head
	if out == nil {
		out = []byte{0xd6, 0xc3, 0xc4, 0, 0}
	}
	out = append(bytes.Clone(out), r.flags)
	if r.flags&3 != 0 {
		out = p.put(p.put(out, r.size), r.start)
	}
	rest := append(p.put(nil, r.target), r.compressed)
	rest = p.put(p.put(p.put(rest, len(r.data)), len(r.inst)), len(r.addr))
	rest = append(append(append(append(rest, r.sum...), r.data...), r.inst...), r.addr...)
	return append(append(p.put(out, len(rest)+r.more), rest...), r.tail...)
}

func TestDamaged(t *testing.T) {
	source := []byte("0123456789abcdef")
	sum := binary.BigEndian.AppendUint32(nil, adler32.Checksum([]byte("01234")))
	copy5 := func(change func(*raw)) raw {
		r := raw{flags: 1, size: 16, target: 5, inst: []byte{21}, addr: []byte{0}}
		change(&r)
		return r
	}
	rows := []struct {
		name string
		raw  raw
		want string // of the error
	}{
		{"another format", copy5(func(r *raw) { r.head = []byte("PK\x03\x04\x00") }), "does not begin"},
		{"another version", copy5(func(r *raw) { r.head = []byte{0xd6, 0xc3, 0xc4, 'S', 0} }), "version"},
		{"secondary compression", copy5(func(r *raw) { r.head = []byte{0xd6, 0xc3, 0xc4, 0, 1, 2} }), "secondary"},
		{"code table", copy5(func(r *raw) { r.head = []byte{0xd6, 0xc3, 0xc4, 0, 2, 0} }), "code table"},
		{"unknown header flag", copy5(func(r *raw) { r.head = []byte{0xd6, 0xc3, 0xc4, 0, 8} }), "header indicator"},
		{"huge application header", copy5(func(r *raw) { r.head = []byte{0xd6, 0xc3, 0xc4, 0, 4, 0xff, 0xff, 0xff, 0x7f} }), "application header"},
		{"unknown window flag", copy5(func(r *raw) { r.flags = 0x11 }), "window indicator"},
		{"source and target", copy5(func(r *raw) { r.flags = 3 }), "window indicator"},
		{"compressed sections", copy5(func(r *raw) { r.compressed = 1 }), "secondary"},
		{"segment too long", copy5(func(r *raw) { r.size = 17 }), "segment of 17"},
		{"segment too far", copy5(func(r *raw) { r.start = 1 }), "segment of 16 bytes at 1"},
		{"segment beyond numbers", copy5(func(r *raw) { r.start = 1<<63 - 1 }), "segment"},
		{"segment of a target not there yet", copy5(func(r *raw) { r.flags, r.size = 2, 1 }), "segment of 1"},
		{"window over the limit", copy5(func(r *raw) { r.target = 1 << 40 }), "limit"},
		{"window too short", copy5(func(r *raw) { r.target = 4 }), "instruction of 5 bytes"},
		{"window too long", copy5(func(r *raw) { r.target = 6 }), "makes 5 bytes, announces 6"},
		{"length too long", copy5(func(r *raw) { r.more = 1 }), "announces"},
		{"length too short", copy5(func(r *raw) { r.more = -1 }), "announces"},
		{"wrong sum", copy5(func(r *raw) { r.flags, r.sum = 5, []byte{1, 2, 3, 4} }), "sum"},
		{"copy from where it writes", copy5(func(r *raw) { r.addr = []byte{16} }), "not before"},
		{"copy from behind", copy5(func(r *raw) { r.addr = []byte{100} }), "not before"},
		{"copy from before the beginning", copy5(func(r *raw) { r.inst, r.addr = []byte{37}, []byte{17} }), "before position"},
		{"copy by a cache that is empty, no source", raw{target: 4, inst: []byte{20 + 16*6}, addr: []byte{9}}, "not before"},
		{"no address", copy5(func(r *raw) { r.addr = nil }), "cut off"},
		{"half an address", copy5(func(r *raw) { r.addr = []byte{0x81} }), "cut off"},
		{"address left over", copy5(func(r *raw) { r.addr = []byte{0, 0} }), "left over"},
		{"data left over", copy5(func(r *raw) { r.data = []byte{0} }), "left over"},
		{"no data for add", raw{target: 4, inst: []byte{5}}, "cut off"},
		{"no data for run", raw{target: 4, inst: []byte{0, 4}}, "cut off"},
		{"no size", raw{target: 1, inst: []byte{0}, data: []byte{0}}, "cut off"},
		{"size zero", raw{target: 1, inst: []byte{0, 0}, data: []byte{0}}, "no bytes"},
		{"number not in its shortest form", raw{target: 1, inst: []byte{0, 0x80}, data: []byte{0}}, "too long"},
		{"instruction too long", raw{target: 4, inst: []byte{1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f}, data: []byte{1}}, "sections"},
		{"more data than target", raw{target: 1, inst: []byte{3}, data: []byte{1, 2}}, "sections"},
		{"more instructions than target", raw{target: 1, inst: []byte{0, 1, 1}, data: []byte{0}}, "sections"},
		{"bytes behind", copy5(func(r *raw) { r.tail = []byte{0} }), "cut off"},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			_, err := decode(t, source, row.raw.bytes(), min(row.raw.target, 100))
			require.ErrorContains(t, err, row.want)
			require.True(t, errors.Is(err, ErrFormat) != errors.Is(err, ErrUnsupported), "%v", err)
		})
	}
	for _, row := range []struct {
		name string
		raw  raw
		want string
	}{
		{"plain", copy5(func(*raw) {}), "01234"},
		{"with a sum", copy5(func(r *raw) { r.flags, r.sum = 5, sum }), "01234"},
		{"with an application header", copy5(func(r *raw) { r.head = []byte{0xd6, 0xc3, 0xc4, 0, 4, 2, 'h', 'i'} }), "01234"},
		{"over the end of the segment", raw{flags: 1, size: 2, target: 5, inst: []byte{21}, addr: []byte{0}}, "01010"},
	} {
		t.Run(row.name, func(t *testing.T) {
			out, err := decode(t, source, row.raw.bytes(), row.raw.target)
			require.NoError(t, err)
			require.Equal(t, row.want, string(out))
		})
	}
}

// TestTruncated: a delta that ends early is refused wherever it ends.
func TestTruncated(t *testing.T) {
	rng := newRand(4)
	source := edit(rng, nil, 3000)
	target := edit(rng, source, 3000)
	delta := encode(t, source, target, "-9", "-A=x")
	for n := range delta {
		_, err := decode(t, source, delta[:n], len(target))
		require.Error(t, err, "%d of %d bytes", n, len(delta))
	}
}

// TestWrongSource: the sum tells that a delta is not of this source.
func TestWrongSource(t *testing.T) {
	rng := newRand(5)
	source := noise(rng, 3000)
	delta := encode(t, source, source, "-9")
	source[100]++
	_, err := decode(t, source, delta, len(source))
	require.ErrorIs(t, err, ErrFormat)
	_, err = decode(t, source[:100], delta, len(source))
	require.ErrorIs(t, err, ErrFormat)
}

// TestLimits: what a header announces is refused before memory is taken for it.
func TestLimits(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "out"))
	require.NoError(t, err)
	defer f.Close()
	big := raw{target: 1 << 30, inst: []byte{0, 0x84, 0x80, 0x80, 0x80, 0}, data: []byte{7}}.bytes()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, err = Decode(f, bytes.NewReader(nil), bytes.NewReader(big), Limits{})
	runtime.ReadMemStats(&after)
	require.ErrorContains(t, err, "limit is 16777216")
	require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(1<<20))

	two := raw{target: 4, inst: []byte{0, 4}, data: []byte{7}}.bytes()
	two = append(two, two[5:]...)
	_, err = Decode(f, bytes.NewReader(nil), bytes.NewReader(two), Limits{Total: 7})
	require.ErrorContains(t, err, "limit is 3")
	n, err := Decode(f, bytes.NewReader(nil), bytes.NewReader(two), Limits{Total: 8})
	require.NoError(t, err)
	require.EqualValues(t, 8, n)
	require.ErrorContains(t, Apply(make([]byte, 7), nil, two), "limit is 3")
	require.ErrorContains(t, Apply(make([]byte, 9), nil, two), "want 9")
}

// TestFailing: errors of what is read and written arrive.
func TestFailing(t *testing.T) {
	failed := errors.New("disk is on fire")
	delta := raw{flags: 1, size: 16, target: 5, inst: []byte{21}, addr: []byte{0}}.bytes()
	_, err := Decode(failing{failed}, bytes.NewReader(make([]byte, 16)), bytes.NewReader(delta), Limits{})
	require.ErrorIs(t, err, failed)
	_, err = Decode(failing{failed}, failing{failed}, bytes.NewReader(delta), Limits{})
	require.ErrorIs(t, err, failed)
	require.NotErrorIs(t, err, ErrFormat)
	_, err = Decode(failing{failed}, failing{failed}, io.MultiReader(bytes.NewReader(delta[:9]), failing{failed}), Limits{})
	require.ErrorIs(t, err, failed)
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error)          { return 0, f.err }
func (f failing) Write([]byte) (int, error)         { return 0, f.err }
func (f failing) ReadAt([]byte, int64) (int, error) { return 0, f.err }
func (f failing) Size() int64                       { return 16 }

// FuzzApply: any bytes give the same answer both ways, and no panic.
func FuzzApply(f *testing.F) {
	rng := newRand(6)
	source := edit(rng, nil, 2000)
	for range 6 {
		p := newProgram(source)
		p.begin(1, 0, len(source))
		for range 20 {
			p.step(rng)
		}
		p.end()
		p.begin(2, 3, len(p.target)-3)
		for range 20 {
			p.step(rng)
		}
		p.end()
		f.Add(p.delta, len(p.target))
	}
	f.Add(raw{flags: 5, size: 16, target: 5, inst: []byte{21}, addr: []byte{0}, sum: []byte{1, 2, 3, 4}}.bytes(), 5)
	f.Fuzz(func(t *testing.T, delta []byte, size int) {
		if size < 0 || size > 1<<16 {
			return
		}
		out := make([]byte, size)
		err := Apply(out, source, delta)
		dst := new(memoryTarget)
		n, derr := Decode(dst, bytes.NewReader(source), bytes.NewReader(delta), Limits{Window: size, Total: int64(max(size, 1))})
		if err == nil {
			require.NoError(t, derr)
			require.EqualValues(t, size, n)
			require.Equal(t, out, append([]byte{}, *dst...))
		} else if derr == nil {
			require.NotEqual(t, int64(size), n)
		}
	})
}

// memoryTarget is a Target in memory.
type memoryTarget []byte

func (m *memoryTarget) Write(p []byte) (int, error) {
	*m = append(*m, p...)
	return len(p), nil
}

func (m *memoryTarget) ReadAt(p []byte, off int64) (int, error) {
	return bytes.NewReader(*m).ReadAt(p, off)
}
