package vmm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"time"
)

// ErrReleased means that a residue was released and cannot be read any more.
var ErrReleased = errors.New("the residue is released")

// Residue is what a VM has changed since it was resumed, as of one moment: device state,
// memory pages, disk blocks. It is a superset: pages may be equal to what they were.
type Residue struct {
	// State is the path of the device state, loadable like one of SaveBase. Release removes
	// it.
	State string
	// MemorySize and DiskSize are the sizes of the whole images in bytes.
	MemorySize, DiskSize int64
	// Pause is how long the VM was stopped; 0 if it was paused before.
	Pause time.Duration

	vm         *VM
	mem        segments
	blocks     segments
	memoryPath string

	mu     sync.RWMutex // held for reading while files are read
	lock   *os.File     // nil once the layers are merged
	memory *os.File
	disk   *os.File
	closed bool
}

// MemoryExtents returns the changed ranges of memory, in order.
func (r *Residue) MemoryExtents() []Extent { return r.mem.extents() }

// DiskExtents returns the changed ranges of the disk, in order; discarded ones are Zero.
func (r *Residue) DiskExtents() []Extent { return r.blocks.extents() }

// ReadMemory reads p at off, whole pages within MemoryExtents.
func (r *Residue) ReadMemory(p []byte, off int64) error {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if r.closed {
		return fmt.Errorf("read memory residue: %w", ErrReleased)
	}
	if err := r.mem.read(r.memory, p, off); err != nil {
		return fmt.Errorf("read memory residue: %w", err)
	}
	return nil
}

// ReadDisk reads p at off, whole pages within DiskExtents.
func (r *Residue) ReadDisk(p []byte, off int64) error {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if r.closed {
		return fmt.Errorf("read disk residue: %w", ErrReleased)
	}
	if err := r.blocks.read(r.disk, p, off); err != nil {
		return fmt.Errorf("read disk residue: %w", err)
	}
	return nil
}

// Release ends the residue: its files are removed and the VM's disk layers are merged again.
// It may be called again, to finish what an error interrupted, and after the VM has ended.
// Until it has succeeded no other capture of the VM is possible in this process.
func (r *Residue) Release(ctx context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.closeFilesLocked(); err != nil {
		return fmt.Errorf("release residue: %w", err)
	}
	if r.lock == nil {
		return nil
	}
	err := r.vm.monitor(ctx, func(c *qmp) error { return melt(ctx, c, r.vm.dir) })
	if err != nil && !errors.Is(err, ErrEnded) {
		return fmt.Errorf("release residue: %w", err)
	}
	lock := r.lock
	r.lock = nil
	if err := lock.Close(); err != nil {
		return fmt.Errorf("release residue: %w", err)
	}
	return nil
}

// abandonTries is how often abandon asks the monitor: the connection that was cut off just
// before may take the next one with it.
const abandonTries = 3

// abandon releases as far as possible; the next capture merges what is left.
func (r *Residue) abandon(ctx context.Context) error {
	err := r.Release(ctx)
	for try := 1; err != nil && try < abandonTries && ctx.Err() == nil; try++ {
		err = r.Release(ctx)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.lock != nil {
		err = errors.Join(err, r.lock.Close())
		r.lock = nil
	}
	return err
}

// closeFilesLocked closes and removes the residue's files, once.
func (r *Residue) closeFilesLocked() error {
	if r.closed {
		return nil
	}
	r.closed = true
	var errs []error
	for _, f := range []*os.File{r.memory, r.disk} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	for _, path := range []string{r.memoryPath, r.State} {
		if path == "" {
			continue
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
