package overlay

import (
	"context"
	"errors"
	"io"
	"slices"
	"sync"
	"time"
)

// Hold makes readers of a launch image wait while its source is away, instead of seeing
// errors: a guest whose memory cannot be read dies. What waits is visible in Stalls. A
// waiting read ends with its context. The zero value is ready for use.
type Hold struct {
	mu     sync.Mutex
	stalls map[*Stall]struct{}
}

// Stall is a read that waits for its source.
type Stall struct {
	Image  string    `json:"image"` // "memory" or "disk"
	Offset int64     `json:"offset"`
	Since  time.Time `json:"since"`
	Tries  int       `json:"tries"` // that have failed
	Error  string    `json:"error"` // of the last try

	over bool
}

const (
	holdFirst = 100 * time.Millisecond
	holdMost  = 5 * time.Second
	// holdSilence is after how long the first try of a read over a network is a stall.
	holdSilence = 2 * time.Second
)

var errNoAnswer = errors.New("the source has not answered yet")

// File returns f with reads that are tried again until they succeed. For the disk, an error
// that will not pass (damage, not an outage) is returned: QEMU stops the guest and can go on
// later. For memory there is no such way out, so every error is held.
func (h *Hold) File(f *ImageFile) *HeldFile { return &HeldFile{f, h} }

// Stalls lists the reads that wait now, the oldest first.
func (h *Hold) Stalls() []Stall {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := make([]Stall, 0, len(h.stalls))
	for s := range h.stalls {
		out = append(out, *s)
	}
	slices.SortFunc(out, func(a, b Stall) int { return a.Since.Compare(b.Since) })
	return out
}

// HeldFile is an ImageFile whose reads wait for their source.
type HeldFile struct {
	*ImageFile
	hold *Hold
}

// ReadAt is ImageFile.ReadAt, tried again with growing pauses until ctx ends.
func (f *HeldFile) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if f.im.Local() { // no silence to be seen, and none of its cost
		n, err := f.ImageFile.ReadAt(ctx, p, off)
		if err == nil || err == io.EOF || !f.waits(ctx, err) {
			return n, err
		}
		s := f.stall(off)
		defer f.hold.forget(s)
		return f.again(ctx, p, off, s, err)
	}
	s := f.stall(off)
	silence := time.AfterFunc(holdSilence, func() { f.hold.note(s, errNoAnswer) })
	defer func() {
		silence.Stop()
		f.hold.forget(s)
	}()
	n, err := f.ImageFile.ReadAt(ctx, p, off)
	if err == nil || err == io.EOF || !f.waits(ctx, err) {
		return n, err
	}
	return f.again(ctx, p, off, s, err)
}

// again tries a read again that ended with err.
func (f *HeldFile) again(ctx context.Context, p []byte, off int64, s *Stall, err error) (n int, _ error) {
	for pause := holdFirst; ; pause = min(2*pause, holdMost) {
		f.hold.note(s, err)
		if err := rest(ctx, pause); err != nil {
			return 0, err
		}
		n, err = f.ImageFile.ReadAt(ctx, p, off)
		if err == nil || err == io.EOF || !f.waits(ctx, err) {
			return n, err
		}
	}
}

func (f *HeldFile) stall(off int64) *Stall {
	return &Stall{Image: f.space.String(), Offset: off, Since: time.Now()}
}

// note makes s visible with the error of its last try, or with errNoAnswer in the first.
func (h *Hold) note(s *Stall, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if s.over || err == errNoAnswer && s.Tries > 0 {
		return
	}
	if h.stalls == nil {
		h.stalls = make(map[*Stall]struct{})
	}
	s.Error = err.Error()
	if err != errNoAnswer {
		s.Tries++
	}
	h.stalls[s] = struct{}{}
}

func (h *Hold) forget(s *Stall) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s.over = true
	delete(h.stalls, s)
}

func (f *HeldFile) waits(ctx context.Context, err error) bool {
	if ctx.Err() != nil || errors.Is(err, ErrClosed) {
		return false
	}
	return f.space == Memory || temporary(err)
}

// temporary reports whether err may pass by itself.
func temporary(err error) bool {
	var t interface{ Temporary() bool }
	return errors.As(err, &t) && t.Temporary()
}
