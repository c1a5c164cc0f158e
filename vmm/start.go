package vmm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// BootSpec says what to boot.
type BootSpec struct {
	Machine    Machine
	Memory     string // RAM file to create; it must not exist
	Disk       string // written to by the guest
	DiskFormat string // "raw" or "qcow2"
	Kernel     string // where Machine.Kernel is set
	Initrd     string // where Machine.Initrd is set
	Forwards   []Forward
	Name       string // of the domain, where libvirt starts it; "": made up
	Title      string // beside the name, for people
}

// ResumeSpec says what to resume.
type ResumeSpec struct {
	Machine Machine
	Memory  string // memory image of Machine.Memory bytes, mapped privately: it never changes
	Disk    string // raw disk image, only read: a top layer is made over it
	// Ready, if not nil, returns when Memory and Disk can be read. It runs while the files of
	// the VM's own are made, for which DiskSize, of Disk in bytes, must then be given.
	Ready    func(context.Context) error
	DiskSize int64
	State    []byte // device state, of SaveBase or of a Residue
	Kernel   string
	Initrd   string
	Forwards []Forward
	Paused   bool   // leave the VM paused once its state is loaded
	Name     string // of the domain, where libvirt starts it; "": made up
	Title    string // beside the name, for people
}

// vmInfo is the state of a VM's folder that must outlive the process that made it.
type vmInfo struct {
	Version  int       `json:"version"`
	Resumed  bool      `json:"resumed"`
	Machine  Machine   `json:"machine"`
	Memory   string    `json:"memory"`
	Dev      uint64    `json:"dev"` // device and inode of Memory
	Inode    uint64    `json:"inode"`
	Disk     string    `json:"disk"`
	DiskSize int64     `json:"disk_size"`
	Forwards []Forward `json:"forwards"`
	// Domain is set where libvirt drives the VM. Version is then 2, which programs refuse that
	// know of no libvirt.
	Domain *domainInfo `json:"domain,omitempty"`
}

const (
	// maxState bounds a device state in bytes.
	maxState = 256 << 20
	// poll is the pace at which files and the monitor are looked at where there is no event.
	poll = 2 * time.Millisecond
	// startTimeout bounds QEMU's way to its monitor; a loaded machine needs a second or two.
	startTimeout = 60 * time.Second
	// cleanTimeout bounds the ending of a VM whose start went wrong.
	cleanTimeout = 10 * time.Second
)

// Boot starts a VM from its disk or kernel, with its RAM in a new shared file. dir is the
// VM's own folder and must be empty. On an error, and when ctx ends, no process is left and
// the RAM file is removed.
func (q *QEMU) Boot(ctx context.Context, dir string, s BootSpec) (*VM, error) {
	return q.boot(ctx, dir, s, nil)
}

func (q *QEMU) boot(ctx context.Context, dir string, s BootSpec, d *domainInfo) (vm *VM, err error) {
	l := line{machine: s.Machine, shared: true, diskFormat: s.DiskFormat}
	if s.DiskFormat != "raw" && s.DiskFormat != "qcow2" {
		return nil, fmt.Errorf("boot VM: disk format %.40q is unknown: use raw or qcow2", s.DiskFormat)
	}
	dir, err = l.resolve(dir, s.Memory, s.Disk, s.Kernel, s.Initrd, s.Forwards)
	if err != nil {
		return nil, err
	}
	if _, err := regularFile("disk", l.disk); err != nil {
		return nil, err
	}
	if err := createMemory(l.memory, s.Machine.Memory); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(l.memory))
		}
	}()
	info := vmInfo{Machine: s.Machine, Memory: l.memory, Disk: l.disk, Domain: d}
	return q.start(ctx, dir, l, info, nil, func(ctx context.Context, vm *VM, c *qmp) error {
		return vm.checkExecutes(ctx, c)
	})
}

// Resume starts a VM from captured memory, disk and device state. The memory file is mapped
// privately and the disk gets a top layer in dir, so neither changes. dir is the VM's own
// folder and must be empty. on, if not nil, is told "qemu started", "state loaded" and
// "running" as they happen. On an error, and when ctx ends, no process is left; the files in
// dir stay for whoever wants to know more.
func (q *QEMU) Resume(ctx context.Context, dir string, s ResumeSpec, on func(event string)) (*VM, error) {
	return q.resume(ctx, dir, s, on, nil)
}

func (q *QEMU) resume(ctx context.Context, dir string, s ResumeSpec, on func(event string), d *domainInfo) (*VM, error) {
	if on == nil {
		on = func(string) {}
	}
	l := line{machine: s.Machine, diskFormat: "qcow2", incoming: true}
	dir, err := l.resolve(dir, s.Memory, s.Disk, s.Kernel, s.Initrd, s.Forwards)
	if err != nil {
		return nil, err
	}
	if s.Ready == nil {
		disk, err := regularFile("disk", l.disk)
		if err != nil {
			return nil, err
		}
		s.DiskSize = disk.Size
	}
	if s.DiskSize <= 0 || s.DiskSize%pageSize != 0 {
		return nil, fmt.Errorf("resume VM: disk %s has %d bytes: want a multiple of %d", s.Disk, s.DiskSize, pageSize)
	}
	g, gctx := errgroup.WithContext(ctx)
	if s.Ready != nil {
		g.Go(func() error { return s.Ready(gctx) })
	}
	g.Go(func() error { return q.prepare(gctx, dir, s.State, l.disk, s.DiskSize) })
	if err := g.Wait(); err != nil {
		return nil, err
	}
	mem, err := regularFile("memory", l.memory)
	if err != nil {
		return nil, err
	}
	if mem.Size != s.Machine.Memory {
		return nil, fmt.Errorf("resume VM: memory file %s has %d bytes, the machine has %d", s.Memory, mem.Size, s.Machine.Memory)
	}
	disk, err := regularFile("disk", l.disk)
	if err != nil {
		return nil, err
	}
	if disk.Size != s.DiskSize {
		return nil, fmt.Errorf("resume VM: disk %s has %d bytes, not %d", s.Disk, disk.Size, s.DiskSize)
	}
	info := vmInfo{Resumed: true, Machine: s.Machine, Memory: l.memory, Dev: mem.Dev, Inode: mem.Ino, Disk: l.disk, DiskSize: disk.Size, Domain: d}
	l.disk = topLayer
	return q.start(ctx, dir, l, info, on, func(ctx context.Context, vm *VM, c *qmp) error {
		if s.Paused {
			return nil
		}
		if err := c.execute(ctx, "cont", nil, nil); err != nil {
			return err
		}
		on("running")
		return vm.checkExecutes(ctx, c)
	})
}

// resolve validates everything the command line is made from, completes it, and returns the
// absolute form of dir.
func (l *line) resolve(dir, memory, disk, kernel, initrd string, fs []Forward) (string, error) {
	if err := l.machine.Validate(); err != nil {
		return "", err
	}
	var err error
	if l.forwards, err = checkForwards(l.machine, fs); err != nil {
		return "", err
	}
	if l.memory, err = absolute("memory file", memory); err != nil {
		return "", err
	}
	if l.disk, err = absolute("disk", disk); err != nil {
		return "", err
	}
	boot := []struct {
		what, path string
		want       bool
		to         *string
	}{{"kernel", kernel, l.machine.Kernel, &l.kernel}, {"initrd", initrd, l.machine.Initrd, &l.initrd}}
	for _, b := range boot {
		if b.want != (b.path != "") {
			return "", fmt.Errorf("start VM: %s: the machine says %t, the path given is %q: give one exactly where the machine has it", b.what, b.want, b.path)
		}
		if !b.want {
			continue
		}
		if *b.to, err = absolute(b.what, b.path); err != nil {
			return "", err
		}
		if _, err := regularFile(b.what, *b.to); err != nil {
			return "", err
		}
	}
	return freshFolder(dir)
}

// freshFolder checks that dir is an empty folder and returns its absolute path.
func freshFolder(dir string) (string, error) {
	dir, err := absolute("folder", dir)
	if err != nil {
		return "", err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "", fmt.Errorf("read folder of VM: %w", err)
	}
	if len(entries) > 0 {
		return "", fmt.Errorf("start VM: folder %s is not empty (%s): give each VM a folder of its own", dir, entries[0].Name())
	}
	return dir, nil
}

// regularFile stats a file that QEMU is to open.
func regularFile(what, path string) (unix.Stat_t, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return st, fmt.Errorf("open %s %s: %w", what, path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return st, fmt.Errorf("open %s %s: it is not a regular file", what, path)
	}
	return st, nil
}

func createMemory(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("create memory file: %w", err)
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		return errors.Join(fmt.Errorf("size memory file: %w", err), os.Remove(path))
	}
	return nil
}

// prepare puts the resumed VM's own files into its folder: the state, from which captures
// also take their beginning, and the disk's top layer.
func (q *QEMU) prepare(ctx context.Context, dir string, state []byte, disk string, size int64) error {
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		if len(state) == 0 || len(state) > maxState {
			return fmt.Errorf("resume VM: the device state has %d bytes: want 1 to %d", len(state), maxState)
		}
		path := filepath.Join(dir, resumeState)
		err := writeFile(path, func(f *os.File) error { _, err := f.Write(state); return err })
		if err != nil {
			return err
		}
		_, err = statePrefix(path)
		return err
	})
	g.Go(func() error { return q.createLayer(gctx, filepath.Join(dir, topLayer), disk, "raw", size) })
	return g.Wait()
}

// createLayer makes an empty qcow2 layer over a file. The file is not opened (-u), so this
// is quick even where reading it is slow, or it is in use.
func (q *QEMU) createLayer(ctx context.Context, path, backing, format string, size int64) error {
	img, err := q.img()
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600) // decides the mode
	if err != nil {
		return fmt.Errorf("create disk layer: %w", err)
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("create disk layer: %w", err)
	}
	if _, err := output(ctx, img, "create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", format, path, strconv.FormatInt(size, 10)); err != nil {
		return fmt.Errorf("create disk layer: %w", err)
	}
	return nil
}

// start writes down what the VM is and starts it. Then begin brings it to life.
func (q *QEMU) start(ctx context.Context, dir string, l line, info vmInfo, on func(string), begin func(context.Context, *VM, *qmp) error) (*VM, error) {
	info.Version, info.Forwards = 1, l.forwards
	if info.Domain != nil {
		info.Version = 2
	}
	vm := &VM{q: q, dir: dir, info: info}
	if err := writeJSON(dir, vmFile, info); err != nil {
		return nil, err
	}
	if err := vm.driver().start(ctx, vm, l, on, begin); err != nil {
		return nil, err
	}
	return vm, nil
}

// launch starts the launcher, in a session of its own so that a terminal's Ctrl-C does not
// reach it.
func (vm *VM) launch() error {
	logFile, err := os.OpenFile(filepath.Join(vm.dir, launcherLog), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("start launcher: %w", err)
	}
	defer logFile.Close()
	lock, err := lockStart(vm.dir)
	if err != nil {
		return fmt.Errorf("start launcher: %w", err)
	}
	defer lock.Close() // the launcher has it, too
	argv := append(append([]string{}, vm.q.Launcher...), vm.dir)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = logFile, logFile, []*os.File{lock}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start launcher: %w", err)
	}
	vm.launcher = cmd.Process
	vm.reaped = make(chan struct{})
	go func() { // joined by Wait, Destroy and Quit: the launcher ends with its VM
		defer close(vm.reaped)
		_ = cmd.Wait()
	}()
	return nil
}

// come waits for the monitor and brings the VM to life.
func (vm *VM) come(ctx context.Context, begin func(context.Context, *VM, *qmp) error) error {
	c, err := vm.firstDial(ctx)
	if err != nil {
		return err
	}
	defer c.close()
	err = pollUntil(ctx, func() (bool, error) { // the launcher writes it while QEMU starts
		vm.procs, err = readProcesses(vm.dir)
		return vm.procs.QEMU.PID != 0, err
	})
	if err != nil {
		return err
	}
	if err := vm.resolvePorts(ctx, c); err != nil {
		return err
	}
	return begin(ctx, vm, c)
}

// firstDial connects to the monitor as soon as QEMU listens, or returns an error as soon as
// the launcher has ended.
func (vm *VM) firstDial(ctx context.Context) (*qmp, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, startTimeout, fmt.Errorf("no monitor within %v", startTimeout))
	defer cancel()
	tick := time.NewTicker(poll)
	defer tick.Stop()
	for {
		c, err := dialQMP(ctx, vm.dir)
		if err == nil {
			return c, nil
		}
		select {
		case <-vm.reaped:
			return nil, errGone
		case <-ctx.Done():
			return nil, fmt.Errorf("start QEMU: %w", context.Cause(ctx))
		case <-tick.C:
		}
	}
}

// abandon ends a VM whose start went wrong and returns the error, with what QEMU said if it
// has ended by itself.
func (vm *VM) abandon(ctx context.Context, cause error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanTimeout)
	defer cancel()
	ended := errors.Is(cause, errGone) || errors.Is(cause, errMonitor)
	// The launcher, told by SIGTERM, ends a QEMU that it has started and starts none that it
	// has not. A launcher that was killed cannot: then QEMU is ended directly.
	_ = vm.launcher.Signal(syscall.SIGTERM)
	select {
	case <-vm.reaped:
	case <-ctx.Done():
		_ = vm.launcher.Kill()
		<-vm.reaped
	}
	if p, err := readProcesses(vm.dir); err == nil {
		_ = p.QEMU.signal(unix.SIGKILL)
		_ = p.QEMU.wait(ctx)
	}
	if !ended {
		return cause
	}
	return vm.startError()
}

// ignoreShared makes QEMU leave the contents of shared memory out of a state, and accept a
// state without.
func ignoreShared(ctx context.Context, c *qmp) error {
	return c.execute(ctx, "migrate-set-capabilities", map[string]any{
		"capabilities": []map[string]any{{"capability": "x-ignore-shared", "state": true}},
	}, nil)
}

// pollUntil calls f until it reports true or an error, or ctx ends.
func pollUntil(ctx context.Context, f func() (bool, error)) error {
	tick := time.NewTicker(poll)
	defer tick.Stop()
	for {
		done, err := f()
		if err != nil || done {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}
