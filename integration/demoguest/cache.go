package demoguest

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// SetCache brings the files of the folders into the page cache, or without folders makes
// the host forget all clean pages.
func SetCache(folders []string) error {
	if folders == nil {
		unix.Sync()
		return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
	}
	for _, dir := range folders {
		err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
			if err != nil || !e.Type().IsRegular() {
				return err
			}
			return touch(path)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// touch reads a file's data, its holes left out.
func touch(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	for off := int64(0); ; {
		data, err := f.Seek(off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		if err != nil {
			return err
		}
		n, err := f.ReadAt(buf, data)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		off = data + int64(n)
	}
}
