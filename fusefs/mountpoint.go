package fusefs

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// Errors that callers of Mount and Unmount tell apart with errors.Is.
var (
	// ErrBusy: files of the mount are open or mapped.
	ErrBusy = errors.New("mount is busy")
	// ErrMounted: the directory is a mountpoint already.
	ErrMounted = errors.New("already a mountpoint")
	// ErrUnavailable: this machine or user cannot mount FUSE file systems.
	ErrUnavailable = errors.New("FUSE is not available")
)

// statTimeout bounds the look at a mount that may not answer.
const statTimeout = time.Second

// resolvePoint makes dir absolute and resolves the links of its parent folders, as the
// mount table has it, without touching dir itself.
func resolvePoint(dir string) (string, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return "", fmt.Errorf("resolve mountpoint %s: %w", dir, err)
	}
	parent, err := filepath.EvalSymlinks(filepath.Dir(abs))
	if err != nil {
		return "", fmt.Errorf("resolve mountpoint %s: %w", dir, err)
	}
	return filepath.Join(parent, filepath.Base(abs)), nil
}

// checkPoint returns dir as the mount table will show it, or why it cannot be mounted on.
func checkPoint(dir string) (string, error) {
	if dir == "" {
		return "", errors.New("mountpoint is empty: name an empty directory")
	}
	point, err := resolvePoint(dir)
	if err == nil {
		err = checkUnmounted(point)
	}
	if err != nil {
		return "", err
	}
	info, err := os.Lstat(point)
	if err == nil && info.Mode()&os.ModeSymlink != 0 {
		if point, err = filepath.EvalSymlinks(point); err != nil {
			return "", fmt.Errorf("mountpoint %s: %w", dir, err)
		}
		if err := checkUnmounted(point); err != nil {
			return "", err
		}
		info, err = os.Lstat(point)
	}
	switch {
	case errors.Is(err, os.ErrNotExist):
		return "", fmt.Errorf("mountpoint %s: %w: create it with mkdir", dir, err)
	case err != nil:
		return "", fmt.Errorf("mountpoint %s: %w", dir, err)
	case !info.IsDir():
		return "", fmt.Errorf("mountpoint %s: %w: name an empty directory", dir, syscall.ENOTDIR)
	}
	d, err := os.Open(point)
	if err != nil {
		return "", fmt.Errorf("mountpoint %s: %w", dir, err)
	}
	defer d.Close()
	switch _, err := d.Readdirnames(1); {
	case err == nil:
		return "", fmt.Errorf("mountpoint %s: %w: name an empty directory", dir, syscall.ENOTEMPTY)
	case err != io.EOF:
		return "", fmt.Errorf("mountpoint %s: %w", dir, err)
	}
	return point, nil
}

func checkUnmounted(point string) error {
	m, found, err := findMount(point)
	if err != nil || !found {
		return err
	}
	what := fmt.Sprintf("mountpoint %s: %s (type %s, source %s)", point, "%w", m.kind, m.source)
	if m.isFUSE() {
		switch err := statBounded(point); {
		case errors.Is(err, syscall.ENOTCONN):
			return fmt.Errorf(what+" whose process has died: clear it with `umount -l %s` or `fusermount3 -uz %s`", ErrMounted, point, point)
		case errors.Is(err, os.ErrDeadlineExceeded):
			return fmt.Errorf(what+" that does not answer: end its process, then clear it with `umount -l %s`", ErrMounted, point)
		}
		return fmt.Errorf(what+": unmount it with `fusermount3 -u %s` or name another directory", ErrMounted, point)
	}
	return fmt.Errorf(what+": name another directory", ErrMounted)
}

// statBounded stats a foreign mount. If its server does not answer in time, the goroutine
// stays in the system call until that server ends or goes on.
func statBounded(path string) error {
	done := make(chan error, 1)
	go func() {
		_, err := os.Stat(path)
		done <- err
	}()
	timer := time.NewTimer(statTimeout)
	defer timer.Stop()
	select {
	case err := <-done:
		return err
	case <-timer.C:
		return os.ErrDeadlineExceeded
	}
}
