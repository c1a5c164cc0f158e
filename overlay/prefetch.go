package overlay

import (
	"context"
	"slices"
)

const (
	// prefetchRun is how many pages are read at once, at most.
	prefetchRun = 32
	// prefetchGap is how many pages of the base between pages of an overlay are taken along:
	// one longer push costs less than two.
	prefetchGap = 4
	// prefetchBatch is how many pages of a profile are sorted to find neighbours.
	prefetchBatch = 128
)

// prefetching is the key of a context whose reads are no demands of a guest.
type prefetching struct{}

// Prefetch reads pages of a launch image that a guest is likely to touch, the likeliest
// first, and gives them to push, whole pages from offset off on; p is push's until it
// returns. With a profile these are the pages of the profile, in its order; without one what
// the overlays hold of memory, ascending, since what was changed is used more than what was
// not. Pages of a remote source are fetched in the background: by a [Image.Fetch] under way,
// which it waits for, or one frame after the other. It ends with the first error.
func (im *Image) Prefetch(ctx context.Context, profile []Addr, push func(ctx context.Context, s Space, p []byte, off int64) error) error {
	ctx = context.WithValue(ctx, prefetching{}, true)
	buf := make([]byte, prefetchRun*PageSize)
	give := func(s Space, off, n int64) error {
		for end := off + n; off < end; off += int64(len(buf)) {
			p := buf[:min(int64(len(buf)), end-off)]
			if err := im.await(ctx, s, int64(len(p)), off); err != nil {
				return err
			}
			if err := im.ReadPages(ctx, s, p, off); err != nil {
				return err
			}
			if err := push(ctx, s, p, off); err != nil {
				return err
			}
		}
		return nil
	}
	if profile == nil {
		for _, e := range bridge(imageChanges(ctx, im, Memory, 0).Extents, prefetchGap*PageSize) {
			if err := give(Memory, e.Off, e.Len); err != nil {
				return err
			}
		}
		return nil
	}
	for batch := range slices.Chunk(slices.Clone(profile), prefetchBatch) {
		slices.Sort(batch)
		for i, n := 0, 0; i < len(batch); i += n {
			n = runLength(batch[i:], len(batch))
			if err := give(batch[i].Space(), batch[i].Offset(), int64(n)*PageSize); err != nil {
				return err
			}
		}
	}
	return nil
}

// await waits until the frames of n bytes from off on are on this host: what follows is no
// demand for which background fetches would have to wait.
func (im *Image) await(ctx context.Context, s Space, n, off int64) error {
	if !slices.ContainsFunc(im.chain, func(r *Reader) bool { return r.remote != nil }) {
		return nil
	}
	last := frameKey{level: -1}
	for end := off + n; off < end; off += PageSize {
		src := im.resolve(MakeAddr(s, off/PageSize), len(im.chain))
		if src.level < 0 {
			continue
		}
		r := im.chain[src.level]
		key := frameKey{src.level, r.index.frameOf(src.entry)}
		if r.remote == nil || key == last {
			continue
		}
		last = key
		if im.cache.has(key) || im.kept != nil && im.kept.holds(key) {
			continue
		}
		if err := r.remote.await(ctx, key.frame, &im.gate); err != nil {
			return err
		}
	}
	return nil
}

// bridge joins extents that are at most gap bytes apart.
func bridge(extents []Extent, gap int64) []Extent {
	var out []Extent
	for _, e := range extents {
		if n := len(out) - 1; n >= 0 && e.Off-(out[n].Off+out[n].Len) <= gap {
			out[n].Len = e.Off + e.Len - out[n].Off
		} else {
			out = append(out, e)
		}
	}
	return out
}
