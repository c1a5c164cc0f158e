package fusefs

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"syscall"
	"time"
)

// ErrNotLookedUp is returned by Push while nobody has looked the file up by its name yet: the
// kernel has no inode then to keep pages for.
var ErrNotLookedUp = errors.New("file was not looked up yet")

const (
	pushPage = 4096
	// quietPoll and quietMost bound how a push gives way to reads that wait for an answer.
	quietPoll = 200 * time.Microsecond
	quietMost = 20 * time.Millisecond
)

// Push puts p, the content of a file ("memory" or "disk") from off on, into the kernel's page
// cache, so that whoever touches it next need not ask. off and len(p) are multiples of 4096.
// It gives way to reads in flight, and leaves out pages that the kernel has asked for or was
// given before, and those that a read in flight covers: the kernel has locked them, a push
// would wait for that read. It returns how many bytes it has pushed. Calls must come from
// goroutines that serve no reads.
func (s *Server) Push(ctx context.Context, file string, p []byte, off int64) (int, error) {
	for _, f := range s.root.files {
		if f.name == file {
			return f.push(ctx, p, off)
		}
	}
	return 0, fmt.Errorf("push %s: there is no such file", file)
}

// Begin notes that a guest runs on the files, from now on.
func (s *Server) Begin() { s.begun.Store(time.Now().UnixNano()) }

// Idle returns for how long a guest that runs has had no read of memory or disk under way: since
// [Server.Begin], if it has begun none, 0 while one has no answer. Before, nobody knows what
// the guest wants, and running is false.
func (s *Server) Idle() (d time.Duration, running bool) {
	begun := s.begun.Load()
	if begun == 0 || s.memory.busy() || s.disk.busy() {
		return 0, begun != 0
	}
	return time.Since(time.Unix(0, max(s.memory.last.Load(), s.disk.last.Load(), begun))), true
}

func (f *fileNode) push(ctx context.Context, p []byte, off int64) (pushed int, err error) {
	if off < 0 || off%pushPage != 0 || len(p)%pushPage != 0 || int64(len(p)) > f.size()-off {
		return 0, fmt.Errorf("push %s: %d bytes at %d are not whole pages of its %d bytes", f.name, len(p), off, f.size())
	}
	if err := f.reads.quiet(ctx); err != nil {
		return 0, err
	}
	first := off / pushPage
	for at, end := first, first+int64(len(p)/pushPage); at < end; {
		from, n := f.reads.missing(at, end)
		if n == 0 {
			break
		}
		at = from + n
		b := p[(from-first)*pushPage:][:n*pushPage]
		switch errno := f.WriteCache(from*pushPage, b); errno {
		case 0:
		case syscall.ENOENT:
			return pushed, ErrNotLookedUp
		default:
			return pushed, fmt.Errorf("push %s at %d: %w", f.name, from*pushPage, errno)
		}
		f.reads.known.add(from, n)
		f.reads.pushed.Add(n * pushPage)
		pushed += len(b)
	}
	return pushed, nil
}

// quiet waits until no read is in flight, but not for long: a held one may stay for hours.
func (s *reads) quiet(ctx context.Context) error {
	for begin := time.Now(); s.busy() && time.Since(begin) < quietMost; {
		select {
		case <-ctx.Done():
		case <-time.After(quietPoll):
			continue
		}
		break
	}
	return context.Cause(ctx)
}

func (s *reads) busy() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.inFlight) > 0
}

// missing returns the first run of pages from page at up to end that the kernel neither has
// nor waits for.
func (s *reads) missing(at, end int64) (from, n int64) {
	from, to := s.known.gap(at, end)
	s.mu.Lock()
	defer s.mu.Unlock()
	for r := range s.inFlight { // each was known before it came into the map, unless it came since
		if first := r.off / pushPage; from <= first && first < to {
			to = first
		}
	}
	return from, to - from
}

// pageSet is a set of page numbers; the zero value is empty.
type pageSet struct {
	mu    sync.Mutex
	words []uint64
}

func (b *pageSet) add(first, n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if more := (first+n+63)/64 - int64(len(b.words)); more > 0 {
		b.words = append(b.words, make([]uint64, more)...)
	}
	for i := first; i < first+n; i++ {
		b.words[i/64] |= 1 << (i % 64)
	}
}

// gap returns the first run of pages from at up to end that are not in the set, empty where
// there is none.
func (b *pageSet) gap(at, end int64) (from, to int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	has := func(i int64) bool {
		return i/64 < int64(len(b.words)) && b.words[i/64]&(1<<(i%64)) != 0
	}
	for at < end && has(at) {
		at++
	}
	for to = at; to < end && !has(to); to++ {
	}
	return at, to
}
