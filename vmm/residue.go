package vmm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// ErrReleased means that a residue was released and cannot be read any more.
var ErrReleased = errors.New("the residue is released")

// Files of a Residue in its folder.
const (
	residueState  = "state"
	residueMemory = "memory.residue"
)

// Residue is what a VM has changed since it was resumed, or since the round before: device
// state, memory pages, disk blocks. It is a superset: pages may be equal to what they were.
type Residue struct {
	// State is the path of the device state, loadable like one of SaveBase, and "" where a
	// round has none. Release removes it.
	State string
	// MemorySize and DiskSize are the sizes of the whole images in bytes.
	MemorySize, DiskSize int64
	// Pause is how long the VM was stopped; 0 if it was not, or was paused before.
	Pause time.Duration

	rounds     *Rounds
	only       bool   // of a capture: its release ends the rounds
	layer      string // that was frozen for it, "" before
	mem        segments
	blocks     segments
	memoryPath string

	mu     sync.RWMutex // held for reading while files are read
	memory *os.File
	disk   *os.File
	closed bool
}

// newResidue returns a residue whose files are not made yet.
func newResidue(r *Rounds, outDir string, state bool) *Residue {
	res := &Residue{
		rounds: r, memoryPath: filepath.Join(outDir, residueMemory),
		MemorySize: r.vm.info.Machine.Memory, DiskSize: r.vm.info.DiskSize,
	}
	if state {
		res.State = filepath.Join(outDir, residueState)
	}
	return res
}

// open makes the residue's files; existing ones are an error and stay.
func (r *Residue) open() error {
	for _, path := range []string{r.State, r.memoryPath} {
		if path == "" {
			continue
		}
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

// saveDevices makes QEMU write the state of the devices of the stopped VM.
func (r *Residue) saveDevices(ctx context.Context, c *qmp) error {
	vm := r.rounds.vm
	path := filepath.Join(vm.dir, xenState)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove old device state: %w", err)
	}
	if err := vm.lend(path); err != nil {
		return err
	}
	return c.execute(ctx, "xen-save-devices-state", map[string]any{"filename": c.file(xenState), "live": false}, nil)
}

// finish does what needs no stopped VM, once the disk layer is frozen: the device state, if
// there is one, and the map of the layer.
func (r *Residue) finish(ctx context.Context) error {
	vm := r.rounds.vm
	if r.State != "" {
		if err := spliceFiles(r.State, filepath.Join(vm.dir, resumeState), filepath.Join(vm.dir, xenState)); err != nil {
			return err
		}
		if err := os.Remove(filepath.Join(vm.dir, xenState)); err != nil {
			return fmt.Errorf("remove device state: %w", err)
		}
	}
	layer := filepath.Join(vm.dir, r.layer)
	blocks, err := vm.q.mapLayer(ctx, layer, r.DiskSize)
	if err != nil {
		return err
	}
	r.blocks = blocks
	if r.disk, err = os.Open(layer); err != nil {
		return fmt.Errorf("open disk layer: %w", err)
	}
	return nil
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

// Release ends the residue: its files are removed, and its disk layer is merged into the
// one below. Residues of rounds are merged in the order in which they were taken: one that
// is released early is merged together with those before it. Release may be called again,
// to finish what an error interrupted, and after the VM has ended. Until that of a capture's
// residue has succeeded no other capture of the VM is possible in this process.
func (r *Residue) Release(ctx context.Context) error {
	err := r.closeFiles()
	if err == nil && r.only {
		err = r.rounds.close(ctx)
	} else if err == nil {
		err = r.rounds.settle(ctx)
	}
	if err != nil {
		return fmt.Errorf("release residue: %w", err)
	}
	return nil
}

// released reports whether the residue's files are closed.
func (r *Residue) released() bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.closed
}

// closeFiles closes and removes the residue's files, once.
func (r *Residue) closeFiles() error {
	r.mu.Lock()
	defer r.mu.Unlock()
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
