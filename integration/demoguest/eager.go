package demoguest

import (
	"context"

	"golang.org/x/sync/errgroup"
)

// OwnEager decodes the whole overlay that ref names into plain files, and resumes from them.
func (l *Lab) OwnEager(ctx context.Context, ref string, answered func(address string) error) error {
	if err := l.Mounted(ctx, ref, func(dir string) error { return CopyImages(ctx, dir, l.Path("round")) }); err != nil {
		return err
	}
	return l.Resume(ctx, l.Path("round"), answered)
}

// Eager is the original way: decode memory and disk, at the same time, then resume. delta
// are the programs that print the delta of an image, each one's output the next one's input.
func (l *Lab) Eager(ctx context.Context, delta func(name string) [][]string, answered func(address string) error) error {
	g, gctx := errgroup.WithContext(ctx)
	for _, name := range Images {
		g.Go(func() error {
			base := l.Path("state", "bases", l.Made.Base, name)
			return Piped(gctx, l.Path("round", name), append(delta(name), []string{"xdelta3", "-d", "-c", "-B", "2147483648", "-s", base})...)
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return l.Resume(ctx, l.Path("round"), answered)
}
