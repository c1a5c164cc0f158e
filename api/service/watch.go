package service

import (
	"context"
	"errors"
	"io/fs"
	"iter"
	"os"
	"slices"
	"time"

	"cloudlet/api"
)

// Operation describes an operation by its id or the beginning of it.
func (s *Service) Operation(ctx context.Context, id string) (api.Operation, error) {
	id, err := s.findOperation(id)
	if err != nil {
		return api.Operation{}, fail(err)
	}
	op, _, err := s.look(ctx, id)
	return op, fail(err)
}

// Operations lists the operations, the oldest first. The newest 1000 are kept.
func (s *Service) Operations(ctx context.Context) ([]api.Operation, error) {
	out, err := shared(ctx, s, "operations", func(ctx context.Context) ([]api.Operation, error) {
		ids, err := s.list("operations")
		if err != nil {
			return nil, err
		}
		records, err := s.readOperations(ids)
		if err != nil {
			return nil, err
		}
		out := make([]api.Operation, 0, len(records))
		for _, r := range records[max(0, len(records)-keptOperations):] {
			op := r.shown()
			if !r.State.Ended() {
				if op, _, err = s.look(ctx, r.ID); err != nil {
					return nil, err
				}
			}
			out = append(out, op)
		}
		return out, nil
	})
	return slices.Clone(out), fail(err)
}

func sortOperations(list []operationRecord) {
	slices.SortFunc(list, func(a, b operationRecord) int { return a.Created.Compare(b.Created) })
}

// own returns the operation if this process works on it.
func (s *Service) own(id string) *operation {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.live[id]
}

// look returns an operation as it is now, and a channel that is closed when it has changed;
// nil where another process works on it, or it has ended.
func (s *Service) look(ctx context.Context, id string) (api.Operation, <-chan struct{}, error) {
	if op := s.own(id); op != nil {
		op.mu.Lock()
		defer op.mu.Unlock()
		return op.record.shown(), op.changed, nil
	}
	r, err := s.settle(ctx, id)
	return r.shown(), nil, err
}

// WaitOperation returns an operation once its version is above after or it has ended. When
// ctx ends before, it returns the operation as it is, without an error.
func (s *Service) WaitOperation(ctx context.Context, id string, after int64) (api.Operation, error) {
	for op, err := range s.OperationEvents(ctx, id, after) {
		return op, err
	}
	return s.Operation(context.WithoutCancel(ctx), id)
}

// OperationEvents yields the states of an operation whose version is above after, as many as
// the reader keeps up with, up to and with the final one. It ends early, without an error,
// when ctx ends.
func (s *Service) OperationEvents(ctx context.Context, id string, after int64) iter.Seq2[api.Operation, error] {
	return func(yield func(api.Operation, error) bool) {
		id, err := s.findOperation(id)
		if err != nil {
			yield(api.Operation{}, fail(err))
			return
		}
		var tick *time.Ticker
		for {
			op, changed, err := s.look(context.WithoutCancel(ctx), id)
			if err != nil {
				yield(api.Operation{}, fail(err))
				return
			}
			if op.Version > after {
				after = op.Version
				if !yield(op, nil) {
					return
				}
			}
			if op.State.Ended() {
				return
			}
			var poll <-chan time.Time
			if changed == nil { // another process writes to its record
				if tick == nil {
					tick = time.NewTicker(operationTick)
					defer tick.Stop()
				}
				poll = tick.C
			}
			select {
			case <-changed:
			case <-poll:
			case <-ctx.Done():
				return
			}
		}
	}
}

// ForgetOperation removes the record of an operation that has ended; what it has made stays.
// One that goes on is a Conflict.
func (s *Service) ForgetOperation(ctx context.Context, id string) error {
	id, err := s.findOperation(id)
	if err != nil {
		return fail(err)
	}
	now, _, err := s.look(ctx, id)
	if err != nil {
		return fail(err)
	}
	s.mu.Lock()
	op := s.live[id]
	unsaved := op != nil && op.unsaved
	s.mu.Unlock()
	if !now.State.Ended() || unsaved {
		return api.Errorf(api.Conflict, "operation %s has not ended: it is %s", id, now.State).Fix("cancel it first")
	}
	return fail(s.locked(ctx, func() error { return os.RemoveAll(s.operationPath(id)) }))
}

// CancelOperation ends an operation and returns when nothing is left of its work. One that
// has ended already, or that succeeds in this moment, is a Conflict.
func (s *Service) CancelOperation(ctx context.Context, id string) (api.Operation, error) {
	id, err := s.findOperation(id)
	if err != nil {
		return api.Operation{}, fail(err)
	}
	now, _, err := s.look(ctx, id)
	if err != nil {
		return now, fail(err)
	}
	if now.State.Ended() {
		return now, api.Errorf(api.Conflict, "operation %s has ended: it is %s", id, now.State)
	}
	if err := s.cancelHandoff(now); err != nil {
		return now, err
	}
	if op := s.own(id); op != nil {
		op.end()
	} else if err := os.WriteFile(s.operationPath(id, "cancel"), nil, 0o600); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return now, fail(err)
	} else if err := s.cancelDead(ctx, id); err != nil {
		return now, fail(err)
	}
	for op, err := range s.OperationEvents(ctx, id, 0) {
		if err != nil {
			return now, err
		}
		now = op
	}
	switch {
	case now.State == api.OperationCancelled:
		return now, nil
	case now.State.Ended():
		return now, api.Errorf(api.Conflict, "operation %s ended before it could be cancelled: it is %s", id, now.State)
	}
	return now, fail(context.Cause(ctx))
}
