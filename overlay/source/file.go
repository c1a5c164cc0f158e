package source

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"syscall"
)

// fileStep is how much of a file is read between two looks at the context.
const fileStep = 1 << 20

// File is a local regular file.
type File struct {
	file   *os.File
	size   int64
	closed atomic.Bool
}

// Local says that reads do not wait for a network.
func (f *File) Local() bool { return true }

// OpenFile opens a regular file; its size stays what it is now.
func OpenFile(path string) (*File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe must not block
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = &Error{Op: "open", Name: path, Err: fmt.Errorf("not a regular file (%s)", info.Mode().Type())}
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &File{file: f, size: info.Size()}, nil
}

// Size returns the size in bytes at the time of opening.
func (f *File) Size() int64 { return f.size }

// String returns the path.
func (f *File) String() string { return f.file.Name() }

// ReadAt implements Source; a file that has become shorter is ErrChanged.
func (f *File) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	want, err := clamp(f.String(), len(p), off, f.size)
	if err != nil {
		return 0, err
	}
	if f.closed.Load() {
		return 0, f.fail(ErrClosed)
	}
	n := 0
	for {
		if err := ctx.Err(); err != nil {
			return n, f.fail(err)
		}
		if n == want {
			break
		}
		k, err := f.file.ReadAt(p[n:min(n+fileStep, want)], off+int64(n))
		n += k
		if err == io.EOF && n < want {
			return n, f.fail(fmt.Errorf("%w: the file ends at byte %d of %d", ErrChanged, off+int64(n), f.size))
		}
		if err != nil && err != io.EOF {
			return n, f.fail(err)
		}
	}
	if want < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *File) fail(err error) error {
	if errors.Is(err, os.ErrClosed) {
		err = ErrClosed
	}
	return &Error{Op: "read", Name: f.String(), Err: err}
}

// Close closes the file; a second Close does nothing.
func (f *File) Close() error {
	if f.closed.Swap(true) {
		return nil
	}
	return f.file.Close()
}
