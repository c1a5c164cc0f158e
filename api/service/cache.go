package service

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"cloudlet/overlay"

	"golang.org/x/sys/unix"
)

// openCache opens the file that keeps what was fetched of an overlay over a network, for one
// mount at a time; nil where there is nothing to keep or it is in use. Files not used for the
// longest are removed until what is left is within the limit.
func openCache(spec MountSpec, l link) (*os.File, error) {
	if spec.Cache == "" || spec.CacheLimit <= 0 || !isRemote(l.Source) {
		return nil, nil
	}
	if err := os.MkdirAll(spec.Cache, 0o700); err != nil {
		return nil, err
	}
	if err := trimCache(spec.Cache, spec.CacheLimit); err != nil {
		return nil, fmt.Errorf("cache of fetched overlays: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(spec.Cache, fmt.Sprintf("%s-%d", l.ID, l.Size)), os.O_CREATE|os.O_RDWR, 0o600)
	if errors.Is(err, unix.EROFS) || errors.Is(err, unix.ENOSPC) || errors.Is(err, fs.ErrPermission) {
		return nil, nil // a mount works without
	}
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, f.Close()
	}
	now := time.Now()
	if err := os.Chtimes(f.Name(), now, now); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// trimCache removes files of the cache that nobody uses, the oldest first, until at most limit
// bytes are taken.
func trimCache(dir string, limit int64) error {
	type kept struct {
		path  string
		bytes int64
		used  time.Time
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var files []kept
	var total int64
	for _, e := range entries {
		var st unix.Stat_t
		path := filepath.Join(dir, e.Name())
		if err := unix.Stat(path, &st); err != nil {
			continue // removed since
		}
		files = append(files, kept{path, st.Blocks * 512, time.Unix(st.Mtim.Unix())})
		total += st.Blocks * 512
	}
	slices.SortFunc(files, func(a, b kept) int { return cmp.Compare(a.used.UnixNano(), b.used.UnixNano()) })
	for _, f := range files {
		if total <= limit {
			return nil
		}
		l, err := tryLock(f.path, unix.LOCK_EX)
		if err != nil {
			continue // in use, or removed since
		}
		err = ignoreMissing(os.Remove(f.path))
		l.unlock()
		if err != nil {
			return err
		}
		total -= f.bytes
	}
	return nil
}

// openDecoded returns an unnamed file for the pages of decoded frames, where getting them once
// more would be slow; nil where it would not, or none can be had.
func openDecoded(spec MountSpec, readers []*overlay.Reader) (*os.File, error) {
	if spec.Alive == "" || spec.CacheLimit <= 0 || !slices.ContainsFunc(spec.Links, func(l link) bool { return isRemote(l.Source) || l.Upload > 0 }) &&
		!slices.ContainsFunc(readers, func(r *overlay.Reader) bool { return r.Manifest().Strategy.Codec == overlay.CodecXZ }) {
		return nil, nil
	}
	fd, err := unix.Open(filepath.Dir(spec.Alive), unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, nil // a mount works without
	}
	return os.NewFile(uintptr(fd), "decoded pages"), nil
}
