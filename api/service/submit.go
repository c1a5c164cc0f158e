package service

import (
	"context"

	"cloudlet/api"
)

// Caller is on whose behalf work is done.
type Caller struct {
	Name  string // who asks, for idempotency and logs
	Local bool   // a unix socket or this process: may name host paths and any URL
	Key   string // idempotency key; "" means none
}

// VerifyBase asks Submit to check a base.
type VerifyBase struct{ api.Verify }

// VerifyOverlay asks Submit to check an overlay.
type VerifyOverlay struct{ api.Verify }

// Submit begins an operation: api.CreateBase, api.ImportBase, VerifyBase, api.CreateOverlay,
// api.ImportOverlay, VerifyOverlay or api.Run. What is wrong with the request, and what
// cannot fit on this host, is an error at once and leaves nothing. The work goes on when ctx
// has ended; Close joins it. The same caller, key and request give the same operation for 24
// hours; another request under that key is a Conflict.
func (s *Service) Submit(ctx context.Context, caller Caller, req any) (api.Operation, error) {
	return api.Operation{}, api.Errorf(api.Internal, "submit %T: not there yet", req)
}
