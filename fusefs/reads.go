package fusefs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// Times of a read's life.
const (
	// watchAfter is the age at which a read begins to look for a killed caller.
	watchAfter = 20 * time.Millisecond
	// killedPoll is how often a caller that had some signal is looked at for a deadly one:
	// the kernel reports only the first signal.
	killedPoll = 25 * time.Millisecond
	// heldAfter is the age at which a read that has no answer yet counts as held, and, once
	// reads were aborted, the age that no read exceeds.
	heldAfter = time.Second
	// gaveUpFor is how long a read given up after an abort fails at once when repeated. The
	// kernel starts a page fault anew whenever a signal has arrived meanwhile, without looking
	// at the error, so that a thread often signalled would never see it.
	gaveUpFor = 10 * time.Second
	maxGaveUp = 4096
)

// reads serves the reads of one file and knows those in flight.
type reads struct {
	file File
	name string
	// hold keeps failed reads unanswered instead of returning their error.
	hold bool
	// aborted is closed by Server.Abort; dead reports that the kernel's side has ended.
	aborted <-chan struct{}
	dead    func() bool
	log     *slog.Logger

	requests, bytes, failures, longest atomic.Int64
	// pushed counts bytes put into the kernel's cache unasked; last is when a read last
	// began or ended.
	pushed, last atomic.Int64
	// known are the pages that the kernel has asked for or was given.
	known pageSet
	// record, if not nil, takes the pages that are asked for, once each.
	record *recorder

	mu       sync.Mutex
	inFlight map[*read]struct{}
	// gaveUp holds the offsets of reads given up after an abort, and when.
	gaveUp map[int64]time.Time
}

// read is one read in flight.
type read struct {
	off    int64
	n      int
	pid    uint32
	since  time.Time
	ctx    context.Context
	cancel context.CancelCauseFunc
	// kernel is closed when the kernel reports a signal of the caller.
	kernel <-chan struct{}
	timer  *time.Timer
	// watched is closed when watch has returned.
	watched chan struct{}
	// err is why the read is held; reads.mu guards it.
	err error
}

// serve fills dest from off, as far as the file goes, and returns how many bytes that are.
func (s *reads) serve(ctx context.Context, dest []byte, off int64) (int, syscall.Errno) {
	if off < 0 {
		return 0, syscall.EINVAL
	}
	n := int(min(int64(len(dest)), max(s.file.Size()-off, 0)))
	s.requests.Add(1)
	if n == 0 {
		return 0, 0
	}
	if s.hasGivenUp(off) {
		s.failures.Add(1)
		return 0, errno(errAborted)
	}
	r := s.begin(ctx, off, n)
	defer s.end(r)
	err := s.fill(r, dest[:n])
	if err == nil {
		s.bytes.Add(int64(n))
		return n, 0
	}
	if s.hold && r.ctx.Err() == nil {
		err = s.keep(r, err)
	}
	return 0, errno(err)
}

// fill reads r from the file; a panic of the file becomes an error.
func (s *reads) fill(r *read, p []byte) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = &panicError{v, debug.Stack()}
		}
		if err == nil {
			return
		}
		if r.ctx.Err() != nil {
			err = context.Cause(r.ctx)
		}
		s.report(r, err)
	}()
	n, err := s.file.ReadAt(r.ctx, p, r.off)
	if n == len(p) && (err == nil || err == io.EOF) {
		return nil
	}
	if err == nil || err == io.EOF {
		err = fmt.Errorf("have %d of %d bytes: %w", n, len(p), io.ErrUnexpectedEOF)
	}
	return err
}

func (s *reads) report(r *read, err error) {
	if errors.Is(err, errKilled) {
		return
	}
	s.failures.Add(1)
	args := []any{"file", s.name, "offset", r.off, "length", r.n, "held", s.hold && !errors.Is(err, errAborted), "error", err}
	if p := (*panicError)(nil); errors.As(err, &p) {
		args = append(args, "stack", string(p.stack))
	}
	s.log.Error("read of launch image failed", args...)
}

// keep holds a failed read until its caller is killed or reads are aborted, and returns
// which of them it was.
func (s *reads) keep(r *read, err error) error {
	s.mu.Lock()
	r.err = err
	s.mu.Unlock()
	select {
	case <-r.ctx.Done():
		return context.Cause(r.ctx)
	case <-s.aborted:
		return errAborted
	}
}

func (s *reads) begin(ctx context.Context, off int64, n int) *read {
	r := &read{off: off, n: n, since: time.Now(), kernel: ctx.Done(), watched: make(chan struct{})}
	if c, ok := ctx.(*fuse.Context); ok {
		r.pid = c.Pid
	}
	r.ctx, r.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
	s.know(off/pushPage, (int64(n)+pushPage-1)/pushPage)
	s.last.Store(r.since.UnixNano())
	s.mu.Lock()
	s.inFlight[r] = struct{}{}
	s.mu.Unlock()
	r.timer = time.AfterFunc(watchAfter, func() { s.watch(r) })
	return r
}

func (s *reads) end(r *read) {
	r.cancel(nil)
	if !r.timer.Stop() {
		<-r.watched
	}
	s.last.Store(time.Now().UnixNano()) // before it is out of flight: who asks later finds one or the other
	s.mu.Lock()
	delete(s.inFlight, r)
	s.mu.Unlock()
	took := int64(time.Since(r.since))
	for old := s.longest.Load(); took > old && !s.longest.CompareAndSwap(old, took); old = s.longest.Load() {
	}
}

// watch cancels a read whose caller was killed, whose connection has ended, or which is
// too old after an abort. It returns when the read ends.
func (s *reads) watch(r *read) {
	defer close(r.watched)
	var tick <-chan time.Time
	var limit <-chan time.Time
	kernel, aborted := r.kernel, s.aborted
	for {
		select {
		case <-r.ctx.Done():
			return
		case <-kernel:
			kernel = nil
			ticker := time.NewTicker(killedPoll)
			defer ticker.Stop()
			tick = ticker.C
		case <-tick:
		case <-aborted:
			aborted = nil
			timer := time.NewTimer(max(0, heldAfter-time.Since(r.since)))
			defer timer.Stop()
			limit = timer.C
		case <-limit:
			if s.hold { // a reader of the other files sees the error, and may ask again
				s.giveUp(r.off)
			}
			r.cancel(errAborted)
			return
		}
		if kernel == nil && (s.dead() || killed(r.pid)) {
			r.cancel(errKilled)
			return
		}
	}
}

func (s *reads) giveUp(off int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gaveUp == nil || len(s.gaveUp) >= maxGaveUp {
		s.gaveUp = make(map[int64]time.Time)
	}
	s.gaveUp[off] = time.Now()
}

func (s *reads) hasGivenUp(off int64) bool {
	select {
	case <-s.aborted:
	default:
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	at, ok := s.gaveUp[off]
	return ok && time.Since(at) < gaveUpFor
}

// held returns the reads that wait for more than an ordinary answer.
func (s *reads) held() (held []HeldRead, inFlight int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for r := range s.inFlight {
		if r.err == nil && time.Since(r.since) < heldAfter {
			continue
		}
		h := HeldRead{File: s.name, Offset: r.off, Length: r.n, PID: int(r.pid), Since: r.since}
		if r.err != nil {
			h.Error = r.err.Error()
		}
		held = append(held, h)
	}
	return held, len(s.inFlight)
}
