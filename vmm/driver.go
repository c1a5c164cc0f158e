package vmm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// driver is what differs between a QEMU that we start and one that libvirt starts. All else,
// from captures to the disk's layers, is done by QEMU's monitor and by its process.
type driver interface {
	// start starts QEMU and calls begin with its monitor: a booted VM runs by then, a resumed
	// one is paused with its state loaded. After an error nothing is left that runs. on is told
	// of the steps.
	start(ctx context.Context, vm *VM, l line, on func(string), begin func(context.Context, *VM, *qmp) error) error
	// connect opens the monitor, and waits until another client has left.
	connect(ctx context.Context, vm *VM) (*qmp, error)
	// find completes what is known of the VM's processes, once no start is under way.
	find(ctx context.Context, vm *VM) error
	// kill ends QEMU at once, quit in order. Both may return before it has ended.
	kill(ctx context.Context, vm *VM) error
	quit(ctx context.Context, vm *VM) error
	// exit says how QEMU has ended, after its process is gone.
	exit(ctx context.Context, vm *VM) (Exit, error)
	// folder is put before the names of files when QEMU is told of them.
	folder(vm *VM) string
	// lend gives a file, made if it is missing, to the user that QEMU runs as.
	lend(path string) error
	// regain takes back a file that was lent.
	regain(path string) error
}

// driver returns what the VM was started by.
func (vm *VM) driver() driver {
	if vm.info.Domain != nil {
		return &domain{*vm.info.Domain, &vm.q.conns}
	}
	return direct{}
}

// file returns the name by which QEMU is told of a file in the VM's folder.
func (vm *VM) file(name string) string { return filepath.Join(vm.driver().folder(vm), name) }

func (vm *VM) lend(path string) error { return vm.driver().lend(path) }

// direct is a QEMU that is the child of our launcher.
type direct struct{}

func (direct) folder(*VM) string { return "" }

func (direct) lend(string) error { return nil }

func (direct) regain(string) error { return nil }

func (direct) connect(ctx context.Context, vm *VM) (*qmp, error) { return dialQMP(ctx, vm.dir) }

func (direct) kill(_ context.Context, vm *VM) error { return vm.procs.QEMU.signal(unix.SIGKILL) }

func (direct) quit(ctx context.Context, vm *VM) error { return vm.Monitor(ctx, "quit", nil, nil) }

// find waits for a launcher that has just begun: it will tell of its QEMU in a moment.
func (direct) find(ctx context.Context, vm *VM) error {
	return pollUntil(ctx, func() (bool, error) {
		if begins, err := startBegins(vm.dir); begins || err != nil {
			return false, err
		}
		var err error
		vm.procs, err = readProcesses(vm.dir)
		if err != nil || vm.procs.QEMU.PID != 0 {
			return true, err
		}
		starting, err := vm.procs.Launcher.alive()
		return !starting, err
	})
}

func (direct) start(ctx context.Context, vm *VM, l line, on func(string), begin func(context.Context, *VM, *qmp) error) error {
	if len(vm.q.Launcher) == 0 {
		return errors.New("start VM: no launcher command is configured")
	}
	bin, err := vm.q.binary()
	if err != nil {
		return err
	}
	if err := writeJSON(vm.dir, launchFile, launch{Argv: append([]string{bin}, l.args()...)}); err != nil {
		return err
	}
	if err := vm.launch(); err != nil {
		return err
	}
	err = vm.come(ctx, func(ctx context.Context, vm *VM, c *qmp) error {
		if l.incoming {
			on("qemu started")
			if err := loadState(ctx, c, filepath.Join(vm.dir, resumeState)); err != nil {
				return err
			}
			on("state loaded")
		}
		return begin(ctx, vm, c)
	})
	if err != nil {
		return vm.abandon(ctx, err)
	}
	return nil
}

// exit waits for the launcher's record.
func (direct) exit(ctx context.Context, vm *VM) (Exit, error) {
	limit, cancel := context.WithTimeout(ctx, recordGrace)
	defer cancel()
	err := vm.procs.Launcher.wait(limit)
	if vm.reaped != nil && err == nil {
		select {
		case <-vm.reaped:
		case <-limit.Done():
		}
	}
	if ctx.Err() != nil {
		return Exit{}, fmt.Errorf("wait for VM: %w", ctx.Err())
	}
	return vm.exit()
}

// lockStart makes others wait that look for the VM: until the lock is free, a start is under
// way that can be found by nothing else.
func lockStart(dir string) (*os.File, error) {
	lock, err := os.OpenFile(filepath.Join(dir, startFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", lock.Name(), err), lock.Close())
	}
	return lock, nil
}

// startBegins reports whether a start is under way that has not yet told of a process.
func startBegins(dir string) (bool, error) {
	f, err := os.Open(filepath.Join(dir, startFile))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	err = unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return true, nil
	}
	return false, err
}

// loadState loads a device state into a QEMU that waits for one.
func loadState(ctx context.Context, c *qmp, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open device state: %w", err)
	}
	defer f.Close()
	if err := ignoreShared(ctx, c); err != nil {
		return err
	}
	if err := c.executeFD(ctx, "getfd", map[string]any{"fdname": "state"}, nil, f); err != nil {
		return err
	}
	if err := c.execute(ctx, "migrate-incoming", map[string]any{"uri": "fd:state"}, nil); err != nil {
		return err
	}
	return pollUntil(ctx, func() (bool, error) {
		s, err := c.runState(ctx)
		return s != "inmigrate", err
	})
}
