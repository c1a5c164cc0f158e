package overlay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// baseChunk is a run of whole pages of an image file: data, or a hole of any length.
type baseChunk struct {
	off, n int64
	hole   bool
}

const (
	baseChunkSize = 1 << 20
	baseHoleSize  = 128 << 20
)

// scanBaseImage calls fn for every chunk of f, from several goroutines, in no order: data
// comes with its bytes, a hole with nil.
func scanBaseImage(ctx context.Context, f *os.File, size int64, fn func(c baseChunk, p []byte) error) error {
	g, ctx := errgroup.WithContext(ctx)
	chunks := make(chan baseChunk)
	g.Go(func() error {
		defer close(chunks)
		return eachBaseChunk(f, size, func(c baseChunk) error {
			select {
			case chunks <- c:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
	})
	for range max(2, runtime.GOMAXPROCS(0)) {
		g.Go(func() error {
			buf := make([]byte, baseChunkSize)
			for c := range chunks {
				if err := ctx.Err(); err != nil {
					return err
				}
				var p []byte
				if !c.hole {
					p = buf[:c.n]
					if _, err := f.ReadAt(p, c.off); err != nil {
						return fmt.Errorf("read %s at %d: %w", f.Name(), c.off, baseNoEOF(err))
					}
				}
				if err := fn(c, p); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}

// eachBaseChunk splits f into chunks, in order. A file system that knows no holes has data
// only.
func eachBaseChunk(f *os.File, size int64, emit func(baseChunk) error) error {
	for off := int64(0); off < size; {
		data, end := baseExtent(f, off, size)
		for off < data {
			n := min(baseHoleSize, data-off)
			if err := emit(baseChunk{off: off, n: n, hole: true}); err != nil {
				return err
			}
			off += n
		}
		for off < end {
			n := min(baseChunkSize-off%baseChunkSize, end-off)
			if err := emit(baseChunk{off: off, n: n}); err != nil {
				return err
			}
			off += n
		}
	}
	return nil
}

// baseExtent returns where the next data at or after off starts and ends, in whole pages.
func baseExtent(f *os.File, off, size int64) (start, end int64) {
	start, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		return size, size
	}
	if err != nil {
		return off, size
	}
	if end, err = unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE); err != nil {
		end = size
	}
	start -= start % PageSize
	end += (PageSize - end%PageSize) % PageSize
	return max(start, off), min(end, size)
}

// eachBaseRun calls fn for every longest run of pages of p that are all zero, or all not.
func eachBaseRun(p []byte, fn func(start, end int, zero bool) error) error {
	for start := 0; start < len(p); {
		zero := baseIsZero(p[start : start+PageSize])
		end := start + PageSize
		for end < len(p) && baseIsZero(p[end:end+PageSize]) == zero {
			end += PageSize
		}
		if err := fn(start, end, zero); err != nil {
			return err
		}
		start = end
	}
	return nil
}

// punchBaseHole frees the blocks of a zero range where the file system can.
func punchBaseHole(f *os.File, off, n int64) error {
	err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("punch hole into %s at %d: %w", f.Name(), off, err)
	}
	return nil
}

// baseNoEOF turns the end of a file that must go on into an error that says so.
func baseNoEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// baseSpaceError adds the remedy to an error of a full disk.
func baseSpaceError(path string, err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("write %s: %w: free some space there and try again", path, err)
	}
	return err
}

// baseTracker adds up the work of several goroutines for one Progress.
type baseTracker struct {
	phase string
	total int64
	p     Progress

	mu   sync.Mutex
	done int64
}

func (t *baseTracker) add(n int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.done += n
	t.p.Report(t.phase, t.done, t.total)
}
