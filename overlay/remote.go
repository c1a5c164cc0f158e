package overlay

import (
	"context"
	"math"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// remote is what a Reader knows of the encoded frames of a source over a network: which are at
// hand, on disk or in memory, and which are on their way. A frame is on its way once, whoever
// asked for it first. What is on disk is not believed: it is hashed whenever it is read.
type remote struct {
	r *Reader

	mu      sync.Mutex
	frames  []remoteFrame
	cache   *os.File
	off     bool // cache takes no writes, or there is none
	failed  bool // a write has failed
	cached  int  // frames whose place is onDisk
	held    map[int][]byte
	heldAll int // bytes in held
	fetches int // calls of Image.Fetch under way
	streams streams
	stalled bool // it waits for frames in held to be decoded
	// changed is closed, and forgotten, when a frame has landed or left, or a Fetch has ended;
	// nil while nobody waits for that.
	changed chan struct{}
}

// remoteFrame is one frame of a remote.
type remoteFrame struct {
	place  place
	want   want
	used   bool    // it has been decoded, and was not kept
	bad    bool    // a background fetch brought other bytes twice: left to demand
	flight *flight // nil: not on its way
}

// place is where an encoded frame is.
type place uint8

const (
	away    place = iota
	unknown       // there is something in its place on disk
	onDisk
	inMemory
)

// want is why a Fetch under way has not given a frame up.
type want uint8

const (
	unwanted want = iota
	wantRest
	wantHot // in the profile
)

// flight is a fetch under way.
type flight struct {
	over chan struct{} // closed at its end
	by   *fetcher      // nil: demand, or Prefetch for itself
}

func newRemote(r *Reader, cache *os.File) *remote {
	m := &remote{r: r, cache: cache, off: cache == nil, frames: make([]remoteFrame, len(r.index.frames)),
		held: make(map[int][]byte)}
	if cache != nil {
		m.scan()
	}
	return m
}

// scan marks the frames of which the cache may hold all bytes: what has a hole is away.
func (m *remote) scan() {
	fd := int(m.cache.Fd())
	for at := int64(0); ; {
		data, err := unix.Seek(fd, at, unix.SEEK_DATA)
		if err == unix.EINVAL {
			data, err = at, nil // a file system without holes
		}
		if err != nil {
			return
		}
		hole, err := unix.Seek(fd, data, unix.SEEK_HOLE)
		if err != nil || hole <= data { // not a regular file
			hole = math.MaxInt64
		}
		m.mark(data, hole)
		if at = hole; hole == math.MaxInt64 {
			return
		}
	}
}

// mark marks the frames within the bytes from first to end of the file as unknown.
func (m *remote) mark(first, end int64) {
	frames := m.r.index.frames
	lo, hi := 0, len(frames)
	for lo < hi {
		if mid := (lo + hi) / 2; m.offset(mid) < first {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	for ; lo < len(frames) && m.offset(lo)+int64(frames[lo].encoded) <= end; lo++ {
		m.frames[lo].place = unknown
	}
}

// offset returns where frame i begins in the file.
func (m *remote) offset(i int) int64 {
	return m.r.members[memberFrames].data + m.r.index.frames[i].offset
}

func (m *remote) size(i int) int { return int(m.r.index.frames[i].encoded) }

func (m *remote) complete() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.cache != nil && m.cached == len(m.frames)
}

func (m *remote) stats() (cached, off int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.failed {
		off = 1
	}
	return int64(m.cached), off
}

// demand returns frame i, in buf where it is large enough, and fetches it if it is not at
// hand. A fetch that is under way is waited for; if it fails, demand tries itself.
func (m *remote) demand(ctx context.Context, i int, buf []byte, g *gate) ([]byte, error) {
	for {
		if b, ok := m.take(i, buf); ok {
			return b, nil
		}
		if g != nil {
			g.enter()
			defer g.leave()
			g = nil
		}
		f, mine := m.claim(i)
		if mine {
			return m.fetchClaimed(ctx, i, buf, f)
		}
		if f == nil {
			continue
		}
		if err := waitFor(ctx, f.over); err != nil {
			return nil, err
		}
	}
}

// fetchClaimed fetches frame i for a demand, whose flight is f.
func (m *remote) fetchClaimed(ctx context.Context, i int, buf []byte, f *flight) (b []byte, err error) {
	p := away
	defer func() { m.land(i, f, p, nil) }() // also after a panic
	if b, err = m.r.fetchFrame(ctx, i, buf); err != nil {
		return nil, err
	}
	if m.store(b, m.offset(i)) {
		p = onDisk
	}
	m.mu.Lock()
	m.frames[i].used = true
	m.mu.Unlock()
	return b, nil
}

// claim begins a flight for a demand of frame i, or returns the one to wait for, or nil where
// the frame has come to hand since the caller looked.
func (m *remote) claim(i int) (f *flight, mine bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	fr := &m.frames[i]
	switch {
	case fr.place != away:
		return nil, false
	case fr.flight != nil:
		return fr.flight, false
	}
	fr.flight = &flight{over: make(chan struct{})}
	return fr.flight, true
}

// land ends a flight of frame i, which is at p then: in memory as b.
func (m *remote) land(i int, f *flight, p place, b []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	fr := &m.frames[i]
	fr.flight = nil
	m.moveLocked(i, p)
	if p == inMemory {
		m.held[i] = b
		m.heldAll += len(b)
	}
	if p != away || fr.used || fr.bad {
		fr.want = unwanted
	}
	close(f.over)
	m.changeLocked()
}

// moveLocked notes where frame i is from now on.
func (m *remote) moveLocked(i int, p place) {
	fr := &m.frames[i]
	if fr.place == onDisk {
		m.cached--
	}
	if p == onDisk {
		m.cached++
	}
	fr.place = p
}

func (m *remote) changeLocked() {
	if m.changed != nil {
		close(m.changed)
		m.changed = nil
	}
}

// changedLocked returns what is closed at the next change.
func (m *remote) changedLocked() <-chan struct{} {
	if m.changed == nil {
		m.changed = make(chan struct{})
	}
	return m.changed
}

// store writes encoded frames into the cache on disk and reports whether they are there.
func (m *remote) store(b []byte, off int64) bool {
	m.mu.Lock()
	stop := m.off
	m.mu.Unlock()
	if stop {
		return false
	}
	if _, err := m.cache.WriteAt(b, off); err != nil {
		m.mu.Lock()
		m.off, m.failed = true, true
		m.mu.Unlock()
		return false
	}
	return true
}

// take returns frame i, in buf where it is large enough, if it is at hand and right. From
// memory it is removed: it is decoded now.
func (m *remote) take(i int, buf []byte) ([]byte, bool) {
	m.mu.Lock()
	p := m.frames[i].place
	if p == inMemory {
		b := m.held[i]
		delete(m.held, i)
		m.heldAll -= len(b)
		m.moveLocked(i, away)
		m.frames[i].used = true
		m.changeLocked()
		m.mu.Unlock()
		return append(buf[:0], b...), true
	}
	m.mu.Unlock()
	if p == away {
		return nil, false
	}
	n := m.size(i)
	b := buf
	if cap(b) < n {
		b = make([]byte, n)
	}
	b = b[:n]
	_, err := m.cache.ReadAt(b, m.offset(i))
	right := err == nil && Sum(b) == m.r.index.frames[i].hash
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case right:
		if m.frames[i].place == unknown {
			m.moveLocked(i, onDisk)
		}
		return b, true
	case m.frames[i].place == p: // nobody has brought it meanwhile
		m.moveLocked(i, away)
	}
	return nil, false
}
