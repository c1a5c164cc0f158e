package vmm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// ErrBusy means that a residue of the VM is held already.
var ErrBusy = errors.New("a capture of the VM is in progress")

// Files of a Residue in its folder.
const (
	residueState  = "state"
	residueMemory = "memory.residue"
)

// Capture takes the residue of a resumed VM: its device state, the pages and the disk blocks
// it has changed since it was resumed. The VM is stopped for that time, then runs on if it
// ran; a paused one stays paused. The files go to outDir, which must exist. The caller ends
// the residue with Release. On an error, and when ctx ends, the VM goes on as it was and no
// file is left.
func (vm *VM) Capture(ctx context.Context, outDir string) (_ *Residue, err error) {
	if !vm.info.Resumed {
		return nil, errors.New("capture VM: it was booted, its memory is a shared file: use SaveBase")
	}
	outDir, err = absolute("folder", outDir)
	if err != nil {
		return nil, err
	}
	lock, err := lockCapture(vm.dir)
	if err != nil {
		return nil, fmt.Errorf("capture VM: %w", err)
	}
	r := &Residue{
		vm: vm, lock: lock,
		State:      filepath.Join(outDir, residueState),
		memoryPath: filepath.Join(outDir, residueMemory),
		MemorySize: vm.info.Machine.Memory, DiskSize: vm.info.DiskSize,
	}
	defer func() {
		if err != nil {
			clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
			defer cancel()
			err = errors.Join(fmt.Errorf("capture VM: %w", err), r.abandon(clean))
		}
	}()
	if err := r.open(); err != nil {
		return nil, err
	}
	if err := vm.monitor(ctx, func(c *qmp) error { return r.take(ctx, c) }); err != nil {
		return nil, err
	}
	if err := r.finish(ctx); err != nil {
		return nil, err
	}
	return r, nil
}

// lockCapture makes sure that one residue of a VM is held at a time, in any process.
func lockCapture(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = fmt.Errorf("%w: wait until it is released", ErrBusy)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// open makes the residue's files; existing ones are an error and stay.
func (r *Residue) open() error {
	for _, path := range []string{r.State, r.memoryPath} {
		if _, err := os.Lstat(path); err == nil {
			r.State, r.memoryPath = "", ""
			return fmt.Errorf("create %s: %w: give each capture a folder of its own", path, fs.ErrExist)
		}
	}
	f, err := os.OpenFile(r.memoryPath, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("create %s: %w", r.memoryPath, err)
	}
	r.memory = f
	if err := f.Truncate(r.MemorySize); err != nil {
		return fmt.Errorf("size %s: %w", r.memoryPath, err)
	}
	return nil
}

// take does what the monitor is needed for; the VM is stopped from stop to cont.
func (r *Residue) take(ctx context.Context, c *qmp) (err error) {
	vm := r.vm
	if err := melt(ctx, c, vm.dir); err != nil { // what a capture that was killed has left
		return err
	}
	if err := vm.q.createLayer(ctx, filepath.Join(vm.dir, newLayer), topLayer, "qcow2", r.DiskSize); err != nil {
		return err
	}
	state, err := c.runState(ctx)
	if err != nil {
		return err
	}
	if state == "inmigrate" {
		return errors.New("its state is not loaded yet")
	}
	start := time.Now()
	if state == Running {
		defer func() {
			if err != nil {
				err = errors.Join(err, r.undo(ctx, c))
			}
		}()
		if err := writeJSON(vm.dir, stoppedFile, struct{}{}); err != nil {
			return err
		}
		if err := c.execute(ctx, "stop", nil, nil); err != nil {
			return err
		}
	}
	if err := r.takeStopped(ctx, c); err != nil {
		return err
	}
	if state == Running {
		if err := c.execute(ctx, "cont", nil, nil); err != nil {
			return err
		}
		r.Pause = time.Since(start)
		return os.Remove(filepath.Join(vm.dir, stoppedFile))
	}
	return nil
}

// recoverCapture lets a VM run again that was stopped for a capture whose process was
// killed.
func (vm *VM) recoverCapture(ctx context.Context) error {
	path := filepath.Join(vm.dir, stoppedFile)
	if _, err := os.Lstat(path); err != nil {
		return nil
	}
	lock, err := lockCapture(vm.dir)
	if errors.Is(err, ErrBusy) {
		return nil // the capture goes on
	}
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := vm.Continue(ctx); err != nil && !errors.Is(err, ErrEnded) {
		return fmt.Errorf("undo capture that was killed: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("undo capture that was killed: %w", err)
	}
	return nil
}

// undo lets the VM run again; on a new connection if the old one broke.
func (r *Residue) undo(ctx context.Context, c *qmp) error {
	if undo(ctx, c) == nil {
		return os.Remove(filepath.Join(r.vm.dir, stoppedFile))
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	err := c.close() // one client at a time
	if alive, aliveErr := r.vm.procs.QEMU.alive(); aliveErr == nil && !alive {
		return nil
	}
	return errors.Join(err, r.vm.Continue(ctx))
}

// takeStopped reads the stopped VM: devices, memory, then the disk, whose layer is frozen
// last so that a failure before it leaves nothing to mend.
func (r *Residue) takeStopped(ctx context.Context, c *qmp) error {
	if err := os.Remove(filepath.Join(r.vm.dir, xenState)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove old device state: %w", err)
	}
	err := c.execute(ctx, "xen-save-devices-state", map[string]any{"filename": xenState, "live": false}, nil)
	if err != nil {
		return err
	}
	pid := r.vm.PID()
	regions, err := memoryRegions(pid, r.vm.info)
	if err != nil {
		return err
	}
	spans, err := changedSpans(pid, regions)
	if err != nil {
		return err
	}
	if r.mem, err = copyMemory(ctx, pid, spans, r.memory); err != nil {
		return err
	}
	if err := r.vm.check(); err != nil { // that it was this process's memory
		return err
	}
	return freeze(ctx, c)
}

// finish does what needs no stopped VM.
func (r *Residue) finish(ctx context.Context) error {
	dir := r.vm.dir
	if err := spliceFiles(r.State, filepath.Join(dir, resumeState), filepath.Join(dir, xenState)); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(dir, xenState)); err != nil {
		return fmt.Errorf("remove device state: %w", err)
	}
	layer := filepath.Join(dir, topLayer)
	blocks, err := r.vm.q.mapLayer(ctx, layer, r.DiskSize)
	if err != nil {
		return err
	}
	r.blocks = blocks
	if r.disk, err = os.Open(layer); err != nil {
		return fmt.Errorf("open disk layer: %w", err)
	}
	return nil
}

// spliceFiles writes the captured state: see splice.
func spliceFiles(to, resumed, xen string) error {
	prefix, err := statePrefix(resumed)
	if err != nil {
		return err
	}
	head, err := os.Open(resumed)
	if err != nil {
		return fmt.Errorf("open device state: %w", err)
	}
	defer head.Close()
	devices, err := os.Open(xen)
	if err != nil {
		return fmt.Errorf("open saved devices: %w", err)
	}
	defer devices.Close()
	return writeFile(to, func(f *os.File) error { return splice(f, head, prefix, devices) })
}
