package service

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// lockPoll is how often a lock that another process holds is tried again.
const lockPoll = 5 * time.Millisecond

// lock is a flock on a file or folder; it ends with unlock or with the process.
type lock struct{ f *os.File }

func (l *lock) unlock() { l.f.Close() }

// errLocked: another process holds the lock.
var errLocked = errors.New("in use by another process")

// tryLock takes the lock of path, shared or exclusive, or returns errLocked.
func tryLock(path string, how int) (*lock, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	for {
		err = unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = errLocked
	} else if err == nil {
		err = sameFile(f, path)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return &lock{f}, nil
}

// waitLock is tryLock, tried until ctx ends.
func waitLock(ctx context.Context, path string, how int) (*lock, error) {
	tick := time.NewTicker(lockPoll)
	defer tick.Stop()
	for {
		l, err := tryLock(path, how)
		if !errors.Is(err, errLocked) {
			return l, err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for the lock of %s: %w", path, context.Cause(ctx))
		}
	}
}

// sameFile returns an error if path is not f any more: whoever held its lock has removed it.
func sameFile(f *os.File, path string) error {
	have, err := f.Stat()
	if err != nil {
		return err
	}
	now, err := os.Stat(path)
	if err == nil && !os.SameFile(have, now) {
		err = fs.ErrNotExist
	}
	return err
}

// lockForLife takes the exclusive lock of path until this process is gone: its descriptor is
// never closed, so whoever finds the lock free finds no process either.
func lockForLife(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second) // for those who look whether it is held
	defer cancel()
	l, err := waitLock(ctx, path, unix.LOCK_EX)
	if err != nil {
		return err
	}
	defer l.unlock()
	if _, err := unix.FcntlInt(l.f.Fd(), unix.F_DUPFD_CLOEXEC, 0); err != nil {
		return fmt.Errorf("keep the lock of %s: %w", path, err)
	}
	return nil
}

// isLocked reports whether a process holds the exclusive lock of path.
func isLocked(path string) bool {
	l, err := tryLock(path, unix.LOCK_SH)
	if err == nil {
		l.unlock()
	}
	return errors.Is(err, errLocked)
}

// writeJSON replaces path by v, durably and at once.
func writeJSON(path string, v any) error { return replaceJSON(path, v, true) }

// replaceJSON replaces path by v at once; durably where sync is set.
func replaceJSON(path string, v any, sync bool) error {
	b, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		return fmt.Errorf("marshal %s: %w", path, err)
	}
	return replaceFile(path, append(b, '\n'), sync)
}

// replaceFile replaces the content of path at once; durably where sync is set.
func replaceFile(path string, b []byte, sync bool) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil && sync {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", path, err), ignoreMissing(os.Remove(f.Name())))
	}
	if !sync {
		return nil
	}
	return syncDir(filepath.Dir(path))
}

// syncFile makes what was written to path durable.
func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func readJSON(path string, v any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	return nil
}

// isDamaged reports whether a file was read and holds no JSON: its content was never made
// durable, or the disk has lost it.
func isDamaged(err error) bool {
	var syntax *json.SyntaxError
	var kind *json.UnmarshalTypeError
	return errors.As(err, &syntax) || errors.As(err, &kind)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// stage is a folder of our own in tmp, to make something in. Its lock says that we live.
type stage struct {
	dir  string
	lock *lock
}

// newStage makes a stage; the caller ends it with drop, also after its content has moved.
func (s *Service) newStage(ctx context.Context, what string) (*stage, error) {
	var st stage
	err := s.locked(ctx, func() (err error) {
		if st.dir, err = os.MkdirTemp(s.path("tmp"), what+"-*"); err != nil {
			return err
		}
		st.lock, err = tryLock(st.dir, unix.LOCK_EX)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("make a folder for %s: %w", what, err)
	}
	return &st, nil
}

func (st *stage) drop() error {
	defer st.lock.unlock()
	return os.RemoveAll(st.dir)
}

// locked runs f while this process alone may change names and records. f must be short.
// Those of this process wait in line; only the first of them polls for the lock.
func (s *Service) locked(ctx context.Context, f func() error) error {
	select {
	case s.turn <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("wait for the lock of %s: %w", s.cfg.Dir, context.Cause(ctx))
	}
	defer func() { <-s.turn }()
	l, err := waitLock(ctx, s.path("lock"), unix.LOCK_EX)
	if err != nil {
		return err
	}
	defer l.unlock()
	return f()
}

// list returns the names of the folders in the store's folder kind.
func (s *Service) list(kind string) ([]string, error) {
	entries, err := os.ReadDir(s.path(kind))
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names, nil
}
