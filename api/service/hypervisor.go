package service

import (
	"context"
	"errors"
	"path/filepath"

	"cloudlet/api"
	"cloudlet/vmm"
)

// hypervisor starts VMs, and finds those that were started by whatever hypervisor.
type hypervisor interface {
	Probe(ctx context.Context) (vmm.Host, error)
	Examine(ctx context.Context) []vmm.Finding
	Account(ctx context.Context) (vmm.Account, error)
	ConvertDisk(ctx context.Context, path, format, out string) error
	Boot(ctx context.Context, dir string, s vmm.BootSpec) (*vmm.VM, error)
	Resume(ctx context.Context, dir string, s vmm.ResumeSpec, on func(event string)) (*vmm.VM, error)
	Adopt(ctx context.Context, dir string) (*vmm.VM, error)
	DestroyIn(ctx context.Context, dir string) error
	Watch(ctx context.Context, on func(vmm.Event)) error
	Close() error
}

// newHypervisor returns what the configuration names. This is the one place that knows there
// is more than one.
func newHypervisor(c Config) (hypervisor, error) {
	q := &vmm.QEMU{
		Binary: c.QEMU, ImgBinary: c.QEMUImg, Cache: filepath.Join(c.Dir, "host.json"),
		Launcher: append(append([]string{}, c.Program...), "launcher"),
	}
	uri, through, err := vmm.ParseLibvirt(c.VMM)
	if err != nil {
		return nil, &api.Error{Code: api.Invalid, Field: "vmm", Detail: err.Error(), Err: err}
	}
	if through {
		return &vmm.Libvirt{QEMU: q, URI: uri, Dir: c.Dir}, nil
	}
	return q, nil
}

// domainOf is the name of an instance's domain, where it has one.
func domainOf(id string) string { return "cloudlet-" + id }

// watch looks at instances as soon as something happens to them, until ctx ends.
func (s *Service) watch(ctx context.Context) {
	err := s.vmm.Watch(ctx, func(e vmm.Event) {
		if e.Dir == "" {
			if err := s.adopt(ctx, true); err != nil && ctx.Err() == nil {
				s.log.Warn("look at instances", "err", err)
			}
			return
		}
		id := filepath.Base(filepath.Dir(e.Dir))
		in, err := s.see(ctx, id)
		switch {
		case api.CodeOf(fail(err)) == api.NotFound: // the VM of a base being made
		case err != nil && ctx.Err() == nil:
			s.log.Warn("look at instance", "instance", id, "err", err)
		case err == nil:
			s.log.Info("event of an instance", "instance", id, "state", in.State, "reason", in.Reason)
		}
	})
	if err != nil && !errors.Is(err, context.Canceled) {
		s.log.Error("watch instances", "err", err)
	}
}
