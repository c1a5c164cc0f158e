package client

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"cloudlet/api"

	"github.com/stretchr/testify/require"
)

// worker serves one operation as the service does.
type worker struct {
	streams bool // else the answer to an event stream's request is the operation
	breaks  int  // the stream ends after so many events

	mu      sync.Mutex
	changed chan struct{}
	op      api.Operation
}

func newWorker() *worker {
	return &worker{streams: true, changed: make(chan struct{}), op: api.Operation{ID: "op", State: api.OperationRunning, Version: 1, Request: json.RawMessage("{}")}}
}

func (w *worker) set(f func(*api.Operation)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f(&w.op)
	w.op.Version++
	close(w.changed)
	w.changed = make(chan struct{})
}

func (w *worker) now() (api.Operation, <-chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.op, w.changed
}

func (w *worker) after(ctx context.Context, version int64) (api.Operation, bool) {
	for {
		op, changed := w.now()
		if op.Version > version {
			return op, true
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return op, false
		}
	}
}

func (w *worker) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	op, _ := w.now()
	switch {
	case r.Method == "DELETE" && op.State.Ended():
		refuse(rw, 409, api.Error{Code: api.Conflict, Detail: "ended"})
	case r.Method == "DELETE":
		w.set(func(op *api.Operation) {
			op.State, op.Error = api.OperationCancelled, &api.Error{Code: api.Cancelled, Detail: "cancelled"}
		})
		op, _ = w.now()
		answer(rw, 200, op)
	case r.Header.Get("Accept") == "text/event-stream" && w.streams:
		rw.Header().Set("Content-Type", "text/event-stream")
		version, _ := strconv.ParseInt(r.Header.Get("Last-Event-ID"), 10, 64)
		fmt.Fprint(rw, ": hello\n\n")
		for n := 0; n != w.breaks || n == 0; n++ {
			op, ok := w.after(r.Context(), version)
			if !ok {
				return
			}
			data, _ := json.Marshal(op)
			fmt.Fprintf(rw, "id: %d\nevent: operation\ndata: %s\n\n", op.Version, data)
			rw.(http.Flusher).Flush()
			if version = op.Version; op.State.Ended() {
				return
			}
		}
	case r.URL.Query().Has("wait"):
		version, _ := strconv.ParseInt(r.URL.Query().Get("after"), 10, 64)
		op, _ := w.after(r.Context(), version)
		answer(rw, 200, op)
	default:
		answer(rw, 200, op)
	}
}

func TestWait(t *testing.T) {
	for name, prepare := range map[string]func(*worker){
		"events":        func(*worker) {},
		"broken events": func(w *worker) { w.breaks = 1 },
		"polls":         func(w *worker) { w.streams = false },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorker()
			prepare(w)
			l := NewLocal(w)
			defer l.Close()
			c, err := New(Options{Server: "http://here", Transport: l})
			require.NoError(t, err)
			first, _ := w.now()
			seen := make(chan api.Operation, 10)
			go func() {
				w.set(func(op *api.Operation) { op.Phase, op.Done, op.Total = "copy", 1, 3 })
				<-seen // so that the states are seen singly
				w.set(func(op *api.Operation) { op.Done = 2 })
				<-seen
				w.set(func(op *api.Operation) { op.State, op.Result = api.OperationDone, json.RawMessage(`{"id":"base"}`) })
			}()
			var states []string
			op, err := c.Wait(t.Context(), first, func(op api.Operation) {
				states = append(states, fmt.Sprint(op.State, op.Done))
				seen <- op
			})
			require.NoError(t, err)
			require.Equal(t, []string{"running1", "running2", "done2"}, states)
			b, err := Result[api.Base](op)
			require.NoError(t, err)
			require.Equal(t, "base", b.ID)
		})
	}
}

func TestWaitEnded(t *testing.T) {
	c, err := New(Options{Server: "http://127.0.0.1:9"})
	require.NoError(t, err)
	op, err := c.Wait(t.Context(), api.Operation{ID: "x", State: api.OperationFailed, Error: &api.Error{Code: api.Damaged, Detail: "bad page"}}, nil)
	require.NoError(t, err)
	_, err = Result[api.Base](op)
	require.Equal(t, api.Damaged, api.CodeOf(err))
	_, err = Result[api.Base](api.Operation{State: api.OperationRunning})
	require.Equal(t, api.Conflict, api.CodeOf(err))
}

// TestWaitCancels: the end of ctx cancels the operation, unless it had ended or Follow is asked.
func TestWaitCancels(t *testing.T) {
	w := newWorker()
	over(t, w, func(t *testing.T, c *Client) {
		w.set(func(op *api.Operation) { op.State, op.Error = api.OperationRunning, nil })
		first, _ := w.now()
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(20*time.Millisecond, cancel)
		_, err := c.Follow(ctx, first, nil)
		require.ErrorIs(t, err, context.Canceled)
		now, _ := w.now()
		require.Equal(t, api.OperationRunning, now.State)

		op, err := c.Wait(ctx, first, nil)
		require.ErrorIs(t, err, context.Canceled)
		require.Equal(t, api.OperationCancelled, op.State)
		now, _ = w.now()
		require.Equal(t, api.OperationCancelled, now.State)

		w.set(func(op *api.Operation) { op.State, op.Result = api.OperationDone, json.RawMessage(`{}`) })
		op, err = c.Wait(ctx, first, nil)
		require.NoError(t, err, "it had succeeded before it could be cancelled")
		require.Equal(t, api.OperationDone, op.State)
	})
}

func TestEvents(t *testing.T) {
	var seen []int64
	read := func(text string) error {
		seen = nil
		return events(strings.NewReader(text), func() {}, func(op api.Operation) { seen = append(seen, op.Version) })
	}
	require.NoError(t, read(": comment\n\nid: 1\nevent: operation\ndata: {\ndata: \"version\":1}\n\nevent: other\ndata: nonsense\n\ndata: {}\n\nevent:operation\ndata:{\"version\":2,\"state\":\"done\"}\n\nevent: operation\ndata: {\"version\":3}\n\n"))
	require.Equal(t, []int64{1, 2}, seen, "nothing follows the final state")
	require.NoError(t, read("event: operation\ndata: {\"version\":1}"), "half an event does not count")
	require.Empty(t, seen)
	require.Error(t, read("event: operation\ndata: nonsense\n\n"))
	require.Error(t, read("data: "+strings.Repeat("x", maxEvent)))
}

// TestWaitBusy: a service that has no room at the moment is asked again.
func TestWaitBusy(t *testing.T) {
	w := newWorker()
	first, _ := w.now()
	asked := 0
	l := NewLocal(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if asked++; asked < 4 {
			refuse(rw, http.StatusServiceUnavailable, api.Error{Code: api.Unavailable, Detail: "512 requests are under way"})
			return
		}
		w.ServeHTTP(rw, r)
	}))
	defer l.Close()
	c, err := New(Options{Server: "http://here", Transport: l})
	require.NoError(t, err)
	w.set(func(op *api.Operation) { op.State = api.OperationDone })
	op, err := c.Wait(t.Context(), first, nil)
	require.NoError(t, err)
	require.Equal(t, api.OperationDone, op.State)
	require.True(t, answered(&api.Error{}))
	require.False(t, answered(c.unreachable(context.DeadlineExceeded)))
}
