package overlay

import (
	"context"
	"crypto/sha256"
	"fmt"
	"hash/crc32"
)

// Verify checks everything in an overlay file that can be checked without its base: the
// hash of every frame, the state, the profile and the zip directory. It does not decode the
// frames; [Image.Verify] does.
func (r *Reader) Verify(ctx context.Context, p Progress) error {
	if err := r.verifyHead(ctx); err != nil {
		return err
	}
	var crc uint32
	var done int64
	for i := range r.index.frames {
		b, err := r.readFrame(ctx, i, nil, nil)
		if err != nil {
			return err
		}
		crc = crc32.Update(crc, crc32.IEEETable, b)
		done += int64(len(b))
		p.Report("verify", done, r.manifest.Members.Frames.Size)
	}
	return r.verifyCRC(crc)
}

func (r *Reader) verifyHead(ctx context.Context) error {
	if _, err := r.State(); err != nil {
		return err
	}
	if _, err := r.Profile(); err != nil {
		return err
	}
	return r.verifyDirectory(ctx)
}

func (r *Reader) verifyCRC(crc uint32) error {
	if crc != r.members[memberFrames].crc {
		return fmt.Errorf("overlay %.12s: %w: member \"frames\" does not match its CRC", r.ID(), ErrFormat)
	}
	return nil
}

// Verify checks the last overlay of the image wholly: all that [Reader.Verify] checks, and
// every page decoded and hashed, against the overlay's id. An image without overlays has
// nothing to check here: see [Base.Verify].
func (im *Image) Verify(ctx context.Context, p Progress) error {
	if len(im.chain) == 0 {
		return nil
	}
	r := im.chain[len(im.chain)-1]
	if err := r.verifyHead(ctx); err != nil {
		return err
	}
	hashes, err := im.hashStored(ctx, r, p)
	if err != nil {
		return err
	}
	id := sha256.New()
	r.manifest.newIdentity(id)
	x := r.index
	for _, e := range x.sorted {
		a, n := Addr(e>>32), int(uint32(e))
		h, err := im.entryHash(ctx, x, n, hashes)
		if err != nil {
			return fmt.Errorf("verify %s: %w", a, err)
		}
		addIdentity(id, a, h)
	}
	if Hash(id.Sum(nil)) != r.ID() {
		return fmt.Errorf("overlay %.12s: %w: its pages do not match its id", r.ID(), ErrFormat)
	}
	return nil
}

// hashStored decodes every frame of r, the last overlay, and hashes its pages.
func (im *Image) hashStored(ctx context.Context, r *Reader, p Progress) ([]Hash, error) {
	x := r.index
	hashes := make([]Hash, len(x.stored))
	var done int64
	var crc uint32
	var encoded, pages []byte
	for i := range x.frames {
		f := &x.frames[i]
		var err error
		if encoded, err = r.readFrame(ctx, i, encoded, nil); err != nil {
			return nil, err
		}
		crc = crc32.Update(crc, crc32.IEEETable, encoded)
		if pages, err = r.decodePages(i, encoded, im.base, pages); err != nil {
			return nil, err
		}
		for k := range int(f.pages) {
			hashes[f.first+k] = Sum(pages[k*PageSize : (k+1)*PageSize])
		}
		done += int64(f.encoded)
		p.Report("verify", done, r.manifest.Members.Frames.Size)
	}
	return hashes, r.verifyCRC(crc)
}

// entryHash returns the hash of the page of entry n of the last overlay's index x.
func (im *Image) entryHash(ctx context.Context, x *index, n int, stored []Hash) (Hash, error) {
	if n < len(x.stored) {
		return stored[n], nil
	}
	switch r := x.refs[n-len(x.stored)]; r.kind {
	case refZero:
		return zeroHash, nil
	case refSelf:
		e, _ := x.lookup(r.target)
		return stored[e], nil
	case refBase:
		return im.base.PageHash(r.target)
	default:
		var page [PageSize]byte
		if err := im.readPage(ctx, r.target, len(im.chain)-1, page[:]); err != nil {
			return Hash{}, err
		}
		return Sum(page[:]), nil
	}
}

// readPage reads page a as it stands in the first top overlays of the chain.
func (im *Image) readPage(ctx context.Context, a Addr, top int, p []byte) error {
	src := im.resolve(a, top)
	switch {
	case src.zero:
		clear(p)
		return nil
	case src.level < 0:
		return im.base.ReadVerified(src.addr.Space(), p, src.addr.Offset())
	}
	fr := frameReader{im: im}
	return fr.page(ctx, p, src)
}

// DecodeFrames reads, verifies and decodes every frame of the last overlay of the image, one
// after the other, and keeps nothing: what decoding costs one core. It returns the bytes of
// the pages.
func (im *Image) DecodeFrames(ctx context.Context) (n int64, err error) {
	if len(im.chain) == 0 {
		return 0, nil
	}
	r := im.chain[len(im.chain)-1]
	var pages []byte
	for i := range r.index.frames {
		if pages, err = r.decodeFrame(ctx, i, im.base, nil, pages); err != nil {
			return n, err
		}
		n += int64(len(pages))
	}
	return n, nil
}

// StoredPages calls yield with every page that the last overlay of the image stores, in the
// order of its frames, and the base's page of the same address. The pages are valid until
// yield returns.
func (im *Image) StoredPages(ctx context.Context, yield func(a Addr, page, base []byte) error) error {
	if len(im.chain) == 0 {
		return nil
	}
	r := im.chain[len(im.chain)-1]
	base := make([]byte, PageSize)
	var pages []byte
	for i := range r.index.frames {
		var err error
		if pages, err = r.decodeFrame(ctx, i, im.base, nil, pages); err != nil {
			return err
		}
		f := &r.index.frames[i]
		for k, a := range r.index.stored[f.first : f.first+int(f.pages)] {
			if err := im.base.ReadVerified(a.Space(), base, a.Offset()); err != nil {
				return err
			}
			if err := yield(a, pages[k*PageSize:(k+1)*PageSize], base); err != nil {
				return err
			}
		}
	}
	return nil
}
