package product

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Spec says what to make.
type Spec struct {
	Title string   // what log lines begin with
	Dir   string   // absolute path of the folder that holds products of all keys
	Key   string   // name of this product's folder in Dir
	Parts []string // names in the product's folder; a product without one of them is made anew

	// Make fills the folder product; work is a scratch folder on the same file system that
	// is removed afterwards.
	Make func(ctx context.Context, work, product string) error
	Log  io.Writer // not nil
}

// Find returns the product's folder if it is there with all its parts.
func (s Spec) Find() (dir string, ok bool) {
	dir = filepath.Join(s.Dir, s.Key)
	for _, name := range s.Parts {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			return "", false
		}
	}
	return dir, true
}

// Build finds the product or makes it, and returns its folder. It also sets links with the
// names of the parts in s.Dir itself, for people.
func (s Spec) Build(ctx context.Context) (dir string, err error) {
	if dir, ok := s.Find(); ok {
		return dir, nil
	}
	if err := os.MkdirAll(s.Dir, 0o755); err != nil {
		return "", err
	}
	unlock, err := s.lock(ctx)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	if dir, ok := s.Find(); ok { // another process made it meanwhile
		return dir, nil
	}
	if err := s.clean(); err != nil {
		return "", err
	}
	start := time.Now()
	work, err := os.MkdirTemp(s.Dir, tempPrefix)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	made := filepath.Join(work, "product")
	if err := os.Mkdir(made, 0o755); err != nil {
		return "", err
	}
	if err := s.Make(ctx, work, made); err != nil {
		return "", err
	}
	dir = filepath.Join(s.Dir, s.Key)
	if err := s.publish(made, dir); err != nil {
		return "", err
	}
	fmt.Fprintf(s.Log, "%s: built in %.1f s\n", s.Title, time.Since(start).Seconds())
	return dir, nil
}

const tempPrefix = ".building-"

// clean removes what interrupted builds left behind. The caller holds the lock.
func (s Spec) clean() error {
	left, err := filepath.Glob(filepath.Join(s.Dir, tempPrefix+"*"))
	if err != nil {
		return err
	}
	for _, dir := range left {
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	return nil
}

// publish syncs the finished folder, moves it to its place, and points the links in the
// folder above it to its parts.
func (s Spec) publish(from, to string) error {
	err := filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() && !d.Type().IsRegular() {
			return err
		}
		return syncPath(path)
	})
	if err != nil {
		return err
	}
	if err := os.RemoveAll(to); err != nil { // a product that somebody emptied in part
		return err
	}
	if err := os.Rename(from, to); err != nil {
		return err
	}
	for _, name := range s.Parts {
		temp := filepath.Join(filepath.Dir(from), name)
		if err := os.Symlink(filepath.Join(filepath.Base(to), name), temp); err != nil {
			return err
		}
		if err := os.Rename(temp, filepath.Join(s.Dir, name)); err != nil {
			return err
		}
	}
	return syncPath(s.Dir)
}

func syncPath(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// lock takes the exclusive lock of the folder until the returned function is called. The
// kernel drops the lock of a process that dies.
func (s Spec) lock(ctx context.Context) (unlock func() error, err error) {
	name := filepath.Join(s.Dir, ".lock")
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for waiting := false; ; waiting = true {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f.Close, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", name, err), f.Close())
		}
		if !waiting {
			fmt.Fprintf(s.Log, "%s: waiting for another build in %s\n", s.Title, s.Dir)
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("lock %s: %w", name, ctx.Err()), f.Close())
		case <-tick.C:
		}
	}
}
