package rest

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"mime"
	"net/http"
	"strings"
	"time"

	"cloudlet/api"
)

const typeEvents = "text/event-stream"

// wantsEvents reports whether a client asks for an event stream.
func wantsEvents(r *http.Request) bool {
	for _, value := range r.Header.Values("Accept") {
		for one := range strings.SplitSeq(value, ",") {
			if kind, _, err := mime.ParseMediaType(strings.TrimSpace(one)); err == nil && kind == typeEvents {
				return true
			}
		}
	}
	return false
}

// state is one element of an operation's stream.
type state struct {
	op  api.Operation
	err error
}

// events sends the states of an operation until its end. Where a client goes on from is its
// Last-Event-ID, else after. A client that has the final state is told 204, which ends its
// reconnecting.
func (s *server) events(w *response, r *http.Request, after int64) error {
	if last := r.Header.Values("Last-Event-ID"); len(last) > 0 {
		n, err := number("Last-Event-ID", last[0], math.MaxInt64)
		if err != nil {
			return err
		}
		after = n
	}
	id := r.PathValue("id")
	op, err := s.service.Operation(r.Context(), id)
	if err != nil {
		return err
	}
	if op.State.Ended() && op.Version <= after {
		w.WriteHeader(http.StatusNoContent)
		return nil
	}
	w.Header().Set("Content-Type", typeEvents)
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Accel-Buffering", "no")
	w.WriteHeader(http.StatusOK)
	if r.Method == http.MethodHead {
		return nil
	}
	if err := w.flush(); err != nil {
		return err
	}

	ctx, cancel := context.WithCancel(r.Context())
	states := make(chan state)
	go func() {
		defer close(states)
		for op, err := range s.service.OperationEvents(ctx, op.ID, after) {
			select {
			case states <- state{op, err}:
			case <-ctx.Done():
				return
			}
		}
	}()
	defer func() {
		cancel()
		for range states { // until the goroutine has ended
		}
	}()
	return s.stream(w, r, op.ID, states)
}

// stream writes states as they come, and comments where none come.
func (s *server) stream(w *response, r *http.Request, id string, states <-chan state) error {
	keep := time.NewTicker(s.limits.Keep)
	defer keep.Stop()
	for {
		var err error
		select {
		case st, ok := <-states:
			switch {
			case !ok:
				return nil
			case st.err != nil:
				return s.sendProblem(w, st.err)
			}
			err = sendState(w, st.op)
			keep.Reset(s.limits.Keep)
		case <-keep.C:
			if _, err = w.Write([]byte(": still here\n\n")); err == nil {
				err = w.flush()
			}
		case <-stopping(r.Context()):
			op, err := s.service.Operation(r.Context(), id)
			if err != nil {
				return s.sendProblem(w, err)
			}
			return sendState(w, op)
		case <-r.Context().Done():
			return nil
		}
		if err != nil {
			return nil // the client has left
		}
	}
}

// sendState writes one event: the version is its id, the operation its data.
func sendState(w *response, op api.Operation) error {
	data, err := json.Marshal(op)
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintf(w, "id: %d\nevent: operation\ndata: %s\n\n", op.Version, data); err != nil {
		return err
	}
	return w.flush()
}

// sendProblem ends a stream that cannot go on with an event "problem".
func (s *server) sendProblem(w *response, cause error) error {
	p, _ := problemOf(cause)
	data, err := json.Marshal(p)
	if err != nil {
		return err
	}
	s.log.Warn("event stream broken off", "problem", cause)
	if _, err := fmt.Fprintf(w, "event: problem\ndata: %s\n\n", data); err != nil {
		return err
	}
	return w.flush()
}
