package vmm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// process identifies a process for ever: a pid alone is used again, and start times begin
// anew with each boot of the host.
type process struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks since the host's boot
	Boot  string `json:"boot"`  // the host's boot id
}

// identify returns the identity of a living process.
func identify(pid int) (process, error) {
	start, _, err := readStat(pid)
	if err != nil {
		return process{}, err
	}
	boot, err := bootID()
	return process{PID: pid, Start: start, Boot: boot}, err
}

func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read boot id: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// readStat returns the start time and the state letter of a process.
func readStat(pid int) (start uint64, state byte, err error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0, fmt.Errorf("identify process %d: %w", pid, err)
	}
	return parseStat(string(data))
}

// parseStat reads a line of /proc/PID/stat. The command name in parentheses may itself hold
// parentheses and blanks, so fields are counted from the last closing one.
func parseStat(s string) (start uint64, state byte, err error) {
	i := strings.LastIndexByte(s, ')')
	fields := strings.Fields(s[i+1:])
	if i < 0 || len(fields) < 20 || len(fields[0]) != 1 {
		return 0, 0, fmt.Errorf("parse process status %.80q: too few fields", s)
	}
	start, err = strconv.ParseUint(fields[19], 10, 64)
	if err != nil {
		return 0, 0, fmt.Errorf("parse process status: %w", err)
	}
	return start, fields[0][0], nil
}

// errGone means that a process has ended.
var errGone = errors.New("the process has ended")

// open returns a pidfd of the process, or errGone. The start time is read after the pidfd
// was opened, so the descriptor cannot mean another process.
func (p process) open() (int, error) {
	if p.PID <= 1 {
		return -1, errGone
	}
	boot, err := bootID()
	if err != nil {
		return -1, err
	}
	if boot != p.Boot {
		return -1, errGone
	}
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return -1, errGone
	}
	if err != nil {
		return -1, fmt.Errorf("open process %d: %w", p.PID, err)
	}
	start, state, err := readStat(p.PID)
	if err == nil && start == p.Start && state != 'Z' && state != 'X' {
		return fd, nil
	}
	_ = unix.Close(fd)
	if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ESRCH) {
		return -1, err
	}
	return -1, errGone
}

// alive reports whether the process runs.
func (p process) alive() (bool, error) {
	fd, err := p.open()
	if errors.Is(err, errGone) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, unix.Close(fd)
}

// signal sends a signal; a process that has ended is no error.
func (p process) signal(s unix.Signal) error {
	fd, err := p.open()
	if errors.Is(err, errGone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, s, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("signal process %d: %w", p.PID, err)
	}
	return nil
}

// wait returns nil once the process has ended, or ctx's error.
func (p process) wait(ctx context.Context) error {
	fd, err := p.open()
	if errors.Is(err, errGone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	wake, stop, err := wakeup(ctx)
	if err != nil {
		return err
	}
	defer stop()
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(wake), Events: unix.POLLIN}}
	for {
		_, err := unix.Poll(fds, -1)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("wait for process %d: %w", p.PID, err)
		case fds[0].Revents != 0:
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		}
	}
}

// wakeup returns a descriptor that becomes readable when ctx ends; stop releases it.
func wakeup(ctx context.Context) (fd int, stop func(), err error) {
	fd, err = unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return -1, nil, fmt.Errorf("make event: %w", err)
	}
	fired := make(chan struct{})
	cancel := context.AfterFunc(ctx, func() {
		defer close(fired)
		_, _ = unix.Write(fd, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	})
	return fd, func() {
		if !cancel() {
			<-fired
		}
		_ = unix.Close(fd)
	}, nil
}
