package vmm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// SaveBase captures a booted VM and ends it: its device state goes to statePath, its RAM
// file and disk are complete when it returns. If the capture fails, the VM goes on as it
// was and no file is left.
func (vm *VM) SaveBase(ctx context.Context, statePath string) error {
	if vm.info.Resumed {
		return errors.New("save base: the VM was resumed, its memory is private: use Capture")
	}
	err := writeFile(statePath, func(f *os.File) error {
		if err := vm.monitor(ctx, func(c *qmp) error { return saveState(ctx, c, f) }); err != nil {
			return err
		}
		if _, err := statePrefix(f.Name()); err != nil {
			return err
		}
		return f.Sync()
	})
	if err != nil {
		return fmt.Errorf("save base: %w", err)
	}
	// From here on the capture is complete; quitting flushes the disk. A forced end would
	// leave a disk that does not fit the memory.
	if err := vm.quit(ctx); err != nil {
		return errors.Join(fmt.Errorf("save base: %w", err), os.Remove(statePath), vm.Destroy(context.WithoutCancel(ctx)))
	}
	if err := errors.Join(vm.driver().regain(vm.info.Memory), vm.driver().regain(vm.info.Disk)); err != nil {
		return fmt.Errorf("save base: %w", err)
	}
	return syncDir(filepath.Dir(statePath))
}

// saveState stops the VM and writes its state without shared memory to f; if that fails,
// the VM runs again if it did.
func saveState(ctx context.Context, c *qmp, f *os.File) (err error) {
	state, err := c.runState(ctx)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil && state == Running {
			err = errors.Join(err, undo(ctx, c))
		}
	}()
	if err := c.execute(ctx, "stop", nil, nil); err != nil {
		return err
	}
	if err := ignoreShared(ctx, c); err != nil {
		return err
	}
	if err := c.executeFD(ctx, "getfd", map[string]any{"fdname": "state"}, nil, f); err != nil {
		return err
	}
	if err := c.execute(ctx, "migrate", map[string]any{"uri": "fd:state"}, nil); err != nil {
		return err
	}
	return pollUntil(ctx, func() (bool, error) { return saved(ctx, c) })
}

// saved reports whether the state has been written.
func saved(ctx context.Context, c *qmp) (bool, error) {
	var m struct {
		Status string `json:"status"`
		Desc   string `json:"error-desc"`
	}
	if err := c.execute(ctx, "query-migrate", nil, &m); err != nil {
		return false, err
	}
	switch m.Status {
	case "completed":
		return true, nil
	case "failed", "cancelled":
		return false, fmt.Errorf("write device state: QEMU reports %s %s", m.Status, m.Desc)
	}
	return false, nil
}

// undoTimeout bounds the attempt to let a VM run again after an operation on it was given
// up.
const undoTimeout = 10 * time.Second

// undo lets a VM run again after a failure, even if ctx has ended.
func undo(ctx context.Context, c *qmp) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	if err := c.execute(ctx, "cont", nil, nil); err != nil {
		return fmt.Errorf("let the VM run again: %w: continue it by hand", err)
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync folder: %w", err)
	}
	return errors.Join(d.Sync(), d.Close())
}
