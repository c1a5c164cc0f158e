package overlay

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sort"

	"golang.org/x/sys/unix"
)

// Extent is a range of an image, in bytes, both multiples of PageSize. Zero says that all of
// it is zero, so that it need not be read.
type Extent struct {
	Off, Len int64
	Zero     bool
}

// Changes is one image of a launch VM as far as it may differ from its parent: a superset is
// fine, pages equal to the parent's are dropped. The content must not change while an
// overlay is made of it.
type Changes struct {
	// Extents are ascending and do not overlap. Outside of them the image is the parent's.
	Extents []Extent
	// Read fills p, whole pages, from offset off; they lie in extents that are not Zero, and
	// may span several that follow one another; safe for concurrent use.
	Read func(p []byte, off int64) error

	size int64 // of the whole image; 0: not known
}

// FileChanges takes a raw image file as the launch VM's whole disk or memory. Holes are zero.
// The file must stay open and unchanged until the overlay is made.
func FileChanges(f *os.File) (Changes, error) {
	info, err := f.Stat()
	if err != nil {
		return Changes{}, err
	}
	size := info.Size()
	if size%PageSize != 0 {
		return Changes{}, fmt.Errorf("image %s: its size %d is not a multiple of %d", f.Name(), size, PageSize)
	}
	c := Changes{size: size, Read: func(p []byte, off int64) error {
		if _, err := f.ReadAt(p, off); err != nil {
			return fmt.Errorf("read image %s at %d: %w", f.Name(), off, err)
		}
		return nil
	}}
	for off := int64(0); off < size; {
		data, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			data = size
		} else if err != nil {
			return c, fmt.Errorf("seek data in %s: %w", f.Name(), err)
		}
		data &^= PageSize - 1
		if data > off {
			c.Extents = append(c.Extents, Extent{Off: off, Len: data - off, Zero: true})
		}
		if data == size {
			break
		}
		hole, err := unix.Seek(int(f.Fd()), data, unix.SEEK_HOLE)
		if err != nil {
			return c, fmt.Errorf("seek hole in %s: %w", f.Name(), err)
		}
		hole = (hole + PageSize - 1) &^ (PageSize - 1)
		c.Extents = append(c.Extents, Extent{Off: data, Len: hole - data})
		off = hole
	}
	return c, nil
}

// check refuses extents that are not aligned, ascending and within size.
func (c *Changes) check(s Space, size int64) error {
	if c.size != 0 && c.size != size {
		return fmt.Errorf("changes of %s: the file has %d bytes, the parent's %s has %d", s, c.size, s, size)
	}
	var end int64
	for _, e := range c.Extents {
		if e.Off%PageSize != 0 || e.Len%PageSize != 0 || e.Len <= 0 || e.Off < end || e.Len > size-e.Off {
			return fmt.Errorf("changes of %s: extent of %d bytes at %d behind %d in an image of %d", s, e.Len, e.Off, end, size)
		}
		end = e.Off + e.Len
	}
	return nil
}

// Changes returns what the last overlay of the image changes of image s, nothing where there
// is none. No extent is marked Zero. The image must stay open as long as it is read, and ctx
// ends the reading.
func (im *Image) Changes(ctx context.Context, s Space) Changes {
	return imageChanges(ctx, im, s, max(len(im.chain)-1, 0))
}

// imageChanges returns what the overlays of an image from level on change of s.
func imageChanges(ctx context.Context, im *Image, s Space, level int) Changes {
	var pages []int64
	for _, r := range im.chain[level:] {
		for _, e := range r.index.sorted {
			if a := Addr(e >> 32); a.Space() == s {
				pages = append(pages, a.Page())
			}
		}
	}
	slices.Sort(pages)
	c := Changes{Read: func(p []byte, off int64) error { return im.ReadPages(ctx, s, p, off) }}
	for _, n := range slices.Compact(pages) {
		off := n * PageSize
		if last := len(c.Extents) - 1; last >= 0 && c.Extents[last].Off+c.Extents[last].Len == off {
			c.Extents[last].Len += PageSize
		} else {
			c.Extents = append(c.Extents, Extent{Off: off, Len: PageSize})
		}
	}
	return c
}

// over lays c over below: where both have an extent, c counts.
func (c Changes) over(below Changes) Changes {
	out := Changes{Read: func(p []byte, off int64) error { return c.readOver(below, p, off) }, size: c.size}
	rest := slices.Clone(below.Extents)
	for _, e := range c.Extents {
		for len(rest) > 0 && rest[0].Off < e.Off {
			b := rest[0]
			b.Len = min(b.Len, e.Off-b.Off)
			out.Extents = append(out.Extents, b)
			rest = skipTo(rest, b.Off+b.Len)
		}
		out.Extents = append(out.Extents, e)
		rest = skipTo(rest, e.Off+e.Len)
	}
	out.Extents = append(out.Extents, rest...)
	return out
}

// skipTo returns the extents from off on; it cuts the first of them where it must.
func skipTo(ext []Extent, off int64) []Extent {
	for len(ext) > 0 && ext[0].Off+ext[0].Len <= off {
		ext = ext[1:]
	}
	if len(ext) > 0 && ext[0].Off < off {
		ext[0].Off, ext[0].Len = off, ext[0].Off+ext[0].Len-off
	}
	return ext
}

func (c Changes) readOver(below Changes, p []byte, off int64) error {
	for len(p) > 0 {
		from, zero, n := below, false, int64(len(p))
		i := sort.Search(len(c.Extents), func(i int) bool { return c.Extents[i].Off+c.Extents[i].Len > off })
		if i < len(c.Extents) {
			if e := c.Extents[i]; e.Off > off {
				n = min(n, e.Off-off)
			} else {
				from, zero, n = c, e.Zero, min(n, e.Off+e.Len-off)
			}
		}
		if zero {
			clear(p[:n])
		} else if err := from.Read(p[:n], off); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

// withoutHoles returns c without the zeros that need no look at the parent: where the base's
// file has a hole too, and no overlay of im changes it.
func (c Changes) withoutHoles(ctx context.Context, im *Image, s Space) Changes {
	if !slices.ContainsFunc(c.Extents, func(e Extent) bool { return e.Zero }) {
		return c
	}
	data := imageChanges(ctx, im, s, 0).over(Changes{Extents: im.base.dataExtents(s)}).Extents
	var out []Extent
	for _, e := range c.Extents {
		if !e.Zero {
			out = append(out, e)
			continue
		}
		for len(data) > 0 && data[0].Off+data[0].Len <= e.Off {
			data = data[1:]
		}
		for _, d := range data {
			if d.Off >= e.Off+e.Len {
				break
			}
			from := max(d.Off, e.Off)
			out = append(out, Extent{Off: from, Len: min(d.Off+d.Len, e.Off+e.Len) - from, Zero: true})
		}
	}
	c.Extents = out
	return c
}

// dataExtents returns where the file of image s may hold more than zeros.
func (b *Base) dataExtents(s Space) (ext []Extent) {
	size := b.Size(s)
	for off := int64(0); off < size; {
		start, end := baseExtent(b.images[s].file, off, size)
		if start < end {
			ext = append(ext, Extent{Off: start, Len: end - start})
		}
		off = end
	}
	return ext
}

// scanChunk is the size of one step of the scan, in bytes.
const scanChunk = 1 << 20

// chunks calls yield for every chunk of at most scanChunk bytes of the extents.
func (c *Changes) chunks(yield func(Extent) error) error {
	for _, e := range c.Extents {
		for e.Len > 0 {
			n := min(e.Len, scanChunk)
			if err := yield(Extent{e.Off, n, e.Zero}); err != nil {
				return err
			}
			e.Off, e.Len = e.Off+n, e.Len-n
		}
	}
	return nil
}

func (c *Changes) bytes() (n int64) {
	for _, e := range c.Extents {
		n += e.Len
	}
	return n
}
