package overlay

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sort"
)

const (
	indexMagic  = "CLOVIDX1"
	indexHeader = 24
	frameRecord = 40 // bytes of the five frame columns together
	refRecord   = 9
)

// refKind is what a reference says of its page; the numbers are the format's.
type refKind uint8

const (
	refZero   refKind = 0
	refBase   refKind = 1
	refParent refKind = 2
	refSelf   refKind = 3
	refKinds          = 4
)

// frame is one row of the frame table.
type frame struct {
	hash    Hash
	encoded uint32
	pages   uint16
	codec   Codec
	delta   Delta
	first   int   // number of its first page among the stored pages; not in the file
	offset  int64 // from the start of the member "frames"; not in the file
}

// ref is a page that is stored elsewhere.
type ref struct {
	addr, target Addr
	kind         refKind
}

// index is the decoded index of an overlay.
type index struct {
	frames []frame
	stored []Addr
	refs   []ref
	// sorted holds every address in the index, ascending: address in the upper half, the
	// entry in the lower: below len(stored) a stored page, else len(stored) + reference.
	sorted []uint64
}

func (x *index) marshal() []byte {
	le := binary.LittleEndian
	b := make([]byte, 0, indexHeader+frameRecord*len(x.frames)+4*len(x.stored)+refRecord*len(x.refs))
	b = append(b, indexMagic...)
	b = le.AppendUint32(b, uint32(len(x.frames)))
	b = le.AppendUint32(b, uint32(len(x.stored)))
	b = le.AppendUint32(b, uint32(len(x.refs)))
	b = le.AppendUint32(b, 0)
	for i := range x.frames {
		b = append(b, x.frames[i].hash[:]...)
	}
	for i := range x.frames {
		b = le.AppendUint32(b, x.frames[i].encoded)
	}
	for i := range x.frames {
		b = le.AppendUint16(b, x.frames[i].pages)
	}
	for i := range x.frames {
		b = append(b, byte(x.frames[i].codec))
	}
	for i := range x.frames {
		b = append(b, byte(x.frames[i].delta))
	}
	var last Addr
	put := func(a Addr) {
		b = le.AppendUint32(b, uint32(a-last))
		last = a
	}
	for _, a := range x.stored {
		put(a)
	}
	last = 0
	for i := range x.refs {
		put(x.refs[i].addr)
	}
	last = 0
	for i := range x.refs {
		put(x.refs[i].target)
	}
	for i := range x.refs {
		b = append(b, byte(x.refs[i].kind))
	}
	return b
}

// parseIndex decodes and checks an index. m gives the sizes that addresses and frames must
// keep to.
func parseIndex(b []byte, m *Manifest) (*index, error) {
	le := binary.LittleEndian
	if len(b) < indexHeader || string(b[:8]) != indexMagic || le.Uint32(b[20:]) != 0 {
		return nil, errors.New("index has no valid header")
	}
	nf, ns, nr := uint64(le.Uint32(b[8:])), uint64(le.Uint32(b[12:])), uint64(le.Uint32(b[16:]))
	if uint64(len(b)) != indexHeader+frameRecord*nf+4*ns+refRecord*nr {
		return nil, fmt.Errorf("index of %d frames, %d pages and %d references has %d bytes", nf, ns, nr, len(b))
	}
	x := &index{frames: make([]frame, nf), stored: make([]Addr, ns), refs: make([]ref, nr)}
	if err := x.parseFrames(b[indexHeader:], m); err != nil {
		return nil, err
	}
	col := b[indexHeader+frameRecord*nf:]
	var last Addr
	next := func() Addr {
		last += Addr(le.Uint32(col))
		col = col[4:]
		return last
	}
	for i := range x.stored {
		x.stored[i] = next()
	}
	last = 0
	for i := range x.refs {
		x.refs[i].addr = next()
	}
	last = 0
	for i := range x.refs {
		x.refs[i].target = next()
	}
	for i := range x.refs {
		x.refs[i].kind = refKind(col[i])
	}
	if err := x.sort(m); err != nil {
		return nil, err
	}
	return x, x.checkRefs(m)
}

func (x *index) parseFrames(b []byte, m *Manifest) error {
	le := binary.LittleEndian
	n := len(x.frames)
	var offset int64
	first := 0
	for i := range x.frames {
		f := &x.frames[i]
		copy(f.hash[:], b[32*i:])
		f.encoded = le.Uint32(b[32*n+4*i:])
		f.pages = le.Uint16(b[36*n+2*i:])
		f.codec, f.delta = Codec(b[38*n+i]), Delta(b[39*n+i])
		f.first, f.offset = first, offset
		switch {
		case f.pages < 1 || f.pages > MaxFramePages:
			return fmt.Errorf("frame %d has %d pages", i, f.pages)
		case f.encoded < 1 || int(f.encoded) > int(f.pages)*PageSize:
			return fmt.Errorf("frame %d of %d pages has %d encoded bytes", i, f.pages, f.encoded)
		case int(f.codec) >= len(codecNames) || int(f.delta) >= len(deltaNames):
			return fmt.Errorf("frame %d has unknown codec %d or delta %d", i, f.codec, f.delta)
		case f.delta == DeltaDict && f.codec != CodecZstd:
			return fmt.Errorf("frame %d has a dictionary and codec %s", i, f.codec)
		case f.delta == DeltaStride && f.codec == CodecNone:
			return fmt.Errorf("frame %d has a stride and no codec", i)
		case f.delta == DeltaVCDIFF && f.encoded <= vcdiffHead || f.delta == DeltaStride && f.encoded <= strideHead:
			return fmt.Errorf("frame %d has a delta and %d bytes", i, f.encoded)
		case f.codec == CodecNone && f.delta != DeltaVCDIFF && int(f.encoded) != int(f.pages)*PageSize:
			return fmt.Errorf("plain frame %d of %d pages has %d bytes", i, f.pages, f.encoded)
		}
		first += int(f.pages)
		offset += int64(f.encoded)
	}
	if first != len(x.stored) {
		return fmt.Errorf("frames have %d pages, index lists %d", first, len(x.stored))
	}
	if offset != m.Members.Frames.Size {
		return fmt.Errorf("frames have %d bytes, manifest says %d", offset, m.Members.Frames.Size)
	}
	return nil
}

// sort fills x.sorted and refuses addresses out of range and repeated ones.
func (x *index) sort(m *Manifest) error {
	x.sorted = make([]uint64, 0, len(x.stored)+len(x.refs))
	for i, a := range x.stored {
		x.sorted = append(x.sorted, uint64(a)<<32|uint64(i))
	}
	for i, r := range x.refs {
		x.sorted = append(x.sorted, uint64(r.addr)<<32|uint64(len(x.stored)+i))
		if i > 0 && r.addr <= x.refs[i-1].addr {
			return fmt.Errorf("references are not in order at %s", r.addr)
		}
	}
	slices.Sort(x.sorted)
	for i, e := range x.sorted {
		a := Addr(e >> 32)
		if !m.holds(a) {
			return fmt.Errorf("%s is outside of the image", a)
		}
		if i > 0 && a == Addr(x.sorted[i-1]>>32) {
			return fmt.Errorf("%s stands twice in the index", a)
		}
	}
	return nil
}

func (x *index) checkRefs(m *Manifest) error {
	for i := range x.refs {
		r := &x.refs[i]
		switch {
		case r.kind >= refKinds:
			return fmt.Errorf("%s has unknown kind %d", r.addr, r.kind)
		case r.kind == refZero && r.target != 0:
			return fmt.Errorf("%s is zero and has a target", r.addr)
		case r.kind != refZero && !m.holds(r.target):
			return fmt.Errorf("%s refers to %s, outside of the image", r.addr, r.target)
		case r.kind == refParent && m.Depth == 1:
			return fmt.Errorf("%s refers to a parent overlay, but the parent is a base", r.addr)
		case r.kind == refSelf:
			if e, ok := x.lookup(r.target); !ok || e >= len(x.stored) {
				return fmt.Errorf("%s refers to %s, which is not stored here", r.addr, r.target)
			}
		}
	}
	return nil
}

// holds reports whether a lies within the images.
func (m *Manifest) holds(a Addr) bool { return a.Offset() < m.Size(a.Space()) }

// lookup returns the entry of a: below len(stored) a stored page, else len(stored) + a
// reference's number.
func (x *index) lookup(a Addr) (entry int, ok bool) {
	key := uint64(a) << 32
	i := sort.Search(len(x.sorted), func(i int) bool { return x.sorted[i] >= key })
	if i == len(x.sorted) || Addr(x.sorted[i]>>32) != a {
		return 0, false
	}
	return int(uint32(x.sorted[i])), true
}

// frameOf returns the number of the frame that holds stored page number i.
func (x *index) frameOf(i int) int {
	return sort.Search(len(x.frames), func(f int) bool { return x.frames[f].first > i }) - 1
}

func (x *index) stats(m *Manifest) Stats {
	var s Stats
	for _, a := range x.stored {
		s.of(a.Space()).Stored++
	}
	for i := range x.refs {
		p := s.of(x.refs[i].addr.Space())
		*[refKinds]*int64{&p.Zero, &p.Base, &p.Parent, &p.Self}[x.refs[i].kind]++
	}
	for _, p := range []*PageStats{&s.Memory, &s.Disk} {
		p.Modified = p.Zero + p.Base + p.Parent + p.Self + p.Stored
	}
	s.Frames, s.FrameBytes = len(x.frames), m.Members.Frames.Size
	return s
}
