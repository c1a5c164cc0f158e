package source

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// spool is the download of a file from its beginning on, for a server that does not answer
// ranges. A download that breaks begins anew, and what it brings again must be the same.
type spool struct {
	h      *HTTP
	file   *os.File
	cancel context.CancelFunc
	known  chan struct{} // closed when the size is known, or will not be
	over   chan struct{} // closed when the download has ended

	mu      sync.Mutex
	have    int64
	err     error         // of the last attempt, until bytes come again
	changed chan struct{} // closed and replaced when have or err change
}

// openSpool begins the download and returns when the size is known.
func (h *HTTP) openSpool(ctx context.Context, dir string) error {
	f, err := unnamedFile(dir)
	if err != nil {
		return fmt.Errorf("make file to download into: %w", err)
	}
	life, cancel := context.WithCancel(context.WithoutCancel(ctx))
	s := &spool{h: h, file: f, cancel: cancel, known: make(chan struct{}), over: make(chan struct{}), changed: make(chan struct{})}
	h.spool = s
	go s.run(life) // joined by close
	select {
	case <-s.known:
	case <-ctx.Done():
		return ctx.Err()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if h.size < 0 {
		return s.err
	}
	return nil
}

// unnamedFile returns a file in dir that no folder lists.
func unnamedFile(dir string) (*os.File, error) {
	f, err := os.OpenFile(dir, unix.O_TMPFILE|os.O_RDWR, 0o600)
	if err == nil {
		return f, nil
	}
	if f, err = os.CreateTemp(dir, ".download-"); err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func (s *spool) close() error {
	s.cancel()
	<-s.over
	return s.file.Close()
}

// Growing says whether the bytes come by themselves, in order.
func (h *HTTP) Growing() bool { return h.spool != nil }

// Local reports whether all bytes are on this host.
func (h *HTTP) Local() bool {
	if h.spool == nil {
		return false
	}
	h.spool.mu.Lock()
	defer h.spool.mu.Unlock()
	return h.spool.have == h.size
}

// run downloads until all is there, an error will not pass, or ctx ends.
func (s *spool) run(ctx context.Context) {
	defer close(s.over)
	opening := true
	known := func() {
		if opening {
			opening = false
			close(s.known)
		}
	}
	defer known()
	for try := 0; ; try++ {
		before := s.have // only this goroutine changes it
		err := s.attempt(ctx, known)
		if err == nil || ctx.Err() != nil {
			return
		}
		var temp temporaryError
		lasting := !errors.As(err, &temp)
		if s.have > before {
			try = 0
			err = fmt.Errorf("the download broke at byte %d of %d and begins anew: %w", s.have, s.h.size, err)
		}
		if lasting || try >= s.h.o.Retries {
			s.note(s.have, fmt.Errorf("%d attempts: %w", try+1, err))
		}
		if lasting || opening && try >= s.h.o.Retries || s.h.pause(ctx, try) != nil {
			return
		}
	}
}

func (s *spool) note(have int64, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.have, s.err = have, err
	close(s.changed)
	s.changed = make(chan struct{})
}

// attempt makes one request for the whole file; known is called once its size is accepted.
func (s *spool) attempt(ctx context.Context, known func()) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	h := s.h
	silence := time.AfterFunc(h.o.Timeout, func() { cancel(fmt.Errorf("%w for %s", errSilent, h.o.Timeout)) })
	defer silence.Stop()
	req, err := h.request(ctx)
	if err != nil {
		return err
	}
	resp, err := h.client.Do(req)
	if err != nil {
		return requestError(ctx, err)
	}
	defer resp.Body.Close()
	if err := s.accept(resp); err != nil {
		return err
	}
	known()
	buf, old := make([]byte, 64<<10), make([]byte, 64<<10)
	for off := int64(0); off < h.size; {
		n, err := resp.Body.Read(buf[:min(int64(len(buf)), h.size-off)])
		if n > 0 {
			silence.Reset(h.o.Timeout)
			if err := s.add(buf[:n], old, off); err != nil {
				return err
			}
			off += int64(n)
		}
		if err != nil && off < h.size {
			return requestError(ctx, fmt.Errorf("the answer ends after %d of %d bytes: %w", off, h.size, noEOF(err)))
		}
	}
	return nil
}

// accept holds an answer against what is known of the file.
func (s *spool) accept(resp *http.Response) error {
	h, v := s.h, validatorOf(resp.Header)
	if resp.StatusCode != http.StatusOK {
		return statusError(resp.StatusCode)
	}
	if err := checkEncoding(resp.Header); err != nil {
		return err
	}
	switch {
	case resp.ContentLength < 0:
		return errors.New("the server neither supports ranges nor says how long the file is: " + useFile)
	case h.size < 0:
		return h.acceptUnversioned(v, resp.ContentLength)
	case resp.ContentLength != h.size || !h.validator.is(v):
		return fmt.Errorf("%w on the server", ErrChanged)
	}
	return nil
}

// add takes p, the file's bytes at off: what is there already must be the same.
func (s *spool) add(p, old []byte, off int64) error {
	if n := min(int64(len(p)), s.have-off); n > 0 {
		if _, err := s.file.ReadAt(old[:n], off); err != nil {
			return temporaryError{fmt.Errorf("read what was downloaded: %w", err)}
		}
		if !bytes.Equal(old[:n], p[:n]) {
			return fmt.Errorf("%w on the server: bytes %d to %d came otherwise the first time", ErrChanged, off, off+n-1)
		}
		p, off = p[n:], off+n
	}
	if len(p) == 0 {
		return nil
	}
	if _, err := s.file.WriteAt(p, off); err != nil {
		return temporaryError{fmt.Errorf("write what is downloaded: %w", err)} // a full disk, for one
	}
	s.note(off+int64(len(p)), nil)
	return nil
}

// read fills p, which lies within the file, once its bytes have come.
func (s *spool) read(ctx context.Context, p []byte, off int64) error {
	for {
		s.mu.Lock()
		have, err, changed := s.have, s.err, s.changed
		s.mu.Unlock()
		if off+int64(len(p)) <= have {
			break
		}
		if err != nil {
			return err
		}
		select {
		case <-changed:
		case <-s.over:
			if s.h.closed.Load() {
				return ErrClosed
			}
			s.mu.Lock()
			err, have = s.err, s.have
			s.mu.Unlock()
			if err == nil && off+int64(len(p)) > have {
				return errors.New("the download has ended")
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	_, err := s.file.ReadAt(p, off)
	if errors.Is(err, os.ErrClosed) {
		return ErrClosed
	}
	if err == io.EOF {
		err = nil // p ends where the file does
	}
	return err
}
