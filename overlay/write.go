package overlay

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/klauspost/compress/zstd"
)

// group is a frame to be: the pages that go into it.
type group struct {
	addrs  []Addr
	size   int // capacity in bytes
	delta  Delta
	stride int // of DeltaStride in words, else 0
}

// encodedFrame is a frame ready to be written.
type encodedFrame struct {
	frame
	addrs []Addr
	bytes []byte
}

// groups orders the stored pages into frames: those of the profile first, in its order, the
// others as the strategy says; a frame holds pages of one image only.
func (c *creation) groups(ctx context.Context, yield func(group) error) (err error) {
	cold := c.stored
	similar := c.strategy.Order == OrderSimilar || c.strategy.Order == OrderCold && len(c.l.Profile) > 0
	if len(c.l.Profile) > 0 {
		hot := make([]Addr, 0, len(c.l.Profile))
		isHot := make(map[Addr]struct{}, len(c.l.Profile))
		for _, a := range c.l.Profile {
			if _, ok := slices.BinarySearch(c.stored, a); ok {
				hot = append(hot, a)
				isHot[a] = struct{}{}
			}
		}
		if err := split(group{hot, c.strategy.HotSize, c.strategy.Delta, 0}, yield); err != nil {
			return err
		}
		cold = slices.DeleteFunc(slices.Clone(cold), func(a Addr) bool { _, ok := isHot[a]; return ok })
	}
	if !similar {
		return split(group{cold, c.strategy.FrameSize, c.strategy.Delta, 0}, yield)
	}
	parts, err := c.bySimilarity(ctx, cold)
	if err != nil {
		return err
	}
	for _, g := range parts {
		if err := split(g, yield); err != nil {
			return err
		}
	}
	return nil
}

// split parts the pages of g into frames.
func split(g group, yield func(group) error) error {
	for rest := g.addrs; len(rest) > 0; rest = rest[len(g.addrs):] {
		n := 1
		for n < len(rest) && n < g.size/PageSize && rest[n].Space() == rest[0].Space() {
			n++
		}
		g.addrs = rest[:n]
		if err := yield(g); err != nil {
			return err
		}
	}
	return nil
}

// encodeGroup reads the pages of g into buf, and those of the base behind them, and encodes
// the frame.
func (c *creation) encodeGroup(ctx context.Context, g group, e *frameEncoder, buf []byte) (encodedFrame, error) {
	pages := buf[:len(g.addrs)*PageSize]
	f := encodedFrame{addrs: g.addrs, frame: frame{pages: uint16(len(g.addrs))}}
	if err := c.readLaunch(pages, g.addrs); err != nil {
		return f, err
	}
	var base []byte
	if g.delta != DeltaNone {
		base = buf[len(pages) : 2*len(pages)]
		if err := readPages(base, g.addrs, c.l.Parent.base.ReadVerified); err != nil {
			return f, err
		}
	}
	var b []byte
	var err error
	if g.stride > 0 {
		b, err = e.encodeStride(ctx, &f.frame, pages, g.stride)
	} else {
		b, err = e.encodeFrame(ctx, &f.frame, pages, base)
	}
	if err != nil {
		return f, err
	}
	f.encoded, f.hash = uint32(len(b)), Sum(b)
	f.bytes = slices.Clone(b)
	return f, nil
}

// readLaunch reads pages of the launch VM.
func (c *creation) readLaunch(dst []byte, addrs []Addr) error {
	return readPages(dst, addrs, func(s Space, p []byte, off int64) error {
		if s == Disk {
			return c.l.Disk.Read(p, off)
		}
		return c.l.Memory.Read(p, off)
	})
}

// spoolFrames encodes all frames into w and returns the index they give and the CRC of
// their bytes.
func (c *creation) spoolFrames(ctx context.Context, w io.Writer) (*index, uint32, error) {
	x := &index{refs: c.refs, stored: make([]Addr, 0, len(c.stored))}
	var crc uint32
	size := max(c.strategy.FrameSize, c.strategy.HotSize)
	var mu sync.Mutex
	var encoders []*frameEncoder
	err := ordered(ctx, c.workers, func(yield func(group) error) error { return c.groups(ctx, yield) },
		func() (func(group) (encodedFrame, error), error) {
			e, err := newFrameEncoder(&c.strategy, size, c.tools)
			mu.Lock()
			encoders = append(encoders, e)
			mu.Unlock()
			buf := make([]byte, 2*size)
			return func(g group) (encodedFrame, error) { return c.encodeGroup(ctx, g, e, buf) }, err
		},
		func(f encodedFrame) error {
			if _, err := w.Write(f.bytes); err != nil {
				return fmt.Errorf("write frame %d: %w", len(x.frames), err)
			}
			crc = crc32.Update(crc, crc32.IEEETable, f.bytes)
			c.manifest.Members.Frames.Size += int64(f.encoded)
			x.frames = append(x.frames, f.frame)
			x.stored = append(x.stored, f.addrs...)
			c.progress.Report("encode", int64(len(x.stored))*PageSize, int64(len(c.stored))*PageSize)
			return nil
		})
	for _, e := range encoders {
		err = errors.Join(err, e.Close())
	}
	if err == nil && len(x.stored) != len(c.stored) {
		err = fmt.Errorf("encoded %d of %d pages", len(x.stored), len(c.stored))
	}
	return x, crc, err
}

// newSpool returns a file in dir that has no name, so that nothing is left of it.
func newSpool(dir string) (*os.File, error) {
	f, err := os.CreateTemp(dir, ".frames-*")
	if err != nil {
		return nil, fmt.Errorf("make temporary file: %w", err)
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(fmt.Errorf("unlink temporary file: %w", err), f.Close())
	}
	return f, nil
}

// write encodes the frames into the spool file, for the head needs their sizes and hashes,
// then writes the overlay: head, frames, directory.
func (c *creation) write(ctx context.Context, path string, spool *os.File) (*Created, error) {
	x, crc, err := c.spoolFrames(ctx, spool)
	if err != nil {
		return nil, err
	}
	m := &c.manifest
	index := x.marshal()
	var bodies [memberCount][]byte
	e, err := c.packer(max(len(index), len(c.l.State)))
	if err != nil {
		return nil, err
	}
	for _, part := range []struct {
		i      int
		body   []byte
		member *Member
	}{
		{memberIndex, index, &m.Members.Index},
		{memberState, c.l.State, &m.Members.State},
		{memberProfile, MarshalProfile(c.l.Profile), &m.Members.Profile},
	} {
		if bodies[part.i], err = pack(e, part.body, part.member); err != nil {
			return nil, fmt.Errorf("pack %s: %w", memberNames[part.i], err)
		}
	}
	if m.Members.Index.Decoded > maxIndex {
		return nil, fmt.Errorf("index of %d pages has %d bytes, over the limit of %d", len(x.stored)+len(x.refs), m.Members.Index.Decoded, maxIndex)
	}
	if _, err := parseIndex(index, m); err != nil {
		return nil, fmt.Errorf("check what was made: %w", err)
	}
	m.Stats = x.stats(m)
	if bodies[memberManifest], err = m.marshal(); err != nil {
		return nil, err
	}
	if _, err := parseManifest(bodies[memberManifest]); err != nil {
		return nil, fmt.Errorf("check what was made: %w", err)
	}
	size, err := writeArchive(ctx, path, &bodies, spool, m.Members.Frames.Size, crc)
	if err != nil {
		return nil, err
	}
	made := *m // alone: c is large
	return &Created{ID: m.ID, Digest: Sum(bodies[memberManifest]), Size: size, Manifest: &made}, nil
}

// packer returns the encoder of the small members, the largest of which has size bytes.
func (c *creation) packer(size int) (*zstd.Encoder, error) {
	level, window := zstd.SpeedBestCompression, zstd.MinWindowSize
	if c.quick {
		level = zstd.SpeedFastest
	}
	for window < min(size, 8<<20) { // its tables take their time, too
		window <<= 1
	}
	return zstd.NewWriter(nil, zstd.WithEncoderLevel(level), zstd.WithWindowSize(window), zstd.WithEncoderConcurrency(1),
		zstd.WithEncoderCRC(false), zstd.WithSingleSegment(true), zstd.WithLowerEncoderMem(true))
}

// pack compresses the body of a small member and describes it in d.
func pack(e *zstd.Encoder, body []byte, d *Member) ([]byte, error) {
	if len(body) == 0 {
		return nil, nil
	}
	b := e.EncodeAll(body, nil)
	*d = Member{Size: int64(len(b)), SHA256: Sum(b), Decoded: int64(len(body))}
	return b, nil
}

// writeArchive writes the zip: members from bodies, then the frames from spool.
func writeArchive(ctx context.Context, path string, bodies *[memberCount][]byte, spool *os.File, frames int64, crc uint32) (size int64, err error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*")
	if err != nil {
		return 0, fmt.Errorf("make temporary file: %w", err)
	}
	defer func() {
		if err != nil {
			f.Close() // may be closed already; the file goes anyway
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	var members []zipMember
	put := func(b []byte) {
		if err == nil {
			_, err = f.Write(b)
			size += int64(len(b))
		}
	}
	for i, body := range bodies {
		n, sum := int64(len(body)), crc32.ChecksumIEEE(body)
		if i == memberFrames {
			n, sum = frames, crc
		}
		m, header := layoutMember(memberNames[i], sum, n, size, i == memberFrames)
		members = append(members, m)
		put(header)
		put(body)
	}
	if err != nil {
		return 0, err
	}
	if _, err = spool.Seek(0, io.SeekStart); err != nil {
		return 0, err
	}
	for left := frames; left > 0; {
		if err = ctx.Err(); err != nil {
			return 0, context.Cause(ctx)
		}
		var n int64
		if n, err = io.CopyN(f, spool, min(left, 64<<20)); err != nil {
			return 0, fmt.Errorf("copy frames: %w", err)
		}
		left, size = left-n, size+n
	}
	put(zipDirectory(members))
	if err == nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return 0, err
	}
	return size, commit(f, path)
}

// commit makes the temporary file f durable under its name path.
func commit(f *os.File, path string) error {
	if err := f.Chmod(0o644); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
