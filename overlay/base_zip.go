package overlay

import (
	"archive/zip"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/klauspost/compress/flate"
	"golang.org/x/sync/errgroup"
)

// baseZipDate is the date of every member: the earliest a zip can hold.
var baseZipDate = time.Date(1980, 1, 1, 0, 0, 0, 0, time.UTC)

// Export writes the base as a zip whose members are the files of its folder, without the
// derived ones, deflated. The same base gives the same bytes. Pages are verified on the
// way, and a damaged one ends the export. It needs some tens of MiB of memory.
func (b *Base) Export(ctx context.Context, w io.Writer, p Progress) error {
	members := b.man.members()
	track := &baseTracker{phase: "export base", p: p}
	for _, m := range members {
		track.total += m.size
	}
	manifest, err := encodeBaseManifest(&b.man)
	if err != nil {
		return err
	}
	out := bufio.NewWriterSize(w, 1<<20)
	zw := zip.NewWriter(out)
	zw.RegisterCompressor(zip.Deflate, func(w io.Writer) (io.WriteCloser, error) { return newBaseDeflater(w), nil })
	add := func(name string, fill func(io.Writer) error) error {
		h := &zip.FileHeader{Name: name, Method: zip.Deflate, Modified: baseZipDate}
		h.SetMode(0o644)
		mw, err := zw.CreateHeader(h)
		if err == nil {
			err = fill(mw)
		}
		if err != nil {
			return fmt.Errorf("export base %.12s: write member %s: %w", b.id, name, err)
		}
		return nil
	}
	err = add(BaseManifestFile, func(w io.Writer) error { _, err := w.Write(manifest); return err })
	for _, m := range members {
		if err != nil {
			return err
		}
		err = add(m.name, func(w io.Writer) error {
			if m.name == Memory.String() || m.name == Disk.String() {
				s := Memory
				if m.name == Disk.String() {
					s = Disk
				}
				return b.exportImage(ctx, w, s, track)
			}
			return b.exportFile(ctx, w, m, track)
		})
	}
	if err == nil {
		err = errors.Join(zw.Close(), out.Flush())
	}
	return err
}

// exportImage writes an image, its pages verified.
func (b *Base) exportImage(ctx context.Context, w io.Writer, s Space, track *baseTracker) error {
	buf := make([]byte, 8*baseChunkSize)
	zero := make([]byte, baseChunkSize)
	return eachBaseChunk(b.images[s].file, b.Size(s), func(c baseChunk) error {
		for n := int64(0); n < c.n; {
			if err := ctx.Err(); err != nil {
				return err
			}
			p := zero[:min(c.n-n, baseChunkSize)]
			if !c.hole {
				p = buf[:c.n]
				if err := b.ReadVerified(s, p, c.off); err != nil {
					return err
				}
			} else if err := b.checkHole(s, c.off+n, int64(len(p))); err != nil {
				return err
			}
			if _, err := w.Write(p); err != nil {
				return err
			}
			n += int64(len(p))
			track.add(int64(len(p)))
		}
		return nil
	})
}

// checkHole checks that the hashes of a range that reads as zero say zero.
func (b *Base) checkHole(s Space, off, n int64) error {
	hashes := make([]Hash, n/PageSize)
	if err := b.PageHashes(s, off/PageSize, hashes); err != nil {
		return err
	}
	for i, h := range hashes {
		if h != baseZeroHash {
			return &BasePageError{Base: b.id, Addr: MakeAddr(s, off/PageSize+int64(i))}
		}
	}
	return nil
}

// exportFile writes a plain member; what it should hash to, the importer checks.
func (b *Base) exportFile(ctx context.Context, w io.Writer, m baseMember, track *baseTracker) error {
	f, err := openBaseFile(filepath.Join(b.dir, m.name))
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, baseChunkSize)
	for off := int64(0); off < m.size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		p := buf[:min(int64(len(buf)), m.size-off)]
		if _, err := f.ReadAt(p, off); err != nil {
			return baseNoEOF(err)
		}
		if _, err := w.Write(p); err != nil {
			return err
		}
		off += int64(len(p))
		track.add(int64(len(p)))
	}
	return nil
}

// baseDeflater deflates blocks of 1 MiB each by itself, several at a time, and joins them
// into one stream: the bytes depend on the input alone. The block of zeros is made once.
type baseDeflater struct {
	w       io.Writer
	pending [][]byte // the last one may be short
	free    [][]byte
	workers int
	zero    []byte // a block of zeros, deflated
}

func newBaseDeflater(w io.Writer) *baseDeflater {
	return &baseDeflater{w: w, workers: max(2, runtime.GOMAXPROCS(0))}
}

// Write deflates whole blocks as enough of them have come.
func (d *baseDeflater) Write(p []byte) (n int, err error) {
	n = len(p)
	for len(p) > 0 {
		last := len(d.pending) - 1
		if last < 0 || len(d.pending[last]) == baseChunkSize {
			if len(d.pending) == 4*d.workers {
				if err := d.flush(); err != nil {
					return 0, err
				}
			}
			d.pending = append(d.pending, d.block())
			last = len(d.pending) - 1
		}
		b := d.pending[last]
		take := min(len(p), baseChunkSize-len(b))
		d.pending[last] = append(b, p[:take]...)
		p = p[take:]
	}
	return n, nil
}

func (d *baseDeflater) block() []byte {
	if n := len(d.free); n > 0 {
		b := d.free[n-1]
		d.free = d.free[:n-1]
		return b[:0]
	}
	return make([]byte, 0, baseChunkSize)
}

// flush deflates the pending blocks side by side and writes them in order.
func (d *baseDeflater) flush() error {
	out := make([][]byte, len(d.pending))
	var g errgroup.Group
	g.SetLimit(d.workers)
	for i, b := range d.pending {
		if len(b) == baseChunkSize && baseAllZero(b) {
			if d.zero == nil {
				var err error
				if d.zero, err = deflateBaseBlock(b); err != nil {
					return err
				}
			}
			out[i] = d.zero
			continue
		}
		g.Go(func() (err error) {
			out[i], err = deflateBaseBlock(b)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	d.free, d.pending = append(d.free, d.pending...), d.pending[:0]
	for _, p := range out {
		if _, err := d.w.Write(p); err != nil {
			return err
		}
	}
	return nil
}

// Close writes what is pending and ends the stream with an empty final block.
func (d *baseDeflater) Close() error {
	if err := d.flush(); err != nil {
		return err
	}
	_, err := d.w.Write([]byte{1, 0, 0, 0xff, 0xff})
	return err
}

// deflateBaseBlock returns b deflated on its own, ended at a byte boundary and not final.
func deflateBaseBlock(b []byte) ([]byte, error) {
	var out bytes.Buffer
	out.Grow(len(b) / 2)
	w, err := flate.NewWriter(&out, flate.BestSpeed)
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(b); err != nil {
		return nil, err
	}
	if err := w.Flush(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

func baseAllZero(p []byte) bool {
	for len(p) >= PageSize {
		if !baseIsZero(p[:PageSize]) {
			return false
		}
		p = p[PageSize:]
	}
	return baseIsZero(p)
}

var _ io.WriteCloser = (*baseDeflater)(nil)

// ImportBase makes the folder dir, which must not exist, from the base zip file. Every hash
// is checked before it returns; on an error nothing is left. The caller renames the folder
// into place and opens it there: the Base returned knows it as dir.
func ImportBase(ctx context.Context, dir string, file *os.File, p Progress) (*Base, error) {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, fmt.Errorf("import base: %w", err)
	}
	b, err := importBase(ctx, dir, file, p)
	if err != nil {
		err = fmt.Errorf("import base %s: %w", file.Name(), baseSpaceError(dir, err))
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return b, nil
}

func importBase(ctx context.Context, dir string, file *os.File, p Progress) (*Base, error) {
	im, err := openBaseZip(file)
	if err != nil {
		return nil, err
	}
	im.dir = dir
	if err := im.extract(ctx, p); err != nil {
		return nil, err
	}
	if err := writeBaseFile(filepath.Join(dir, BaseManifestFile), im.manifest); err != nil {
		return nil, err
	}
	return OpenBase(dir)
}
