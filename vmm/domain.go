package vmm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// domain is a QEMU that libvirt has started. Libvirt is asked to start and to end it, and to
// pass on what the monitor is told: it follows QEMU's events, so it knows of what is done so.
type domain struct {
	domainInfo
	conns *connections
}

func (d *domain) folder(vm *VM) string { return vm.dir }

func (d *domain) lend(path string) error {
	if !d.Account.Other() {
		return nil
	}
	return d.Account.take(path)
}

func (d *domain) regain(path string) error {
	if !d.Account.Other() {
		return nil
	}
	return own().take(path)
}

// ask calls libvirt.
func (d *domain) ask(ctx context.Context, f func(library) error) error {
	return d.conns.do(ctx, d.URI, f, nil)
}

// maxConsole is the longest path of a socket in bytes.
const maxConsole = 107

func (d *domain) start(ctx context.Context, vm *VM, l line, on func(string), begin func(context.Context, *VM, *qmp) error) (err error) {
	d.conns.know(d.UUID, vm.dir)
	lock, err := lockStart(vm.dir)
	if err != nil {
		return fmt.Errorf("start domain: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.abandon(ctx, vm, err))
		}
		err = errors.Join(err, lock.Close())
	}()
	if err := d.admit(vm, &l); err != nil {
		return fmt.Errorf("start domain %s: %w", d.Name, err)
	}
	spec := domainSpec{
		name: d.Name, title: d.Title, uuid: d.UUID, emulator: d.Emulator, log: filepath.Join(vm.dir, serialLog),
		console: filepath.Join(vm.dir, serialSocket), account: d.Account, label: d.Label,
	}
	if len(spec.console) > maxConsole {
		spec.console = ""
	}
	xml, err := domainXML(l, spec)
	if err != nil {
		return err
	}
	if err := d.come(ctx, vm, l, xml); err != nil {
		return d.startError(err)
	}
	if l.incoming {
		on("qemu started")
	}
	if vm.procs.QEMU, err = d.identify(); err != nil {
		return err
	}
	if err := seeMemory(vm, l); err != nil {
		return err
	}
	return vm.monitor(ctx, func(c *qmp) error {
		if err := d.forward(ctx, vm, c); err != nil {
			return err
		}
		// Whoever finds this finds a VM that may run.
		if err := writeJSON(vm.dir, processFile, vm.procs); err != nil {
			return err
		}
		if l.incoming {
			on("state loaded")
		} else if err := c.execute(ctx, "cont", nil, nil); err != nil {
			return err
		}
		return begin(ctx, vm, c)
	})
}

// admit sees that QEMU can open all it is given, and gives it what is the VM's own.
func (d *domain) admit(vm *VM, l *line) error {
	files := []reach{{canRun, d.Emulator}, {canWrite, l.memory}}
	if l.incoming {
		l.backing, l.disk = vm.info.Disk, filepath.Join(vm.dir, topLayer)
		files = append(files, reach{canRead, l.backing})
	} else if err := d.lend(l.memory); err != nil {
		return err
	}
	if err := d.lend(l.disk); err != nil {
		return err
	}
	files = append(files, reach{canWrite, l.disk})
	for _, path := range []string{l.kernel, l.initrd} {
		if path != "" {
			files = append(files, reach{canRead, path})
		}
	}
	for _, f := range files {
		if err := d.Account.open(d.Dir, filepath.Dir(f.path)); err != nil {
			return err
		}
	}
	return d.Account.check(d.Emulator, files)
}

// come makes libvirt start QEMU, paused: booted, or restored from an image that is made here.
func (d *domain) come(ctx context.Context, vm *VM, l line, xml string) error {
	limit, cancel := context.WithTimeoutCause(ctx, startTimeout,
		fmt.Errorf("libvirt has not started it within %v: see the log of its daemon", startTimeout))
	defer cancel()
	err := d.demand(limit, vm, l, xml)
	if err != nil && ctx.Err() == nil && limit.Err() != nil {
		return fmt.Errorf("%w: %w", ErrNoLibvirt, context.Cause(limit))
	}
	return err
}

func (d *domain) demand(ctx context.Context, vm *VM, l line, xml string) error {
	if !l.incoming {
		return d.begin(ctx, func(lib library) error { return lib.create(xml) })
	}
	state, err := os.ReadFile(filepath.Join(vm.dir, resumeState))
	if err != nil {
		return err
	}
	image := filepath.Join(vm.dir, saveFile)
	if err := writeFile(image, func(f *os.File) error { return saveImage(f, xml, state) }); err != nil {
		return err
	}
	if err := d.begin(ctx, func(lib library) error { return lib.restore(image) }); err != nil {
		return err
	}
	return os.Remove(image)
}

// begin calls libvirt to start the domain. A call that was given up goes on: should it succeed
// after all, it ends the domain, of which nobody else knows.
func (d *domain) begin(ctx context.Context, f func(library) error) error {
	return d.ask(ctx, func(lib library) error {
		err := f(lib)
		if err == nil && ctx.Err() != nil {
			return errors.Join(ctx.Err(), lib.destroy(d.UUID, false))
		}
		return err
	})
}

// startError adds the remedy to an error of libvirt's where one is known.
func (d *domain) startError(err error) error {
	switch {
	case errors.Is(err, ErrNameTaken):
		return fmt.Errorf("start domain %s: %w: end that domain, or give another name", d.Name, err)
	case errors.Is(err, ErrNoLibvirt), errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("start domain %s: %w", d.Name, err)
	}
	if remedy := remedyFor(err.Error()); remedy != "" {
		return fmt.Errorf("start domain %s: %s (%w)", d.Name, remedy, err)
	}
	return fmt.Errorf("start domain %s: %w", d.Name, err)
}

// abandon ends a domain whose start went wrong, and writes down why there is none.
func (d *domain) abandon(ctx context.Context, vm *VM, cause error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanTimeout)
	defer cancel()
	err := writeJSON(vm.dir, exitFile, exitRecord{At: time.Now(), Code: -1, Error: cause.Error()})
	kerr := d.kill(ctx, vm)
	if errors.Is(cause, ErrNoLibvirt) && vm.procs.QEMU.PID == 0 {
		return err // it is no news that libvirt cannot be asked
	}
	if kerr != nil {
		return errors.Join(err, kerr)
	}
	return errors.Join(err, vm.procs.QEMU.wait(ctx))
}

// seeMemory makes sure that QEMU has mapped the VM's memory file, before the guest runs.
func seeMemory(vm *VM, l line) error {
	if l.incoming {
		if _, err := memoryRegions(vm.PID(), vm.info); err != nil {
			return fmt.Errorf("the guest's memory is not what it should be, so it was not let run: %w", err)
		}
		return nil
	}
	st, err := regularFile("memory", l.memory)
	if err != nil {
		return err
	}
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", vm.PID()))
	if err != nil {
		return fmt.Errorf("read memory map of QEMU: %w", err)
	}
	file := vmInfo{Memory: l.memory, Dev: st.Dev, Inode: st.Ino}
	for text := range strings.Lines(string(data)) {
		if f, is := mapping(strings.TrimSuffix(text, "\n"), file); is && strings.HasSuffix(f[1], "s") {
			return nil
		}
	}
	return fmt.Errorf("the guest's memory is not in %s, so it was not let run", l.memory)
}

// forward forwards ports, which libvirt cannot for QEMU's own network.
func (d *domain) forward(ctx context.Context, vm *VM, c *qmp) error {
	for _, f := range vm.info.Forwards {
		said, err := c.human(ctx, hostfwd(f))
		if err != nil {
			return err
		}
		if said = strings.TrimSpace(said); said != "" {
			return fmt.Errorf("start domain %s: %s (%s)", d.Name, portRemedy(f.Addr, strconv.Itoa(f.Host)), said)
		}
	}
	return vm.resolvePorts(ctx, c)
}

// find completes what is known of QEMU's process. A start whose process was killed may have
// left a domain of which nothing is written down: nobody has looked at its memory, nor forwarded
// its ports, and its guest has not run. It is ended.
func (d *domain) find(ctx context.Context, vm *VM) error {
	d.conns.know(d.UUID, vm.dir)
	err := pollUntil(ctx, func() (bool, error) {
		begins, err := startBegins(vm.dir)
		return !begins, err
	})
	if err != nil {
		return err
	}
	if vm.procs, err = readProcesses(vm.dir); err != nil || vm.procs.QEMU.PID != 0 {
		return err
	}
	if _, err := os.Lstat(filepath.Join(vm.dir, exitFile)); err == nil {
		return nil
	}
	active, err := d.active(ctx)
	if err != nil || !active {
		return err
	}
	if err := d.kill(ctx, vm); err != nil {
		return fmt.Errorf("end domain %s, whose start was killed: %w", d.Name, err)
	}
	return writeJSON(vm.dir, exitFile, exitRecord{At: time.Now(), Code: -1, Error: "the process that was starting it was killed"})
}

func (d *domain) active(ctx context.Context) (active bool, err error) {
	err = d.ask(ctx, func(lib library) (err error) {
		active, err = lib.active(d.UUID)
		return err
	})
	return active, err
}

// lost reports whether there may be a domain whose process is not known.
func (vm *VM) lost() bool { return vm.info.Domain != nil && vm.procs.QEMU.PID == 0 }

// identify finds QEMU's process by libvirt's file of its pid.
func (d *domain) identify() (process, error) {
	path := d.URI.pidFile(d.Name)
	text, err := os.ReadFile(path)
	if err != nil {
		return process{}, fmt.Errorf("find QEMU of domain %s: %w", d.Name, err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return process{}, fmt.Errorf("find QEMU of domain %s: %s: %w", d.Name, path, err)
	}
	p, err := identify(pid)
	if err != nil {
		return process{}, fmt.Errorf("find QEMU of domain %s: %w", d.Name, err)
	}
	args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return process{}, fmt.Errorf("find QEMU of domain %s: %w", d.Name, err)
	}
	if !slices.Contains(strings.Split(string(args), "\x00"), d.UUID) {
		return process{}, fmt.Errorf("find QEMU of domain %s: process %d of %s is another", d.Name, pid, path)
	}
	return p, nil
}

// killGrace is how long libvirt may take to end QEMU before it is killed.
const killGrace = 3 * time.Second

// kill asks libvirt, so that it tells others of a domain that was destroyed. Where libvirt is
// not there QEMU is killed, and libvirt will see it.
func (d *domain) kill(ctx context.Context, vm *VM) error {
	limit, cancel := context.WithTimeout(ctx, killGrace)
	defer cancel()
	if vm.procs.QEMU.PID == 0 {
		// A start that libvirt has only begun finds nothing to start with. No guest wrote to these.
		for _, name := range []string{saveFile, topLayer} {
			if err := os.Remove(filepath.Join(vm.dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
	}
	err := d.destroy(limit, vm, false)
	if vm.procs.QEMU.PID == 0 {
		return err
	}
	return vm.procs.QEMU.signal(unix.SIGKILL)
}

// quit lets QEMU end in order: libvirt sends it SIGTERM.
func (d *domain) quit(ctx context.Context, vm *VM) error { return d.destroy(ctx, vm, true) }

// destroy returns once QEMU is gone, which libvirt looks for five times a second, or libvirt
// has given up.
func (d *domain) destroy(ctx context.Context, vm *VM, graceful bool) error {
	until, cancel := context.WithCancel(ctx)
	defer cancel()
	gone := make(chan bool, 1)
	if vm.procs.QEMU.PID == 0 {
		gone <- false
	} else {
		go func() { // ends with QEMU or with this call
			err := vm.procs.QEMU.wait(until)
			gone <- err == nil
			cancel()
		}()
	}
	err := d.ask(until, func(lib library) error { return lib.destroy(d.UUID, graceful) })
	cancel()
	if <-gone || errors.Is(err, errNoDomain) || errors.Is(err, errNotRunning) {
		return nil
	}
	return err
}

// connect waits until another client has left: there is one at a time, as with a monitor of
// ours, so that nobody sees the middle of an operation of others.
func (d *domain) connect(ctx context.Context, vm *VM) (*qmp, error) {
	lock, err := os.OpenFile(filepath.Join(vm.dir, monitorLock), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock monitor: %w", err)
	}
	err = pollUntil(ctx, func() (bool, error) {
		err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) {
			return false, nil
		}
		return true, err
	})
	if err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return &qmp{transport: &passage{d: d, lock: lock, turn: make(chan struct{}, 1)}, folder: vm.dir}, nil
}

// passage is a monitor through libvirt.
type passage struct {
	d    *domain
	turn chan struct{} // holds a value while a command is under way, even if it was given up

	mu   sync.Mutex
	lock *os.File // free for the next client once it is closed
}

func (p *passage) executeFD(ctx context.Context, command string, args, out any, f *os.File) error {
	text, err := json.Marshal(request{Execute: command, Arguments: args})
	if err != nil {
		return fmt.Errorf("encode monitor command %s: %w", command, err)
	}
	if f != nil { // the caller may close it while libvirt still works
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("monitor command %s: %w", command, err)
		}
		f = os.NewFile(uintptr(fd), f.Name())
	}
	done := func() {
		if f != nil {
			_ = f.Close() // libvirt has its own
		}
		<-p.turn
	}
	select {
	case p.turn <- struct{}{}:
	case <-ctx.Done():
		if f != nil {
			_ = f.Close()
		}
		return fmt.Errorf("monitor command %s: %w", command, ctx.Err())
	}
	var said string
	err = p.d.conns.do(ctx, p.d.URI, func(lib library) (err error) {
		said, err = lib.command(p.d.UUID, string(text), f)
		return err
	}, done)
	if errors.Is(err, errNoDomain) || errors.Is(err, errNotRunning) {
		err = fmt.Errorf("%w: %w", errMonitor, err)
	}
	if err != nil {
		return fmt.Errorf("monitor command %s: %w", command, err)
	}
	var m message
	if err := json.Unmarshal([]byte(said), &m); err != nil {
		// The id is libvirt's, a string.
		var other struct {
			Return json.RawMessage `json:"return"`
			Error  json.RawMessage `json:"error"`
		}
		if err := json.Unmarshal([]byte(said), &other); err != nil {
			return fmt.Errorf("monitor command %s: parse answer: %w", command, err)
		}
		m = message{Return: other.Return}
		if other.Error != nil {
			if err := json.Unmarshal(other.Error, &m.Error); err != nil {
				return fmt.Errorf("monitor command %s: parse answer: %w", command, err)
			}
		}
	}
	return m.into(command, out)
}

// close lets the next client in, once a command that was given up has ended.
func (p *passage) close() error {
	p.mu.Lock()
	lock := p.lock
	p.lock = nil
	p.mu.Unlock()
	if lock == nil {
		return nil
	}
	select {
	case p.turn <- struct{}{}:
		return lock.Close()
	default:
	}
	p.d.conns.calls.Go(func() {
		p.turn <- struct{}{}
		_ = lock.Close() // opened for its lock only
	})
	return nil
}
