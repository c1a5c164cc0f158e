package source

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"syscall"
	"time"
)

const (
	// growPoll is how often a growing file is looked at.
	growPoll = 20 * time.Millisecond
	// growSilence is how long a file may not grow until that is an error of its readers.
	growSilence = 60 * time.Second
	// growPatience is how long each read waits at least, however long the silence was.
	growPatience = time.Second
)

// GrowingFile is a local regular file that somebody appends to until it has its final size.
type GrowingFile struct {
	*File

	mu    sync.Mutex
	have  int64     // bytes that are there
	grown time.Time // when have last became more
	err   error     // for good
}

// OpenGrowing opens a file that will have size bytes. Reads wait until their bytes are there.
// If it has not grown for a minute, reads that wait return a temporary error; if it is removed
// before it is whole, one for good.
func OpenGrowing(path string, size int64) (*GrowingFile, error) {
	if size < 0 {
		return nil, &Error{Op: "open", Name: path, Err: fmt.Errorf("negative size %d", size)}
	}
	f, err := OpenFile(path)
	if err != nil {
		return nil, err
	}
	f.size = size
	g := &GrowingFile{File: f, grown: time.Now()}
	if err := g.look(); err != nil {
		return nil, errors.Join(g.fail(err), f.Close())
	}
	return g, nil
}

// Growing says that the bytes come by themselves.
func (g *GrowingFile) Growing() bool { return true }

// Local reports whether all bytes are there.
func (g *GrowingFile) Local() bool {
	g.mu.Lock()
	whole := g.have == g.size
	g.mu.Unlock()
	if !whole && !g.closed.Load() {
		g.look() // its error is the next read's
		g.mu.Lock()
		whole = g.have == g.size
		g.mu.Unlock()
	}
	return whole
}

// look asks how much of the file is there.
func (g *GrowingFile) look() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.err != nil || g.have == g.size {
		return g.err
	}
	info, err := g.file.Stat()
	if err != nil {
		return err
	}
	n := info.Size()
	switch {
	case n > g.size:
		g.err = fmt.Errorf("%w: it has %d bytes, and should become %d", ErrChanged, n, g.size)
	case n < g.have:
		g.err = fmt.Errorf("%w: it had %d bytes, and has %d", ErrChanged, g.have, n)
	case n < g.size && info.Sys().(*syscall.Stat_t).Nlink == 0:
		g.err = fmt.Errorf("the file was removed when it had %d of %d bytes: whoever wrote it has given up", n, g.size)
	case n > g.have:
		g.have, g.grown = n, time.Now()
	}
	return g.err
}

// ReadAt implements Source; it waits until the bytes are there.
func (g *GrowingFile) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	want, err := clamp(g.String(), len(p), off, g.size)
	if err != nil {
		return 0, err
	}
	if want > 0 && !g.there(off+int64(want)) {
		if err := g.wait(ctx, off+int64(want)); err != nil {
			return 0, err
		}
	}
	return g.File.ReadAt(ctx, p, off)
}

// wait waits until the first n bytes are there.
func (g *GrowingFile) wait(ctx context.Context, n int64) error {
	begin := time.Now()
	tick := time.NewTicker(growPoll)
	defer tick.Stop()
	for {
		if g.closed.Load() {
			return g.fail(ErrClosed)
		}
		if err := ctx.Err(); err != nil {
			return g.fail(err)
		}
		if err := g.look(); err != nil {
			return g.fail(err)
		}
		if g.there(n) {
			return nil
		}
		g.mu.Lock()
		silence, have := time.Since(g.grown), g.have
		g.mu.Unlock()
		if silence > growSilence && time.Since(begin) > growPatience {
			err := fmt.Errorf("the file has had %d of %d bytes for %s: %w", have, g.size, silence.Round(time.Second), io.ErrNoProgress)
			return &Error{Op: "read", Name: g.String(), Err: err, temp: true}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

func (g *GrowingFile) there(n int64) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return n <= g.have
}
