package service

import (
	"context"
	"io"

	"cloudlet/api"
)

// CreateUpload makes room for an overlay whose content will be sent with Append.
func (s *Service) CreateUpload(ctx context.Context, caller Caller, req api.CreateUpload) (api.Upload, error) {
	return api.Upload{}, api.Errorf(api.Internal, "upload: not there yet")
}

// Upload describes an upload.
func (s *Service) Upload(ctx context.Context, id string) (api.Upload, error) {
	return api.Upload{}, api.Errorf(api.Internal, "upload: not there yet")
}

// DeleteUpload removes an upload and what has arrived of it.
func (s *Service) DeleteUpload(ctx context.Context, id string) error {
	return api.Errorf(api.Internal, "upload: not there yet")
}

// Append adds what r holds at off, which must be the upload's offset; else it is a Conflict,
// and the upload is returned too, to tell where to go on. What has arrived when r breaks
// stays. More than the upload's size is Invalid, and nothing of r stays.
func (s *Service) Append(ctx context.Context, id string, off int64, r io.Reader) (api.Upload, error) {
	return api.Upload{}, api.Errorf(api.Internal, "upload: not there yet")
}

// FinishUpload begins the operation that checks a complete upload and takes it into the store.
func (s *Service) FinishUpload(ctx context.Context, caller Caller, id string) (api.Operation, error) {
	return api.Operation{}, api.Errorf(api.Internal, "upload: not there yet")
}
