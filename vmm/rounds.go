package vmm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"

	"golang.org/x/sync/errgroup"
)

// Rounds takes what a resumed VM changes, round by round: the residues of all rounds laid
// over each other in order, on the images that the VM was resumed from, are the VM's memory
// and disk at the time of Last. It holds the VM's capture lock until Close.
type Rounds struct {
	vm *VM

	mu       sync.Mutex // held during a round, a merge and Close
	lock     *os.File   // nil once closed
	tracker  tracker
	active   string     // the layer that the VM writes to
	prepared string     // the one it will write to next, "" if there is none yet
	base     string     // the layer that released ones are merged into
	layers   int        // made so far
	taken    []*Residue // whose layers are not merged yet, in order
	broken   error      // why there can be no further round
}

// errClosed means that the rounds are closed.
var errClosed = errors.New("the rounds are closed")

// Rounds begins to take what the VM changes. It merges what layers a killed process has
// left. The error wraps ErrBusy while other rounds or a capture's residue are held, by
// whichever process. The caller ends them with Close.
func (vm *VM) Rounds(ctx context.Context) (*Rounds, error) {
	r, err := vm.rounds(ctx, func(regions []region) (tracker, error) {
		soft, err := vm.canSoftDirty()
		if err != nil {
			return nil, err
		}
		if soft {
			return &softTracker{pid: vm.PID(), regions: regions}, nil
		}
		return newHashTracker(vm.PID(), regions, vm.info.Machine.Memory), nil
	})
	if err != nil {
		return nil, fmt.Errorf("begin rounds of VM: %w", err)
	}
	return r, nil
}

// canSoftDirty reports whether QEMU's changes can be found by soft-dirty bits.
func (vm *VM) canSoftDirty() (bool, error) {
	soft, err := hasSoftDirty()
	if err != nil || !soft {
		return false, err
	}
	f, err := os.OpenFile(fmt.Sprintf("/proc/%d/clear_refs", vm.PID()), os.O_WRONLY, 0)
	if errors.Is(err, os.ErrPermission) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("probe soft-dirty bits: %w", err)
	}
	return true, f.Close()
}

// rounds takes the lock and prepares the first round.
func (vm *VM) rounds(ctx context.Context, track func([]region) (tracker, error)) (_ *Rounds, err error) {
	if !vm.info.Resumed {
		return nil, errors.New("it was booted, its memory is a shared file: use SaveBase")
	}
	lock, err := lockCapture(vm.dir)
	if err != nil {
		return nil, err
	}
	r := &Rounds{vm: vm, lock: lock, active: topLayer, base: topLayer}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.abandon(ctx))
		}
	}()
	err = vm.monitor(ctx, func(c *qmp) error {
		state, err := c.runState(ctx)
		if err != nil {
			return err
		}
		if state == "inmigrate" {
			return errors.New("its state is not loaded yet")
		}
		return melt(ctx, c, vm.dir)
	})
	if err != nil {
		return nil, err
	}
	regions, err := memoryRegions(vm.PID(), vm.info)
	if err == nil {
		r.tracker, err = track(regions)
	}
	if err == nil {
		err = r.prepare(ctx)
	}
	if err != nil {
		return nil, vm.orEnded(ctx, err)
	}
	return r, nil
}

// Next takes what was changed since the round before, the first what was changed since the
// VM was resumed. The VM may run; it stands still for Residue.Pause, if at all. The files go
// to outDir, which must exist; there is no device state. Pages that change meanwhile may be
// torn: they belong to the next round as well. After an error nothing is lost: the VM does
// what it did, no file is left, and the next round takes what this one should have.
func (r *Rounds) Next(ctx context.Context, outDir string) (*Residue, error) {
	res, err := r.take(ctx, outDir, false, func(res *Residue) error { return r.takeLive(ctx, res) })
	if err != nil {
		return nil, fmt.Errorf("take round of VM: %w", err)
	}
	return res, nil
}

// Last takes what was changed since the round before of a paused VM, with its device state.
// The VM stays paused, also after an error. It need not remain the last round.
func (r *Rounds) Last(ctx context.Context, outDir string) (*Residue, error) {
	res, err := r.take(ctx, outDir, true, func(res *Residue) error {
		var state string
		err := r.vm.monitor(ctx, func(c *qmp) (err error) {
			if state, err = c.runState(ctx); err != nil || state == Running {
				return err
			}
			return r.takeStopped(ctx, c, res, res.finish)
		})
		if err == nil && state == Running {
			err = errors.New("it runs: pause it before")
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("take last round of VM: %w", err)
	}
	return res, nil
}

// Close ends the rounds: residues that are still held are released, the disk layers are
// merged, and others may capture the VM again. The VM goes on as it is, running or paused.
// Close may be called again, to finish what an error interrupted, and after the VM has ended.
func (r *Rounds) Close(ctx context.Context) error {
	if err := r.close(ctx); err != nil {
		return fmt.Errorf("close rounds of VM: %w", err)
	}
	return nil
}

func (r *Rounds) close(ctx context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.lock == nil {
		return nil
	}
	var errs []error
	for _, res := range r.taken {
		errs = append(errs, res.closeFiles())
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	err := r.vm.monitor(ctx, func(c *qmp) error { return melt(ctx, c, r.vm.dir) })
	if err != nil && !errors.Is(err, ErrEnded) {
		return err
	}
	lock := r.lock
	r.lock, r.taken, r.tracker = nil, nil, nil
	return lock.Close()
}

// Merge merges the disk layers that rounds or a capture of a killed process have left. A VM
// that has ended, or has no layers, is no error.
func (vm *VM) Merge(ctx context.Context) error {
	if !vm.info.Resumed {
		return nil
	}
	lock, err := lockCapture(vm.dir)
	if err != nil {
		return fmt.Errorf("merge disk layers of VM: %w", err)
	}
	err = vm.monitor(ctx, func(c *qmp) error { return melt(ctx, c, vm.dir) })
	if errors.Is(err, ErrEnded) {
		err = nil
	}
	if err := errors.Join(err, lock.Close()); err != nil {
		return fmt.Errorf("merge disk layers of VM: %w", err)
	}
	return nil
}

// take takes a round by steps, and undoes what they did if one fails.
func (r *Rounds) take(ctx context.Context, outDir string, state bool, steps func(*Residue) error) (_ *Residue, err error) {
	outDir, err = absolute("folder", outDir)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.lock == nil {
		return nil, errClosed
	}
	if r.broken != nil {
		return nil, fmt.Errorf("after an earlier error (%w): close these rounds and begin others", r.broken)
	}
	res := newResidue(r, outDir, state)
	defer func() {
		if err != nil {
			err = errors.Join(err, r.dropLocked(ctx, res))
		}
	}()
	if err := res.open(); err != nil {
		return nil, err
	}
	if err := r.prepare(ctx); err != nil {
		return nil, err
	}
	if err := steps(res); err != nil {
		return nil, err
	}
	r.tracker.keep()
	r.taken = append(r.taken, res)
	return res, nil
}

// prepare makes the layer that the VM goes on in, unless it is there.
func (r *Rounds) prepare(ctx context.Context) error {
	if r.prepared != "" {
		return nil
	}
	r.layers++
	name := layerName(r.layers)
	path := filepath.Join(r.vm.dir, name)
	err := r.vm.q.createLayer(ctx, path, r.vm.file(r.active), "qcow2", r.vm.info.DiskSize)
	if err == nil {
		err = r.vm.lend(path)
	}
	if err != nil {
		return errors.Join(err, removeLayer(r.vm.dir, name))
	}
	r.prepared = name
	return nil
}

// takeLive takes a round of a VM that may run.
func (r *Rounds) takeLive(ctx context.Context, res *Residue) error {
	vm := r.vm
	mark := func() error { return r.tracker.mark(false) }
	var err error
	if r.tracker.stops() {
		err = vm.monitor(ctx, func(c *qmp) (err error) {
			res.Pause, err = vm.whileStopped(ctx, c, mark)
			return err
		})
	} else {
		err = mark()
	}
	if err == nil { // the guest keeps half of the CPUs
		err = r.copyMemory(ctx, res, max(1, runtime.GOMAXPROCS(0)/2))
	}
	if err != nil {
		return vm.orEnded(ctx, err)
	}
	if err := vm.monitor(ctx, func(c *qmp) error { return r.freeze(ctx, c, res) }); err != nil {
		return err
	}
	if err := res.finish(ctx); err != nil {
		return err
	}
	// The last round finds its layer made. If this fails the next round says so.
	_ = r.prepare(ctx)
	return nil
}

// takeStopped reads the stopped VM: first the devices, then memory, while the disk layer is
// frozen and, if given, then does the rest.
func (r *Rounds) takeStopped(ctx context.Context, c *qmp, res *Residue, then func(context.Context) error) error {
	if err := res.saveDevices(ctx, c); err != nil {
		return err
	}
	if err := r.tracker.mark(true); err != nil {
		return err
	}
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return r.copyMemory(gctx, res, runtime.GOMAXPROCS(0)) })
	g.Go(func() error {
		if err := r.freeze(gctx, c, res); err != nil || then == nil {
			return err
		}
		return then(gctx)
	})
	return g.Wait()
}

// maxWorkers bounds those that copy memory, each with a buffer of copyBatch.
const maxWorkers = 16

func (r *Rounds) copyMemory(ctx context.Context, res *Residue, workers int) (err error) {
	if res.mem, err = r.tracker.copy(ctx, res.memory, min(workers, maxWorkers)); err != nil {
		return err
	}
	return r.vm.check() // that it was this process's memory
}

// freeze freezes the active layer for a residue; the VM goes on in the prepared one.
func (r *Rounds) freeze(ctx context.Context, c *qmp, res *Residue) error {
	res.layer = r.active // from here on there may be something to undo
	if err := freeze(ctx, c, r.prepared); err != nil {
		return err
	}
	r.active, r.prepared = r.prepared, ""
	return nil
}

// dropLocked undoes a round that failed, so that the next one takes all of it.
func (r *Rounds) dropLocked(ctx context.Context, res *Residue) error {
	err := res.closeFiles()
	if res.layer == "" {
		return err
	}
	thaw := r.vm.insist(ctx, func(ctx context.Context, c *qmp) error { return r.thaw(ctx, c, res.layer) })
	if thaw != nil {
		r.broken = thaw
	}
	if errors.Is(thaw, ErrEnded) { // which the round's own error says
		return err
	}
	return errors.Join(err, thaw)
}

// thaw lets the VM write to a frozen layer again, by committing what it wrote since.
func (r *Rounds) thaw(ctx context.Context, c *qmp, layer string) error {
	stack, err := diskStack(ctx, c)
	if err != nil {
		return err
	}
	if stack[0] == layer {
		return nil // it was not frozen; the layer prepared for it stays
	}
	if err := commit(ctx, c, r.vm.dir, stack[0], layer); err != nil {
		return err
	}
	r.active, r.prepared = layer, ""
	return nil
}

// maxZeros is how much discarded data, in bytes, is merged while the VM writes to another
// layer: QEMU then writes the zeros out.
const maxZeros = 16 << 20

// settle merges the layers of released residues, in order: one that was taken later waits
// for those before it. A layer with many zeros stays until Close, whose merge keeps them
// holes, and those above are merged into it.
func (r *Rounds) settle(ctx context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for len(r.taken) > 0 && r.taken[0].released() {
		res := r.taken[0]
		if res.blocks.zeros() > maxZeros {
			r.base = res.layer
		}
		if res.layer != r.base {
			err := r.vm.monitor(ctx, func(c *qmp) error { return commit(ctx, c, r.vm.dir, res.layer, r.base) })
			if err != nil && !errors.Is(err, ErrEnded) {
				return err
			}
		}
		r.taken = r.taken[1:]
	}
	return nil
}

// abandon closes as far as possible; whoever comes next merges what is left.
func (r *Rounds) abandon(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	err := r.close(ctx)
	for try := 1; err != nil && try < insistTries && ctx.Err() == nil; try++ {
		err = r.close(ctx)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.lock != nil {
		err = errors.Join(err, r.lock.Close())
		r.lock = nil
	}
	return err
}
