package service

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"cloudlet/api"

	"golang.org/x/sys/unix"
)

// adoptBound is how long the lock of an active operation is waited for: another process may
// just be looking whether it is held.
const adoptBound = 200 * time.Millisecond

// settle reads an operation that this process does not work on. Where its process has died
// it is ended, or left to the daemon that will take it up.
func (s *Service) settle(ctx context.Context, id string) (operationRecord, error) {
	r, err := s.readOperation(id)
	if errors.Is(err, fs.ErrNotExist) {
		return r, api.Errorf(api.NotFound, "no operation %q in %s", id, s.cfg.Dir)
	}
	if err != nil || r.State.Ended() {
		return r, err
	}
	lk, err := tryLock(s.operationPath(id), unix.LOCK_EX)
	if errors.Is(err, errLocked) {
		return r, nil
	}
	if err != nil {
		return r, err
	}
	defer lk.unlock()
	if r, err = s.readOperation(id); err != nil || r.State.Ended() || s.resumable(r) {
		return r, err
	}
	return s.bury(ctx, r)
}

// resumable reports whether a daemon can go on where a dead one has stopped.
func (s *Service) resumable(r operationRecord) bool {
	if !r.Daemon {
		return false
	}
	switch r.Kind {
	case api.KindImportBase, api.KindImportOverlay:
		var req api.ImportBase // the two are alike
		return r.Upload == "" && json.Unmarshal(r.Request, &req) == nil && isURL(req.Source)
	case api.KindRun:
		in, err := s.runsOn(r)
		return err == nil && in != nil
	case api.KindHandoff:
		if r.Target == nil {
			return false
		}
		_, err := os.Stat(s.journal(r.Target.ID).Path)
		return err == nil
	}
	return false
}

// runsOn returns the record of the instance that a run has resumed, nil if it has not.
func (s *Service) runsOn(r operationRecord) (*record, error) {
	if r.Kind != api.KindRun || r.Target == nil {
		return nil, nil
	}
	in, err := s.readRecord(r.Target.ID)
	if err != nil {
		return nil, ignoreMissing(err)
	}
	if in.State != api.Running {
		return nil, nil
	}
	return in, nil
}

// bury ends an operation whose process has died; the caller holds its lock.
func (s *Service) bury(ctx context.Context, r operationRecord) (operationRecord, error) {
	where := "soon after it had begun"
	if r.Phase != "" {
		where = fmt.Sprintf("in phase %q", r.Phase)
	}
	detail := fmt.Sprintf("the process that worked on it was killed or crashed, %s", where)
	remedy := "ask again"
	switch {
	case r.Kind == api.KindRun && r.Target != nil:
		in, err := s.inspect(ctx, r.Target.ID)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			detail += "; nothing is left of its instance"
			r.Target = nil
		case err != nil:
			return r, err
		case in.State == api.Stopped || in.State == api.Lost:
			detail += fmt.Sprintf("; the VM of instance %s was removed, its record stays", in.ID)
		default:
			detail += fmt.Sprintf("; instance %s runs, but its first answer was not seen", in.ID)
			remedy = "use the instance, or remove it"
		}
	case r.Upload != "":
		detail += "; the upload is still there"
		remedy = "finish the upload again"
	case r.Kind == api.KindCreateOverlay:
		detail += "; what it had written was removed, the instance runs on"
		r.Target = nil
	default:
		detail += "; what it had written was removed"
		r.Target = nil
	}
	r.State, r.Ended, r.Version = api.OperationFailed, time.Now().UTC(), r.Version+versionGap
	r.Error = api.Errorf(api.Internal, "%s", detail).Fix("%s", remedy)
	s.log.Info("operation of a dead process ended", "operation", r.ID, "kind", r.Kind, "reason", detail)
	if err := s.recordEnd(r); err != nil {
		s.log.Info("write end of operation", "operation", r.ID, "err", err) // the next who asks tries again
		return r, nil
	}
	s.note(ctx, r)
	return r, nil
}

// cancelDead ends an operation that waits for a daemon to take it up, if it is one.
func (s *Service) cancelDead(ctx context.Context, id string) error {
	lk, err := tryLock(s.operationPath(id), unix.LOCK_EX)
	if errors.Is(err, errLocked) {
		return nil // its process lives
	}
	if err != nil {
		return err
	}
	defer lk.unlock()
	r, err := s.readOperation(id)
	if err != nil || r.State.Ended() {
		return err
	}
	if r.Kind == api.KindHandoff && s.resumable(r) {
		return api.Errorf(api.Conflict, "operation %s hands an instance off, and no daemon works on it", id).Fix("start `cloudlet serve` on this store: it lets the guest run on if it is not too late")
	}
	in, err := s.runsOn(r)
	if err != nil {
		return err
	}
	if in != nil {
		if err := s.undo(in); err != nil {
			return err
		}
	}
	r.State, r.Ended, r.Version, r.Target = api.OperationCancelled, time.Now().UTC(), r.Version+versionGap, nil
	r.Error = api.Errorf(api.Cancelled, "the operation was cancelled while no process worked on it")
	if err := s.recordEnd(r); err != nil {
		return err
	}
	s.note(ctx, r)
	return nil
}

// sweepOperations ends the operations of dead processes; a daemon takes up what can go on.
func (s *Service) sweepOperations(ctx context.Context) error {
	entries, err := os.ReadDir(s.path("active"))
	if err != nil {
		return err
	}
	for _, e := range entries {
		err = errors.Join(err, s.sweepOperation(ctx, e.Name()))
	}
	return errors.Join(err, s.prune(ctx), s.pruneKeys(ctx))
}

func (s *Service) sweepOperation(ctx context.Context, id string) error {
	lk, err := tryLock(s.operationPath(id), unix.LOCK_EX)
	if errors.Is(err, errLocked) && s.cfg.Daemon && s.own(id) == nil {
		bound, cancel := context.WithTimeout(ctx, adoptBound)
		defer cancel()
		if lk, err = waitLock(bound, s.operationPath(id), unix.LOCK_EX); err != nil && ctx.Err() == nil {
			return nil // a command works on it
		}
	}
	if errors.Is(err, errLocked) {
		return nil
	}
	if errors.Is(err, fs.ErrNotExist) {
		return s.unmark(ctx, id)
	}
	if err != nil {
		return err
	}
	kept := false
	defer func() {
		if !kept {
			lk.unlock()
		}
	}()
	r, err := s.readOperation(id)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return errors.Join(os.RemoveAll(s.operationPath(id)), s.unmark(ctx, id))
	case isDamaged(err): // its state was not made durable before the power failed
		s.log.Warn("remove an operation whose record cannot be read", "operation", id, "err", err)
		return errors.Join(os.RemoveAll(s.operationPath(id)), s.unmark(ctx, id))
	case err != nil:
		return err
	case r.State.Ended():
		return s.unmark(ctx, id)
	case !s.resumable(r):
		_, err = s.bury(ctx, r)
		return err
	case !s.cfg.Daemon:
		return nil
	}
	kept = true
	s.takeUp(ctx, r, lk)
	return nil
}

// unmark takes an operation without a living record from the active ones. One that is being
// made has its mark first, and the store's lock is held until it is whole.
func (s *Service) unmark(ctx context.Context, id string) error {
	return s.locked(ctx, func() error {
		if r, err := s.readOperation(id); err == nil && !r.State.Ended() {
			return nil
		}
		return ignoreMissing(os.Remove(s.path("active", id)))
	})
}

// takeUp goes on with an operation of a daemon that has died.
func (s *Service) takeUp(ctx context.Context, r operationRecord, lk *lock) {
	r.Version += versionGap
	r.Phase, r.Done, r.Total = "taken up again", 0, 0
	op, life := newOperation(ctx, r)
	op.lock, op.dirty = lk, true
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		op.work(nil)
		lk.unlock() // for the next daemon
		return
	}
	s.live[r.ID] = op
	s.joined.Add(1)
	s.mu.Unlock()
	s.log.Info("operation taken up again", "operation", r.ID, "kind", r.Kind)
	s.start(life, op, func(ctx context.Context, op *operation) (any, error) { return s.workAgain(ctx, op, r) })
}

// workAgain does the work of an operation from its request.
func (s *Service) workAgain(ctx context.Context, op *operation, r operationRecord) (any, error) {
	caller := Caller{Name: r.Caller, Local: r.Local}
	switch r.Kind {
	case api.KindImportBase:
		var req api.ImportBase
		if err := json.Unmarshal(r.Request, &req); err != nil {
			return nil, err
		}
		return s.importBase(ctx, req, s.rules(caller), op.progress)
	case api.KindImportOverlay:
		var req api.ImportOverlay
		if err := json.Unmarshal(r.Request, &req); err != nil {
			return nil, err
		}
		return s.importOverlay(ctx, location{source: req.Source, allow: s.rules(caller)}, req.Name, op.progress)
	}
	if r.Kind == api.KindHandoff {
		return s.handOffAgain(ctx, op, r.Target)
	}
	var req api.Run
	if err := json.Unmarshal(r.Request, &req); err != nil {
		return nil, err
	}
	return s.runAgain(ctx, r, req, op)
}

// runAgain waits for the first answer of an instance whose resume a dead process had begun.
func (s *Service) runAgain(ctx context.Context, r operationRecord, req api.Run, op *operation) (out api.Instance, err error) {
	lk, err := waitLock(ctx, s.instancePath(r.Target.ID), unix.LOCK_EX)
	if err != nil {
		return out, err
	}
	defer lk.unlock()
	in, err := s.readRecord(r.Target.ID)
	if err != nil {
		return out, err
	}
	vm, err := s.vmm.Adopt(ctx, s.instancePath(in.ID, "vm"))
	if err != nil {
		return out, err
	}
	out, err = s.firstAnswer(ctx, in, vm, req, &timeline{start: r.Created, events: in.Timeline, report: op.progress})
	if err != nil && !(req.Keep && ctx.Err() == nil) && !errors.Is(context.Cause(ctx), errStopping) {
		err = errors.Join(err, s.undo(in))
	}
	return out, err
}

// adopt looks at all living instances, so that those which ended while nobody looked are
// recorded and their mounts let go. It says what it found; with quiet only what has ended.
func (s *Service) adopt(ctx context.Context, quiet bool) error {
	ids, err := s.list("instances")
	if err != nil {
		return err
	}
	for _, id := range ids {
		r, rerr := s.readRecord(id)
		if rerr != nil || !r.alive() {
			continue
		}
		in, ierr := s.inspect(ctx, id)
		if ierr != nil {
			s.log.Error("adopt instance", "instance", id, "err", ierr) // it is tried again when it is asked for
			continue
		}
		if !quiet || in.State == api.Stopped || in.State == api.Lost {
			s.log.Info("instance of before", "instance", id, "state", in.State, "reason", in.Reason)
		}
	}
	return nil
}

// janitor sweeps now and then, since what dies while the daemon runs is not seen by an Open.
func (s *Service) janitor(ctx context.Context) {
	tick := time.NewTicker(janitorPause)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := errors.Join(s.saveLate(), s.adopt(ctx, true), s.sweep(ctx), s.sweepUploads(ctx), s.sweepOperations(ctx), s.sweepHandoffs(ctx)); err != nil && ctx.Err() == nil {
			s.log.Warn("sweep", "err", err)
		}
	}
}

const janitorPause = 30 * time.Second

// lockDaemon makes this process the daemon of the store.
func (s *Service) lockDaemon() error {
	path := s.path("daemon.lock")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return noStore(err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		if err = f.Truncate(0); err == nil {
			_, err = fmt.Fprintln(f, os.Getpid())
		}
		if err == nil {
			s.daemon = &lock{f}
			return nil
		}
	}
	pid, _ := os.ReadFile(path) // only for the message
	f.Close()
	if errors.Is(err, unix.EWOULDBLOCK) {
		return api.Errorf(api.Conflict, "a daemon serves %s already, process %s", filepath.Clean(s.cfg.Dir), trimmed(pid)).Fix("stop that one, or choose another state folder with --state")
	}
	return fail(err)
}
