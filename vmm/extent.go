package vmm

import (
	"fmt"
	"os"
	"slices"
)

// Extent is a range of an image that has changed, in bytes; a multiple of 4096 long and so
// aligned. Zero: all its bytes are zero, by content or because they were discarded.
type Extent struct {
	Off  int64 `json:"off"`
	Len  int64 `json:"len"`
	Zero bool  `json:"zero,omitempty"`
}

// segment is an extent and where its bytes are in a file.
type segment struct {
	Extent
	at int64
}

// segments are in order of Off and do not overlap.
type segments []segment

// add appends a segment, to the last one where it follows in image and file.
func (ss segments) add(s segment) segments {
	if len(ss) > 0 {
		last := &ss[len(ss)-1]
		if last.Zero == s.Zero && last.Off+last.Len == s.Off && (s.Zero || last.at+last.Len == s.at) {
			last.Len += s.Len
			return ss
		}
	}
	return append(ss, s)
}

func (ss segments) extents() []Extent {
	out := make([]Extent, len(ss))
	for i, s := range ss {
		out[i] = s.Extent
	}
	return out
}

// zeros returns how many bytes are zero.
func (ss segments) zeros() int64 {
	var n int64
	for _, s := range ss {
		if s.Zero {
			n += s.Len
		}
	}
	return n
}

// read reads p at off, which must lie in segments wholly.
func (ss segments) read(f *os.File, p []byte, off int64) error {
	if off%pageSize != 0 || len(p)%pageSize != 0 {
		return fmt.Errorf("read %d bytes at %d: not aligned to pages of %d", len(p), off, pageSize)
	}
	i, _ := slices.BinarySearchFunc(ss, off, func(s segment, off int64) int {
		if s.Off+s.Len <= off {
			return -1
		}
		return 1
	})
	for ; len(p) > 0; i++ {
		if i == len(ss) || ss[i].Off > off {
			return fmt.Errorf("read %d bytes at %d: they have not changed and are not here", len(p), off)
		}
		s := ss[i]
		n := min(int64(len(p)), s.Off+s.Len-off)
		if s.Zero {
			clear(p[:n])
		} else if _, err := f.ReadAt(p[:n], s.at+off-s.Off); err != nil {
			return fmt.Errorf("read %d bytes at %d: %w", n, off, err)
		}
		p, off = p[n:], off+n
	}
	return nil
}
