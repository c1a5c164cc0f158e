package overlay

import (
	"context"
	"errors"
	"fmt"
)

// Repack writes the last overlay of im once more to path, with another strategy, or its
// frames in the order of profile; nil keeps the profile that it has. Parent, pages, device
// state and so the id stay the same; the digest does not. Everything read is verified.
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
	made, err := Create(ctx, path, Launch{
		Parent: parent, Machine: r.manifest.Machine, State: state, Profile: profile,
		Memory: imageChanges(ctx, im, Memory, len(parent.chain)), Disk: imageChanges(ctx, im, Disk, len(parent.chain)),
	}, o)
	if err == nil && made.ID != r.ID() {
		return nil, fmt.Errorf("repack overlay %.12s: it became %.12s", r.ID(), made.ID)
	}
	return made, err
}
