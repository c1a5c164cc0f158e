package service

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"

	"cloudlet/api"
	"cloudlet/overlay"

	"golang.org/x/sys/unix"
)

// ReceiveBase takes a base package that r brings into the store. size is how many bytes that
// will be, or -1 where that is not known. Nothing is left of one that breaks off.
func (s *Service) ReceiveBase(ctx context.Context, caller Caller, name string, r io.Reader, size int64) (api.Base, error) {
	b, err := s.receiveBase(ctx, name, r, size)
	if err == nil {
		s.log.Info("base received", "base", b.ID, "caller", caller.Name)
	}
	return b, fail(err)
}

func (s *Service) receiveBase(ctx context.Context, name string, r io.Reader, size int64) (out api.Base, err error) {
	if err := s.checkName(name); err != nil {
		return out, err
	}
	if s.closing() {
		return out, errClosing()
	}
	if size > 0 {
		if err := s.locked(ctx, func() error { return s.admit(need{Disk: size}, nil) }); err != nil {
			return out, err
		}
	}
	st, err := s.newStage(ctx, "package")
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(s.spaceError(err), st.drop()) }()
	path := filepath.Join(st.dir, "base.zip")
	if err := s.spool(ctx, path, r, size); err != nil {
		return out, err
	}
	return s.importBaseFile(ctx, path, name, nil)
}

// spool writes what r brings to path, and keeps to the room that is there.
func (s *Service) spool(ctx context.Context, path string, r io.Reader, size int64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	var n int64
	for err == nil {
		if err = context.Cause(ctx); err != nil {
			break
		}
		if err = s.roomFor(max(0, size-n)); err != nil {
			break
		}
		var k int64
		k, err = io.CopyN(f, arriving{r}, uploadSync)
		n += k
	}
	if err == io.EOF {
		err = nil
	}
	if err == nil && size >= 0 && n != size {
		err = api.Errorf(api.Invalid, "%d bytes were announced, %d arrived", size, n)
	}
	return errors.Join(err, f.Close())
}

// arriving says of errors of a request's body that they are not of our making.
type arriving struct{ r io.Reader }

// Read implements io.Reader.
func (a arriving) Read(p []byte) (int, error) {
	n, err := a.r.Read(p)
	switch {
	case err == nil || err == io.EOF:
	case errors.Is(err, os.ErrDeadlineExceeded):
		err = api.Errorf(api.TimedOut, "no more bytes arrive: %w", err).Fix("send it again, or go on where it broke off")
	case !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded):
		err = api.Errorf(api.Invalid, "the content breaks off: %w", err).Fix("send it again, or go on where it broke off")
	}
	return n, err
}

// BasePackage returns a function that writes the package of a base, any number of times, and
// its size in bytes, -1 if that is not known before it is written. An error of the function
// before its first Write says that the base is gone.
func (s *Service) BasePackage(ctx context.Context, ref string) (write func(context.Context, io.Writer) error, size int64, err error) {
	b, release, err := s.openBase(ref)
	if err != nil {
		return nil, 0, fail(err)
	}
	id := b.ID().String()
	release()
	return func(ctx context.Context, w io.Writer) error {
		b, release, err := s.openBase(id)
		if err != nil {
			return fail(err)
		}
		defer release()
		return fail(b.Export(ctx, w, overlay.Progress(nil)))
	}, -1, nil
}

// OverlayContent opens the file of an overlay in the store, which stays until it is closed.
func (s *Service) OverlayContent(ctx context.Context, ref string) (io.ReadSeekCloser, api.Overlay, error) {
	at, err := s.findStored(ref)
	if err != nil {
		return nil, api.Overlay{}, fail(err)
	}
	lk, err := tryLock(s.path("overlays", at.id), unix.LOCK_SH)
	if err != nil {
		return nil, api.Overlay{}, fail(err)
	}
	o, err := s.describeOverlay(ctx, at.id)
	if err == nil {
		var f *os.File
		if f, err = os.Open(at.source); err == nil {
			return &heldFile{f, lk}, o, nil
		}
	}
	lk.unlock()
	return nil, o, fail(err)
}

// heldFile is a file whose folder is kept in the store until it is closed.
type heldFile struct {
	*os.File
	lock *lock
}

// Close closes the file and lets the folder go.
func (h *heldFile) Close() error {
	defer h.lock.unlock()
	return h.File.Close()
}
