package overlay

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// The members of an overlay, in the order of the file.
const (
	memberManifest = iota
	memberIndex
	memberState
	memberProfile
	memberFrames
	memberCount
)

var memberNames = [memberCount]string{"manifest.json", "index", "state", "profile", "frames"}

const (
	zipLocalMagic    = 0x04034b50
	zipCentralMagic  = 0x02014b50
	zip64EndMagic    = 0x06064b50
	zip64LocateMagic = 0x07064b50
	zipEndMagic      = 0x06054b50
	zipMax32         = 0xFFFFFFFE // at and over this a value goes to zip64 fields
	zipDate          = 0x0021     // 1 January 1980
	zipAlignID       = 0x4C43
	zipLocalSize     = 30
)

// zipMember is one stored member: everything its headers are made of.
type zipMember struct {
	name   string
	crc    uint32
	size   int64
	header int64 // offset of its local header
	data   int64 // offset of its first byte
}

// layoutMember places a member whose local header begins at off and returns it with the
// bytes of that header. align brings its data to a multiple of PageSize.
func layoutMember(name string, crc uint32, size, off int64, align bool) (zipMember, []byte) {
	m := zipMember{name: name, crc: crc, size: size, header: off}
	extra := zip64Extra(uint64(size), uint64(size))
	if size < zipMax32 {
		extra = nil
	}
	if align {
		end := off + zipLocalSize + int64(len(name)+len(extra)) + 4
		extra = binary.LittleEndian.AppendUint16(extra, zipAlignID)
		pad := -end & (PageSize - 1)
		extra = binary.LittleEndian.AppendUint16(extra, uint16(pad))
		extra = append(extra, make([]byte, pad)...)
	}
	h := binary.LittleEndian.AppendUint32(nil, zipLocalMagic)
	h = m.appendCommon(h, len(extra))
	h = append(h, name...)
	h = append(h, extra...)
	m.data = off + int64(len(h))
	return m, h
}

// appendCommon appends the fields that local header and directory share.
func (m *zipMember) appendCommon(b []byte, extra int) []byte {
	version, size := uint16(20), uint32(m.size)
	if m.size >= zipMax32 {
		version, size = 45, 0xFFFFFFFF
	}
	le := binary.LittleEndian
	b = le.AppendUint16(b, version)
	b = le.AppendUint16(b, 0) // flags
	b = le.AppendUint16(b, 0) // method: stored
	b = le.AppendUint16(b, 0) // time
	b = le.AppendUint16(b, zipDate)
	b = le.AppendUint32(b, m.crc)
	b = le.AppendUint32(b, size)
	b = le.AppendUint32(b, size)
	b = le.AppendUint16(b, uint16(len(m.name)))
	return le.AppendUint16(b, uint16(extra))
}

func zip64Extra(values ...uint64) []byte {
	b := binary.LittleEndian.AppendUint16(nil, 1)
	b = binary.LittleEndian.AppendUint16(b, uint16(8*len(values)))
	for _, v := range values {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	return b
}

// zipDirectory returns the bytes that end an archive of these members: central directory
// and end records (APPNOTE 4.3.12 to 4.3.16).
func zipDirectory(members []zipMember) []byte {
	le := binary.LittleEndian
	last := members[len(members)-1]
	start := last.data + last.size
	var b []byte
	for _, m := range members {
		var big []uint64
		if m.size >= zipMax32 {
			big = append(big, uint64(m.size), uint64(m.size))
		}
		header := uint32(m.header)
		if m.header >= zipMax32 {
			big, header = append(big, uint64(m.header)), 0xFFFFFFFF
		}
		var extra []byte
		if big != nil {
			extra = zip64Extra(big...)
		}
		b = le.AppendUint32(b, zipCentralMagic)
		b = le.AppendUint16(b, 3<<8|45) // made by: Unix, 4.5
		b = m.appendCommon(b, len(extra))
		b = le.AppendUint16(b, 0)                    // comment
		b = le.AppendUint16(b, 0)                    // disk
		b = le.AppendUint16(b, 0)                    // internal attributes
		b = le.AppendUint32(b, uint32(0o100644)<<16) // external attributes
		b = le.AppendUint32(b, header)
		b = append(b, m.name...)
		b = append(b, extra...)
	}
	size, n := int64(len(b)), uint64(len(members))
	start32 := uint32(start)
	if start >= zipMax32 {
		start32 = 0xFFFFFFFF
		b = le.AppendUint32(b, zip64EndMagic)
		b = le.AppendUint64(b, 44)
		b = le.AppendUint16(b, 3<<8|45)
		b = le.AppendUint16(b, 45)
		b = le.AppendUint64(b, 0) // two disk numbers
		b = le.AppendUint64(b, n)
		b = le.AppendUint64(b, n)
		b = le.AppendUint64(b, uint64(size))
		b = le.AppendUint64(b, uint64(start))
		b = le.AppendUint32(b, zip64LocateMagic)
		b = le.AppendUint32(b, 0)
		b = le.AppendUint64(b, uint64(start+size))
		b = le.AppendUint32(b, 1)
	}
	b = le.AppendUint32(b, zipEndMagic)
	b = le.AppendUint32(b, 0) // two disk numbers
	b = le.AppendUint16(b, uint16(n))
	b = le.AppendUint16(b, uint16(n))
	b = le.AppendUint32(b, uint32(size))
	b = le.AppendUint32(b, start32)
	return le.AppendUint16(b, 0)
}

// parseLocal reads the local header of member number i at off from b, which begins there.
// It returns errShort where b is too short to tell.
func parseLocal(b []byte, i int, off int64) (zipMember, error) {
	name := memberNames[i]
	if len(b) < zipLocalSize {
		return zipMember{}, errShort
	}
	if binary.LittleEndian.Uint32(b) != zipLocalMagic {
		return zipMember{}, fmt.Errorf("no zip member %q at offset %d", name, off)
	}
	size := int64(binary.LittleEndian.Uint32(b[22:]))
	total := zipLocalSize + int(binary.LittleEndian.Uint16(b[26:])) + int(binary.LittleEndian.Uint16(b[28:]))
	if total > zipLocalSize+len(name)+20+4+PageSize {
		return zipMember{}, fmt.Errorf("zip header of member %q is %d bytes long", name, total)
	}
	if len(b) < total {
		return zipMember{}, errShort
	}
	if at := zipLocalSize + len(name) + 4; size == 0xFFFFFFFF && total >= at+8 {
		size = int64(binary.LittleEndian.Uint64(b[at:]) & (1<<62 - 1))
	}
	m, want := layoutMember(name, binary.LittleEndian.Uint32(b[14:]), size, off, i == memberFrames)
	if !bytes.Equal(b[:total], want) {
		return zipMember{}, fmt.Errorf("zip header of member %q is not as an overlay's", name)
	}
	return m, nil
}
