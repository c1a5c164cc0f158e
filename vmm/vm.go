package vmm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ErrEnded means that the VM has ended; the error that wraps it says how.
var ErrEnded = errors.New("the VM has ended")

// VM is a virtual machine in a folder, running or ended. Its methods may be called from any
// process, and concurrently.
type VM struct {
	q     *QEMU
	dir   string
	info  vmInfo
	procs processes

	// Set in the process that started the VM only.
	launcher *os.Process
	reaped   chan struct{} // closed when the launcher was reaped
}

// Status is what a VM does at the moment.
type Status struct {
	State  string `json:"state"` // "running", "paused", "io-error", "guest-panicked" or "ended"
	Reason string `json:"reason,omitempty"`
	Reset  bool   `json:"reset,omitempty"` // paused, and reset since: it boots when it is continued
}

// The states of a VM.
const (
	Running       = "running"
	Paused        = "paused"
	IOError       = "io-error"
	GuestPanicked = "guest-panicked"
	Ended         = "ended"
)

// Adopt finds a VM again from its folder, whoever started it. A VM that has ended is
// returned as well; its Wait says how it ended. A VM that was left stopped by a capture, or
// without part of its memory by DropFree, whose process was killed, runs again and has all of
// it; where libvirt cannot be asked now, with the next Adopt.
func (q *QEMU) Adopt(ctx context.Context, dir string) (*VM, error) {
	vm, err := q.find(ctx, dir)
	if err != nil {
		return nil, fmt.Errorf("adopt VM: %w", err)
	}
	errs := []error{vm.adoptPorts(ctx)}
	for _, err := range []error{vm.recoverCapture(ctx), vm.recoverBalloon(ctx)} {
		if !errors.Is(err, ErrNoLibvirt) { // which Status says, too
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("adopt VM: %w", err)
	}
	return vm, nil
}

// DestroyIn kills the VM of a folder, at whatever step of its start, and waits until it is
// gone. A folder without a VM, and a VM that has ended, are no error.
func (q *QEMU) DestroyIn(ctx context.Context, dir string) error {
	vm, err := q.find(ctx, dir)
	if errors.Is(err, errNoVM) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("destroy VM: %w", err)
	}
	return vm.Destroy(ctx)
}

// errNoVM means that a folder never held a VM that was started.
var errNoVM = errors.New("it holds none")

// find reads the folder of a VM. It waits for a launcher that was started and has not yet
// told of its QEMU, but needs no QEMU that answers.
func (q *QEMU) find(ctx context.Context, dir string) (*VM, error) {
	dir, err := absolute("folder", dir)
	if err != nil {
		return nil, err
	}
	vm := &VM{q: q, dir: dir}
	err = readJSON(dir, vmFile, &vm.info)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("folder %s: %w: %w", dir, errNoVM, err)
	}
	if err != nil {
		return nil, err
	}
	if v := vm.info.Version; v != 1 && v != 2 || (v == 2) != (vm.info.Domain != nil) {
		return nil, fmt.Errorf("%s has version %d, this program knows 1 and 2: use a newer program", vmFile, vm.info.Version)
	}
	if err := vm.info.Machine.Validate(); err != nil {
		return nil, err
	}
	if err := vm.driver().find(ctx, vm); err != nil {
		return nil, err
	}
	return vm, nil
}

// readProcesses reads what the launcher wrote about itself and QEMU; nothing yet is no
// error.
func readProcesses(dir string) (processes, error) {
	var p processes
	if err := readJSON(dir, processFile, &p); err != nil && !errors.Is(err, os.ErrNotExist) {
		return p, err
	}
	return p, nil
}

// Dir returns the VM's folder.
func (vm *VM) Dir() string { return vm.dir }

// PID returns QEMU's process id, 0 if it was never started. The process may have ended.
func (vm *VM) PID() int { return vm.procs.QEMU.PID }

// Machine returns the VM's configuration.
func (vm *VM) Machine() Machine { return vm.info.Machine }

// Forwards returns the forwarded ports, with the ports that are really bound.
func (vm *VM) Forwards() []Forward { return slices.Clone(vm.info.Forwards) }

// statusTimeout bounds Status: a QEMU that waits for a page with its main loop answers
// nobody.
const statusTimeout = 10 * time.Second

// Status returns what the VM does. It is an error if QEMU lives and does not answer.
func (vm *VM) Status(ctx context.Context) (Status, error) {
	limit, cancel := context.WithTimeoutCause(ctx, statusTimeout,
		fmt.Errorf("QEMU did not answer within %v: it may be waiting for a page of its memory or for another client", statusTimeout))
	defer cancel()
	var state string
	err := vm.monitor(limit, func(c *qmp) (err error) {
		state, err = c.runState(limit)
		return err
	})
	switch {
	case errors.Is(err, ErrEnded):
		exit, err := vm.Wait(ctx)
		return Status{State: Ended, Reason: exit.Reason}, err
	case err != nil && limit.Err() != nil:
		return Status{}, fmt.Errorf("ask for status of VM: %w", context.Cause(limit))
	case err != nil:
		return Status{}, fmt.Errorf("ask for status of VM: %w", err)
	}
	return statusOf(state), nil
}

// statusOf translates QEMU's run states.
func statusOf(state string) Status {
	switch state {
	case "running":
		return Status{State: Running}
	case "paused":
		return Status{State: Paused}
	case "io-error":
		return Status{State: IOError, Reason: "a disk request failed and the VM was stopped: continue it to try again"}
	case "guest-panicked":
		return Status{State: GuestPanicked, Reason: "the guest's kernel has panicked"}
	case "internal-error":
		return Status{State: Paused, Reason: "QEMU stopped the VM: internal error of its accelerator: use --accel tcg"}
	case "prelaunch":
		return Status{State: Paused, Reason: "it was reset while it was paused: it boots when it is continued", Reset: true}
	case "inmigrate":
		return Status{State: Paused, Reason: "the VM's state is not loaded"}
	}
	return Status{State: Paused, Reason: "QEMU is in state " + state}
}

// Pause stops the VM's CPUs and flushes its disk. It can take as long as a page of memory
// that a CPU waits for.
func (vm *VM) Pause(ctx context.Context) error { return vm.simple(ctx, "pause", "stop") }

// Continue lets a paused VM run, and one in state "io-error" try again.
func (vm *VM) Continue(ctx context.Context) error { return vm.simple(ctx, "continue", "cont") }

// Reset resets the guest as its reset button would.
func (vm *VM) Reset(ctx context.Context) error { return vm.simple(ctx, "reset", "system_reset") }

func (vm *VM) simple(ctx context.Context, verb, command string) error {
	if err := vm.Monitor(ctx, command, nil, nil); err != nil {
		return fmt.Errorf("%s VM: %w", verb, err)
	}
	return nil
}

// Monitor runs one command of QEMU's monitor (QMP) and decodes its answer into out, unless
// that is nil. It returns a *QMPError if QEMU refuses, an error that wraps ErrEnded if the
// VM has ended.
func (vm *VM) Monitor(ctx context.Context, command string, args any, out any) error {
	return vm.monitor(ctx, func(c *qmp) error { return c.execute(ctx, command, args, out) })
}

// monitor connects to the monitor for the time of f. A connection that breaks because the
// VM has ended becomes an error that wraps ErrEnded.
func (vm *VM) monitor(ctx context.Context, f func(c *qmp) error) error {
	err := vm.check()
	if err != nil {
		return vm.endedError(ctx, err)
	}
	c, err := vm.driver().connect(ctx, vm)
	if err == nil {
		defer c.close()
		err = f(c)
	}
	return vm.orEnded(ctx, err)
}

// orEnded returns an error that wraps ErrEnded in the place of one that came of the VM's end.
func (vm *VM) orEnded(ctx context.Context, err error) error {
	if err == nil || ctx.Err() != nil {
		return err
	}
	var refused *QMPError
	if errors.As(err, &refused) || errors.Is(err, ErrEnded) {
		return err
	}
	// The monitor closes a little before the process is gone.
	wait, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	if vm.procs.QEMU.wait(wait) == nil {
		return vm.endedError(ctx, errGone)
	}
	return err
}

// check returns errGone if QEMU is not there.
func (vm *VM) check() error {
	alive, err := vm.procs.QEMU.alive()
	if err == nil && !alive {
		return errGone
	}
	return err
}

func (vm *VM) endedError(ctx context.Context, err error) error {
	if !errors.Is(err, errGone) {
		return err
	}
	exit, err := vm.Wait(ctx)
	if err != nil {
		return err
	}
	return fmt.Errorf("%w: %s", ErrEnded, exit.Reason)
}

// Destroy kills the VM and waits until it is gone. Its folder stays. A VM that has ended is
// no error.
func (vm *VM) Destroy(ctx context.Context) error {
	alive, err := vm.procs.QEMU.alive()
	if err != nil {
		return fmt.Errorf("destroy VM: %w", err)
	}
	if alive || vm.lost() {
		// On a full disk the VM ends without the note: its end is what makes room.
		if err := vm.announce("destroy"); err != nil && !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
			return fmt.Errorf("destroy VM: %w", err)
		}
		if err := vm.driver().kill(ctx, vm); err != nil {
			return fmt.Errorf("destroy VM: %w", err)
		}
	}
	if _, err := vm.Wait(ctx); err != nil {
		return fmt.Errorf("destroy VM: QEMU (pid %d) is not gone: it may be held by a page of its memory; abort the mount: %w", vm.PID(), err)
	}
	return nil
}

// quitGrace is the time that QEMU has to flush and close its disk.
const quitGrace = 10 * time.Second

// Quit ends the VM in order, its disk flushed, and by force if that takes more than ten
// seconds. It waits until the VM is gone; one that has ended is no error.
func (vm *VM) Quit(ctx context.Context) error {
	err := vm.quit(ctx)
	if err == nil || ctx.Err() != nil {
		return err
	}
	return vm.Destroy(ctx)
}

// quit ends the VM in order or returns an error.
func (vm *VM) quit(ctx context.Context) error {
	limit, cancel := context.WithTimeout(ctx, quitGrace)
	defer cancel()
	if err := vm.announce("quit"); err != nil {
		return fmt.Errorf("quit VM: %w", err)
	}
	err := vm.driver().quit(limit, vm)
	if err != nil && !errors.Is(err, ErrEnded) {
		return fmt.Errorf("quit VM: %w", err)
	}
	if _, err := vm.Wait(limit); err != nil {
		return fmt.Errorf("quit VM: %w", err)
	}
	return nil
}

// resolvePorts asks which ports were bound where a free one was asked for.
func (vm *VM) resolvePorts(ctx context.Context, c *qmp) error {
	if !slices.ContainsFunc(vm.info.Forwards, func(f Forward) bool { return f.Host == 0 }) {
		return nil
	}
	text, err := c.human(ctx, "info usernet")
	if err != nil {
		return err
	}
	if err := bindPorts(vm.info.Forwards, text); err != nil {
		return err
	}
	return writeJSON(vm.dir, vmFile, vm.info)
}

// adoptPorts completes the ports of a VM whose starter did not live to do it.
func (vm *VM) adoptPorts(ctx context.Context) error {
	if !slices.ContainsFunc(vm.info.Forwards, func(f Forward) bool { return f.Host == 0 }) {
		return nil
	}
	err := vm.monitor(ctx, func(c *qmp) error { return vm.resolvePorts(ctx, c) })
	if errors.Is(err, ErrEnded) {
		return nil
	}
	return err
}

// hostForward matches a listening port in QEMU's "info usernet":
//
//	TCP[HOST_FORWARD]  13       127.0.0.1 35333       10.0.2.15  8080
var hostForward = regexp.MustCompile(`^\s*TCP\[HOST_FORWARD\]\s+\d+\s+(\S+)\s+(\d+)\s+\S+\s+(\d+)`)

// bindPorts fills in the host ports that are 0. Forwards to the same guest port are told
// apart by order; QEMU lists the latest first.
func bindPorts(fs []Forward, text string) error {
	taken := make(map[int]bool)
	for _, f := range fs {
		taken[f.Host] = f.Host != 0
	}
	lines := strings.Split(text, "\n")
	slices.Reverse(lines)
	for i := range fs {
		if fs[i].Host != 0 {
			continue
		}
		for _, l := range lines {
			m := hostForward.FindStringSubmatch(l)
			if m == nil || (m[1] != fs[i].Addr && !(m[1] == "*" && fs[i].Addr == "0.0.0.0")) || m[3] != strconv.Itoa(fs[i].Guest) {
				continue
			}
			port, err := strconv.Atoi(m[2])
			if err == nil && port > 0 && port < 1<<16 && !taken[port] {
				fs[i].Host, taken[port] = port, true
				break
			}
		}
		if fs[i].Host == 0 {
			return fmt.Errorf("find port forwarded to %d: QEMU does not list it: %.200q", fs[i].Guest, text)
		}
	}
	return nil
}
