package service

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"cloudlet/api"
	"cloudlet/fusefs"
	"cloudlet/vmm"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// record is what the store keeps of an instance.
type record struct {
	ID       string          `json:"id"`
	Name     string          `json:"name,omitempty"`
	Created  time.Time       `json:"created"`
	Ended    time.Time       `json:"ended,omitzero"`
	State    api.State       `json:"state"` // starting, running (that is: alive), stopped or lost
	Reason   string          `json:"reason,omitempty"`
	Image    string          `json:"image"`
	Base     string          `json:"base"`
	Links    []link          `json:"overlays,omitempty"`
	Mount    string          `json:"mount"`
	Machine  json.RawMessage `json:"machine"`
	Timeline []api.Event     `json:"timeline,omitempty"`

	// Lineage is the id that the instance keeps wherever it is handed off to, Epoch the number
	// of the right to run it, Tried the highest epoch that a handoff from here has used.
	Lineage string     `json:"lineage,omitempty"`
	Epoch   uint64     `json:"epoch,omitempty"`
	Tried   uint64     `json:"tried,omitempty"`
	Handoff string     `json:"handoff,omitempty"` // under way
	Arrived string     `json:"arrived,omitempty"` // handoff by which it came
	Own     int        `json:"own,omitempty"`     // of Links, the last ones, which that handoff has brought
	Moved   *api.Moved `json:"moved,omitempty"`
}

func (r *record) alive() bool { return r.State == api.Starting || r.State == api.Running }

func (s *Service) instancePath(id string, parts ...string) string {
	return s.path(append([]string{"instances", id}, parts...)...)
}

func (s *Service) readRecord(id string) (*record, error) {
	r := new(record)
	return r, readJSON(s.instancePath(id, "record.json"), r)
}

func (s *Service) writeRecord(r *record) error {
	return writeJSON(s.instancePath(r.ID, "record.json"), r)
}

// newRecord makes the folder and the record of the new instance id and takes its lock.
func (s *Service) newRecord(ctx context.Context, id string, req api.Run, l *launchImage, machine json.RawMessage) (*record, *lock, error) {
	image := l.image.ID().String()
	r := &record{
		ID: id, Name: req.Name, Created: time.Now().UTC(), State: api.Starting,
		Image: image, Base: l.base.ID().String(), Links: l.links, Mount: mountKey(image), Machine: machine,
		Lineage: newHandoffID(), Epoch: 1,
	}
	if req.Record {
		r.Mount = recordingKey(r.ID)
	}
	var lk *lock
	err := s.locked(ctx, func() error {
		if err := s.checkInstanceName(req.Name); err != nil {
			return err
		}
		if err := os.Mkdir(s.instancePath(r.ID), 0o700); err != nil {
			return err
		}
		var err error
		if lk, err = tryLock(s.instancePath(r.ID), unix.LOCK_EX); err != nil {
			return err
		}
		return s.writeRecord(r)
	})
	if err != nil && lk != nil {
		err = errors.Join(s.spaceError(err), os.RemoveAll(s.instancePath(r.ID)))
	}
	return r, lk, err
}

func (s *Service) checkInstanceName(name string) error {
	if name == "" {
		return nil
	}
	id, err := s.findInstance(name)
	if r, rerr := s.readRecord(id); err == nil && rerr == nil && r.Moved != nil {
		return nil
	}
	if err == nil {
		return api.Errorf(api.Conflict, "the name %q is taken by instance %s", name, id).Fix("choose another, or remove that with `cloudlet rm %s`", id)
	}
	if api.CodeOf(err) == api.NotFound {
		return nil
	}
	return err
}

// maxSeeing is how many instances are asked at once: most of the time goes into waiting for
// QEMU and mount processes.
const maxSeeing = 16

// Instances lists the instances, the oldest first; ended ones only with all.
func (s *Service) Instances(ctx context.Context, all bool) ([]api.Instance, error) {
	ids, err := s.list("instances")
	if err != nil {
		return nil, fail(err)
	}
	seen, errs := make([]api.Instance, len(ids)), make([]error, len(ids))
	var g errgroup.Group
	g.SetLimit(maxSeeing)
	for i, id := range ids {
		g.Go(func() error { seen[i], errs[i] = s.see(ctx, id); return nil })
	}
	g.Wait() // no error of its own
	out := []api.Instance{}
	for i, in := range seen {
		if os.IsNotExist(errs[i]) {
			continue // removed since, or being made
		}
		if errs[i] != nil {
			return nil, fail(errs[i])
		}
		if all || in.State != api.Stopped && in.State != api.Lost {
			out = append(out, in)
		}
	}
	slices.SortFunc(out, func(a, b api.Instance) int { return a.Created.Compare(b.Created) })
	return out, nil
}

// Instance describes one instance.
func (s *Service) Instance(ctx context.Context, ref string) (api.Instance, error) {
	if _, in := s.guest(ref); in != nil {
		return *in, nil
	}
	id, err := s.findInstance(ref)
	if err != nil {
		return api.Instance{}, fail(err)
	}
	in, err := s.see(ctx, id)
	return in, fail(err)
}

// see is inspect, shared by those who ask at the same time: a monitor serves one at a time.
func (s *Service) see(ctx context.Context, id string) (api.Instance, error) {
	return shared(ctx, s, "instance "+id, func(ctx context.Context) (api.Instance, error) { return s.inspect(ctx, id) })
}

// inspect finds out what an instance does now, and records it where it has ended.
func (s *Service) inspect(ctx context.Context, id string) (api.Instance, error) {
	r, err := s.readRecord(id)
	if errors.Is(err, fs.ErrNotExist) {
		return api.Instance{}, err
	}
	if err != nil {
		return api.Instance{ID: id, State: api.Lost, Reason: fmt.Sprintf("its record cannot be read: %v; remove it with `cloudlet rm --force %s`", err, id)}, nil
	}
	if !r.alive() {
		return r.describe(), nil
	}
	if r.State == api.Starting {
		if r.Handoff != "" {
			in := r.describe()
			in.Reason = s.handoffState(r.Handoff)
			return in, nil
		}
		if isLocked(s.instancePath(id)) {
			return r.describe(), nil
		}
		return s.end(ctx, r, api.Stopped, "the command that was starting it was killed")
	}
	if moved := s.movedTo(r.Handoff); moved != nil {
		in := r.describe()
		in.State, in.Reason, in.Moved = api.Paused, s.handoffState(r.Handoff), moved
		return in, nil
	}
	vm, err := s.vmm.Adopt(ctx, s.instancePath(id, "vm"))
	if ctx.Err() != nil {
		return api.Instance{}, context.Cause(ctx)
	}
	if !s.mountLives(r.Mount) {
		return s.endLost(ctx, r, vm)
	}
	if err != nil {
		in := r.describe()
		in.Reason = fmt.Sprintf("its VM cannot be looked at: %v", err)
		return in, nil
	}
	var mount *api.Mount
	var merr error
	var asking sync.WaitGroup
	asking.Go(func() { mount, merr = s.describeMount(ctx, r.Mount) })
	status, err := vm.Status(ctx)
	asking.Wait()
	if err != nil && ctx.Err() == nil {
		status = vmm.Status{State: vmm.Running, Reason: fmt.Sprintf("QEMU does not answer: %v", err)}
	}
	if status.State == vmm.Ended {
		return s.end(ctx, r, api.Stopped, status.Reason)
	}
	in := r.describe()
	in.State, in.Reason, in.Reset, in.PID = api.State(status.State), status.Reason, status.Reset, vm.PID()
	if r.Handoff != "" {
		in.Reason = joinReason(in.Reason, s.handoffState(r.Handoff))
	}
	for _, f := range vm.Forwards() {
		in.Endpoints = append(in.Endpoints, api.Endpoint{Guest: f.Guest, Address: s.reachable(f)})
	}
	if in.Mount = mount; merr != nil {
		in.Reason = joinReason(in.Reason, fmt.Sprintf("its mount does not answer: %v", merr))
	} else if n := len(in.Mount.Held); n > 0 {
		why := in.Mount.Held[0].Error
		if why == "" {
			why = "they have not come yet"
		}
		in.Reason = joinReason(in.Reason, fmt.Sprintf("waits for %d pages: %s", n, why))
	}
	return in, nil
}

func joinReason(a, b string) string {
	if a == "" {
		return b
	}
	return a + "; " + b
}

func (r *record) describe() api.Instance {
	in := api.Instance{
		ID: r.ID, Name: r.Name, State: r.State, Reason: r.Reason, Image: r.Image, Base: r.Base,
		Created: r.Created, Ended: r.Ended, Timeline: r.Timeline,
		Lineage: r.Lineage, Epoch: r.Epoch, Handoff: r.Handoff, Moved: r.Moved,
	}
	for i, l := range r.Links {
		in.Overlays = append(in.Overlays, l.ID)
		if i < len(r.Links)-r.Own {
			in.Source = shownRef(l.Source)
		}
	}
	return in
}

// endLost ends an instance whose mount has died: the pages it has not read are gone.
func (s *Service) endLost(ctx context.Context, r *record, vm *vmm.VM) (api.Instance, error) {
	reason := "the mount process that served its memory and disk has died"
	// The mount's folder goes with its last instance, its log stays with each.
	log := s.instancePath(r.ID, "mount.log")
	if err := os.Link(s.mountPath(r.Mount, "log"), log); err == nil || errors.Is(err, fs.ErrExist) {
		reason += "; see " + log
	}
	if vm != nil { // nil: what its folder holds is no VM, as after a power failure
		if status, err := vm.Status(ctx); err == nil && status.State == vmm.Ended {
			reason += "; then " + status.Reason
		}
	}
	// Whoever waits in the kernel for a page of that mount is freed first, so that QEMU can die.
	if err := fusefs.AbortConnection(s.mountPath(r.Mount, "fs")); err != nil {
		return api.Instance{}, err
	}
	return s.end(ctx, r, api.Lost, reason)
}

// end destroys what is left of an instance, records why it ended and lets its mount go. It
// waits for a command that works on the instance.
func (s *Service) end(ctx context.Context, r *record, state api.State, reason string) (api.Instance, error) {
	if err := s.destroyVM(ctx, s.instancePath(r.ID, "vm")); err != nil {
		return api.Instance{}, err
	}
	err := s.locked(ctx, func() error {
		now, err := s.readRecord(r.ID)
		if err != nil {
			return err
		}
		if *r = *now; !r.alive() {
			return nil // another process was first
		}
		r.State, r.Reason, r.Ended = state, reason, time.Now().UTC()
		err = s.writeRecord(r)
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
			// What the guest has changed is of no use any more, and makes room.
			layers, gerr := filepath.Glob(s.instancePath(r.ID, "vm", "disk.*"))
			for _, layer := range layers {
				gerr = errors.Join(gerr, ignoreMissing(os.Remove(layer)))
			}
			err = errors.Join(gerr, s.writeRecord(r))
		}
		return err
	})
	if err != nil {
		return api.Instance{}, err
	}
	err = s.releaseMount(ctx, r.Mount)
	if r.Arrived != "" {
		err = errors.Join(err, s.removeArrived(r.Arrived)) // of no use to anybody else
	}
	return r.describe(), err
}

// working opens a living instance for a change; the lock keeps other changes away.
func (s *Service) working(ctx context.Context, ref string) (*record, *vmm.VM, *lock, error) {
	id, err := s.findInstance(ref)
	if err != nil {
		return nil, nil, nil, err
	}
	lk, err := tryLock(s.instancePath(id), unix.LOCK_EX)
	if errors.Is(err, errLocked) {
		return nil, nil, nil, api.Errorf(api.Conflict, "instance %s is busy: another command or operation works on it", id).Fix("wait until that has finished, or cancel it")
	}
	if err != nil {
		return nil, nil, nil, err
	}
	in, err := s.inspect(ctx, id)
	if err == nil && (in.State == api.Stopped || in.State == api.Lost) {
		err = api.Errorf(api.Conflict, "instance %s has ended: %s", id, in.Reason).Fix("start another with `cloudlet run`")
	}
	if err == nil {
		var r *record
		var vm *vmm.VM
		if r, err = s.readRecord(id); err == nil && r.Handoff != "" {
			err = api.Errorf(api.Conflict, "instance %s is being handed off: %s", id, s.handoffState(r.Handoff)).Fix("see `cloudlet handoff %s --status`", id)
		}
		if err == nil {
			if vm, err = s.vmm.Adopt(ctx, s.instancePath(id, "vm")); err == nil {
				return r, vm, lk, nil
			}
		}
	}
	lk.unlock()
	return nil, nil, nil, err
}

// change does something to the VM of an instance and says what that does now.
func (s *Service) change(ctx context.Context, ref string, do func(*vmm.VM, context.Context) error) (api.Instance, error) {
	r, vm, lk, err := s.working(ctx, ref)
	if err != nil {
		return api.Instance{}, fail(err)
	}
	defer lk.unlock()
	if err := do(vm, ctx); err != nil {
		return api.Instance{}, fail(fmt.Errorf("instance %s: %w", r.ID, err))
	}
	in, err := s.inspect(ctx, r.ID)
	return in, fail(err)
}

// stopInstance ends the VM of an instance. What the guest has changed is dropped; its record and its
// log stay until Delete. An instance that has ended already is no error.
func (s *Service) stopInstance(ctx context.Context, ref string) (api.Instance, error) {
	in, err := s.Instance(ctx, ref)
	if err != nil || in.State == api.Stopped || in.State == api.Lost {
		return in, err
	}
	r, _, lk, err := s.working(ctx, in.ID)
	if err != nil {
		return in, fail(err)
	}
	defer lk.unlock()
	in, err = s.end(ctx, r, api.Stopped, "stopped by request")
	return in, fail(err)
}

// Delete removes an instance that has ended, or with force any, and all that is left of it.
func (s *Service) Delete(ctx context.Context, ref string, force bool) error {
	in, err := s.Instance(ctx, ref)
	if err != nil {
		return err
	}
	if in.State != api.Stopped && in.State != api.Lost {
		if !force {
			return api.Errorf(api.Conflict, "instance %s is %s", in.ID, in.State).Fix("stop it first, or use --force")
		}
		if _, err := s.stopInstance(ctx, in.ID); err != nil {
			return err
		}
	}
	// Of one whose record cannot be read it is not known whether it has ended.
	if _, err := s.readRecord(in.ID); err != nil && !errors.Is(err, fs.ErrNotExist) {
		if !force {
			return api.Errorf(api.Conflict, "instance %s may still run: %s", in.ID, in.Reason).Fix("use --force: it ends what is left of its VM")
		}
		if err := s.destroyVM(ctx, s.instancePath(in.ID, "vm")); err != nil {
			return fail(err)
		}
	}
	return fail(s.locked(ctx, func() error { return s.deleteUnused("instance", s.instancePath(in.ID), "", nil) }))
}

// Log copies the serial console's output of an instance to w, from the beginning.
func (s *Service) Log(ctx context.Context, ref string, w io.Writer) error {
	id, err := s.findInstance(ref)
	if err != nil {
		return fail(err)
	}
	f, err := os.Open(s.instancePath(id, "vm", "serial.log"))
	if err != nil {
		return fail(err)
	}
	defer f.Close()
	_, err = io.Copy(w, f)
	return fail(err)
}

// imageUsers names the living instances that run on a base or overlay.
func (s *Service) imageUsers(image string) ([]string, error) {
	return s.usersThat(func(r *record) bool {
		return r.Base == image || slices.ContainsFunc(r.Links, func(l link) bool { return l.ID == image })
	})
}

// usersThat names the living instances that use something, as uses says.
func (s *Service) usersThat(uses func(*record) bool) ([]string, error) {
	ids, err := s.list("instances")
	var users []string
	for _, id := range ids {
		switch r, err := s.readRecord(id); {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil: // it may use anything
			users = append(users, "instance "+id+", whose record cannot be read")
		case r.alive() && uses(r):
			users = append(users, "instance "+id)
		}
	}
	return users, err
}

// mountUsed reports whether a living instance runs on a mount.
func (s *Service) mountUsed(key string) (bool, error) {
	ids, err := s.list("instances")
	for _, id := range ids {
		// One whose record cannot be read may run on any.
		if r, err := s.readRecord(id); err != nil && !errors.Is(err, fs.ErrNotExist) || err == nil && r.alive() && r.Mount == key {
			return true, nil
		}
	}
	return false, err
}
