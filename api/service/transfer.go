package service

import (
	"context"
	"io"

	"cloudlet/api"
)

// ReceiveBase takes a base package that r brings into the store. size is how many bytes that
// will be, or -1 where that is not known.
func (s *Service) ReceiveBase(ctx context.Context, caller Caller, name string, r io.Reader, size int64) (api.Base, error) {
	return api.Base{}, api.Errorf(api.Internal, "receive base: not there yet")
}

// BasePackage returns a function that writes the package of a base, any number of times, and
// its size in bytes, -1 if that is not known before it is written. An error of the function
// before its first Write says that the base is gone.
func (s *Service) BasePackage(ctx context.Context, ref string) (write func(context.Context, io.Writer) error, size int64, err error) {
	return nil, 0, api.Errorf(api.Internal, "base package: not there yet")
}

// OverlayContent opens the file of an overlay in the store, which stays until it is closed.
func (s *Service) OverlayContent(ctx context.Context, ref string) (io.ReadSeekCloser, api.Overlay, error) {
	return nil, api.Overlay{}, api.Errorf(api.Internal, "overlay content: not there yet")
}

// OverlayFor is Overlay on behalf of a caller: only a local one may name a file or any URL.
func (s *Service) OverlayFor(ctx context.Context, caller Caller, ref string) (api.Overlay, error) {
	return api.Overlay{}, api.Errorf(api.Internal, "overlay: not there yet")
}
