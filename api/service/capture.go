package service

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"cloudlet/api"
	"cloudlet/overlay"
	"cloudlet/vmm"
)

// createOverlay makes an overlay of what a running instance differs in from the image it
// was resumed from, and puts it into the store. The guest stands still while its memory is
// copied and its disk frozen, then runs on; with req.Stop it ends instead, and stands still in
// between, so that nothing it did is lost.
func (s *Service) createOverlay(ctx context.Context, id string, req api.CreateOverlay, p api.Progress) (out api.CreatedOverlay, err error) {
	if err := s.checkName(req.Name); err != nil {
		return out, err
	}
	strategy, err := usableStrategy(ctx, req.Strategy)
	if err != nil {
		return out, err
	}
	r, vm, lk, err := s.working(ctx, id)
	if err != nil {
		return out, err
	}
	defer lk.unlock()
	if out, err = s.overlayOf(ctx, r, vm, req, strategy, p); err != nil || !req.Stop {
		return out, err
	}
	// The overlay is there; the end of its instance cannot be called off any more.
	if _, eerr := s.end(context.WithoutCancel(ctx), r, api.Stopped, fmt.Sprintf("ended with the capture of overlay %.12s", out.ID)); eerr != nil {
		s.log.Error("end instance after its capture", "instance", r.ID, "problem", eerr)
	}
	return out, nil
}

// dropFree lets the guest, if it runs, give up what stands in memory that it does not use, and
// says why not if it does not. That it cannot is no reason against an overlay.
func (s *Service) dropFree(ctx context.Context, r *record, vm *vmm.VM, req api.CreateOverlay, p api.Progress) (freed int64, kept string, err error) {
	if req.KeepFree {
		return 0, "", nil
	}
	report := overlay.Progress(p).Report
	report("free memory", 0, 0)
	freed, err = vm.DropFree(ctx, func(done, total int64) { report("free memory", done, total) })
	if err == nil || ctx.Err() != nil || errors.Is(err, vmm.ErrBusy) || errors.Is(err, vmm.ErrEnded) {
		return freed, "", err
	}
	s.log.Info("the overlay will hold free memory, too", "instance", r.ID, "reason", err)
	return 0, err.Error(), nil
}

// standStill pauses a VM that runs; undo lets it run again, and is to be called after an error, too.
func standStill(ctx context.Context, vm *vmm.VM) (undo func() error, err error) {
	status, err := vm.Status(ctx)
	if err != nil || status.State != vmm.Running {
		return func() error { return nil }, err
	}
	return func() error {
		bound, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoBound)
		defer cancel()
		return vm.Continue(bound)
	}, vm.Pause(ctx)
}

// usableStrategy parses a strategy and sees that this host has the programs that encode by it,
// before a guest stands still for nothing.
func usableStrategy(ctx context.Context, text string) (overlay.Strategy, error) {
	strategy, err := overlay.ParseStrategy(text)
	if err != nil {
		return strategy, &api.Error{Code: api.Invalid, Detail: err.Error(), Field: "strategy", Err: err}
	}
	return strategy, strategy.CheckPrograms(ctx)
}

// overlayOf is createOverlay of an instance whose lock is held. With req.Stop the guest stands
// still from its capture on; if there is no overlay, it goes on as it was.
func (s *Service) overlayOf(ctx context.Context, r *record, vm *vmm.VM, req api.CreateOverlay, strategy overlay.Strategy, p api.Progress) (out api.CreatedOverlay, err error) {
	start := time.Now()
	undo := func() error { return nil }
	defer func() {
		if err != nil {
			err = errors.Join(err, undo())
		}
	}()
	l, err := s.openLinks(ctx, r.Base, r.Links)
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(err, l.close()) }()
	st, err := s.newStage(ctx, "capture")
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(s.spaceError(err), st.drop()) }()
	if out.Freed, out.FreeKept, err = s.dropFree(ctx, r, vm, req, p); err != nil {
		return out, fmt.Errorf("capture instance %s: %w", r.ID, err)
	}
	if req.Stop {
		if undo, err = standStill(ctx, vm); err != nil {
			return out, err
		}
	}
	path := filepath.Join(st.dir, "overlay")
	if out.Pause, err = s.capture(ctx, r, vm, l, st.dir, path, overlay.CreateOptions{Strategy: strategy, Progress: overlay.Progress(p)}); err != nil {
		return out, fmt.Errorf("capture instance %s: %w", r.ID, err)
	}
	keep := func() error {
		out.Overlay, err = s.keepOverlay(ctx, st.dir, req.Name)
		return err
	}
	if req.Output == "" {
		err = keep()
	} else if out.Output, err = filepath.Abs(req.Output); err == nil {
		err = copyOut(path, out.Output, keep)
	}
	if err != nil {
		return out, err
	}
	for _, parent := range r.Links[:len(r.Links)-r.Own] {
		if _, err := os.Stat(s.overlayFile(parent.ID)); err != nil {
			out.Needs = append(out.Needs, parent.ID)
		}
	}
	out.Took = time.Since(start).Seconds()
	return out, nil
}

// capture copies what the VM has changed, lets it go on, and makes the overlay of it.
func (s *Service) capture(ctx context.Context, r *record, vm *vmm.VM, l *launchImage, dir, path string, o overlay.CreateOptions) (pause float64, err error) {
	o.Progress.Report("capture", 0, 0)
	residueDir := filepath.Join(dir, "residue")
	if err := os.Mkdir(residueDir, 0o700); err != nil {
		return 0, err
	}
	residue, err := vm.Capture(ctx, residueDir)
	if err != nil {
		return 0, err
	}
	defer func() {
		// The frozen layer is committed back also when the caller has given up.
		bound, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoBound)
		defer cancel()
		err = errors.Join(err, residue.Release(bound))
	}()
	state, err := os.ReadFile(residue.State)
	if err != nil {
		return 0, err
	}
	parent, err := l.launched(r.Own)
	if err != nil {
		return 0, err
	}
	defer parent.Close() // of the readers of l, which do the work
	launch := overlay.Launch{
		Parent: parent, Below: l.image, Machine: r.Machine, State: state,
		Memory: overlay.Changes{Extents: extents(residue.MemoryExtents()), Read: residue.ReadMemory},
		Disk:   overlay.Changes{Extents: extents(residue.DiskExtents()), Read: residue.ReadDisk},
	}
	_, err = overlay.Create(ctx, path, launch, o)
	return residue.Pause.Seconds(), err
}

func extents(in []vmm.Extent) []overlay.Extent {
	out := make([]overlay.Extent, len(in))
	for i, e := range in {
		out[i] = overlay.Extent{Off: e.Off, Len: e.Len, Zero: e.Zero}
	}
	return out
}

// copyOut writes the content of file from to path. If also fails, nothing appears there.
func copyOut(from, path string, also func() error) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	return writeFile(path, func(f *os.File) error {
		if _, err := f.ReadFrom(src); err != nil {
			return err
		}
		return also()
	})
}
