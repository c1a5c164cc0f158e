package service

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"cloudlet/api"
)

const (
	defaultOperations = 16
	keptOperations    = 1000
	operationTick     = 100 * time.Millisecond // between changes that watchers and the disk see
	versionGap        = 100                    // above what a killed process may have shown without writing it
)

// operationRecord is what the store keeps of an operation.
type operationRecord struct {
	api.Operation
	Caller string `json:"caller,omitempty"`
	Local  bool   `json:"local,omitempty"`
	Daemon bool   `json:"daemon,omitempty"` // a daemon's, which the next one takes up
	Upload string `json:"upload,omitempty"` // what it takes in
	Need   need   `json:"need,omitzero"`
}

// operation is one that this process works on.
type operation struct {
	lock    *lock
	work    context.CancelCauseFunc // ends the work
	poke    chan struct{}           // show the change now
	ready   chan struct{}           // ActionReady
	stopped chan struct{}           // of the work: no more changes
	unsaved bool                    // its end is not on disk; guarded by the Service

	mu        sync.Mutex
	record    operationRecord
	dirty     bool          // record has changed since its version was given
	changed   chan struct{} // closed at the next version
	cancelled bool
	guest     *api.Instance // of a CreateBase, while it runs
}

// newOperation returns an operation and the context of its work, which outlives that of the
// request, and ends with the work, by CancelOperation or by Close.
func newOperation(ctx context.Context, r operationRecord) (*operation, context.Context) {
	life, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	return &operation{
		record: r, work: cancel, poke: make(chan struct{}, 1), ready: make(chan struct{}, 1),
		stopped: make(chan struct{}), changed: make(chan struct{}),
	}, life
}

func (s *Service) operationPath(id string, parts ...string) string {
	return s.path(append([]string{"operations", id}, parts...)...)
}

func (s *Service) readOperation(id string) (r operationRecord, err error) {
	err = readJSON(s.operationPath(id, "record.json"), &r)
	return r, err
}

// start works on an operation whose lock is held, in a goroutine that Close joins.
func (s *Service) start(ctx context.Context, op *operation, work func(context.Context, *operation) (any, error)) {
	var shown sync.WaitGroup
	shown.Go(func() { s.show(op) })
	go func() {
		defer s.strike(op)
		result, err := s.guard(ctx, op, work)
		close(op.stopped)
		shown.Wait()
		if err == nil || !errors.Is(context.Cause(ctx), errStopping) || !s.leave(op) {
			s.conclude(context.WithoutCancel(ctx), op, result, err)
		}
	}()
}

// errStopping is the cause that ends the work when the service stops.
var errStopping = fmt.Errorf("the service stops: %w", context.Canceled)

// guard does the work. A panic ends the operation, not the service.
func (s *Service) guard(ctx context.Context, op *operation, work func(context.Context, *operation) (any, error)) (result any, err error) {
	defer func() {
		if p := recover(); p != nil {
			s.log.Error("panic", "operation", op.record.ID, "panic", p, "stack", string(debug.Stack()))
			result, err = nil, api.Errorf(api.Internal, "a fault of this program ended the operation: %v", p).Fix("report it, with the log")
		}
	}()
	result, err = work(ctx, op)
	if err != nil && ctx.Err() != nil {
		s.log.Debug("work was cancelled", "operation", op.record.ID, "err", err)
		err = context.Cause(ctx)
	}
	return result, err
}

// leave leaves an operation to the next daemon, if that can go on with it.
func (s *Service) leave(op *operation) bool {
	op.mu.Lock()
	r, cancelled := op.record, op.cancelled
	op.mu.Unlock()
	if !s.resumable(r) {
		return false
	}
	if cancelled { // too late to end it here; the next daemon does
		if err := os.WriteFile(s.operationPath(r.ID, "cancel"), nil, 0o600); err != nil {
			s.log.Warn("write cancellation for the next start", "operation", r.ID, "err", err)
		}
	}
	if err := replaceJSON(s.operationPath(r.ID, "record.json"), r, true); err != nil {
		s.log.Warn("write operation for the next start", "operation", r.ID, "err", err) // an older record is there
	}
	s.log.Info("operation is left to the next start", "operation", r.ID, "kind", r.Kind)
	op.lock.unlock()
	op.mu.Lock()
	defer op.mu.Unlock()
	close(op.changed)
	op.changed = nil // from here on the record is watched
	return true
}

// show gives the changes of an operation to its watchers and to the disk, and looks whether
// another process asks for its end.
func (s *Service) show(op *operation) {
	tick := time.NewTicker(operationTick)
	defer tick.Stop()
	asked := s.operationPath(op.record.ID, "cancel")
	for {
		select {
		case <-op.stopped:
			return
		case <-op.poke:
		case <-tick.C:
			if _, err := os.Stat(asked); err == nil {
				op.end()
			}
		}
		if r, ok := op.publish(); ok {
			if err := replaceJSON(s.operationPath(r.ID, "record.json"), r, false); err != nil {
				s.log.Debug("write progress of operation", "operation", r.ID, "err", err) // its end is written again
			}
		}
	}
}

// end asks the work to end.
func (op *operation) end() {
	op.mu.Lock()
	op.cancelled = true
	op.mu.Unlock()
	op.work(nil)
}

// publish gives a change its version and wakes the watchers.
func (op *operation) publish() (operationRecord, bool) {
	op.mu.Lock()
	defer op.mu.Unlock()
	if !op.dirty {
		return op.record, false
	}
	op.dirty = false
	op.record.Version++
	close(op.changed)
	op.changed = make(chan struct{})
	return op.record, true
}

// progress implements api.Progress.
func (op *operation) progress(phase string, done, total int64) {
	op.mu.Lock()
	defer op.mu.Unlock()
	op.record.Phase, op.record.Done, op.record.Total, op.dirty = phase, done, total, true
}

// change changes the record and shows it at once.
func (op *operation) change(f func(*operationRecord)) {
	op.mu.Lock()
	f(&op.record)
	op.dirty = true
	op.mu.Unlock()
	select {
	case op.poke <- struct{}{}:
	default: // it is on its way
	}
}

func (op *operation) aim(kind, id string) {
	op.change(func(r *operationRecord) { r.Target = &api.Target{Type: kind, ID: id} })
}

func (op *operation) snapshot() api.Operation {
	op.mu.Lock()
	defer op.mu.Unlock()
	return op.record.shown()
}

// conclude records how an operation has ended, on disk before anybody is told.
func (s *Service) conclude(ctx context.Context, op *operation, result any, err error) {
	op.mu.Lock()
	r, cancelled := op.record, op.cancelled
	op.mu.Unlock()
	r.Version++
	r.Ended = time.Now().UTC()
	if err == nil {
		r.Result, err = json.Marshal(result)
	}
	var e *api.Error
	switch {
	case err == nil:
		r.State, r.Phase, r.Done, r.Total = api.OperationDone, "", 0, 0
	case api.CodeOf(fail(err)) == api.Cancelled:
		r.State = api.OperationCancelled
		if e = api.Errorf(api.Cancelled, "the operation was cancelled"); !cancelled {
			e = api.Errorf(api.Cancelled, "the service was stopped while it worked on this").Fix("ask again")
		}
	default:
		r.State = api.OperationFailed
		errors.As(fail(err), &e)
	}
	r.Error = e
	if r.State == api.OperationDone {
		r.Target = targetOf(r.Target, result)
	} else if r.Kind != api.KindHandoff && (r.Kind != api.KindRun || !s.exists(r.Target)) {
		r.Target = nil
	}
	s.log.Info("operation ended", "operation", r.ID, "kind", r.Kind, "state", r.State, "took", r.Ended.Sub(r.Created), "caller", r.Caller, "err", err)
	if err := s.recordEnd(r); err != nil {
		s.log.Error("write end of operation", "operation", r.ID, "err", err)
		s.mu.Lock()
		op.unsaved = true
		s.mu.Unlock()
	}
	op.lock.unlock()
	op.mu.Lock()
	op.record, op.dirty, op.guest = r, false, nil
	close(op.changed)
	op.changed = nil
	op.mu.Unlock()
	s.note(ctx, r)
}

// recordEnd writes the final record and takes the operation from the active ones.
func (s *Service) recordEnd(r operationRecord) error {
	err := replaceJSON(s.operationPath(r.ID, "record.json"), r, true)
	if err != nil {
		return err // it stays active: whoever sweeps says that its process has ended
	}
	return ignoreMissing(os.Remove(s.path("active", r.ID)))
}

// targetOf returns what an operation has made.
func targetOf(t *api.Target, result any) *api.Target {
	switch v := result.(type) {
	case api.Base:
		return &api.Target{Type: "base", ID: v.ID}
	case api.Overlay:
		return &api.Target{Type: "overlay", ID: v.ID}
	case api.CreatedOverlay:
		return &api.Target{Type: "overlay", ID: v.ID}
	case api.Instance:
		return &api.Target{Type: "instance", ID: v.ID}
	}
	return t
}

// exists reports whether the instance that a run aimed at is there: one that missed its probe
// may have been kept.
func (s *Service) exists(t *api.Target) bool {
	if t == nil {
		return false
	}
	_, err := os.Stat(s.instancePath(t.ID, "record.json"))
	return err == nil
}

// findOperation returns the id of the operation that ref names, by its beginning at least.
func (s *Service) findOperation(ref string) (string, error) {
	if operationForm(ref) {
		if _, err := os.Stat(s.operationPath(ref)); err == nil {
			return ref, nil
		}
	}
	var found []string
	if len(ref) >= 4 {
		ids, err := s.list("operations")
		if err != nil {
			return "", err
		}
		for _, id := range ids {
			if strings.HasPrefix(id, ref) {
				found = append(found, id)
			}
		}
	}
	switch len(found) {
	case 0:
		return "", api.Errorf(api.NotFound, "no operation %.80q in %s", ref, s.cfg.Dir).Fix("see `cloudlet op list`; the newest %d are kept", keptOperations)
	case 1:
		return found[0], nil
	}
	return "", api.Errorf(api.Invalid, "%q is the beginning of %d operation ids", ref, len(found)).Fix("give more digits")
}

func operationForm(id string) bool {
	_, err := hex.DecodeString(id)
	return err == nil && len(id) == 12
}

// prune removes the oldest operations beyond those that are kept.
func (s *Service) prune(ctx context.Context) error {
	ids, err := s.list("operations")
	if err != nil || len(ids) <= keptOperations+keptOperations/10 {
		return err
	}
	ops, err := s.readOperations(ids)
	if err != nil {
		return err
	}
	for i, r := range ops {
		if i >= len(ops)-keptOperations {
			break
		}
		if r.State.Ended() {
			err = errors.Join(err, s.locked(ctx, func() error { return os.RemoveAll(s.operationPath(r.ID)) }))
		}
	}
	return err
}

func (s *Service) readOperations(ids []string) ([]operationRecord, error) {
	var out []operationRecord
	for _, id := range ids {
		r, err := s.readOperation(id)
		if errors.Is(err, fs.ErrNotExist) || isDamaged(err) {
			continue // removed since, or being made, or to be swept
		}
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	sortOperations(out)
	return out, nil
}
