package demoguest

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

// What the preparation needs of the host, in bytes: plain copies of 1 GiB of memory and 2 GiB
// of disk, twice, and the guest itself; a guest of 1 GiB beside the decoders of eager.
const (
	needSpace  = 12 << 30
	needMemory = 5 << 30
)

// Options say where a Lab works.
type Options struct {
	Program  string // path of the program under test
	GuestDir string // folder of the guest, which is built if missing
	Dir      string // folder to work in
}

// Lab is a prepared folder with a daemon over its store. It is used from one goroutine.
type Lab struct {
	Options
	Guest appguest.Guest
	Made  Prepared
	// Machine is the base's, for those that start QEMU themselves.
	Machine vmm.Machine
	// Daemon is the service that instances are asked of.
	Daemon *client.Client

	begin time.Time
	stop  func() error // of the daemon
}

// Open prepares a folder, or finds it prepared, and starts the daemon. It ends what an
// earlier run left there. Close the Lab.
func Open(ctx context.Context, o Options) (_ *Lab, err error) {
	l := &Lab{Options: o, begin: time.Now()}
	for _, p := range []*string{&l.Program, &l.GuestDir, &l.Dir} {
		if *p, err = filepath.Abs(*p); err != nil {
			return nil, err
		}
	}
	if err := os.MkdirAll(l.Dir, 0o755); err != nil {
		return nil, err
	}
	if err := l.checkHost(ctx); err != nil {
		return nil, err
	}
	if err := l.clear(ctx); err != nil {
		return nil, err
	}
	if err := l.prepare(ctx); err != nil {
		return nil, errors.Join(err, l.clear(context.WithoutCancel(ctx)))
	}
	if l.stop, err = l.serve(ctx); err != nil {
		return nil, errors.Join(err, l.clear(context.WithoutCancel(ctx)))
	}
	return l, nil
}

// Close ends the daemon and what it has started.
func (l *Lab) Close(ctx context.Context) error {
	err := l.stop()
	return errors.Join(err, l.clear(context.WithoutCancel(ctx)))
}

// Say prints a line with the time since Open.
func (l *Lab) Say(format string, args ...any) {
	fmt.Printf("%6.1f s  %s\n", time.Since(l.begin).Seconds(), fmt.Sprintf(format, args...))
}

// checkHost says before anything is made what this host lacks.
func (l *Lab) checkHost(ctx context.Context) error {
	var checks []api.Check
	if err := l.Cloudlet(ctx, &checks, "doctor"); err != nil {
		return err
	}
	var missing []error
	for _, program := range []string{"xdelta3", "xz", "cp"} {
		if _, err := exec.LookPath(program); err != nil {
			missing = append(missing, fmt.Errorf("the demo's guest needs the program %s: run make deps", program))
		}
	}
	var st unix.Statfs_t
	if err := unix.Statfs(l.Dir, &st); err != nil {
		return err
	}
	if _, err := os.Stat(l.Path("prepared.json")); err != nil {
		if free := int64(st.Bavail) * st.Bsize; free < needSpace {
			missing = append(missing, fmt.Errorf("the demo's guest needs %d GiB of disk in %s, %.1f GiB are free: free some, or choose another folder with -dir", needSpace>>30, l.Dir, float64(free)/(1<<30)))
		}
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return err
	}
	if total := int64(info.Totalram) * int64(info.Unit); total < needMemory {
		missing = append(missing, fmt.Errorf("the demo's guest needs %d GiB of memory, this machine has %.1f GiB", needMemory>>30, float64(total)/(1<<30)))
	}
	return errors.Join(missing...)
}

// clear ends what an earlier run left: instances, mounts, the files of single rounds.
func (l *Lab) clear(ctx context.Context) error {
	var list []api.Instance
	if err := l.Cloudlet(ctx, &list, "ps", "--all"); err != nil {
		return err
	}
	for _, in := range list {
		if err := l.Cloudlet(ctx, nil, "rm", "--force", in.ID); err != nil {
			return err
		}
	}
	vms, err := filepath.Glob(filepath.Join(l.Dir, "vm-*"))
	for _, dir := range vms {
		err = errors.Join(err, l.QEMU().DestroyIn(ctx, dir), os.RemoveAll(dir))
	}
	return errors.Join(err, l.unmount(), l.ClearRound())
}

// ClearRound empties Path("round"), the folder for the files of a single measurement.
func (l *Lab) ClearRound() error {
	return errors.Join(os.RemoveAll(l.Path("round")), os.MkdirAll(l.Path("round"), 0o755))
}

// Path returns a path in the folder.
func (l *Lab) Path(parts ...string) string {
	return filepath.Join(append([]string{l.Dir}, parts...)...)
}

// QEMU returns the means to start VMs beside the daemon's.
func (l *Lab) QEMU() *vmm.QEMU {
	return &vmm.QEMU{Launcher: []string{l.Program, "launcher"}, Cache: l.Path("host.json")}
}

// Cloudlet runs the program over the store and decodes what it prints into v, if not nil.
func (l *Lab) Cloudlet(ctx context.Context, v any, args ...string) error {
	cmd := exec.CommandContext(ctx, l.Program, append([]string{"--state", l.Path("state"), "--json"}, args...)...)
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

// Mounted runs f while the launch image of ref is mounted on a folder that f is given.
func (l *Lab) Mounted(ctx context.Context, ref string, f func(dir string) error) (err error) {
	dir := l.Path("mnt")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := l.Cloudlet(ctx, nil, "mount", "--detach", ref, dir); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.unmount()) }()
	return f(dir)
}

func (l *Lab) unmount() error {
	var there, above unix.Stat_t
	if unix.Stat(l.Path("mnt"), &there) != nil || unix.Stat(l.Dir, &above) != nil || there.Dev == above.Dev {
		return nil
	}
	if out, err := exec.Command("fusermount3", "-u", l.Path("mnt")).CombinedOutput(); err != nil {
		return fmt.Errorf("unmount %s: %w: %s", l.Path("mnt"), err, out)
	}
	return nil
}
