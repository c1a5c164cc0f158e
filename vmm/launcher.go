package vmm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// launch is what the launcher is to start.
type launch struct {
	Argv []string `json:"argv"`
}

// processes is what is known about a VM's processes; QEMU's is zero until it was started.
type processes struct {
	Launcher process `json:"launcher"`
	QEMU     process `json:"qemu"`
}

// exitRecord is how QEMU ended, as its parent saw it.
type exitRecord struct {
	At     time.Time `json:"at"`
	Code   int       `json:"code"`
	Signal string    `json:"signal,omitempty"`
	Stderr string    `json:"stderr,omitempty"`
	Error  string    `json:"error,omitempty"`  // QEMU was not started
	Reason string    `json:"reason,omitempty"` // of libvirt, in a sentence
}

const (
	// maxStderr bounds the tail of QEMU's standard error that is kept, in bytes.
	maxStderr = 8 << 10
	// termGrace is the time that QEMU has to flush its disk after SIGTERM.
	termGrace = 3 * time.Second
)

// startFD is the lock of startFile as the launcher inherits it. It is held until the
// launcher can be found by processFile, whatever becomes of the process that started it.
const startFD = 3

// RunLauncher starts QEMU as launch.json in dir says, stays its parent, and records in dir
// how it ended. It returns the launcher's exit code: 0 once QEMU's end is recorded. The end
// of ctx or SIGTERM ends QEMU, first by SIGTERM; SIGHUP and SIGINT are ignored. It changes
// the whole process (umask, seccomp filter): call it only from a process of its own.
func RunLauncher(ctx context.Context, dir string) int {
	signal.Ignore(syscall.SIGHUP, syscall.SIGINT)
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM)
	defer stop()
	syscall.Umask(0o077)
	err := closeInherited()
	var rec exitRecord
	if err == nil {
		rec, err = runQEMU(ctx, dir)
	}
	if err != nil {
		rec = exitRecord{At: time.Now(), Code: -1, Error: err.Error(), Stderr: stderrTail(dir)}
	}
	if err := writeJSON(dir, exitFile, rec); err != nil {
		fmt.Fprintln(os.Stderr, "launcher:", err)
		return 1
	}
	return 0
}

// closeInherited closes the descriptors that somebody upstream left open by accident, so
// that a VM does not hold them for its lifetime. This process's own are all close-on-exec;
// startFD was passed on purpose.
func closeInherited() error {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return fmt.Errorf("list descriptors: %w", err)
	}
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil || fd <= startFD {
			continue
		}
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		if err != nil || flags&unix.FD_CLOEXEC != 0 {
			continue // the folder that was listed, or our own
		}
		if err := unix.Close(fd); err != nil {
			return fmt.Errorf("close descriptor %d: %w", fd, err)
		}
	}
	return nil
}

func runQEMU(ctx context.Context, dir string) (exitRecord, error) {
	var l launch
	if err := readJSON(dir, launchFile, &l); err != nil {
		return exitRecord{}, fmt.Errorf("read launch file: %w", err)
	}
	if len(l.Argv) == 0 {
		return exitRecord{}, errors.New("read launch file: no program is named")
	}
	self, err := identify(os.Getpid())
	if err != nil {
		return exitRecord{}, err
	}
	if err := writeJSON(dir, processFile, processes{Launcher: self}); err != nil {
		return exitRecord{}, err
	}
	if err := unix.Close(startFD); err != nil {
		return exitRecord{}, fmt.Errorf("release lock of start: %w", err)
	}
	stderr, err := os.OpenFile(filepath.Join(dir, stderrFile), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return exitRecord{}, fmt.Errorf("open QEMU's standard error: %w", err)
	}
	defer stderr.Close()
	if err := filterQEMU(l.Argv); err != nil {
		return exitRecord{}, err
	}
	if err := ctx.Err(); err != nil {
		return exitRecord{}, fmt.Errorf("start QEMU: %w", err)
	}
	cmd := exec.Command(l.Argv[0], l.Argv[1:]...)
	cmd.Dir = dir
	cmd.Stderr, cmd.Stdout = stderr, stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return exitRecord{}, fmt.Errorf("start QEMU: %w", err)
	}
	// The child is not reaped before Wait, so its pid still means it.
	qemu, err := identify(cmd.Process.Pid)
	if err == nil {
		err = writeJSON(dir, processFile, processes{Launcher: self, QEMU: qemu})
	}
	if err != nil {
		return exitRecord{}, errors.Join(err, cmd.Process.Kill(), waitQuietly(cmd))
	}
	terminated := context.AfterFunc(ctx, func() { terminate(context.WithoutCancel(ctx), qemu) })
	defer terminated()
	return recordOf(cmd.Wait(), cmd.ProcessState, dir)
}

// waitQuietly reaps a child that was killed.
func waitQuietly(cmd *exec.Cmd) error {
	var exit *exec.ExitError
	if err := cmd.Wait(); err != nil && !errors.As(err, &exit) {
		return err
	}
	return nil
}

// terminate ends QEMU in order, and by force if it does not follow.
func terminate(ctx context.Context, p process) {
	ctx, cancel := context.WithTimeout(ctx, termGrace)
	defer cancel()
	if p.signal(unix.SIGTERM) != nil || p.wait(ctx) != nil {
		_ = p.signal(unix.SIGKILL)
	}
}

func recordOf(err error, state *os.ProcessState, dir string) (exitRecord, error) {
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return exitRecord{}, fmt.Errorf("wait for QEMU: %w", err)
	}
	rec := exitRecord{At: time.Now(), Code: state.ExitCode(), Stderr: stderrTail(dir)}
	if ws, ok := state.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		rec.Signal = unix.SignalName(ws.Signal())
	}
	return rec, nil
}

// stderrTail returns the end of what QEMU wrote to its standard error.
func stderrTail(dir string) string {
	f, err := os.Open(filepath.Join(dir, stderrFile))
	if err != nil {
		return ""
	}
	defer f.Close()
	if fi, err := f.Stat(); err == nil && fi.Size() > maxStderr {
		if _, err := f.Seek(-maxStderr, io.SeekEnd); err != nil {
			return ""
		}
	}
	data, err := io.ReadAll(io.LimitReader(f, maxStderr))
	if err != nil {
		return ""
	}
	return tail(string(data), maxStderr)
}
