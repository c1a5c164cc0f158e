package main

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// writeSynced makes the file and returns when its bytes are on the disk.
func writeSynced(name string, write func(io.Writer) error) (err error) {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
	}()
	if err := write(f); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return f.Sync()
}

// hashFromDisk returns the SHA-256 of the file's bytes on the disk: it drops the cached
// ones first, else the answer would be about memory only.
func hashFromDisk(name string) (string, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close() // read only: nothing is lost
	if err := f.Sync(); err != nil {
		return "", err
	}
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return "", fmt.Errorf("drop cached pages of %s: %w", name, err)
	}
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", fmt.Errorf("read %s: %w", name, err)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// removeAndTrim removes the file and discards the free blocks of the file system at dir;
// it returns the number of bytes discarded.
func removeAndTrim(name, dir string) (uint64, error) {
	if err := os.Remove(name); err != nil {
		return 0, err
	}
	d, err := os.Open(dir)
	if err != nil {
		return 0, err
	}
	defer d.Close() // a folder: nothing is lost
	// Blocks of a removed file are free for the trim only after the journal's commit.
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return 0, fmt.Errorf("sync %s: %w", dir, err)
	}
	return trim(d)
}

// trim is the FITRIM ioctl, _IOWR('X', 121, struct fstrim_range).
func trim(d *os.File) (uint64, error) {
	const fitrim = 0xc0185879
	r := struct{ start, length, minimum uint64 }{length: 1<<64 - 1}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, d.Fd(), fitrim, uintptr(unsafe.Pointer(&r))); errno != 0 {
		return 0, fmt.Errorf("trim %s: %w", d.Name(), errno)
	}
	return r.length, nil
}
