package overlay

import (
	"archive/zip"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"sort"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/stretchr/testify/require"
	"github.com/ulikunitz/xz"

	"cloudlet/overlay/vcdiff"
)

// specOverlay reads an overlay by the words of doc.go alone: with archive/zip and the
// decoders, and none of the package's own code.
type specOverlay struct {
	t       *testing.T
	members map[string][]byte
	digest  string
	m       specManifest
	state   []byte
	profile []uint32

	frames []specFrame
	refs   []specRef
}

type specManifest struct {
	Format     string
	Version    int
	ID         string
	Parent     string
	Base       string
	Depth      int
	MemorySize int             `json:"memory_size"`
	DiskSize   int             `json:"disk_size"`
	Machine    json.RawMessage `json:"machine"`
	State      string          `json:"state_sha256"`
	Members    map[string]struct {
		Size    int
		SHA256  string
		Decoded int `json:"decoded_size"`
	}
	Stats struct {
		Memory, Disk struct{ Modified, Zero, Base, Parent, Self, Stored int }
		Frames       int
		FrameBytes   int `json:"frame_bytes"`
	}
}

type specFrame struct {
	bytes        []byte
	addrs        []uint32
	codec, delta byte
}

type specRef struct {
	addr, target uint32
	kind         byte
}

// specHash is a SHA-256 in hexadecimal.
func specHash(p []byte) string {
	h := sha256.Sum256(p)
	return hex.EncodeToString(h[:])
}

// specOpen takes the file apart and checks what doc.go says of its head.
func specOpen(t *testing.T, file []byte) *specOverlay {
	o := &specOverlay{t: t, members: map[string][]byte{}}
	z, err := zip.NewReader(bytes.NewReader(file), int64(len(file)))
	require.NoError(t, err)
	require.Empty(t, z.Comment)
	var end int64
	for i, f := range z.File {
		require.Equal(t, []string{"manifest.json", "index", "state", "profile", "frames"}[i], f.Name)
		require.Equal(t, zip.Store, f.Method)
		require.Zero(t, f.Flags)
		require.EqualValues(t, 0, f.ModifiedTime)
		require.EqualValues(t, 0x21, f.ModifiedDate)
		require.EqualValues(t, 0o644, f.Mode().Perm())
		require.EqualValues(t, 3<<8|45, f.CreatorVersion)
		require.EqualValues(t, 20, f.ReaderVersion)
		data, err := f.DataOffset()
		require.NoError(t, err)
		header := file[end:data]
		require.Equal(t, uint32(0x04034b50), binary.LittleEndian.Uint32(header))
		if f.Name == "frames" {
			require.Zero(t, data%4096)
			extra := header[30+len(f.Name):]
			require.Equal(t, uint16(0x4C43), binary.LittleEndian.Uint16(extra))
			require.Equal(t, make([]byte, len(extra)-4), extra[4:])
		} else {
			require.Len(t, header, 30+len(f.Name))
		}
		r, err := f.Open()
		require.NoError(t, err)
		o.members[f.Name], err = io.ReadAll(r) // checks the CRC
		require.NoError(t, err)
		end = data + int64(len(o.members[f.Name]))
	}
	require.Len(t, z.File, 5)
	o.digest = specHash(o.members["manifest.json"])
	require.NoError(t, json.Unmarshal(o.members["manifest.json"], &o.m))
	require.Equal(t, "cloudlet-overlay", o.m.Format)
	require.Equal(t, 1, o.m.Version)
	require.Len(t, o.m.Members, 4)
	require.Equal(t, len(o.members["frames"]), o.m.Members["frames"].Size)
	if o.state = o.small("state"); o.state != nil {
		require.Equal(t, o.m.State, specHash(o.state))
	} else {
		require.Empty(t, o.m.State)
	}
	for p := o.small("profile"); len(p) > 0; p = p[4:] {
		o.profile = append(o.profile, binary.LittleEndian.Uint32(p))
	}
	o.parseIndex(o.small("index"))
	return o
}

// small returns a small member, decoded.
func (o *specOverlay) small(name string) []byte {
	b, m := o.members[name], o.m.Members[name]
	require.Len(o.t, b, m.Size)
	if m.Size == 0 {
		require.Zero(o.t, m.Decoded)
		return nil
	}
	require.Equal(o.t, m.SHA256, specHash(b))
	p := o.zstd(b)
	require.Len(o.t, p, m.Decoded)
	return p
}

func (o *specOverlay) zstd(b []byte, dict ...zstd.DOption) []byte {
	d, err := zstd.NewReader(nil, append(dict, zstd.WithDecoderConcurrency(1))...)
	require.NoError(o.t, err)
	defer d.Close()
	p, err := d.DecodeAll(b, nil)
	require.NoError(o.t, err)
	return p
}

func (o *specOverlay) parseIndex(b []byte) {
	le := binary.LittleEndian
	require.Equal(o.t, "CLOVIDX1", string(b[:8]))
	f, s, r := int(le.Uint32(b[8:])), int(le.Uint32(b[12:])), int(le.Uint32(b[16:]))
	require.Zero(o.t, le.Uint32(b[20:]))
	require.Len(o.t, b, 24+40*f+4*s+9*r)
	column := func(at, n int) []uint32 {
		out := make([]uint32, n)
		var last uint32
		for i := range out {
			last += le.Uint32(b[at+4*i:])
			out[i] = last
		}
		return out
	}
	stored := column(24+40*f, s)
	addrs, targets := column(24+40*f+4*s, r), column(24+40*f+4*s+4*r, r)
	frames := o.members["frames"]
	for i := range f {
		size, pages := int(le.Uint32(b[24+32*f+4*i:])), int(le.Uint16(b[24+36*f+2*i:]))
		fr := specFrame{frames[:size], stored[:pages], b[24+38*f+i], b[24+39*f+i]}
		require.Equal(o.t, hex.EncodeToString(b[24+32*i:24+32*i+32]), specHash(fr.bytes))
		require.LessOrEqual(o.t, size, 4096*pages)
		frames, stored = frames[size:], stored[pages:]
		o.frames = append(o.frames, fr)
	}
	require.Empty(o.t, frames)
	require.Empty(o.t, stored)
	for i := range r {
		if i > 0 {
			require.Less(o.t, addrs[i-1], addrs[i])
		}
		o.refs = append(o.refs, specRef{addrs[i], targets[i], b[24+40*f+4*s+8*r+i]})
	}
}

// specPage returns the page of v at a page address.
func specPage(v vm, a uint32) []byte {
	return v[a>>31][int(a<<1>>1)*4096:][:4096]
}

// apply returns the launch image, and the overlay's id by its content.
func (o *specOverlay) apply(base, parent vm) (vm, string) {
	out := parent.clone()
	pages := map[uint32][]byte{} // by address: everything that the index lists
	for i, f := range o.frames {
		p := f.bytes
		var from []byte // the frame's base pages
		for _, a := range f.addrs {
			from = append(from, specPage(base, a)...)
		}
		size := len(from)
		if f.delta == 2 {
			size = int(binary.LittleEndian.Uint32(p))
			p = p[4:]
		}
		stride := 0
		if f.delta == 4 {
			stride = int(p[0]) + 256*int(p[1])
			require.Zero(o.t, stride%4)
			require.True(o.t, stride >= 4 && stride <= 4092)
			p = p[2:]
		}
		switch f.codec {
		case 0:
		case 1:
			var dict []zstd.DOption
			if f.delta == 3 {
				dict = append(dict, zstd.WithDecoderDictRaw(0, from))
			}
			p = o.zstd(p, dict...)
		case 2:
			r, err := xz.NewReader(bytes.NewReader(p))
			require.NoError(o.t, err)
			p, err = io.ReadAll(r)
			require.NoError(o.t, err)
		default:
			require.Fail(o.t, fmt.Sprintf("frame %d has codec %d", i, f.codec))
		}
		require.Len(o.t, p, size)
		if f.delta == 2 {
			delta := p
			p = make([]byte, len(from))
			require.NoError(o.t, vcdiff.Apply(p, from, delta))
		}
		for at := stride; stride > 0 && at < len(p); at += 4 {
			sum := binary.LittleEndian.Uint32(p[at:]) + binary.LittleEndian.Uint32(p[at-stride:])
			binary.LittleEndian.PutUint32(p[at:], sum)
		}
		for k, a := range f.addrs {
			page := bytes.Clone(p[4096*k : 4096*k+4096])
			if f.delta == 1 {
				for j, c := range specPage(base, a) {
					page[j] ^= c
				}
			}
			require.NotContains(o.t, pages, a)
			pages[a] = page
		}
	}
	fromRef := map[uint32][]byte{}
	for _, r := range o.refs {
		require.NotContains(o.t, pages, r.addr)
		switch r.kind {
		case 0:
			require.Zero(o.t, r.target)
			fromRef[r.addr] = make([]byte, 4096)
		case 1:
			fromRef[r.addr] = specPage(base, r.target)
		case 2:
			require.Greater(o.t, o.m.Depth, 1)
			fromRef[r.addr] = specPage(parent, r.target)
		case 3:
			require.Contains(o.t, pages, r.target)
			fromRef[r.addr] = pages[r.target]
		default:
			require.Fail(o.t, fmt.Sprintf("reference with kind %d", r.kind))
		}
	}
	for a, p := range fromRef {
		pages[a] = p
	}
	return out, o.identity(out, parent, pages)
}

// identity puts the pages into v and returns the id they give.
func (o *specOverlay) identity(v, parent vm, pages map[uint32][]byte) string {
	unhex := func(s string) []byte {
		if s == "" {
			return make([]byte, 32)
		}
		b, err := hex.DecodeString(s)
		require.NoError(o.t, err)
		return b
	}
	var machine bytes.Buffer
	require.NoError(o.t, json.Compact(&machine, o.m.Machine))
	require.LessOrEqual(o.t, machine.Len(), 64<<10)
	id := bytes.NewBufferString("cloudlet-overlay-1\n")
	id.Write(unhex(o.m.Parent))
	id.Write(unhex(specHash(machine.Bytes())))
	id.Write(unhex(o.m.State))
	require.NoError(o.t, binary.Write(id, binary.LittleEndian, []uint64{uint64(o.m.MemorySize), uint64(o.m.DiskSize)}))
	addrs := make([]uint32, 0, len(pages))
	for a := range pages {
		addrs = append(addrs, a)
	}
	sort.Slice(addrs, func(i, j int) bool { return addrs[i] < addrs[j] })
	for _, a := range addrs {
		require.NotEqual(o.t, specPage(parent, a), pages[a], "page %#x is equal to the parent's", a)
		copy(specPage(v, a), pages[a])
		require.NoError(o.t, binary.Write(id, binary.LittleEndian, a))
		id.Write(unhex(specHash(pages[a])))
	}
	s := o.m.Stats
	require.Equal(o.t, len(addrs), s.Memory.Modified+s.Disk.Modified)
	require.Equal(o.t, len(o.refs), s.Memory.Zero+s.Memory.Base+s.Memory.Parent+s.Memory.Self+s.Disk.Zero+s.Disk.Base+s.Disk.Parent+s.Disk.Self)
	require.Equal(o.t, len(addrs)-len(o.refs), s.Memory.Stored+s.Disk.Stored)
	require.Equal(o.t, len(o.frames), s.Frames)
	require.Equal(o.t, o.m.Members["frames"].Size, s.FrameBytes)
	return specHash(id.Bytes())
}

// TestSpec: a reader that knows doc.go only finds in the files of Create what went in.
func TestSpec(t *testing.T) {
	for _, text := range append(everyStrategy(), "small,frame=16K", "balanced,delta=none,frame=4K,hot=4K") {
		t.Run(text, func(t *testing.T) {
			rng := newRand(t)
			v := newVM(rng, 300, 200)
			base := newBase(t, v)
			parent, parentID := v, base.ID().String()
			var chain []*Reader
			for depth := 1; depth <= 3; depth++ {
				w := parent.clone()
				w.mutate(rng, 4)
				copy(w.page(Addr(depth)), parent.page(Addr(200+depth))) // moved within
				for page := range Addr(20) {
					fillRecords(w.page(20+page), 8+4*(depth+int(page%2)), uint32(page)*5000+uint32(depth))
				}
				l := launch(newImage(t, base, chain...), w)
				l.Profile = []Addr{MakeAddr(Disk, 7), 9, 8, MakeAddr(Disk, 11), 250}
				if depth == 2 {
					l.State, l.Profile = nil, nil
				}
				b, made := create(t, l, CreateOptions{Strategy: strategy(t, text)})
				o := specOpen(t, b)
				have, id := o.apply(v, parent)
				require.True(t, bytes.Equal(w[Memory], have[Memory]))
				require.True(t, bytes.Equal(w[Disk], have[Disk]))
				require.Equal(t, made.ID.String(), id)
				if s := openBytes(t, b); s.manifest.Strategy.Stride && s.manifest.Strategy.Codec != CodecNone && depth == 1 {
					require.Positive(t, stridePages(s))
				}
				require.Equal(t, made.ID.String(), o.m.ID)
				require.Equal(t, made.Digest.String(), o.digest)
				require.Equal(t, parentID, o.m.Parent)
				require.Equal(t, base.ID().String(), o.m.Base)
				require.Equal(t, depth, o.m.Depth)
				require.Equal(t, l.State, o.state)
				require.Len(t, o.profile, len(l.Profile))
				for i, a := range l.Profile {
					require.EqualValues(t, a, o.profile[i])
				}
				parent, parentID = w, id
				chain = append(chain, openBytes(t, b))
			}
		})
	}
}
