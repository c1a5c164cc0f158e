package demoguest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"cloudlet/integration/appguest"
	"cloudlet/vmm"
)

// Forwards are the ports of the guest that its VMs make reachable.
func Forwards() []vmm.Forward { return []vmm.Forward{{Guest: appguest.Port}} }

// Resume resumes the launch VM from plain files in dir, hands its address to answered and ends
// it.
func (l *Lab) Resume(ctx context.Context, dir string, answered func(address string) error) error {
	state, err := os.ReadFile(l.Path("plain", "state"))
	if err != nil {
		return err
	}
	return l.WithVM(ctx, answered, func(vmDir string) (*vmm.VM, error) {
		return l.QEMU().Resume(ctx, vmDir, vmm.ResumeSpec{
			Machine: l.Machine, Memory: filepath.Join(dir, "memory"), Disk: filepath.Join(dir, "disk"), State: state,
			Kernel: l.Guest.Kernel, Initrd: l.Guest.Initrd, Forwards: Forwards(),
		}, nil)
	})
}

// WithVM starts a VM, in a folder that start is given, hands its address to answered and ends
// it. Path("round") is empty afterwards.
func (l *Lab) WithVM(ctx context.Context, answered func(address string) error, start func(dir string) (*vmm.VM, error)) (err error) {
	dir, err := os.MkdirTemp(l.Dir, "vm-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir), l.ClearRound()) }()
	vm, err := start(dir)
	if err != nil {
		return err
	}
	f := vm.Forwards()[0]
	return errors.Join(answered(fmt.Sprintf("%s:%d", f.Addr, f.Host)), vm.Destroy(context.WithoutCancel(ctx)))
}
