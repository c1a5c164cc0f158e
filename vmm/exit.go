package vmm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"regexp"
	"strings"
	"time"
)

// Exit is how a VM has ended.
type Exit struct {
	At     time.Time `json:"at"`               // zero if not known
	Code   int       `json:"code"`             // QEMU's exit code, -1 if a signal ended it or it is not known
	Signal string    `json:"signal,omitempty"` // "SIGBUS"
	Reason string    `json:"reason"`           // a sentence
	Stderr string    `json:"stderr,omitempty"` // the end of QEMU's standard error
}

// ending is what somebody asked for before the VM ended.
type ending struct {
	Verb string    `json:"verb"` // "destroy", "quit" or "save"
	At   time.Time `json:"at"`
}

// announce records that the VM's end is wanted, so that whoever asks later does not read of
// an accident.
func (vm *VM) announce(verb string) error {
	return writeJSON(vm.dir, endingFile, ending{Verb: verb, At: time.Now()})
}

// recordGrace bounds the launcher's way from QEMU's end to its record.
const recordGrace = 10 * time.Second

// Wait waits until the VM has ended and returns how. A VM that ended long ago is answered
// from its folder.
func (vm *VM) Wait(ctx context.Context) (Exit, error) {
	if err := vm.procs.QEMU.wait(ctx); err != nil {
		return Exit{}, fmt.Errorf("wait for VM: %w", err)
	}
	return vm.driver().exit(ctx, vm)
}

// exit reads how the VM ended from its folder.
func (vm *VM) exit() (Exit, error) {
	var rec exitRecord
	var want ending
	if err := readJSON(vm.dir, endingFile, &want); err != nil && !errors.Is(err, os.ErrNotExist) {
		return Exit{}, err
	}
	err := readJSON(vm.dir, exitFile, &rec)
	if errors.Is(err, os.ErrNotExist) {
		return unknownExit(vm.procs, want, stderrTail(vm.dir)), nil
	}
	if err != nil {
		return Exit{}, err
	}
	return exitOf(rec, want), nil
}

// unknownExit is the exit of a VM whose launcher left no record.
func unknownExit(p processes, want ending, stderr string) Exit {
	e := Exit{Code: -1, Stderr: stderr}
	boot, err := bootID()
	switch {
	case p.QEMU.PID == 0:
		e.Reason = "QEMU was never started: the launcher was killed before it"
	case err == nil && boot != p.QEMU.Boot:
		e.Reason = "the host was restarted while the VM ran"
	case want.Verb != "":
		e.Reason = "QEMU was ended on request (" + want.Verb + "); the launcher was killed, so its exit code is not known"
	default:
		e.Reason = "the launcher was killed, so how QEMU ended is not known"
	}
	return e
}

// exitOf puts an exit record into words.
func exitOf(rec exitRecord, want ending) Exit {
	e := Exit{At: rec.At, Code: rec.Code, Signal: rec.Signal, Stderr: rec.Stderr}
	lastLine := rec.Stderr[strings.LastIndexByte(rec.Stderr, '\n')+1:]
	switch {
	case rec.Reason != "":
		e.Reason = rec.Reason
	case rec.Error != "":
		e.Reason = "QEMU was not started: " + rec.Error
	case rec.Signal == "SIGKILL" && want.Verb != "":
		e.Reason = "QEMU was killed on request (" + want.Verb + ")"
	case rec.Signal == "SIGKILL":
		e.Reason = "QEMU was killed by SIGKILL: by somebody, or by the kernel for want of memory"
	case rec.Signal == "SIGBUS":
		e.Reason = "QEMU was killed by SIGBUS: a page of its memory could not be read; the mount that serves it failed or has ended"
	case rec.Signal != "":
		e.Reason = "QEMU was killed by " + rec.Signal
	case rec.Code == 0 && want.Verb != "":
		e.Reason = "QEMU ended on request (" + want.Verb + ")"
	case rec.Code == 0 && strings.Contains(rec.Stderr, "terminating on signal"):
		e.Reason = "QEMU was told to end: " + lastLine
	case rec.Code == 0:
		e.Reason = "the guest powered off"
	default:
		e.Reason = fmt.Sprintf("QEMU ended with code %d", rec.Code)
	}
	if rec.Code > 0 && lastLine != "" {
		e.Reason += ": " + lastLine
	}
	return e
}

// startError is the error of a QEMU that ended before it was of use, with the remedy where
// one is known.
func (vm *VM) startError() error {
	var rec exitRecord
	if err := readJSON(vm.dir, exitFile, &rec); err != nil {
		var said string
		if data, err := os.ReadFile(vm.dir + "/" + launcherLog); err == nil {
			said = ": " + tail(string(data), 500)
		}
		return fmt.Errorf("start QEMU: the launcher ended without a record%s", said)
	}
	if rec.Error != "" {
		return fmt.Errorf("start QEMU: %s", rec.Error)
	}
	how := fmt.Sprintf("exit code %d", rec.Code)
	if rec.Signal != "" {
		how = "killed by " + rec.Signal
	}
	if remedy := remedyFor(rec.Stderr); remedy != "" {
		return fmt.Errorf("start QEMU: %s (%s: %s)", remedy, how, tail(rec.Stderr, 1000))
	}
	return fmt.Errorf("start QEMU: %s: %s", how, tail(rec.Stderr, 1000))
}

var badForward = regexp.MustCompile(`set up host forwarding rule 'tcp:([^:']*):(\d+)-`)

// remedyFor knows what helps against QEMU's most frequent complaints.
func remedyFor(stderr string) string {
	has := func(s string) bool { return strings.Contains(stderr, s) }
	switch m := badForward.FindStringSubmatch(stderr); {
	case m != nil:
		return portRemedy(m[1], m[2])
	case has("KVM"), has("kvm") && has("accel"):
		return "kvm cannot be used: use --accel tcg, or give access to /dev/kvm"
	case has("annot allocate memory"):
		return "there is not enough memory: give the VM less, or end other VMs"
	case has("\"write\" lock"), has("\"consistent read\" lock"):
		return "the disk is in use by another process: end that one first"
	case has("No space left"):
		return "the disk of this host is full: free some space"
	case has("Permission denied"):
		return "a file may not be opened: check its owner and mode"
	}
	return ""
}

// portRemedy says why a port cannot be had.
func portRemedy(addr, port string) string {
	l, err := net.Listen("tcp4", net.JoinHostPort(addr, port))
	if err == nil {
		_ = l.Close()
		return fmt.Sprintf("port %s:%s was in use: try again, or choose another with -p", addr, port)
	}
	if errors.Is(err, os.ErrPermission) {
		return fmt.Sprintf("port %s:%s may not be used by this user: choose one above 1023 with -p", addr, port)
	}
	return fmt.Sprintf("port %s:%s is in use or not on this host: choose another with -p", addr, port)
}
