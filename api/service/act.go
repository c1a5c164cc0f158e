package service

import (
	"context"
	"strings"

	"cloudlet/api"
	"cloudlet/handoff"
	"cloudlet/vmm"
)

// Act does a to an instance. ActionReady takes the instance or the operation of a CreateBase.
func (s *Service) Act(ctx context.Context, ref string, a api.Action) (api.Instance, error) {
	switch a {
	case api.ActionPause:
		return s.change(ctx, ref, (*vmm.VM).Pause)
	case api.ActionContinue:
		return s.change(ctx, ref, (*vmm.VM).Continue)
	case api.ActionReset:
		return s.change(ctx, ref, (*vmm.VM).Reset) // it boots anew from its present disk
	case api.ActionStop:
		return s.stopInstance(ctx, ref)
	case api.ActionAbort:
		if err := s.abort(ctx, ref); err != nil {
			return api.Instance{}, err
		}
		return s.Instance(ctx, ref)
	case api.ActionResumeHere:
		return s.resolve(ctx, ref, handoff.ResumeHere)
	case api.ActionDiscardHere:
		return s.resolve(ctx, ref, handoff.DiscardHere)
	case api.ActionReady:
		in, err := s.captureNow(ref)
		return in, fail(err)
	}
	err := invalid("action", "no action %.80q", a).Fix("use pause, continue, reset, stop, abort, ready, resume-here or discard-here")
	return api.Instance{}, err
}

// captureNow says that the guest of a CreateBase is ready.
func (s *Service) captureNow(ref string) (api.Instance, error) {
	op, in := s.guest(ref)
	if in == nil {
		if _, err := s.findInstance(ref); err != nil {
			return api.Instance{}, err
		}
		return api.Instance{}, api.Errorf(api.Conflict, "instance %.80q is not the guest of a base create that waits", ref)
	}
	select {
	case op.ready <- struct{}{}:
	default: // it has been said
	}
	return *in, nil
}

// guest returns the guest that waits to be captured as a base, and its operation, by whose id
// it goes; nil if there is none.
func (s *Service) guest(ref string) (*operation, *api.Instance) {
	if len(ref) < 4 {
		return nil, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, op := range s.live {
		if !strings.HasPrefix(id, ref) {
			continue
		}
		op.mu.Lock()
		in := op.guest
		op.mu.Unlock()
		if in != nil {
			return op, in
		}
	}
	return nil, nil
}

// awaitReady shows a guest and waits until somebody says that it is ready.
func (op *operation) awaitReady(ctx context.Context, in api.Instance) error {
	in.ID, in.Created = op.record.ID, op.record.Created // they do not change
	op.mu.Lock()
	op.guest = &in
	op.mu.Unlock()
	op.change(func(r *operationRecord) {
		r.State, r.Phase, r.Target = api.OperationWaiting, "ready?", &api.Target{Type: "instance", ID: in.ID}
	})
	defer func() {
		op.mu.Lock()
		op.guest = nil
		op.mu.Unlock()
		op.change(func(r *operationRecord) { r.State, r.Target = api.OperationRunning, nil })
	}()
	select {
	case <-op.ready:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
