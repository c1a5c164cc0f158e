package overlay

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"slices"
	"sync"
	"sync/atomic"
)

// Source is where the bytes of an overlay file come from. ReadAt fills p wholly or returns
// an error, io.EOF only where p reaches over the end; it obeys ctx and is safe for
// concurrent use. A Source retries one request as far as that is sensible; an error of its
// that may pass has a method Temporary() bool that returns true. A Source whose reads never
// wait for a network may have a method Local() bool that returns true. One whose bytes come to
// this host by themselves, in order, has a method Growing() bool that returns true; once all
// have come, Local returns true.
type Source interface {
	Size() int64
	ReadAt(ctx context.Context, p []byte, off int64) (int, error)
	Close() error
}

// Reader is an open overlay: its manifest and index are in memory and verified, its frames
// are read when they are asked for. Safe for concurrent use.
type Reader struct {
	src      Source
	local    bool        // reads of src take no longer than a disk's
	grows    func() bool // nil, or whether a source that grew has become local
	remote   *remote     // nil where src is or becomes local by itself
	manifest *Manifest
	digest   Hash
	index    *index
	head     []byte // the file up to the frames
	members  [memberCount]zipMember
	dec      *zstdDecoder
	encoded  sync.Pool // of *[]byte, for encoded frames
	stats    readerCounters
}

// ReaderStats counts what a Reader has done since Open.
type ReaderStats struct {
	Fetched  int64 `json:"bytes_fetched"`   // bytes read from the source, which may have had the first ones at hand
	Verified int64 `json:"frames_verified"` // frames whose hash was right
	Refused  int64 `json:"frames_refused"`  // frames whose hash was wrong, or that did not decode
	Cached   int64 `json:"frames_cached"`   // encoded frames known to be in OpenOptions.Cache
	CacheOff int64 `json:"cache_off"`       // 1 once a write to it has failed and no more are made
}

type readerCounters struct{ fetched, verified, refused atomic.Int64 }

// CorruptFrameError says that a frame's bytes are not the ones that were written.
type CorruptFrameError struct {
	Overlay Hash
	Frame   int
	Err     error
}

// Error names overlay and frame.
func (e *CorruptFrameError) Error() string {
	return fmt.Sprintf("overlay %.12s: frame %d is damaged: %v: fetch or import the overlay again", e.Overlay, e.Frame, e.Err)
}

// Unwrap returns the cause.
func (e *CorruptFrameError) Unwrap() error { return e.Err }

// Is makes errors.Is(err, ErrFormat) true.
func (e *CorruptFrameError) Is(target error) bool { return target == ErrFormat }

const (
	headChunk = 256 << 10 // what Open reads first
	headStep  = 8 << 20   // the most that it reads at once
)

// Open reads and checks the head of an overlay: manifest, index, state and profile, and that
// the file is as long as they say. It does not read the frames; see [Reader.Verify]. The
// Reader owns src from then on, also where Open returns an error.
func Open(ctx context.Context, src Source) (*Reader, error) {
	return OpenWith(ctx, src, OpenOptions{})
}

// OpenOptions are the settings of a Reader; the zero value is fit for use.
type OpenOptions struct {
	// Cache, if not nil, keeps the encoded frames of a source over a network: a sparse file of
	// the overlay's size, each frame at its own offset, which may hold frames of an earlier
	// use. What is read back is verified as if it came over the network, so no byte of it needs
	// to be right. It is the caller's, to be closed after the Reader, and of no other Reader
	// at the same time. A write that fails ends the writing and no read. Not used for a source
	// that is local or becomes it by itself.
	Cache *os.File
}

// OpenWith is Open with settings.
func OpenWith(ctx context.Context, src Source, o OpenOptions) (*Reader, error) {
	r := &Reader{src: src}
	if l, ok := src.(interface{ Local() bool }); ok {
		if r.local = l.Local(); !r.local {
			r.grows = l.Local
		}
	}
	if err := r.open(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("open overlay %v: %w", src, err), src.Close())
	}
	if g, ok := src.(interface{ Growing() bool }); !r.local && !(ok && g.Growing()) {
		r.remote = newRemote(r, o.Cache)
	}
	return r, nil
}

// isLocal reports whether reads take no longer than a disk's by now.
func (r *Reader) isLocal() bool { return r.local || r.grows != nil && r.grows() }

// Complete reports whether the source is needed no more: every frame is in the cache on disk,
// as far as that is known, or the source is local.
func (r *Reader) Complete() bool {
	if r.remote == nil {
		return r.isLocal()
	}
	return r.remote.complete()
}

func (r *Reader) open(ctx context.Context) (err error) {
	if r.dec, err = newZstdDecoder(maxIndex); err != nil {
		return err
	}
	if err := r.openManifest(ctx); err != nil {
		return err
	}
	m := r.manifest
	want := [memberCount]int64{r.members[memberManifest].size, m.Members.Index.Size, m.Members.State.Size,
		m.Members.Profile.Size, m.Members.Frames.Size}
	if err := r.fillHead(ctx, &want); err != nil {
		return err
	}
	hashes := [memberCount]Hash{memberIndex: m.Members.Index.SHA256, memberState: m.Members.State.SHA256, memberProfile: m.Members.Profile.SHA256}
	for i := memberIndex; i < memberCount; i++ {
		if err := r.openMember(ctx, i, want[i]); err != nil {
			return err
		}
		if i == memberFrames {
			break
		}
		if b := r.stored(i); want[i] > 0 && Sum(b) != hashes[i] {
			return fmt.Errorf("%w: member %q does not match its hash in manifest.json", ErrFormat, memberNames[i])
		} else if crc32.ChecksumIEEE(b) != r.members[i].crc {
			return fmt.Errorf("%w: member %q does not match its CRC", ErrFormat, memberNames[i])
		}
	}
	frames := r.members[memberFrames]
	if size := frames.data + frames.size + int64(len(zipDirectory(r.members[:]))); r.src.Size() != size {
		return fmt.Errorf("%w: it has %d bytes and should have %d: it is cut off or has something behind it", ErrFormat, r.src.Size(), size)
	}
	b := make([]byte, m.Members.Index.Decoded)
	if err := r.dec.decode(b, r.stored(memberIndex)); err != nil {
		return fmt.Errorf("%w: index: %w", ErrFormat, err)
	}
	if r.index, err = parseIndex(b, m); err != nil {
		return fmt.Errorf("%w: %w", ErrFormat, err)
	}
	if s := r.index.stats(m); s != m.Stats {
		return fmt.Errorf("%w: stats in manifest.json do not match the index", ErrFormat)
	}
	r.head = r.head[:frames.data]
	return nil
}

func (r *Reader) openManifest(ctx context.Context) error {
	if err := r.openMember(ctx, memberManifest, -1); err != nil {
		return err
	}
	b := r.stored(memberManifest)
	if crc32.ChecksumIEEE(b) != r.members[memberManifest].crc {
		return fmt.Errorf("%w: manifest.json does not match its CRC", ErrFormat)
	}
	m, err := parseManifest(b)
	if err != nil {
		return err
	}
	r.manifest, r.digest = m, Sum(b)
	return nil
}

// openMember finds member i behind the one before it and brings it, or of "frames" only
// its header, into r.head.
func (r *Reader) openMember(ctx context.Context, i int, want int64) error {
	var off int64
	if i > 0 {
		off = r.members[i-1].data + r.members[i-1].size
	}
	m, err := parseLocal(r.from(off), i, off)
	for n := int64(zipLocalSize + 64); errors.Is(err, errShort); n += PageSize {
		if err := r.fill(ctx, off+n); err != nil {
			return err
		}
		m, err = parseLocal(r.from(off), i, off)
		if errors.Is(err, errShort) && int64(len(r.head)) >= r.src.Size() {
			return fmt.Errorf("%w: it ends after %d bytes, within the head: it is cut off", ErrFormat, r.src.Size())
		}
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrFormat, err)
	}
	if want >= 0 && m.size != want {
		return fmt.Errorf("%w: member %q has %d bytes, manifest.json says %d", ErrFormat, m.name, m.size, want)
	}
	if i == memberManifest && m.size > maxManifest {
		return fmt.Errorf("%w: manifest.json has %d bytes, over the limit of %d", ErrFormat, m.size, maxManifest)
	}
	r.members[i] = m
	if i == memberFrames {
		return r.fill(ctx, m.data)
	}
	if m.data+m.size > r.src.Size() {
		return fmt.Errorf("%w: it ends after %d bytes, within member %q: it is cut off", ErrFormat, r.src.Size(), m.name)
	}
	return r.fill(ctx, m.data+m.size)
}

// fill brings the first n bytes of the file into r.head, a chunk at least. What a source
// promises and does not bring costs the memory of one step.
func (r *Reader) fill(ctx context.Context, n int64) error {
	have := int64(len(r.head))
	if n <= have {
		return nil
	}
	n = min(max(n, have+headChunk), r.src.Size())
	for have < n {
		step := min(n-have, headStep)
		r.head = append(r.head, make([]byte, step)...)
		if err := r.read(ctx, r.head[have:], have); err != nil {
			return fmt.Errorf("read head: %w", err)
		}
		have += step
	}
	return nil
}

// fillHead brings the whole head into r.head at once: where it ends follows from the sizes
// of the members.
func (r *Reader) fillHead(ctx context.Context, sizes *[memberCount]int64) error {
	end := r.members[memberManifest].data + sizes[memberManifest]
	for i := memberIndex; i < memberCount; i++ {
		m, _ := layoutMember(memberNames[i], 0, sizes[i], end, i == memberFrames)
		end = m.data
		if i != memberFrames {
			end += m.size
		}
	}
	return r.fill(ctx, end)
}

// read fills p from the source, whose end is an error here: the file says how long it is.
func (r *Reader) read(ctx context.Context, p []byte, off int64) error {
	n, err := r.src.ReadAt(ctx, p, off)
	r.stats.fetched.Add(int64(n))
	switch {
	case n == len(p) && err == io.EOF:
		return nil
	case n != len(p) && (err == nil || err == io.EOF):
		return fmt.Errorf("source brings %d of %d bytes at %d: %w", n, len(p), off, io.ErrUnexpectedEOF)
	}
	return err
}

// from returns the bytes of the head from off on, which may be none.
func (r *Reader) from(off int64) []byte { return r.head[min(off, int64(len(r.head))):] }

// stored returns the bytes of a member in the head, as stored.
func (r *Reader) stored(i int) []byte {
	m := r.members[i]
	return r.head[m.data : m.data+m.size]
}

// Manifest returns what the overlay says of itself; the caller must not change it.
func (r *Reader) Manifest() *Manifest { return r.manifest }

// ID returns the content identity.
func (r *Reader) ID() Hash { return r.manifest.ID }

// Digest returns the identity of this encoding: the SHA-256 of manifest.json.
func (r *Reader) Digest() Hash { return r.digest }

// Size returns the size of the file in bytes.
func (r *Reader) Size() int64 { return r.src.Size() }

// Stats returns the counts so far.
func (r *Reader) Stats() ReaderStats {
	s := ReaderStats{Fetched: r.stats.fetched.Load(), Verified: r.stats.verified.Load(), Refused: r.stats.refused.Load()}
	if r.remote != nil {
		s.Cached, s.CacheOff = r.remote.stats()
	}
	return s
}

// Close closes the source. No read may be under way.
func (r *Reader) Close() error { return r.src.Close() }

// State returns the decoded device state, or nil where the overlay has none.
func (r *Reader) State() ([]byte, error) {
	m := r.manifest
	if m.State == nil {
		return nil, nil
	}
	b := make([]byte, m.Members.State.Decoded)
	if err := r.dec.decode(b, r.stored(memberState)); err != nil {
		return nil, fmt.Errorf("overlay %.12s: %w: state: %w", m.ID, ErrFormat, err)
	}
	if Sum(b) != *m.State {
		return nil, fmt.Errorf("overlay %.12s: %w: state does not match its hash", m.ID, ErrFormat)
	}
	return b, nil
}

// Profile returns the page addresses in the order of their first touch, or nil.
func (r *Reader) Profile() ([]Addr, error) {
	m := r.manifest
	if m.Members.Profile.Size == 0 {
		return nil, nil
	}
	b := make([]byte, m.Members.Profile.Decoded)
	if err := r.dec.decode(b, r.stored(memberProfile)); err != nil {
		return nil, fmt.Errorf("overlay %.12s: %w: profile: %w", m.ID, ErrFormat, err)
	}
	p, err := ParseProfile(b, m.MemorySize, m.DiskSize)
	if err != nil {
		return nil, fmt.Errorf("overlay %.12s: %w", m.ID, err)
	}
	return p, nil
}

// readFrame returns the encoded bytes of frame i, in buf where it is large enough, from the
// cache on disk or the source. Their hash has been checked. g, if not nil, is closed to others
// while the source is asked.
func (r *Reader) readFrame(ctx context.Context, i int, buf []byte, g *gate) ([]byte, error) {
	if r.remote != nil {
		return r.remote.demand(ctx, i, buf, g)
	}
	return r.fetchFrame(ctx, i, buf)
}

// fetchFrame reads frame i from the source and checks its hash. A wrong hash is fetched once
// more: what was damaged on the way is right the second time.
func (r *Reader) fetchFrame(ctx context.Context, i int, buf []byte) ([]byte, error) {
	f := &r.index.frames[i]
	b := slices.Grow(buf[:0], int(f.encoded))[:f.encoded]
	for try := 0; ; try++ {
		if err := r.read(ctx, b, r.members[memberFrames].data+f.offset); err != nil {
			return nil, fmt.Errorf("read frame %d of overlay %.12s: %w", i, r.ID(), err)
		}
		if Sum(b) == f.hash {
			return b, nil
		}
		r.stats.refused.Add(1)
		if try > 0 {
			return nil, &CorruptFrameError{r.ID(), i, errors.New("it does not match its hash")}
		}
	}
}

// decodeFrame reads frame i and returns its pages, in buf where it is large enough; base is
// what a delta refers to.
func (r *Reader) decodeFrame(ctx context.Context, i int, base *Base, g *gate, buf []byte) ([]byte, error) {
	from, _ := r.encoded.Get().(*[]byte)
	if from == nil {
		from = new([]byte)
	}
	defer r.encoded.Put(from)
	encoded, err := r.readFrame(ctx, i, *from, g)
	if err != nil {
		return nil, err
	}
	*from = encoded
	return r.decodePages(i, encoded, base, buf)
}

// decodePages decodes the encoded bytes of frame i, whose hash has been checked, into buf where
// it is large enough.
func (r *Reader) decodePages(i int, encoded []byte, base *Base, buf []byte) (pages []byte, err error) {
	f := &r.index.frames[i]
	n := int(f.pages) * PageSize
	if cap(buf) < n+decodeSlack {
		buf = make([]byte, n, n+decodeSlack)
	}
	pages = buf[:n]
	switch f.delta {
	case DeltaVCDIFF, DeltaDict:
		err = r.decodeDelta(f, pages, encoded, base)
	case DeltaStride:
		err = r.decodeStride(f, pages, encoded)
	default:
		err = r.dec.decodeFrame(f.codec, pages, encoded)
	}
	if b := (*baseError)(nil); errors.As(err, &b) {
		return nil, fmt.Errorf("decode frame %d of overlay %.12s: %w", i, r.ID(), b.error)
	}
	if err != nil {
		r.stats.refused.Add(1)
		return nil, &CorruptFrameError{r.ID(), i, err}
	}
	if f.delta == DeltaXOR {
		if err := xorBase(pages, r.index.stored[f.first:f.first+int(f.pages)], base.ReadVerified); err != nil {
			return nil, fmt.Errorf("decode frame %d of overlay %.12s: %w", i, r.ID(), err)
		}
	}
	r.stats.verified.Add(1)
	return pages, nil
}

// xorBase XORs the pages at addrs with what read returns for the same addresses, a run of
// neighbours at a time.
func xorBase(pages []byte, addrs []Addr, read func(Space, []byte, int64) error) error {
	buf := make([]byte, min(len(pages), 64*PageSize))
	for i, n := 0, 0; i < len(addrs); i += n {
		n = runLength(addrs[i:], len(buf)/PageSize)
		b := buf[:n*PageSize]
		if err := read(addrs[i].Space(), b, addrs[i].Offset()); err != nil {
			return err
		}
		xorBytes(pages[i*PageSize:(i+n)*PageSize], b)
	}
	return nil
}

// runLength returns how many of the addresses follow one another from the first on.
func runLength(addrs []Addr, limit int) int {
	n := 1
	for n < len(addrs) && n < limit && addrs[n] == addrs[0]+Addr(n) && addrs[n].Space() == addrs[0].Space() {
		n++
	}
	return n
}

// verifyDirectory compares the end of the file with what the members demand.
func (r *Reader) verifyDirectory(ctx context.Context) error {
	want := zipDirectory(r.members[:])
	have := make([]byte, len(want))
	if err := r.read(ctx, have, r.src.Size()-int64(len(have))); err != nil {
		return fmt.Errorf("read zip directory: %w", err)
	}
	if !bytes.Equal(have, want) {
		return fmt.Errorf("%w: its zip directory does not match its members", ErrFormat)
	}
	return nil
}
