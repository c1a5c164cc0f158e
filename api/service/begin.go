package service

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"cloudlet/api"

	"golang.org/x/sys/unix"
)

// newID returns an id that no operation and no instance has had.
func newID() string {
	var b [6]byte
	rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// task is what begin makes an operation of.
type task struct {
	caller Caller
	kind   api.Kind
	req    any
	upload string
	since  time.Time // when it was asked for; zero: now
	need   need
	target *api.Target
	work   func(context.Context, *operation) (any, error)
}

// begin makes an operation and starts its work, or finds the one of the same key. Then fresh
// is false and the task's work is not called.
func (s *Service) begin(ctx context.Context, t task) (out api.Operation, fresh bool, err error) {
	request, err := json.Marshal(t.req)
	if err != nil {
		return out, false, err
	}
	if t.since.IsZero() {
		t.since = time.Now()
	}
	op, life := newOperation(ctx, operationRecord{
		Operation: api.Operation{
			ID: newID(), Kind: t.kind, State: api.OperationRunning, Version: 1, Target: t.target,
			Created: t.since.UTC(), Request: request,
		},
		Caller: t.caller.Name, Local: t.caller.Local, Daemon: s.cfg.Daemon, Upload: t.upload, Need: t.need,
	})
	if err := s.enlist(op); err != nil {
		return out, false, err
	}
	known, err := s.place(ctx, op, t.caller, nil)
	if t.need.Memory > 0 && api.CodeOf(err) == api.Unavailable {
		// Look closer: some may have ended, or use already what they were promised.
		if resident, rerr := s.residents(ctx); rerr == nil {
			known, err = s.place(ctx, op, t.caller, resident)
		}
	}
	if err != nil || known != "" {
		s.strike(op)
		if err == nil {
			out, err = s.Operation(ctx, known)
		}
		return out, false, err
	}
	out = op.snapshot()
	s.start(life, op, t.work)
	// The work has begun already; what a crash of the host may lose, nobody has been told of.
	if err := errors.Join(syncFile(s.operationPath(out.ID, "record.json")), syncDir(s.operationPath(out.ID)), syncDir(s.path("operations"))); err != nil {
		op.end()
		return out, true, fmt.Errorf("write operation %s: %w", out.ID, err)
	}
	return out, true, nil
}

// place puts a new operation on disk if it fits, or finds the one of the same key.
func (s *Service) place(ctx context.Context, op *operation, caller Caller, resident map[string]int64) (known string, err error) {
	err = s.locked(ctx, func() (err error) {
		if known, err = s.keyed(caller, op.record.Kind, op.record.Request); err != nil || known != "" {
			return err
		}
		if err := s.admit(op.record.Need, resident); err != nil {
			return err
		}
		return s.layDown(op, caller)
	})
	return known, err
}

// enlist takes a place among the operations of this process.
func (s *Service) enlist(op *operation) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	limit := s.cfg.MaxOperations
	if limit == 0 {
		limit = defaultOperations
	}
	switch {
	case s.closed:
		return errClosing()
	case len(s.live)-s.unsaved >= limit:
		return api.Errorf(api.Unavailable, "%d operations are under way, which is the limit", len(s.live)-s.unsaved).Fix("ask again when one has ended")
	}
	s.live[op.record.ID] = op
	s.joined.Add(1)
	return nil
}

// strike gives the place up. An operation whose end could not be written stays known here.
func (s *Service) strike(op *operation) {
	op.work(nil)
	s.mu.Lock()
	if op.unsaved {
		s.unsaved++
	} else {
		delete(s.live, op.record.ID)
	}
	s.mu.Unlock()
	s.joined.Done()
}

// saveLate writes the ends that could not be written when they came.
func (s *Service) saveLate() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, op := range s.live {
		if !op.unsaved {
			continue
		}
		if err := s.recordEnd(op.record); err != nil {
			return err
		}
		op.unsaved = false
		s.unsaved--
		delete(s.live, id)
	}
	return nil
}

// layDown puts a new operation on disk: first its mark among the active ones, by which what a
// crash leaves is found. The caller holds the store's lock.
func (s *Service) layDown(op *operation, caller Caller) (err error) {
	id := op.record.ID
	if err := os.WriteFile(s.path("active", id), nil, 0o600); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			if op.lock != nil {
				op.lock.unlock()
			}
			err = errors.Join(s.spaceError(err), os.RemoveAll(s.operationPath(id)), ignoreMissing(os.Remove(s.path("active", id))))
		}
	}()
	if err := os.Mkdir(s.operationPath(id), 0o700); err != nil {
		return err
	}
	if op.lock, err = tryLock(s.operationPath(id), unix.LOCK_EX); err != nil {
		return err
	}
	if err := replaceJSON(s.operationPath(id, "record.json"), op.record, false); err != nil {
		return err
	}
	return s.keepKey(caller, op.record.Operation)
}
