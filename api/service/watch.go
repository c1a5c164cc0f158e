package service

import (
	"context"
	"iter"

	"cloudlet/api"
)

// Operation describes an operation by its id or the beginning of it.
func (s *Service) Operation(ctx context.Context, id string) (api.Operation, error) {
	return api.Operation{}, api.Errorf(api.Internal, "operation: not there yet")
}

// Operations lists the operations, the oldest first.
func (s *Service) Operations(ctx context.Context) ([]api.Operation, error) {
	return nil, api.Errorf(api.Internal, "operations: not there yet")
}

// WaitOperation returns an operation once its version is above after or it has ended. When
// ctx ends before, it returns the operation as it is, without an error.
func (s *Service) WaitOperation(ctx context.Context, id string, after int64) (api.Operation, error) {
	return api.Operation{}, api.Errorf(api.Internal, "wait: not there yet")
}

// OperationEvents yields the states of an operation whose version is above after, as many as
// the reader keeps up with, up to and with the final one. It ends early, without an error,
// when ctx ends.
func (s *Service) OperationEvents(ctx context.Context, id string, after int64) iter.Seq2[api.Operation, error] {
	return func(yield func(api.Operation, error) bool) {
		yield(api.Operation{}, api.Errorf(api.Internal, "events: not there yet"))
	}
}

// CancelOperation ends an operation and returns when nothing is left of its work. One that
// has ended already is a Conflict.
func (s *Service) CancelOperation(ctx context.Context, id string) (api.Operation, error) {
	return api.Operation{}, api.Errorf(api.Internal, "cancel: not there yet")
}

// Act does a to an instance. ActionReady takes the instance or the operation of a CreateBase.
func (s *Service) Act(ctx context.Context, ref string, a api.Action) (api.Instance, error) {
	return api.Instance{}, api.Errorf(api.Internal, "act: not there yet")
}

// Close takes no more work and waits for the operations; those that still run when ctx ends
// are cancelled, and Close returns when they have cleaned up. VMs and mounts live on.
func (s *Service) Close(ctx context.Context) error { return nil }
