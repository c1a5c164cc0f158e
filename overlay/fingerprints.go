package overlay

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sort"
)

// The file is a header and entries sorted by print, all little-endian:
//
//	 0  8  magic "cldprint"
//	 8  4  version 1
//	12  4  CRC-32C of the entries
//	16 32  id of the base
//	48  8  number of entries
//	56  8  zero
//	64     entries of 12 bytes: print 8 (the first 8 bytes of a page's SHA-256 as a
//	       big-endian number), address 4
//
// Zero pages are left out, and of pages with one print all but the lowest address. Two
// different pages with one print (2^-17 likely in 64 GiB) cost a missed duplicate, nothing
// else: every hit is compared with the whole hash.

const (
	printsFile    = "fingerprints"
	printsMagic   = "cldprint"
	printsVersion = 1
	printsHeader  = 64
	printSize     = 12
	printsBlock   = 341 * printSize // what one Lookup reads

	printParts   = 256
	printPartMax = 16 << 20 // entries sorted in memory; more are left out
	printPartBuf = 1024 * printSize
)

// Fingerprints finds the page of a base that has a given content, at any address. It
// belongs to its Base, which closes it; safe for concurrent use.
type Fingerprints struct {
	base  *Base
	file  *os.File
	count int64
	first []uint64 // the first print of every block
}

type pagePrint struct {
	print uint64
	addr  Addr
}

func printOf(h Hash) uint64 { return binary.BigEndian.Uint64(h[:]) }

// Fingerprints returns the base's index of pages by content. The first use makes it, in a
// file of the base's folder, in bounded memory; a file that is damaged or of another base
// is made anew.
func (b *Base) Fingerprints(ctx context.Context, p Progress) (*Fingerprints, error) {
	select {
	case b.printsGate <- struct{}{}:
		defer func() { <-b.printsGate }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if b.prints != nil {
		return b.prints, nil
	}
	f, err := b.openFingerprints(ctx)
	if err == nil && f == nil {
		path := filepath.Join(b.dir, printsFile)
		if err := b.buildFingerprints(ctx, path, p); err != nil {
			return nil, fmt.Errorf("index base %.12s: %w", b.id, baseSpaceError(path, err))
		}
		if f, err = b.openFingerprints(ctx); err == nil && f == nil {
			err = fmt.Errorf("read %s: it is not what was just written", path)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("index base %.12s: %w", b.id, err)
	}
	b.prints = f
	return f, nil
}

// openFingerprints returns nil and no error if the file has to be made anew.
func (b *Base) openFingerprints(ctx context.Context) (*Fingerprints, error) {
	file, err := openBaseFile(filepath.Join(b.dir, printsFile))
	if err != nil {
		return nil, nil
	}
	f := &Fingerprints{base: b, file: file}
	ok, err := f.load(ctx)
	if err == nil && ok {
		return f, nil
	}
	return nil, errors.Join(err, file.Close())
}

// load checks the file as a whole and keeps the first print of each block.
func (f *Fingerprints) load(ctx context.Context) (ok bool, err error) {
	info, err := f.file.Stat()
	if err != nil {
		return false, err
	}
	var head [printsHeader]byte
	if _, err := f.file.ReadAt(head[:], 0); err != nil {
		return false, nil
	}
	f.count = (info.Size() - printsHeader) / printSize
	sum := binary.LittleEndian.Uint32(head[12:])
	if info.Size() != printsHeader+f.count*printSize || head != f.header(sum) {
		return false, nil
	}
	f.first = make([]uint64, 0, (f.count*printSize+printsBlock-1)/printsBlock)
	var crc uint32
	table := crc32.MakeTable(crc32.Castagnoli)
	buf := make([]byte, 256*printsBlock)
	for off := int64(0); off < f.count*printSize; off += int64(len(buf)) {
		if err := ctx.Err(); err != nil {
			return false, err
		}
		p := buf[:min(int64(len(buf)), f.count*printSize-off)]
		if _, err := f.file.ReadAt(p, printsHeader+off); err != nil {
			return false, nil
		}
		crc = crc32.Update(crc, table, p)
		for block := range slices.Chunk(p, printsBlock) {
			f.first = append(f.first, decodePrint(block).print)
		}
	}
	return crc == sum, nil
}

func (f *Fingerprints) header(crc uint32) (head [printsHeader]byte) {
	copy(head[:], printsMagic)
	binary.LittleEndian.PutUint32(head[8:], printsVersion)
	binary.LittleEndian.PutUint32(head[12:], crc)
	copy(head[16:], f.base.id[:])
	binary.LittleEndian.PutUint64(head[48:], uint64(f.count))
	return head
}

func decodePrint(p []byte) pagePrint {
	return pagePrint{binary.LittleEndian.Uint64(p), Addr(binary.LittleEndian.Uint32(p[8:]))}
}

func appendPrint(p []byte, e pagePrint) []byte {
	p = binary.LittleEndian.AppendUint64(p, e.print)
	return binary.LittleEndian.AppendUint32(p, uint32(e.addr))
}

// Len returns the number of distinct pages in the index.
func (f *Fingerprints) Len() int64 { return f.count }

// Lookup returns the lowest address of a base page whose SHA-256, as the base's id proves
// it, is h. The page itself is not read; the zero page is never found. A page that cannot
// be looked up is not found.
func (f *Fingerprints) Lookup(h Hash) (Addr, bool) {
	print := printOf(h)
	block := sort.Search(len(f.first), func(i int) bool { return f.first[i] > print }) - 1
	if block < 0 {
		return 0, false
	}
	buf := f.base.blocks.Get().(*[baseListBlock]byte)
	defer f.base.blocks.Put(buf)
	off := int64(block) * printsBlock
	p := buf[:min(printsBlock, f.count*printSize-off)]
	if _, err := f.file.ReadAt(p, printsHeader+off); err != nil {
		return 0, false
	}
	i, found := sort.Find(len(p)/printSize, func(i int) int { return cmp.Compare(print, decodePrint(p[i*printSize:]).print) })
	if !found {
		return 0, false
	}
	addr := decodePrint(p[i*printSize:]).addr
	have, err := f.base.PageHash(addr)
	return addr, err == nil && have == h
}

// buildFingerprints distributes the prints by their leading byte over a scratch file, then
// sorts part after part.
func (b *Base) buildFingerprints(ctx context.Context, path string, p Progress) error {
	var counts [printParts]int64
	pages := (b.Size(Memory) + b.Size(Disk)) / PageSize
	track := &baseTracker{phase: "index base", total: 3 * pages, p: p}
	if err := b.eachPrint(ctx, track, func(e pagePrint) error { counts[e.print>>56]++; return nil }); err != nil {
		return err
	}
	scratch, err := os.CreateTemp(filepath.Dir(path), "."+printsFile+".*.tmp")
	if err != nil {
		return err
	}
	defer scratch.Close() // it has no name, and nobody reads it again
	if err := os.Remove(scratch.Name()); err != nil {
		return err
	}
	if err := b.spreadPrints(ctx, track, scratch, counts); err != nil {
		return err
	}
	return createBaseFile(path, func(out *os.File) error {
		f := &Fingerprints{base: b}
		if _, err := out.Seek(printsHeader, io.SeekStart); err != nil {
			return err
		}
		crc := crc32.New(crc32.MakeTable(crc32.Castagnoli))
		w := bufio.NewWriterSize(io.MultiWriter(out, crc), 1<<20)
		var start int64
		for _, n := range counts {
			if err := ctx.Err(); err != nil {
				return err
			}
			written, err := sortPrints(w, io.NewSectionReader(scratch, start*printSize, n*printSize), min(n, printPartMax))
			if err != nil {
				return err
			}
			f.count += written
			start += n
			track.add(pages / printParts)
		}
		if err := w.Flush(); err != nil {
			return err
		}
		head := f.header(crc.Sum32())
		_, err := out.WriteAt(head[:], 0)
		return err
	})
}

// eachPrint calls fn for the pages of the base in address order. Zero pages are left out,
// and pages that a small memory of earlier ones knows: common pages must not fill one part.
func (b *Base) eachPrint(ctx context.Context, track *baseTracker, fn func(pagePrint) error) error {
	var known [1 << 12]uint64
	hashes := make([]Hash, 8*baseHashesPerBlock)
	for _, s := range Spaces {
		pages := b.Size(s) / PageSize
		for first := int64(0); first < pages; first += int64(len(hashes)) {
			if err := ctx.Err(); err != nil {
				return err
			}
			run := hashes[:min(int64(len(hashes)), pages-first)]
			if err := b.PageHashes(s, first, run); err != nil {
				return err
			}
			for i, h := range run {
				print := printOf(h)
				slot := &known[print%uint64(len(known))]
				if h == baseZeroHash || *slot == print {
					continue
				}
				*slot = print
				if err := fn(pagePrint{print, MakeAddr(s, first+int64(i))}); err != nil {
					return err
				}
			}
			track.add(int64(len(run)))
		}
	}
	return nil
}

// spreadPrints writes every print to its part of the scratch file.
func (b *Base) spreadPrints(ctx context.Context, track *baseTracker, scratch *os.File, counts [printParts]int64) error {
	var bufs [printParts][]byte
	var next [printParts]int64
	for i := 1; i < printParts; i++ {
		next[i] = next[i-1] + counts[i-1]*printSize
	}
	flush := func(part uint64) error {
		_, err := scratch.WriteAt(bufs[part], next[part])
		next[part] += int64(len(bufs[part]))
		bufs[part] = bufs[part][:0]
		return err
	}
	err := b.eachPrint(ctx, track, func(e pagePrint) error {
		part := e.print >> 56
		if bufs[part] = appendPrint(bufs[part], e); len(bufs[part]) < printPartBuf {
			return nil
		}
		return flush(part)
	})
	for part := range bufs {
		if err == nil {
			err = flush(uint64(part))
		}
	}
	return err
}

// sortPrints copies the first n entries of r to w, sorted, one address a print, and returns
// how many that were.
func sortPrints(w io.Writer, r io.Reader, n int64) (written int64, err error) {
	data := make([]byte, n*printSize)
	if _, err := io.ReadFull(r, data); err != nil {
		return 0, err
	}
	entries := make([]pagePrint, n)
	for i := range entries {
		entries[i] = decodePrint(data[i*printSize:])
	}
	slices.SortFunc(entries, func(a, b pagePrint) int {
		return cmp.Or(cmp.Compare(a.print, b.print), cmp.Compare(a.addr, b.addr))
	})
	entries = slices.CompactFunc(entries, func(a, b pagePrint) bool { return a.print == b.print })
	out := bytes.NewBuffer(data[:0])
	for _, e := range entries {
		out.Write(appendPrint(out.AvailableBuffer(), e))
	}
	_, err = w.Write(out.Bytes())
	return int64(len(entries)), err
}
