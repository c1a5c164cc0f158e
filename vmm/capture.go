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

// ErrBusy means that a residue of the VM is held already, or that rounds of it are taken.
var ErrBusy = errors.New("a capture of the VM is in progress")

// Capture takes the residue of a resumed VM: its device state, the pages and the disk blocks
// it has changed since it was resumed. The VM is stopped for that time, then runs on if it
// ran; a paused one stays paused. The files go to outDir, which must exist. The caller ends
// the residue with Release. On an error, and when ctx ends, the VM goes on as it was and no
// file is left.
func (vm *VM) Capture(ctx context.Context, outDir string) (*Residue, error) {
	r, err := vm.rounds(ctx, func(regions []region) (tracker, error) {
		return &softTracker{pid: vm.PID(), regions: regions}, nil // the first round needs no bits
	})
	if err != nil {
		return nil, fmt.Errorf("capture VM: %w", err)
	}
	res, err := r.take(ctx, outDir, true, func(res *Residue) error {
		err := vm.monitor(ctx, func(c *qmp) (err error) {
			res.Pause, err = vm.whileStopped(ctx, c, func() error { return r.takeStopped(ctx, c, res, nil) })
			return err
		})
		if err != nil {
			return err
		}
		return res.finish(ctx)
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("capture VM: %w", err), r.abandon(ctx))
	}
	res.only = true
	return res, nil
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

// whileStopped runs f while the VM is stopped, and says for how long it was. Whatever goes
// wrong, a VM that ran runs again.
func (vm *VM) whileStopped(ctx context.Context, c *qmp, f func() error) (pause time.Duration, err error) {
	state, err := c.runState(ctx)
	if err != nil {
		return 0, err
	}
	if state != Running {
		return 0, f()
	}
	start := time.Now()
	defer func() {
		if err != nil {
			err = errors.Join(err, vm.runAgain(ctx, c))
		}
	}()
	if err := writeJSON(vm.dir, stoppedFile, struct{}{}); err != nil {
		return 0, err
	}
	if err := c.execute(ctx, "stop", nil, nil); err != nil {
		return 0, err
	}
	if err := f(); err != nil {
		return 0, err
	}
	if err := c.execute(ctx, "cont", nil, nil); err != nil {
		return 0, err
	}
	pause = time.Since(start)
	return pause, os.Remove(filepath.Join(vm.dir, stoppedFile))
}

// runAgain lets the VM run again; on a new connection if the old one broke. Where that is not
// to be had either, as while libvirt restarts, whoever adopts the VM next lets it run.
func (vm *VM) runAgain(ctx context.Context, c *qmp) error {
	path := filepath.Join(vm.dir, stoppedFile)
	if undo(ctx, c) == nil {
		return os.Remove(path)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	err := c.close() // one client at a time
	if alive, aliveErr := vm.procs.QEMU.alive(); aliveErr == nil && !alive {
		return nil
	}
	if cerr := vm.Continue(ctx); cerr != nil {
		return errors.Join(err, fmt.Errorf("the VM is stopped until it is looked at again: %w", cerr))
	}
	return errors.Join(err, os.Remove(path))
}

// recoverCapture lets a VM run again that was stopped by a process which was killed.
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

// insistTries is how often insist asks the monitor: a connection that was cut off just
// before may take the next one with it.
const insistTries = 3

// insist undoes something by the monitor, even if ctx has ended.
func (vm *VM) insist(ctx context.Context, f func(context.Context, *qmp) error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	var err error
	for range insistTries {
		err = vm.monitor(ctx, func(c *qmp) error { return f(ctx, c) })
		if err == nil || errors.Is(err, ErrEnded) || ctx.Err() != nil {
			break
		}
	}
	return err
}
