package service

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"cloudlet/api"
	"cloudlet/overlay"
	"cloudlet/vmm"
)

const baseTimeout = 5 * time.Minute

// createBase boots a disk image, waits until the guest is ready, captures it and puts it
// into the store. ready is called when neither probe nor console text is asked for: it
// returns when a person says so. The image itself is not changed.
func (s *Service) createBase(ctx context.Context, req api.CreateBase, ready func(context.Context, api.Instance) error, p api.Progress) (out api.Base, err error) {
	if err := s.checkName(req.Name); err != nil {
		return out, err
	}
	forwards, err := checkForwards(req.Forwards, req.Probe)
	if err != nil {
		return out, err
	}
	m, err := s.newMachine(ctx, req)
	if err != nil {
		return out, err
	}
	st, err := s.newStage(ctx, "base")
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(s.spaceError(err), st.drop()) }()
	dir, vmDir := filepath.Join(st.dir, "base"), filepath.Join(st.dir, "vm")
	for _, d := range []string{dir, vmDir} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return out, err
		}
	}
	if err := s.collect(ctx, req, dir, p); err != nil {
		return out, err
	}
	spec := vmm.BootSpec{
		Machine: m, Memory: filepath.Join(dir, overlay.Memory.String()), Disk: filepath.Join(dir, overlay.Disk.String()), DiskFormat: "raw", Forwards: forwards,
	}
	if m.Kernel {
		spec.Kernel = filepath.Join(dir, overlay.BaseKernelFile)
	}
	if m.Initrd {
		spec.Initrd = filepath.Join(dir, overlay.BaseInitrdFile)
	}
	overlay.Progress(p).Report("boot", 0, 0)
	vm, err := s.vmm.Boot(ctx, vmDir, spec)
	if err != nil {
		return out, fmt.Errorf("boot %s: %w", req.Disk, err)
	}
	defer func() {
		bound, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoBound)
		defer cancel()
		err = errors.Join(err, vm.Destroy(bound))
	}()
	if err := s.awaitReady(ctx, vm, req, ready); err != nil {
		return out, err
	}
	overlay.Progress(p).Report("capture", 0, 0)
	if err := vm.SaveBase(ctx, filepath.Join(dir, overlay.BaseStateFile)); err != nil {
		return out, fmt.Errorf("capture base: %w", err)
	}
	raw, err := json.Marshal(m)
	if err != nil {
		return out, err
	}
	b, err := overlay.SealBase(ctx, dir, raw, overlay.Progress(p))
	if err != nil {
		return out, err
	}
	return s.keepBase(ctx, b, req.Name)
}

// newMachine chooses the machine of a new base.
func (s *Service) newMachine(ctx context.Context, req api.CreateBase) (vmm.Machine, error) {
	host, err := s.vmm.Probe(ctx)
	if err != nil {
		return vmm.Machine{}, err
	}
	m, err := host.Machine(req.Accelerator, req.Memory, max(req.CPUs, 1))
	if err != nil {
		return m, failAs(api.Invalid, err)
	}
	m.Append, m.Kernel, m.Initrd = req.Append, req.Kernel != "", req.Initrd != ""
	if err := m.Validate(); err != nil {
		return m, &api.Error{Code: api.Invalid, Detail: err.Error(), Err: err}
	}
	return m, m.Runnable(host)
}

// collect brings disk, kernel and initrd into dir.
func (s *Service) collect(ctx context.Context, req api.CreateBase, dir string, p api.Progress) error {
	overlay.Progress(p).Report("copy disk", 0, 0)
	if err := s.vmm.ConvertDisk(ctx, req.Disk, req.Format, filepath.Join(dir, overlay.Disk.String())); err != nil {
		return failAs(api.Invalid, err)
	}
	for name, from := range map[string]string{overlay.BaseKernelFile: req.Kernel, overlay.BaseInitrdFile: req.Initrd} {
		if from == "" {
			continue
		}
		if err := copyOut(from, filepath.Join(dir, name), ctx.Err); err != nil {
			return err
		}
	}
	return nil
}

// awaitReady waits until the guest is ready to be captured.
func (s *Service) awaitReady(ctx context.Context, vm *vmm.VM, req api.CreateBase, ready func(context.Context, api.Instance) error) error {
	timeout := req.Timeout
	if timeout == 0 {
		timeout = baseTimeout
	}
	if req.Console != "" {
		if err := awaitConsole(ctx, vm, req.Console, timeout); err != nil {
			return err
		}
	}
	if req.Probe != nil {
		if err := awaitProbe(ctx, vm, req.Probe, timeout); err != nil {
			return err
		}
	}
	if req.Console == "" && req.Probe == nil && req.Settle == 0 {
		in := api.Instance{State: api.Running, PID: vm.PID()}
		for _, f := range vm.Forwards() {
			in.Endpoints = append(in.Endpoints, api.Endpoint{Guest: f.Guest, Address: fmt.Sprintf("%s:%d", f.Addr, f.Host)})
		}
		return ready(ctx, in)
	}
	timer := time.NewTimer(req.Settle)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// awaitConsole waits until the guest's serial console has shown text.
func awaitConsole(ctx context.Context, vm *vmm.VM, text string, timeout time.Duration) error {
	path := filepath.Join(vm.Dir(), "serial.log")
	var seen []byte
	var off int64
	err := await(ctx, vm, timeout, func(context.Context) bool {
		f, err := os.Open(path)
		if err != nil {
			return false // not made yet
		}
		defer f.Close()
		b, err := io.ReadAll(io.NewSectionReader(f, off, 1<<20))
		if err != nil {
			return false
		}
		off += int64(len(b))
		seen = append(seen[max(0, len(seen)-len(text)):], b...)
		return bytes.Contains(seen, []byte(text))
	})
	if api.CodeOf(err) == api.TimedOut {
		return api.Errorf(api.TimedOut, "the guest's console did not show %q within %s%s", text, timeout, serialTail(vm)).Fix("wait longer with --timeout, or choose another text")
	}
	return err
}
