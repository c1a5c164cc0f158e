package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"cloudlet/api"
	"cloudlet/api/client"
	"cloudlet/integration/appguest"
	"cloudlet/vmm"

	"golang.org/x/sys/unix"
)

// What the demo needs of the host, in bytes: plain copies of 1 GiB of memory and 2 GiB of
// disk, twice, and the guest itself; a guest of 1 GiB beside the decoders of eager.
const (
	needSpace  = 12 << 30
	needMemory = 5 << 30
)

// demo is one run of the demonstration.
type demo struct {
	program, guestDir, dir, out, picture string
	publish                              string // root of the project, to renew its documents
	rounds                               int

	begin time.Time
	guest appguest.Guest
	made  prepared
	base  api.Base
	// machine is the base's, for the ways that start QEMU themselves.
	machine vmm.Machine
	round   int // the present one; it chooses the request
	// daemon is the service that the instances are asked of.
	daemon *client.Client
}

func (d *demo) run(ctx context.Context) (err error) {
	d.begin = time.Now()
	for _, p := range []*string{&d.program, &d.guestDir, &d.dir, &d.out, &d.picture} {
		if *p, err = filepath.Abs(*p); err != nil {
			return err
		}
	}
	if err := errors.Join(os.MkdirAll(d.dir, 0o755), os.MkdirAll(filepath.Dir(d.out), 0o755)); err != nil {
		return err
	}
	if err := d.checkHost(ctx); err != nil {
		return err
	}
	if err := d.clear(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.clear(context.WithoutCancel(ctx))) }()
	if err := d.prepare(ctx); err != nil {
		return err
	}
	stop, err := d.serve(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop()) }()
	r, err := d.measure(ctx)
	if err != nil {
		return err
	}
	return d.report(ctx, r)
}

// say prints a line with the time since the beginning.
func (d *demo) say(format string, args ...any) {
	fmt.Printf("%6.1f s  %s\n", time.Since(d.begin).Seconds(), fmt.Sprintf(format, args...))
}

// checkHost says before anything is made what this host lacks.
func (d *demo) checkHost(ctx context.Context) error {
	var checks []api.Check
	if err := d.cloudlet(ctx, &checks, "doctor"); err != nil {
		return err
	}
	var missing []error
	for _, program := range []string{"xdelta3", "xz", "cp"} {
		if _, err := exec.LookPath(program); err != nil {
			missing = append(missing, fmt.Errorf("the demo needs the program %s: run make deps", program))
		}
	}
	var st unix.Statfs_t
	if err := unix.Statfs(d.dir, &st); err != nil {
		return err
	}
	if free := int64(st.Bavail) * st.Bsize; free < needSpace && d.made.Launch == "" {
		missing = append(missing, fmt.Errorf("the demo needs %d GiB of disk in %s, %.1f GiB are free: free some, or choose another folder with -dir", needSpace>>30, d.dir, float64(free)/(1<<30)))
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return err
	}
	if total := int64(info.Totalram) * int64(info.Unit); total < needMemory {
		missing = append(missing, fmt.Errorf("the demo needs %d GiB of memory, this machine has %.1f GiB", needMemory>>30, float64(total)/(1<<30)))
	}
	return errors.Join(missing...)
}

// clear ends what an earlier run left: instances, mounts, the files of single rounds.
func (d *demo) clear(ctx context.Context) error {
	var list []api.Instance
	if err := d.cloudlet(ctx, &list, "ps", "--all"); err != nil {
		return err
	}
	for _, in := range list {
		if err := d.cloudlet(ctx, nil, "rm", "--force", in.ID); err != nil {
			return err
		}
	}
	vms, err := filepath.Glob(filepath.Join(d.dir, "vm-*"))
	for _, dir := range vms {
		err = errors.Join(err, d.qemu().DestroyIn(ctx, dir), os.RemoveAll(dir))
	}
	return errors.Join(err, d.unmount(), os.RemoveAll(d.path("round")), os.MkdirAll(d.path("round"), 0o755))
}

func (d *demo) path(parts ...string) string {
	return filepath.Join(append([]string{d.dir}, parts...)...)
}

func (d *demo) qemu() *vmm.QEMU {
	return &vmm.QEMU{Launcher: []string{d.program, "launcher"}, Cache: d.path("host.json")}
}

// cloudlet runs the program and decodes what it prints.
func (d *demo) cloudlet(ctx context.Context, v any, args ...string) error {
	cmd := exec.CommandContext(ctx, d.program, append([]string{"--state", d.path("state"), "--json"}, args...)...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = time.Minute
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("cloudlet %v: %w: %s%s", args, err, out, stderr.Bytes())
	}
	if v == nil {
		return nil
	}
	return json.Unmarshal(out, v)
}

// mounted runs f while the launch image is mounted on a folder that f is given.
func (d *demo) mounted(ctx context.Context, f func(dir string) error) (err error) {
	dir := d.path("mnt")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := d.cloudlet(ctx, nil, "mount", "--detach", d.made.Overlay, dir); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.unmount()) }()
	return f(dir)
}

func (d *demo) unmount() error {
	var there, above unix.Stat_t
	if unix.Stat(d.path("mnt"), &there) != nil || unix.Stat(d.dir, &above) != nil || there.Dev == above.Dev {
		return nil
	}
	if out, err := exec.Command("fusermount3", "-u", d.path("mnt")).CombinedOutput(); err != nil {
		return fmt.Errorf("unmount %s: %w: %s", d.path("mnt"), err, out)
	}
	return nil
}
