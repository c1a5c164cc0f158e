package fusefs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

const fusectlDir = "/sys/fs/fuse/connections"

// maxStacked bounds how many mounts above each other AbortConnection clears.
const maxStacked = 16

// AbortConnection frees everybody who waits for the cloudlet mount at mountpoint and
// removes it, for the time when its process is dead or stuck. It does not touch the mount
// itself, which could hang. Where nothing is mounted it does nothing. Whoever still has the
// files mapped gets SIGBUS at the next missing page.
func AbortConnection(mountpoint string) error {
	point, err := resolvePoint(mountpoint)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for range maxStacked {
		m, found, err := findMount(point)
		if err != nil || !found {
			return err
		}
		if !m.isOurs() {
			return fmt.Errorf("abort %s: is of type %s, not fuse.%s", point, m.kind, fsSubtype)
		}
		// A failed abort does not keep the mount from being removed.
		abortErr := abortConnection(m)
		if err := errors.Join(abortErr, detach(point, true)); err != nil {
			return err
		}
	}
	return fmt.Errorf("abort %s: more than %d mounts above each other", point, maxStacked)
}

// abortConnection tells the kernel to fail every request of m's connection, now and later.
func abortConnection(m mountEntry) error {
	folder := filepath.Join(fusectlDir, m.connection())
	f, err := os.OpenFile(filepath.Join(folder, "abort"), os.O_WRONLY, 0)
	if errors.Is(err, os.ErrNotExist) {
		_, mounted, tableErr := findMount(fusectlDir)
		if tableErr != nil {
			return tableErr
		}
		if mounted {
			return nil // the connection has ended already
		}
		if err := unix.Mount("fusectl", fusectlDir, "fusectl", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount fusectl on %s: %w: as root, `mount -t fusectl fusectl %[1]s`", fusectlDir, err)
		}
		f, err = os.OpenFile(filepath.Join(folder, "abort"), os.O_WRONLY, 0)
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("abort FUSE connection %s: %w", m.connection(), err)
	}
	if _, err := f.WriteString("1"); err != nil {
		return errors.Join(fmt.Errorf("abort FUSE connection %s: %w", m.connection(), err), f.Close())
	}
	return f.Close()
}
