package rest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"
)

// response is a ResponseWriter that knows what was answered, and that gives up on a client
// that takes nothing for a while.
type response struct {
	http.ResponseWriter
	control *http.ResponseController
	stall   time.Duration
	body    *arriving // nil: the request has none
	status  int       // 0: nothing written yet
}

func newResponse(w http.ResponseWriter, r *http.Request, l Limits) *response {
	out := &response{ResponseWriter: w, control: http.NewResponseController(w), stall: l.Stall}
	if r.ContentLength != 0 {
		out.body = &arriving{ReadCloser: r.Body, w: out, until: time.Now().Add(l.BodyTime), http1: r.ProtoMajor == 1}
	}
	return out
}

// Unwrap is for http.ResponseController.
func (w *response) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// WriteHeader notes the status. A connection whose request was refused before all of it came
// is closed, or net/http would wait for the rest before it answers.
func (w *response) WriteHeader(status int) {
	if w.status != 0 {
		return
	}
	w.status = status
	if w.body != nil && !w.body.ended && w.body.http1 {
		w.Header().Set("Connection", "close")
	}
	w.ResponseWriter.WriteHeader(status)
}

// Write gives the client the stall time to take p.
func (w *response) Write(p []byte) (int, error) {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	w.writeDeadline(w.stall)
	n, err := w.ResponseWriter.Write(p)
	w.writeDeadline(0)
	return n, err
}

// flush sends what was written.
func (w *response) flush() error {
	w.writeDeadline(w.stall)
	err := w.control.Flush()
	w.writeDeadline(0)
	if errors.Is(err, http.ErrNotSupported) {
		return nil
	}
	return err
}

// last bounds what net/http still sends and reads once the handler has returned.
func (w *response) last() {
	w.writeDeadline(w.stall)
	if w.body != nil && !w.body.ended {
		w.readDeadline(lingering)
	}
}

// lingering is how long net/http may look for the rest of a body that nobody wanted.
const lingering = 2 * time.Second

// Deadlines exist on connections only; a transport within the process has none.

func (w *response) writeDeadline(d time.Duration) { _ = w.control.SetWriteDeadline(after(d)) }
func (w *response) readDeadline(d time.Duration)  { _ = w.control.SetReadDeadline(after(d)) }

// after is d from now; never for 0.
func after(d time.Duration) time.Time {
	if d == 0 {
		return time.Time{}
	}
	return time.Now().Add(d)
}

// arriving is the body of a request. All of it must come until a time, or where stall is set
// no read may take longer than that.
type arriving struct {
	io.ReadCloser
	w     *response
	until time.Time
	stall time.Duration
	ended bool  // read to its end
	err   error // what broke it
	http1 bool
}

// Read reads under the deadline, which is lifted at the end: net/http then watches the
// connection to see the client leave.
func (a *arriving) Read(p []byte) (int, error) {
	if a.ended {
		return 0, io.EOF
	}
	until := a.until
	if a.stall > 0 {
		until = time.Now().Add(a.stall)
	}
	_ = a.w.control.SetReadDeadline(until)
	n, err := a.ReadCloser.Read(p)
	switch {
	case err == nil:
	case errors.Is(err, io.EOF):
		a.ended = true
		_ = a.w.control.SetReadDeadline(time.Time{})
	case errors.Is(err, os.ErrDeadlineExceeded):
		a.err = errStalled
		return n, errStalled
	default:
		a.err = err
	}
	return n, err
}

// errStalled is what a body ends with whose bytes did not come in time.
var errStalled = fmt.Errorf("no bytes came in time: %w", os.ErrDeadlineExceeded)

// writeJSON answers with a document.
func writeJSON(w *response, status int, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, err = w.Write(append(data, '\n'))
	return err
}

// writeList answers with a list, which is never null.
func writeList[T any](w *response, list []T, err error) error {
	if err != nil {
		return err
	}
	if list == nil {
		list = []T{}
	}
	return writeJSON(w, http.StatusOK, list)
}

// writeOne answers with one document.
func writeOne[T any](w *response, v T, err error) error {
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, v)
}
