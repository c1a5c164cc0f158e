package cloudlets

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Leftovers lists mounts and processes of the store in a folder, and files in the parts of it
// that are empty when nothing runs.
func Leftovers(state string) []string {
	var left []string
	mounts, err := mountsBelow(state)
	if err != nil {
		left = append(left, err.Error())
	}
	for _, m := range mounts {
		left = append(left, "mount "+m)
	}
	for pid, what := range Processes(state) {
		left = append(left, fmt.Sprintf("process %d: %s", pid, what))
	}
	for _, sub := range []string{"instances", "mounts", "tmp"} {
		entries, err := os.ReadDir(filepath.Join(state, sub))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			left = append(left, err.Error())
		}
		for _, e := range entries {
			left = append(left, filepath.Join(sub, e.Name()))
		}
	}
	return left
}

// Processes lists the living processes, apart from this one, whose command line or working
// folder names a folder.
func Processes(dir string) map[int]string {
	out := map[int]string{}
	dirs, _ := filepath.Glob("/proc/[0-9]*") // the pattern is right
	for _, proc := range dirs {
		var pid int
		if _, err := fmt.Sscanf(proc, "/proc/%d", &pid); err != nil || pid == os.Getpid() {
			continue
		}
		args, err := os.ReadFile(proc + "/cmdline")
		if err != nil || len(args) == 0 {
			continue // ended since, or a kernel thread or zombie
		}
		cwd, err := os.Readlink(proc + "/cwd")
		if err != nil {
			cwd = "nowhere" // it ends
		}
		if what := strings.ReplaceAll(string(args), "\x00", " ") + " in " + cwd; strings.Contains(what, dir) {
			out[pid] = what
		}
	}
	return out
}

// mountsBelow lists the mount points below a folder, the last mounted first.
func mountsBelow(dir string) ([]string, error) {
	text, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return nil, err
	}
	var list []string
	for _, line := range strings.Split(string(text), "\n") {
		if f := strings.Fields(line); len(f) > 1 && strings.HasPrefix(f[1], dir+"/") {
			list = append([]string{f[1]}, list...)
		}
	}
	return list, nil
}

// sweepBound is how long killed processes may take to go.
const sweepBound = 10 * time.Second

// sweep kills the program's and QEMU's processes that work below a folder, and unmounts what is
// mounted there: the last resort.
func sweep(ctx context.Context, program, dir string) error {
	ctx, cancel := context.WithTimeout(ctx, sweepBound)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		ours := 0
		for pid := range Processes(dir + "/") {
			exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
			if exe = strings.TrimSuffix(exe, " (deleted)"); err != nil || exe != program && !strings.HasPrefix(filepath.Base(exe), "qemu-") {
				continue
			}
			ours++
			if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("kill process %d: %w", pid, err)
			}
		}
		if ours == 0 {
			break
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("%d killed processes below %s do not end", ours, dir)
		}
	}
	mounts, err := mountsBelow(dir)
	for _, m := range mounts {
		err = errors.Join(err, unix.Unmount(m, unix.MNT_DETACH))
	}
	return err
}
