package overlay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
)

// ErrClosed is returned by reads of a closed Image.
var ErrClosed = errors.New("launch image is closed")

const defaultFrameCache = 64 << 20

// ImageOptions are the settings of an Image; the zero value is fit for use.
type ImageOptions struct {
	// FrameCache is how many bytes of decoded frames are kept; 0 means 64 MiB.
	FrameCache int
	// Decoded, if not nil, keeps the pages of every frame that is decoded, so that none is
	// decoded twice: an unnamed temporary file that nobody else can write to, since what is
	// read back is believed. It grows to the size of all stored pages. It is the caller's, to
	// be closed after the Image. A write that fails ends the writing and no read.
	Decoded *os.File
}

// Image is a launch image: a base and a chain of overlays merged, page by page, when they
// are read. Every byte it returns has been verified. Safe for concurrent use.
type Image struct {
	base  *Base
	chain []*Reader // the overlay on the base first
	cache *frameCache
	kept  *keptPages // nil: none
	gate  gate       // closed while a guest waits for a fetch

	life   context.Context
	cancel context.CancelCauseFunc
}

// ImageStats counts what an Image has done.
type ImageStats struct {
	ReaderStats
	FramesDecoded int64 `json:"frames_decoded"`      // each counts once unless it left the cache
	FrameHits     int64 `json:"frame_hits"`          // reads answered by a frame decoded before, or under way
	FrameCount    int64 `json:"frame_count"`         // frames of all overlays of the chain
	DecodedKept   int64 `json:"decoded_frames_kept"` // frames whose pages are in ImageOptions.Decoded
}

// NewImage puts a chain of overlays on a base, the overlay whose parent is the base first. It
// returns ErrParent where one does not fit. base and readers stay the caller's, to be closed
// after the Image.
func NewImage(base *Base, chain []*Reader, o ImageOptions) (*Image, error) {
	if len(chain) > MaxDepth {
		return nil, fmt.Errorf("%w: the chain is %d deep, the limit is %d", ErrParent, len(chain), MaxDepth)
	}
	parent := base.ID()
	for i, r := range chain {
		m := r.manifest
		if m.Base != base.ID() {
			return nil, fmt.Errorf("%w: overlay %.12s was made on base %.12s, not on %.12s", ErrParent, m.ID, m.Base, base.ID())
		}
		if m.Parent != parent || m.Depth != i+1 {
			return nil, fmt.Errorf("%w: overlay %.12s has parent %.12s at depth %d, not %.12s", ErrParent, m.ID, m.Parent, m.Depth, parent)
		}
		for _, s := range Spaces {
			if m.Size(s) != base.Size(s) {
				return nil, fmt.Errorf("%w: %s of overlay %.12s has %d bytes, the base's %d", ErrParent, s, m.ID, m.Size(s), base.Size(s))
			}
		}
		parent = m.ID
	}
	limit := o.FrameCache
	if limit == 0 {
		limit = defaultFrameCache
	}
	im := &Image{base: base, chain: chain, cache: newFrameCache(limit)}
	if o.Decoded != nil {
		im.kept = newKeptPages(o.Decoded, chain)
	}
	im.life, im.cancel = context.WithCancelCause(context.Background())
	return im, nil
}

// ID returns the id of the last overlay, or of the base where there is none.
func (im *Image) ID() Hash {
	if len(im.chain) == 0 {
		return im.base.ID()
	}
	return im.chain[len(im.chain)-1].ID()
}

// Base returns the base under the image.
func (im *Image) Base() *Base { return im.base }

// Chain returns the overlays, the one on the base first; the caller must not change it.
func (im *Image) Chain() []*Reader { return im.chain }

// Local reports whether reading every overlay takes no longer than reading a disk.
func (im *Image) Local() bool {
	return !slices.ContainsFunc(im.chain, func(r *Reader) bool { return !r.isLocal() })
}

// Size returns the size of image s in bytes.
func (im *Image) Size(s Space) int64 { return im.base.Size(s) }

// Close ends the fetches and writes under way and waits for them. Base and readers stay open.
func (im *Image) Close() error {
	im.cancel(ErrClosed)
	im.cache.close()
	if im.kept != nil {
		im.kept.writes.Wait()
	}
	return nil
}

// Stats returns the counts so far.
func (im *Image) Stats() ImageStats {
	var s ImageStats
	for _, r := range im.chain {
		t := r.Stats()
		s.Fetched += t.Fetched
		s.Verified += t.Verified
		s.Refused += t.Refused
		s.Cached += t.Cached
		s.CacheOff += t.CacheOff
		s.FrameCount += int64(len(r.index.frames))
	}
	if im.kept != nil {
		s.DecodedKept = im.kept.count.Load()
	}
	im.cache.mu.Lock()
	defer im.cache.mu.Unlock()
	s.FramesDecoded, s.FrameHits = im.cache.loads, im.cache.hits
	return s
}

// File returns image s as something to mount.
func (im *Image) File(s Space) *ImageFile { return &ImageFile{im, s} }

// ImageFile is the memory or the disk of an Image.
type ImageFile struct {
	im    *Image
	space Space
}

// Size returns the size in bytes.
func (f *ImageFile) Size() int64 { return f.im.Size(f.space) }

// ReadAt fills p from any offset, io.EOF where it reaches over the end.
func (f *ImageFile) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	size := f.Size()
	if off < 0 {
		return 0, fmt.Errorf("read %s at negative offset %d", f.space, off)
	}
	if off >= size {
		return 0, io.EOF
	}
	var eof error
	if int64(len(p)) > size-off {
		p, eof = p[:size-off], io.EOF
	}
	if off%PageSize == 0 && len(p)%PageSize == 0 {
		if err := f.im.ReadPages(ctx, f.space, p, off); err != nil {
			return 0, err
		}
		return len(p), eof
	}
	skip := off % PageSize
	buf := make([]byte, (int(skip)+len(p)+PageSize-1)&^(PageSize-1))
	if err := f.im.ReadPages(ctx, f.space, buf, off-skip); err != nil {
		return 0, err
	}
	return copy(p, buf[skip:]), eof
}

// pageSource says where the bytes of one page come from.
type pageSource struct {
	level int  // the overlay that stores it; -1: the base
	entry int  // number of the stored page in that overlay
	zero  bool // all zero
	addr  Addr // the base's page where level is -1
}

// resolve finds page a below level top (an index into chain, len(chain) for the whole).
func (im *Image) resolve(a Addr, top int) pageSource {
	for level := top - 1; level >= 0; level-- {
		x := im.chain[level].index
		e, ok := x.lookup(a)
		if !ok {
			continue
		}
		if e < len(x.stored) {
			return pageSource{level: level, entry: e}
		}
		switch r := x.refs[e-len(x.stored)]; r.kind {
		case refZero:
			return pageSource{level: -1, zero: true}
		case refBase:
			return pageSource{level: -1, addr: r.target}
		case refSelf:
			e, _ := x.lookup(r.target)
			return pageSource{level: level, entry: e}
		case refParent:
			a = r.target
		}
	}
	return pageSource{level: -1, addr: a}
}

// ReadPages fills p, whole pages, from offset off of image s, a multiple of PageSize.
func (im *Image) ReadPages(ctx context.Context, s Space, p []byte, off int64) error {
	return im.read(ctx, s, p, off, im.base.ReadVerified)
}

// readUnverified is ReadPages without the hashes of the base's pages: only for comparing.
func (im *Image) readUnverified(ctx context.Context, s Space, p []byte, off int64) error {
	return im.read(ctx, s, p, off, im.base.ReadRaw)
}

func (im *Image) read(ctx context.Context, s Space, p []byte, off int64, readBase func(Space, []byte, int64) error) error {
	if im.life.Err() != nil {
		return ErrClosed
	}
	first := MakeAddr(s, off/PageSize)
	if len(im.chain) == 0 {
		return readBase(s, p, off)
	}
	im.fetchTogether(ctx, first, len(p)/PageSize)
	frames := frameReader{im: im}
	for i, n := 0, len(p)/PageSize; i < n; {
		src := im.resolve(first+Addr(i), len(im.chain))
		b := p[i*PageSize:]
		i++
		if src.zero {
			clear(b[:PageSize])
			continue
		}
		if src.level >= 0 {
			if err := frames.page(ctx, b[:PageSize], src); err != nil {
				return err
			}
			continue
		}
		run := 1
		for ; i < n; i++ { // neighbours in the base are read at once
			next := im.resolve(first+Addr(i), len(im.chain))
			if next.zero || next.level >= 0 || next.addr != src.addr+Addr(run) || next.addr.Space() != src.addr.Space() {
				break
			}
			run++
		}
		if err := readBase(src.addr.Space(), b[:run*PageSize], src.addr.Offset()); err != nil {
			return err
		}
	}
	return nil
}

// fetchTogether brings the frames over a network that n pages from first on stand in at the
// same time: one after the other each would cost a round trip. Errors come up when they are
// read.
func (im *Image) fetchTogether(ctx context.Context, first Addr, n int) {
	if im.Local() {
		return
	}
	var keys []frameKey
	for a := first; a < first+Addr(n); a++ {
		src := im.resolve(a, len(im.chain))
		if src.level < 0 || im.chain[src.level].isLocal() {
			continue
		}
		key := frameKey{src.level, im.chain[src.level].index.frameOf(src.entry)}
		if !slices.Contains(keys, key) && (im.kept == nil || !im.kept.holds(key)) {
			keys = append(keys, key)
		}
	}
	if len(keys) < 2 {
		return
	}
	var wg sync.WaitGroup
	for _, key := range keys {
		wg.Go(func() { _, _ = im.frame(ctx, key) })
	}
	wg.Wait()
}

// frameReader copies pages out of frames and remembers the last frame, for its neighbours.
type frameReader struct {
	im    *Image
	key   frameKey
	pages []byte
}

func (fr *frameReader) page(ctx context.Context, dst []byte, src pageSource) error {
	r := fr.im.chain[src.level]
	key := frameKey{src.level, r.index.frameOf(src.entry)}
	if fr.pages == nil || fr.key != key {
		if k := fr.im.kept; k != nil && !fr.im.cache.has(key) && k.read(key, dst, src.entry) {
			return nil
		}
		pages, err := fr.im.frame(ctx, key)
		if err != nil {
			return err
		}
		fr.key, fr.pages = key, pages
	}
	slot := src.entry - r.index.frames[key.frame].first
	copy(dst, fr.pages[slot*PageSize:(slot+1)*PageSize])
	return nil
}

// frame returns the decoded pages of a frame; the caller must not change them.
func (im *Image) frame(ctx context.Context, key frameKey) ([]byte, error) {
	r := im.chain[key.level]
	_, ahead := ctx.Value(prefetching{}).(bool)
	return im.cache.get(ctx, im.life, key, r.isLocal(), func(ctx context.Context) ([]byte, error) {
		if !ahead {
			im.readAhead(key)
		}
		pages, err := r.decodeFrame(ctx, key.frame, im.base, &im.gate, nil)
		if err == nil && im.kept != nil {
			im.kept.keep(key, r.index.frames[key.frame].first, pages)
		}
		return pages, err
	})
}

// readAhead fetches the frames that follow in a file whose frames are demanded one after the
// other: over a network each would be waited for.
func (im *Image) readAhead(key frameKey) {
	m := im.chain[key.level].remote
	if m == nil {
		return
	}
	lo, hi := m.follow(key.frame)
	for n := lo; n < hi && im.cache.begin(); n++ {
		go func() {
			defer im.cache.wg.Done()
			m.bring(im.life, n)
		}()
	}
}

// State returns the device state to resume the image with: the last overlay's, or the
// base's, or nil where there is none.
func (im *Image) State() ([]byte, error) {
	if len(im.chain) == 0 {
		return im.base.State()
	}
	return im.chain[len(im.chain)-1].State()
}
