package overlay

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// A base is a folder:
//
//	manifest.json                 sizes, hashes, machine configuration; its SHA-256 is the id
//	disk, memory                  the images; zero pages are holes
//	disk.sha256, memory.sha256    hash lists: 32 bytes of SHA-256 a page
//	state, kernel, initrd         where the base has them
//	disk.sums, memory.sums        derived: SHA-256 of each 16 KiB of the hash list
//	fingerprints                  derived: see Fingerprints
//
// What a page is trusted for: manifest.json's hash is the id; it holds the hash of the sums,
// which are 1/512 of the list and checked whole at the first use of an image; they hold the
// hash of each block of the list, checked at its first use; the list holds the hash of the
// page. So opening costs nothing that grows with the images, and no page is believed by a
// list that is not itself proven by the id. Sums that are missing or damaged are made anew
// from the list.

// baseListBlock is the unit in which a hash list is checked: the hashes of 2 MiB of image.
const baseListBlock = 16 << 10

const (
	baseHashLen        = int64(len(Hash{}))
	baseHashesPerBlock = baseListBlock / baseHashLen
)

// Base is an opened base VM: immutable, safe for concurrent use; the caller closes it after
// the last read.
type Base struct {
	id     Hash
	man    BaseManifest
	dir    string
	images [2]baseImage
	blocks sync.Pool // *[baseListBlock]byte

	printsGate chan struct{} // held by whoever opens or makes prints
	prints     *Fingerprints
}

// baseImage is one image with what is already proven of it.
type baseImage struct {
	space      Space
	meta       BaseImage
	file, list *os.File
	seen       baseBitmap // pages that matched their hash
	listSeen   baseBitmap // blocks of the list that matched theirs
	sums       atomic.Pointer[[]Hash]
}

// BasePageError says that a page of a base, or its entry in the hash list, is not what the
// base's id says.
type BasePageError struct {
	Base Hash
	Addr Addr
	List bool // the hash list is wrong, not known of the page
}

// Error names the base, the page and the remedy.
func (e *BasePageError) Error() string {
	if e.List {
		return fmt.Sprintf("base %.12s: %s: the hash list %s does not match the base: the file was changed; re-import the base",
			e.Base, e.Addr, baseListName(e.Addr.Space()))
	}
	return fmt.Sprintf("base %.12s: %s does not match its hash: the file was changed; re-import the base", e.Base, e.Addr)
}

// OpenBase opens the base in dir. It checks the manifest strictly and the kind and size of
// every file; contents are checked when they are read, or by Verify.
func OpenBase(dir string) (*Base, error) {
	data, err := readBaseManifest(dir)
	if err != nil {
		return nil, fmt.Errorf("open base %s: %w", dir, err)
	}
	man, err := parseBaseManifest(data)
	if err != nil {
		return nil, fmt.Errorf("open base %s: %w", dir, err)
	}
	b := &Base{id: Sum(data), man: *man, dir: dir, printsGate: make(chan struct{}, 1)}
	b.blocks.New = func() any { return new([baseListBlock]byte) }
	if err := b.openMembers(); err != nil {
		return nil, errors.Join(fmt.Errorf("open base %s: %w", dir, err), b.Close())
	}
	return b, nil
}

func readBaseManifest(dir string) ([]byte, error) {
	f, err := openBaseFile(filepath.Join(dir, BaseManifestFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: the folder holds no base, or one whose making was interrupted", err)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, MaxBaseManifest+1))
	if err != nil {
		return nil, fmt.Errorf("read base manifest: %w", err)
	}
	return data, nil
}

// openBaseFlags refuse a symbolic link, and do not wait for the other end of a pipe.
const openBaseFlags = unix.O_NOFOLLOW | unix.O_NONBLOCK

// openBaseFile opens a regular file for reading, never through a symbolic link.
func openBaseFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|openBaseFlags, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("open %s: not a regular file", path)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func (b *Base) openMembers() error {
	files := map[string]*os.File{}
	defer func() {
		for _, f := range files {
			f.Close() // read only, and nothing was written
		}
	}()
	for _, m := range b.man.members() {
		f, err := openBaseFile(filepath.Join(b.dir, m.name))
		if err != nil {
			return err
		}
		files[m.name] = f
		info, err := f.Stat()
		if err != nil {
			return err
		}
		if info.Size() != m.size {
			return fmt.Errorf("%s has %d bytes, the manifest says %d: the file was changed; re-import the base", m.name, info.Size(), m.size)
		}
	}
	take := func(name string) *os.File {
		f := files[name]
		delete(files, name)
		return f
	}
	for _, s := range Spaces {
		meta := b.man.Image(s)
		pages := meta.Size / PageSize
		im := &b.images[s]
		im.space, im.meta = s, meta
		im.file, im.list = take(s.String()), take(baseListName(s))
		im.seen = newBaseBitmap(pages)
		im.listSeen = newBaseBitmap((pages + baseHashesPerBlock - 1) / baseHashesPerBlock)
	}
	return nil
}

// Close closes the base's files.
func (b *Base) Close() error {
	files := []*os.File{b.images[Memory].file, b.images[Memory].list, b.images[Disk].file, b.images[Disk].list}
	b.printsGate <- struct{}{}
	if b.prints != nil {
		files = append(files, b.prints.file)
	}
	<-b.printsGate
	var errs []error
	for _, f := range files {
		if f == nil {
			continue
		}
		if err := f.Close(); !errors.Is(err, os.ErrClosed) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// ID returns the base's id: the SHA-256 of the bytes of its manifest.json.
func (b *Base) ID() Hash { return b.id }

// Manifest returns what the base says of itself; the caller does not change what it points
// to.
func (b *Base) Manifest() BaseManifest { return b.man }

// Dir returns the folder the base was opened in.
func (b *Base) Dir() string { return b.dir }

// Size returns the size of an image in bytes, a multiple of PageSize.
func (b *Base) Size(s Space) int64 { return b.images[s].meta.Size }

// Resumable reports whether the base holds the device state that a resume needs.
func (b *Base) Resumable() bool { return b.man.State != nil }

// State returns the device state, checked against its hash, or nil where the base has none.
func (b *Base) State() ([]byte, error) {
	part := b.man.State
	if part == nil {
		return nil, nil
	}
	f, err := openBaseFile(filepath.Join(b.dir, BaseStateFile))
	if err != nil {
		return nil, fmt.Errorf("read state of base %.12s: %w", b.id, err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, part.Size+1))
	if err != nil {
		return nil, fmt.Errorf("read state of base %.12s: %w", b.id, err)
	}
	if int64(len(data)) != part.Size || Sum(data) != part.SHA256 {
		return nil, fmt.Errorf("base %.12s: state does not match its hash: the file was changed; re-import the base", b.id)
	}
	return data, nil
}

// Path returns the path of a member ("memory", "kernel"), or "" if this base has none of
// that name.
func (b *Base) Path(member string) string {
	if member == BaseManifestFile {
		return filepath.Join(b.dir, member)
	}
	for _, m := range b.man.members() {
		if m.name == member {
			return filepath.Join(b.dir, member)
		}
	}
	return ""
}

// ReadRaw fills p with the image's bytes from byte off on, unverified. off and len(p) are
// multiples of PageSize and within the image.
func (b *Base) ReadRaw(s Space, p []byte, off int64) error {
	im := &b.images[s]
	if off < 0 || off%PageSize != 0 || len(p)%PageSize != 0 || off > im.meta.Size-int64(len(p)) {
		return fmt.Errorf("read base %.12s %s: %d bytes at %d are not whole pages of its %d bytes", b.id, s, len(p), off, im.meta.Size)
	}
	if _, err := im.file.ReadAt(p, off); err != nil {
		if err == io.EOF {
			err = fmt.Errorf("%w: the file is shorter than it was; re-import the base", io.ErrUnexpectedEOF)
		}
		return fmt.Errorf("read base %.12s %s at %d: %w", b.id, s, off, err)
	}
	return nil
}

// ReadVerified is ReadRaw with every page checked against its hash at its first use in this
// process; later uses trust that. A page that is not right is a *BasePageError, and p is
// then all zero.
func (b *Base) ReadVerified(s Space, p []byte, off int64) error {
	if err := b.ReadRaw(s, p, off); err != nil {
		return err
	}
	im := &b.images[s]
	var hashes [64]Hash
	first := off / PageSize
	for n := int64(len(p) / PageSize); n > 0; {
		run := min(n, int64(len(hashes)))
		if !im.seen.all(first, run) {
			if err := b.PageHashes(s, first, hashes[:run]); err != nil {
				clear(p)
				return err
			}
			for i := range run {
				at := (first+i)*PageSize - off
				if !im.seen.has(first+i) && basePageHash(p[at:at+PageSize]) != hashes[i] {
					clear(p)
					return &BasePageError{Base: b.id, Addr: MakeAddr(s, first+i)}
				}
			}
			im.seen.add(first, run)
		}
		first, n = first+run, n-run
	}
	return nil
}

// PageHash returns the SHA-256 of a page, proven by the base's id; the page itself is not
// read.
func (b *Base) PageHash(a Addr) (Hash, error) {
	var h [1]Hash
	err := b.PageHashes(a.Space(), a.Page(), h[:])
	return h[0], err
}

// PageHashes fills dst with the proven hashes of len(dst) pages from page first on.
func (b *Base) PageHashes(s Space, first int64, dst []Hash) error {
	im := &b.images[s]
	pages := im.meta.Size / PageSize
	if first < 0 || first > pages-int64(len(dst)) {
		return fmt.Errorf("read base %.12s: no %s pages %d to %d: it has %d", b.id, s, first, first+int64(len(dst))-1, pages)
	}
	buf := b.blocks.Get().(*[baseListBlock]byte)
	defer b.blocks.Put(buf)
	for len(dst) > 0 {
		block := first / baseHashesPerBlock
		start := block * baseHashesPerBlock
		p := buf[:min(baseHashesPerBlock, pages-start)*baseHashLen]
		n := min(len(dst), int(start+int64(len(p))/baseHashLen-first))
		if im.listSeen.has(block) {
			p, start = p[:int64(n)*baseHashLen], first
		}
		if _, err := im.list.ReadAt(p, start*baseHashLen); err != nil {
			return fmt.Errorf("read base %.12s %s: %w", b.id, baseListName(s), err)
		}
		if !im.listSeen.has(block) {
			if err := b.checkListBlock(im, block, p); err != nil {
				return err
			}
		}
		for i := range dst[:n] {
			copy(dst[i][:], p[(first-start+int64(i))*baseHashLen:])
		}
		first, dst = first+int64(n), dst[n:]
	}
	return nil
}

func (b *Base) checkListBlock(im *baseImage, block int64, p []byte) error {
	wrong := &BasePageError{Base: b.id, Addr: MakeAddr(im.space, block*baseHashesPerBlock), List: true}
	sums, err := b.loadSums(im)
	if err != nil {
		return err
	}
	if sums == nil || sums[block] != Sum(p) {
		return wrong
	}
	im.listSeen.add(block, 1)
	return nil
}

// loadSums returns the proven hashes of the list's blocks, nil if the list itself is wrong.
// Two first users may both load them; they store the same.
func (b *Base) loadSums(im *baseImage) ([]Hash, error) {
	if sums := im.sums.Load(); sums != nil {
		return *sums, nil
	}
	sums := b.readSums(im)
	if sums == nil {
		var err error
		if sums, err = baseListSums(im.list, baseListSize(im.meta.Size)); err != nil {
			return nil, fmt.Errorf("read base %.12s %s: %w", b.id, baseListName(im.space), err)
		}
	}
	if baseSumsRoot(sums) != im.meta.HashRoot {
		return nil, nil
	}
	im.sums.Store(&sums)
	return sums, nil
}

// readSums returns what the derived file says, nil unless it is right.
func (b *Base) readSums(im *baseImage) []Hash {
	f, err := openBaseFile(filepath.Join(b.dir, baseSumsName(im.space)))
	if err != nil {
		return nil
	}
	defer f.Close()
	blocks := (baseListSize(im.meta.Size) + baseListBlock - 1) / baseListBlock
	data := make([]byte, blocks*baseHashLen)
	if _, err := io.ReadFull(f, data); err != nil || Sum(data) != im.meta.HashRoot {
		return nil
	}
	sums := make([]Hash, blocks)
	for i := range sums {
		copy(sums[i][:], data[int64(i)*baseHashLen:])
	}
	return sums
}

// baseListSums hashes each block of a hash list of size bytes.
func baseListSums(list io.ReaderAt, size int64) ([]Hash, error) {
	sums := make([]Hash, 0, (size+baseListBlock-1)/baseListBlock)
	buf := make([]byte, baseListBlock)
	for off := int64(0); off < size; off += baseListBlock {
		p := buf[:min(baseListBlock, size-off)]
		if _, err := list.ReadAt(p, off); err != nil {
			return nil, err
		}
		sums = append(sums, Sum(p))
	}
	return sums, nil
}

func baseSumsRoot(sums []Hash) Hash { return Sum(baseSumsBytes(sums)) }

func baseSumsBytes(sums []Hash) []byte {
	data := make([]byte, 0, int64(len(sums))*baseHashLen)
	for i := range sums {
		data = append(data, sums[i][:]...)
	}
	return data
}

// basePageHash is Sum with a short cut for a zero page.
func basePageHash(page []byte) Hash {
	if baseIsZero(page) {
		return baseZeroHash
	}
	return Sum(page)
}

var (
	baseZeroPage [PageSize]byte
	baseZeroHash = Sum(baseZeroPage[:]) // constants in all but name
)

// baseIsZero reports whether p, a page or less, is all zero.
func baseIsZero(p []byte) bool { return bytes.Equal(p, baseZeroPage[:len(p)]) }

// baseBitmap is a set of numbers that only grows; safe for concurrent use.
type baseBitmap []atomic.Uint64

func newBaseBitmap(n int64) baseBitmap { return make(baseBitmap, (n+63)/64) }

// mask returns the bits of word first/64 that first..first+n-1 cover.
func (baseBitmap) mask(first, n int64) uint64 {
	bits := uint64(math.MaxUint64)
	if at := first % 64; at+n < 64 {
		bits = 1<<(at+n) - 1
	}
	return bits &^ (1<<(first%64) - 1)
}

func (m baseBitmap) has(i int64) bool { return m[i/64].Load()>>(i%64)&1 != 0 }

func (m baseBitmap) all(first, n int64) bool {
	for n > 0 {
		if mask := m.mask(first, n); m[first/64].Load()&mask != mask {
			return false
		}
		step := 64 - first%64
		first, n = first+step, n-step
	}
	return true
}

func (m baseBitmap) add(first, n int64) {
	for n > 0 {
		m[first/64].Or(m.mask(first, n))
		step := 64 - first%64
		first, n = first+step, n-step
	}
}
