package service

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"cloudlet/api"
	"cloudlet/fusefs"
	"cloudlet/vmm"

	"golang.org/x/sys/unix"
)

// Free space below which doctor complains, in bytes: a base of 1 GiB of memory and a small
// disk, and what an instance of it writes.
const wantSpace = 4 << 30

// wantMemory is the free memory below which doctor complains, in bytes.
const wantMemory = 2 << 30

// Doctor checks whether this host can do what the service does, by doing it where that is
// quick: it mounts a small image and runs a VM that only has its firmware.
func (s *Service) Doctor(ctx context.Context) []api.Check {
	type check struct {
		name string
		look func(context.Context) (detail string, err error)
	}
	checks := []check{
		{"state folder", s.checkStore},
		{"memory", func(context.Context) (string, error) { return checkMemory() }},
		{"fuse", s.checkFUSE},
		{"fusectl", func(context.Context) (string, error) { return checkFusectl() }},
		{"user_allow_other", func(context.Context) (string, error) { return checkAllowOther() }},
	}
	reached := true // what starts QEMU
	for _, f := range s.vmm.Examine(ctx) {
		reached = reached && !errors.Is(f.Err, vmm.ErrNoLibvirt)
		checks = append(checks, check{f.Name, func(context.Context) (string, error) { return f.Detail, failAs(api.Unavailable, f.Err) }})
	}
	if reached {
		checks = append(checks, check{"qemu", s.checkQEMU}, check{"accelerator", s.checkAccelerator})
	}
	out := make([]api.Check, 0, len(checks))
	for _, c := range checks {
		check := api.Check{Name: c.name, OK: true}
		detail, err := c.look(ctx)
		check.Detail = detail
		var known *api.Error
		if errors.As(fail(err), &known) {
			check.OK, check.Detail, check.Remedy = false, known.Detail, known.Remedy
		}
		out = append(out, check)
	}
	return out
}

func (s *Service) checkStore(context.Context) (string, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(s.cfg.Dir, &st); err != nil {
		return "", err
	}
	free := int64(st.Bavail) * st.Bsize
	detail := fmt.Sprintf("%s, %.1f GiB free", s.cfg.Dir, float64(free)/(1<<30))
	if free < wantSpace {
		return "", api.Errorf(api.Unavailable, "%s", detail).Fix("free space up to %d GiB, or choose another folder with --state", wantSpace>>30)
	}
	return detail, nil
}

func checkMemory() (string, error) {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return "", err
	}
	var kib int64
	for line := range strings.Lines(string(b)) {
		if _, err := fmt.Sscanf(line, "MemAvailable: %d kB", &kib); err == nil {
			break
		}
	}
	detail := fmt.Sprintf("%.1f GiB available", float64(kib)/(1<<20))
	if kib<<10 < wantMemory {
		return "", api.Errorf(api.Unavailable, "%s", detail).Fix("end what uses it: a guest of 1 GiB wants %d GiB", wantMemory>>30)
	}
	return detail, nil
}

// pageFile is a small file to mount.
type pageFile []byte

func (f pageFile) Size() int64 { return int64(len(f)) }

func (f pageFile) ReadAt(_ context.Context, p []byte, off int64) (int, error) {
	return bytes.NewReader(f).ReadAt(p, off)
}

// checkFUSE mounts a page and reads it in a process of its own: a process must not read what
// it serves itself.
func (s *Service) checkFUSE(ctx context.Context) (_ string, err error) {
	st, err := s.newStage(ctx, "doctor")
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, st.drop()) }()
	dir := filepath.Join(st.dir, "fs")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", err
	}
	page := pageFile(bytes.Repeat([]byte("doctor\n.."), 4096/9+1)[:4096])
	srv, err := fusefs.Mount(dir, fusefs.Options{Memory: page, Disk: page, Name: "cloudlet:doctor"})
	if err != nil {
		return "", failAs(api.Unavailable, err)
	}
	have, err := exec.CommandContext(ctx, "cat", filepath.Join(dir, fusefs.MemoryName)).Output()
	if err == nil && !bytes.Equal(have, page) {
		err = errors.New("a mounted file reads back wrong")
	}
	return "a mounted page reads back", failAs(api.Unavailable, errors.Join(err, srv.ForceUnmount(context.WithoutCancel(ctx))))
}

func checkFusectl() (string, error) {
	const dir = "/sys/fs/fuse/connections"
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return "", api.Errorf(api.Unavailable, "%s: %w", dir, err).Fix("load the kernel module with `modprobe fuse`")
	}
	if st.Type != fusectlMagic {
		if os.Geteuid() == 0 {
			return dir + " is not mounted; it will be when a stuck mount must be aborted", nil
		}
		return "", api.Errorf(api.Unavailable, "%s is not mounted, so a stuck mount cannot be aborted", dir).Fix("as root: mount -t fusectl fusectl %s", dir)
	}
	return dir, nil
}

const fusectlMagic = 0x65735543

func checkAllowOther() (string, error) {
	if os.Geteuid() == 0 {
		return "not needed by root", nil
	}
	b, err := os.ReadFile("/etc/fuse.conf")
	if err != nil && !os.IsNotExist(err) {
		return "", err
	}
	set := slices.ContainsFunc(strings.Split(string(b), "\n"), func(l string) bool { return strings.TrimSpace(l) == "user_allow_other" })
	if !set {
		return "not set: only needed where QEMU runs as another user (put user_allow_other into /etc/fuse.conf)", nil
	}
	return "set", nil
}

func (s *Service) checkQEMU(ctx context.Context) (string, error) {
	h, err := s.vmm.Probe(ctx)
	return fmt.Sprintf("%s, version %s", h.Binary, h.QEMU), err
}

// checkAccelerator runs a VM without a system: its firmware is enough to see that
// instructions are executed.
func (s *Service) checkAccelerator(ctx context.Context) (_ string, err error) {
	h, err := s.vmm.Probe(ctx)
	if err != nil {
		return "", err
	}
	m, err := h.Machine(vmm.Auto, 64<<20, 1)
	if err != nil {
		return "", err
	}
	st, err := s.newStage(ctx, "doctor")
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, st.drop()) }()
	disk, dir := filepath.Join(st.dir, "disk"), filepath.Join(st.dir, "vm")
	if err := errors.Join(os.WriteFile(disk, make([]byte, 1<<20), 0o600), os.Mkdir(dir, 0o700)); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	vm, err := s.vmm.Boot(ctx, dir, vmm.BootSpec{Machine: m, Memory: filepath.Join(st.dir, "ram"), Disk: disk, DiskFormat: "raw"})
	if err != nil {
		return "", failAs(api.Unavailable, err)
	}
	if err := vm.Destroy(context.WithoutCancel(ctx)); err != nil {
		return "", err
	}
	detail := m.Accelerator + " runs a VM"
	if h.KVM != "" {
		detail += "; " + h.KVM
	}
	return detail, nil
}
