package client

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync"
	"time"
)

// Local is a http.RoundTripper into a handler of the same process: no listener, no copies of
// what is sent. Bodies stream both ways. A request's ctx ends when that of the caller does,
// or when the body of the answer is closed.
type Local struct {
	handler http.Handler
	serving sync.WaitGroup
}

// NewLocal returns a Local over h.
func NewLocal(h http.Handler) *Local { return &Local{handler: h} }

// Close waits until the handler has returned from all requests. No request may follow.
func (l *Local) Close() { l.serving.Wait() }

// RoundTrip implements http.RoundTripper.
func (l *Local) RoundTrip(req *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(req.Context())
	r := req.Clone(ctx)
	r.RequestURI, r.Proto, r.ProtoMajor, r.ProtoMinor = req.URL.RequestURI(), "HTTP/1.1", 1, 1
	if r.Host == "" {
		r.Host = req.URL.Host
	}
	if r.Body == nil {
		r.Body, r.ContentLength = http.NoBody, 0
	}
	pr, pw := io.Pipe()
	w := &localWriter{header: http.Header{}, ready: make(chan struct{}), body: pw}
	// The end of ctx unblocks a handler that reads or writes.
	stop := context.AfterFunc(ctx, func() {
		pw.CloseWithError(context.Cause(ctx))
		r.Body.Close()
	})
	l.serving.Go(func() {
		err := l.serve(w, r)
		w.WriteHeader(http.StatusOK)
		pw.CloseWithError(cmp.Or(err, context.Cause(ctx))) // nil: the end of the body
		stop()
		r.Body.Close()
		cancel(nil)
	})
	select {
	case <-w.ready:
	case <-req.Context().Done():
	}
	if err := context.Cause(req.Context()); err != nil {
		cancel(err)
		return nil, err
	}
	if w.failed != nil {
		return nil, w.failed
	}
	resp := &http.Response{
		StatusCode: w.status, Status: strconv.Itoa(w.status) + " " + http.StatusText(w.status), Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: w.sent, ContentLength: -1, Request: req, Body: &localBody{pr, func() { cancel(errBodyClosed) }},
	}
	if n, err := strconv.ParseInt(w.sent.Get("Content-Length"), 10, 64); err == nil {
		resp.ContentLength = n
	}
	return resp, nil
}

var errBodyClosed = errors.New("the body of the answer was closed")

// serve calls the handler. Its panic becomes an error of the caller, as a connection's end would.
func (l *Local) serve(w *localWriter, r *http.Request) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = io.ErrUnexpectedEOF
			if p != http.ErrAbortHandler {
				err = fmt.Errorf("the handler panicked: %v", p)
			}
			w.fail(err)
		}
	}()
	l.handler.ServeHTTP(w, r)
	return nil
}

// localWriter is the http.ResponseWriter of one request; the handler's goroutine uses it
// alone until ready is closed.
type localWriter struct {
	header http.Header
	body   *io.PipeWriter
	once   sync.Once
	ready  chan struct{} // closed when the following are set
	status int
	sent   http.Header
	failed error
}

func (w *localWriter) Header() http.Header { return w.header }

func (w *localWriter) WriteHeader(status int) {
	if status < 200 {
		return
	}
	w.once.Do(func() {
		w.status, w.sent = status, w.header.Clone()
		close(w.ready)
	})
}

func (w *localWriter) fail(err error) {
	w.once.Do(func() {
		w.failed = err
		close(w.ready)
	})
}

func (w *localWriter) Write(p []byte) (int, error) {
	w.WriteHeader(http.StatusOK)
	if w.status == http.StatusNoContent || w.status == http.StatusNotModified {
		return 0, http.ErrBodyNotAllowed
	}
	return w.body.Write(p)
}

// Flush sends the header; what is written is with the reader already.
func (w *localWriter) Flush() { w.WriteHeader(http.StatusOK) }

// Deadlines guard connections against peers that stall. This peer is the same process.
func (w *localWriter) SetReadDeadline(time.Time) error  { return nil }
func (w *localWriter) SetWriteDeadline(time.Time) error { return nil }
func (w *localWriter) EnableFullDuplex() error          { return nil }

// localBody is the body of an answer; closing it ends the request.
type localBody struct {
	*io.PipeReader
	cancel func()
}

func (b *localBody) Close() error {
	b.cancel()
	return b.PipeReader.Close()
}
