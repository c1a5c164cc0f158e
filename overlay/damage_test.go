package overlay

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/json"
	"errors"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// sample makes a small overlay that has most kinds of page and frame.
func sample(t testing.TB) ([]byte, Launch) {
	rng := rand.New(rand.NewPCG(11, 11))
	v := newVM(rng, 20, 12)
	base := newBase(t, v)
	w := v.clone()
	w.mutate(rng, 2)
	l := launch(newImage(t, base), w)
	l.Profile = []Addr{3, MakeAddr(Disk, 4)}
	b, _ := create(t, l, CreateOptions{Strategy: strategy(t, "balanced,frame=16K,hot=4K")})
	return b, l
}

// check does with an overlay what a careful user does: open, and verify every byte.
func check(t testing.TB, b []byte, base *Base) error {
	r, err := Open(t.Context(), bytesSource(b))
	if err != nil {
		return err
	}
	im, err := NewImage(base, []*Reader{r}, ImageOptions{})
	if err != nil {
		return err
	}
	return errors.Join(im.Verify(t.Context(), nil), im.Close())
}

func TestTruncation(t *testing.T) {
	b, _ := sample(t)
	for n := range b {
		_, err := Open(t.Context(), bytesSource(b[:n]))
		require.ErrorIs(t, err, ErrFormat, "cut at %d", n)
	}
	_, err := Open(t.Context(), bytesSource(append(bytes.Clone(b), 0)))
	require.ErrorIs(t, err, ErrFormat, "one byte more")
	require.ErrorContains(t, err, "cut off or has something behind it")
}

// TestEveryByte changes each byte of an overlay in turn, of its frames every 13th: no change
// passes.
func TestEveryByte(t *testing.T) {
	b, l := sample(t)
	require.NoError(t, check(t, b, l.Parent.base))
	frames := openBytes(t, b).members[memberFrames]
	for i := 0; i < len(b); i++ {
		if at := int64(i) - frames.data; at >= 0 && at < frames.size && at%13 != 0 {
			continue
		}
		bit := byte(1) << (i % 8)
		b[i] ^= bit
		require.Error(t, check(t, b, l.Parent.base), "byte %d, bit %#x", i, bit)
		b[i] ^= bit
	}
}

// TestDamagedFrame: reads of other frames go on, and the damage is named.
func TestDamagedFrame(t *testing.T) {
	b, l := sample(t)
	r := openBytes(t, b)
	b[len(b)-int(int64(len(zipDirectory(r.members[:])))+1)] ^= 1 // last byte of the last frame
	last := len(r.index.frames) - 1
	im := newImage(t, l.Parent.base, r)
	for i, a := range r.index.stored {
		var page [PageSize]byte
		err := im.ReadPages(t.Context(), a.Space(), page[:], a.Offset())
		if r.index.frameOf(i) < last {
			require.NoError(t, err)
			continue
		}
		var damaged *CorruptFrameError
		require.ErrorAs(t, err, &damaged)
		require.Equal(t, last, damaged.Frame)
	}
	require.Positive(t, im.Stats().Refused)
}

// repack builds an overlay around a changed manifest and index, with every hash and CRC
// right, so that only the checks of meaning are left to refuse it.
func repack(t *testing.T, b []byte, change func(*Manifest, *index)) []byte {
	r := openBytes(t, b)
	m, x := *r.manifest, *r.index
	x.frames, x.stored, x.refs = append([]frame{}, x.frames...), append([]Addr{}, x.stored...), append([]ref{}, x.refs...)
	change(&m, &x)
	var bodies [memberCount][]byte
	var err error
	e, err := new(creation).packer(0)
	require.NoError(t, err)
	bodies[memberIndex], err = pack(e, x.marshal(), &m.Members.Index)
	require.NoError(t, err)
	bodies[memberState], bodies[memberProfile] = r.stored(memberState), r.stored(memberProfile)
	bodies[memberFrames] = b[r.members[memberFrames].data:][:r.members[memberFrames].size]
	bodies[memberManifest], err = m.marshal()
	require.NoError(t, err)
	var out []byte
	var members []zipMember
	for i, body := range bodies {
		member, h := layoutMember(memberNames[i], crc32.ChecksumIEEE(body), int64(len(body)), int64(len(out)), i == memberFrames)
		members = append(members, member)
		out = append(append(out, h...), body...)
	}
	return append(out, zipDirectory(members)...)
}

// packed returns a compressed frame of the index.
func packed(x *index) *frame {
	return &x.frames[slices.IndexFunc(x.frames, func(f frame) bool { return f.codec != CodecNone })]
}

func TestRefusedByMeaning(t *testing.T) {
	b, _ := sample(t)
	require.Equal(t, b, repack(t, b, func(*Manifest, *index) {}), "repack alone changes nothing")
	for name, tt := range map[string]struct {
		change func(*Manifest, *index)
		want   string
	}{
		"newer version":     {func(m *Manifest, _ *index) { m.Version = 2 }, "format version 2"},
		"other format":      {func(m *Manifest, _ *index) { m.Format = "zip" }, "its format is"},
		"depth 0":           {func(m *Manifest, _ *index) { m.Depth = 0 }, "depth 0"},
		"depth 9":           {func(m *Manifest, _ *index) { m.Depth, m.Parent = 9, Hash{1} }, "depth 9"},
		"parent":            {func(m *Manifest, _ *index) { m.Parent = Hash{1} }, "does not go with parent"},
		"memory size":       {func(m *Manifest, _ *index) { m.MemorySize += 100 }, "memory size"},
		"disk gone":         {func(m *Manifest, _ *index) { m.DiskSize = 0 }, "disk size"},
		"smaller memory":    {func(m *Manifest, _ *index) { m.MemorySize = PageSize }, "outside of the image"},
		"state size":        {func(m *Manifest, _ *index) { m.Members.State.Decoded = MaxStateSize + 1 }, "member state"},
		"state bomb":        {func(m *Manifest, _ *index) { m.Members.State.Decoded = 1 << 40 }, "member state"},
		"profile size":      {func(m *Manifest, _ *index) { m.Members.Profile.Decoded = 1 << 40 }, "member profile"},
		"no state hash":     {func(m *Manifest, _ *index) { m.State = nil }, "state_sha256"},
		"frames size":       {func(m *Manifest, _ *index) { m.Members.Frames.Size++ }, "frames"},
		"stats":             {func(m *Manifest, _ *index) { m.Stats.Memory.Zero++ }, "stats"},
		"page twice":        {func(_ *Manifest, x *index) { x.stored[1] = x.stored[0] }, "twice"},
		"page far":          {func(_ *Manifest, x *index) { x.stored[0] = 1 << 20 }, "outside of the image"},
		"unknown codec":     {func(_ *Manifest, x *index) { x.frames[0].codec = 3 }, "unknown codec"},
		"unknown delta":     {func(_ *Manifest, x *index) { packed(x).delta = 5 }, "unknown codec 1 or delta 5"},
		"dictionary of xz":  {func(_ *Manifest, x *index) { packed(x).codec, packed(x).delta = CodecXZ, DeltaDict }, "a dictionary and codec xz"},
		"plain dictionary":  {func(_ *Manifest, x *index) { packed(x).codec, packed(x).delta = CodecNone, DeltaDict }, "a dictionary and codec none"},
		"delta of nothing":  {func(_ *Manifest, x *index) { packed(x).encoded, packed(x).delta = vcdiffHead, DeltaVCDIFF }, "a delta and 4 bytes"},
		"stride of nothing": {func(_ *Manifest, x *index) { packed(x).encoded, packed(x).delta = strideHead, DeltaStride }, "a delta and 2 bytes"},
		"stride of none":    {func(_ *Manifest, x *index) { packed(x).codec, packed(x).delta = CodecNone, DeltaStride }, "a stride and no codec"},
		"frame of no pages": {func(_ *Manifest, x *index) { x.frames[0].pages = 0 }, "0 pages"},
		"frame too large":   {func(_ *Manifest, x *index) { x.frames[0].pages = MaxFramePages + 1 }, "pages"},
		"frame inflated":    {func(_ *Manifest, x *index) { x.frames[0].encoded = 1 << 30 }, "encoded bytes"},
		"pages missing":     {func(_ *Manifest, x *index) { packed(x).pages++ }, "index lists"},
		"unknown kind":      {func(_ *Manifest, x *index) { x.refs[0].kind = 4 }, "unknown kind"},
		"kind parent":       {func(_ *Manifest, x *index) { x.refs[0].kind = refParent }, "parent is a base"},
		"zero with target":  {func(_ *Manifest, x *index) { x.refs[0].kind, x.refs[0].target = refZero, 1 }, "has a target"},
		"target far":        {func(_ *Manifest, x *index) { x.refs[0].kind, x.refs[0].target = refBase, 1<<31-1 }, "outside of the image"},
		"self of a ref":     {func(_ *Manifest, x *index) { x.refs[0].kind, x.refs[0].target = refSelf, x.refs[1].addr }, "not stored here"},
		"refs unordered":    {func(_ *Manifest, x *index) { x.refs[0], x.refs[1] = x.refs[1], x.refs[0] }, "not in order"},
		"machine too large": {func(m *Manifest, _ *index) { m.Machine = json.RawMessage(`"` + strings.Repeat("x", maxMachine) + `"`) }, "machine"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Open(t.Context(), bytesSource(repack(t, b, tt.change)))
			require.ErrorIs(t, err, ErrFormat)
			require.ErrorContains(t, err, tt.want)
		})
	}
	t.Run("id", func(t *testing.T) {
		b, l := sample(t)
		require.ErrorContains(t, check(t, repack(t, b, func(m *Manifest, _ *index) { m.ID[0]++ }), l.Parent.base), "do not match its id")
	})
	t.Run("spelling", func(t *testing.T) {
		m := openBytes(t, b).stored(memberManifest)
		for _, other := range [][]byte{append(bytes.Clone(m), ' '), bytes.Replace(m, []byte(`"version": 1`), []byte(`"version":  1`), 1),
			bytes.Replace(m, []byte(`"version": 1`), []byte(`"Version": 1`), 1), bytes.Replace(m, []byte("{\n"), []byte("{\n \"x\": 1,\n"), 1)} {
			require.False(t, bytes.Equal(m, other))
			_, err := parseManifest(other)
			require.ErrorIs(t, err, ErrFormat)
		}
	})
}

// TestGolden: files of every version of the format are read for ever. The base of each is
// made anew from its seed.
func TestGolden(t *testing.T) {
	rng := rand.New(rand.NewPCG(2026, 1))
	v := newVM(rng, 40, 30)
	base := newBase(t, v)
	w := v.clone()
	w.mutate(rng, 2)
	records := w.clone()
	for page := range 12 {
		fillRecords(records.page(Addr(2*page)), 12+12*(page%2), uint32(1000*page))
	}
	for _, text := range []string{"balanced", "small", "none", "elijah", "dict", "stride"} {
		path, w := filepath.Join("testdata", "v1-"+text+".overlay"), w
		if text == "stride" {
			w = records
		}
		if _, err := os.Stat(path); *update && err != nil { // what is there stays for ever
			require.NoError(t, os.MkdirAll("testdata", 0o755))
			s := map[string]string{"dict": "balanced,delta=dict", "stride": "balanced,order=similar"}[text]
			b, _ := create(t, launch(newImage(t, base), w), CreateOptions{Strategy: strategy(t, cmp.Or(s, text))})
			require.NoError(t, os.WriteFile(path, b, 0o644))
		}
		b, err := os.ReadFile(path)
		require.NoError(t, err)
		require.NoError(t, check(t, b, base))
		r := openBytes(t, b)
		requireImage(t, newImage(t, base, r), w)
		require.Equal(t, text == "stride", stridePages(r) >= 12)
	}
}

// TestEncoder holds the name of the encoding library equal to go.mod.
func TestEncoder(t *testing.T) {
	mod, err := os.ReadFile("../go.mod")
	require.NoError(t, err)
	require.Contains(t, string(mod), "github.com/"+zstdLibrary+"\n")
}

func TestParseStrategy(t *testing.T) {
	s, err := ParseStrategy("")
	require.NoError(t, err)
	require.Equal(t, "balanced", s.Name)
	s, err = ParseStrategy("small,frame=64K")
	require.NoError(t, err)
	require.Equal(t, 64<<10, s.FrameSize)
	for text, want := range map[string]string{
		"bogus":                    "the strategies are balanced, elijah, fast, none, small",
		"balanced,codec=lz4":       "there are none, zstd, xz",
		"balanced,delta=diff":      "there are none, xor, vcdiff, dict",
		"small,delta=dict":         "delta dict needs codec zstd, not xz",
		"balanced,frame=8M":        "frame size",
		"balanced,frame=-1":        "size",
		"balanced,frame=5000":      "multiple of 4096",
		"balanced,level=9":         "takes 1 to 4, and 10 to 22 by its program",
		"balanced,level=23":        "level 23",
		"fast,level=19,delta=dict": "delta dict needs a level of 1 to 4, not 19",
		"balanced,speed=1":         "the parameters are",
		"balanced,order=hot":       "there are address, cold, similar",
		"balanced,delta=stride":    "there are none, xor, vcdiff, dict",
		"balanced,stride=8":        "there are no, yes",
		"balanced,level=a":         "invalid syntax",
	} {
		_, err := ParseStrategy(text)
		require.ErrorContains(t, err, want, text)
	}
}

func FuzzOpen(f *testing.F) {
	b, l := sample(f)
	f.Add(b)
	f.Add(b[:len(b)/2])
	f.Fuzz(func(t *testing.T, b []byte) {
		if check(t, b, l.Parent.base) == nil {
			require.NotPanics(t, func() { openBytes(t, b) })
		}
	})
}

func FuzzManifest(f *testing.F) {
	b, _ := sample(f)
	r := openBytes(f, b)
	f.Add(r.stored(memberManifest))
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, err := parseManifest(b); err == nil {
			again, err := m.marshal()
			require.NoError(t, err)
			require.Equal(t, b, again)
		}
	})
}

func FuzzIndex(f *testing.F) {
	b, _ := sample(f)
	r := openBytes(f, b)
	f.Add(r.index.marshal())
	m := r.Manifest()
	f.Fuzz(func(t *testing.T, b []byte) {
		if x, err := parseIndex(b, m); err == nil {
			require.Equal(t, b, x.marshal())
		}
	})
}

func FuzzFrame(f *testing.F) {
	page := bytes.Repeat([]byte("abcd"), PageSize/4)
	v := newVM(rand.New(rand.NewPCG(1, 1)), 2, 1)
	copy(v[Memory], page)
	base := newBase(f, v)
	for _, c := range []Codec{CodecNone, CodecZstd, CodecXZ} {
		e := testEncoder(f, c, int(c)%2*3, 2*PageSize)
		b, have, err := e.encode(f.Context(), page)
		require.NoError(f, err)
		f.Add(uint8(have), uint8(DeltaXOR), bytes.Clone(b))
		delta := []byte{0xd6, 0xc3, 0xc4, 0, 0, 1, 0xa0, 0, 0, 9, 0xa0, 0, 0, 0, 3, 1, 19, 0xa0, 0, 0} // copy all of it
		b, have, err = e.encode(f.Context(), delta)
		require.NoError(f, err)
		f.Add(uint8(have), uint8(DeltaVCDIFF), append([]byte{byte(len(delta)), 0, 0, 0}, b...))
		b, have, err = e.encode(f.Context(), page)
		require.NoError(f, err)
		if have != CodecNone {
			f.Add(uint8(have), uint8(DeltaStride), append([]byte{8, 0}, b...))
		}
		if c == CodecZstd {
			b, err = e.encodeDict(page, page)
			require.NoError(f, err)
			f.Add(uint8(c), uint8(DeltaDict), bytes.Clone(b))
		}
	}
	d, err := newZstdDecoder(1 << 20)
	require.NoError(f, err)
	f.Fuzz(func(t *testing.T, c, delta uint8, b []byte) {
		x := &index{frames: []frame{{hash: Sum(b), encoded: uint32(len(b)), pages: 1, codec: Codec(c), delta: Delta(delta)}}, stored: []Addr{0}}
		m := &Manifest{MemorySize: base.Size(Memory), DiskSize: base.Size(Disk), Depth: 1}
		m.Members.Frames.Size = int64(len(b))
		if _, err := parseIndex(x.marshal(), m); err != nil {
			return
		}
		r := &Reader{manifest: m, index: x, dec: d}
		_, _ = r.decodePages(0, b, base, nil) // must not panic, hang or allocate without bound
	})
}

func FuzzLocalHeader(f *testing.F) {
	b, _ := sample(f)
	f.Add(b[:80], 0)
	f.Fuzz(func(t *testing.T, b []byte, i int) {
		if i < 0 || i >= memberCount {
			return
		}
		if m, err := parseLocal(b, i, 0); err == nil {
			require.LessOrEqual(t, m.data, int64(len(b)))
		}
	})
}

// TestXZDictionary: a stream that announces a huge dictionary is refused before it is
// allocated.
func TestXZDictionary(t *testing.T) {
	b, c, err := testEncoder(t, CodecXZ, 0, PageSize).encode(t.Context(), bytes.Repeat([]byte("ab"), PageSize))
	require.NoError(t, err)
	require.Equal(t, CodecXZ, c)
	b = bytes.Clone(b)
	dst := make([]byte, 2*PageSize)
	require.NoError(t, decodeXZ(dst, b))
	require.Error(t, decodeXZ(dst[:PageSize], b), "longer than it should be")
	require.Error(t, decodeXZ(append(dst, 0), b), "shorter than it should be")
	b[16] = 40 // 4 GiB
	binary.LittleEndian.PutUint32(b[20:], crc32.ChecksumIEEE(b[12:20]))
	require.ErrorContains(t, decodeXZ(dst, b), "dictionary")
}
