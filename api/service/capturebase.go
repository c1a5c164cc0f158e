package service

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"cloudlet/api"
	"cloudlet/overlay"
)

// captureBase makes a base of what an instance is now: it captures an overlay, and writes out
// the launch image of it.
func (s *Service) captureBase(ctx context.Context, id, name string, p api.Progress) (out api.Base, err error) {
	r, vm, lk, err := s.working(ctx, id)
	if err != nil {
		return out, err
	}
	defer lk.unlock()
	l, err := s.openLinks(ctx, r.Base, r.Links)
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(err, l.close()) }()
	st, err := s.newStage(ctx, "base")
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(s.spaceError(err), st.drop()) }()
	strategy, err := overlay.ParseStrategy("")
	if err != nil {
		return out, err
	}
	path := filepath.Join(st.dir, "overlay")
	if _, err := s.capture(ctx, r, vm, l, st.dir, path, overlay.CreateOptions{Strategy: strategy, Progress: overlay.Progress(p)}); err != nil {
		return out, fmt.Errorf("capture instance %s: %w", r.ID, err)
	}
	dir := filepath.Join(st.dir, "base")
	if err := s.writeLaunch(ctx, dir, path, l, r.Own, p); err != nil {
		return out, fmt.Errorf("make a base of instance %s: %w", r.ID, err)
	}
	b, err := overlay.SealBase(ctx, dir, r.Machine, overlay.Progress(p))
	if err != nil {
		return out, err
	}
	return s.keepBase(ctx, b, name)
}

// writeLaunch writes the parts of a base to dir: what an overlay, on the launch of an instance,
// makes of disk, memory and state, and the kernel and initrd of the base below.
func (s *Service) writeLaunch(ctx context.Context, dir, path string, l *launchImage, own int, p api.Progress) (err error) {
	top, err := link{Source: path}.read(ctx, "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, top.Close()) }()
	chain := append(append([]*overlay.Reader{}, l.readers[:len(l.readers)-own]...), top)
	image, err := overlay.NewImage(l.base, chain, overlay.ImageOptions{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, image.Close()) }()
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	state, err := image.State()
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, overlay.BaseStateFile), state, 0o600); err != nil {
		return err
	}
	for _, name := range []string{overlay.BaseKernelFile, overlay.BaseInitrdFile} {
		from := l.base.Path(name)
		if from == "" {
			continue
		}
		if err := copyOut(from, filepath.Join(dir, name), ctx.Err); err != nil {
			return err
		}
	}
	for _, space := range []overlay.Space{overlay.Disk, overlay.Memory} {
		err := writeFile(filepath.Join(dir, space.String()), func(f *os.File) error { return writeSpace(ctx, f, image.File(space), "write "+space.String(), p) })
		if err != nil {
			return err
		}
	}
	return nil
}

// writeSpace writes a file of a launch image to f, its zero pages as holes.
func writeSpace(ctx context.Context, f *os.File, image *overlay.ImageFile, phase string, p api.Progress) error {
	size := image.Size()
	if err := f.Truncate(size); err != nil {
		return err
	}
	buf, zero := make([]byte, 1<<20), make([]byte, 1<<20)
	for off := int64(0); off < size; off += int64(len(buf)) {
		part := buf[:min(int64(len(buf)), size-off)]
		if _, err := image.ReadAt(ctx, part, off); err != nil {
			return err
		}
		if string(part) != string(zero[:len(part)]) {
			if _, err := f.WriteAt(part, off); err != nil {
				return err
			}
		}
		overlay.Progress(p).Report(phase, off+int64(len(part)), size)
	}
	return nil
}
