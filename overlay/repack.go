package overlay

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
)

// Repack writes the last overlay of im once more to path, with another strategy, or its
// frames in the order of profile; nil keeps the profile that it has. Parent, pages, device
// state and so the id stay the same; the digest does not. Everything read is verified. The
// pages wait in an unnamed file beside path, as large as all that are stored: they are wanted
// in another order than they stand in frames.
func Repack(ctx context.Context, path string, im *Image, profile []Addr, o CreateOptions) (_ *Created, err error) {
	if len(im.chain) == 0 {
		return nil, fmt.Errorf("repack %.12s: it is a base, not an overlay", im.ID())
	}
	r := im.chain[len(im.chain)-1]
	state, err := r.State()
	if err != nil {
		return nil, err
	}
	if profile == nil {
		if profile, err = r.Profile(); err != nil {
			return nil, err
		}
	}
	parent, err := NewImage(im.base, im.chain[:len(im.chain)-1], ImageOptions{})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, parent.Close()) }()
	spool, err := newSpool(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("repack overlay %.12s: %w", r.ID(), err)
	}
	defer spool.Close() // it has no name, and nobody reads it again
	if im, err = NewImage(im.base, im.chain, ImageOptions{Decoded: spool}); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, im.Close()) }()
	made, err := Create(ctx, path, Launch{
		Parent: parent, Machine: r.manifest.Machine, State: state, Profile: profile,
		Memory: imageChanges(ctx, im, Memory, len(parent.chain)), Disk: imageChanges(ctx, im, Disk, len(parent.chain)),
	}, o)
	if err == nil && made.ID != r.ID() {
		return nil, fmt.Errorf("repack overlay %.12s: it became %.12s", r.ID(), made.ID)
	}
	return made, err
}
