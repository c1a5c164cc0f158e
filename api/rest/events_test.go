package rest

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"cloudlet/api"

	"github.com/stretchr/testify/require"
)

// served is a rig behind a real listener on the loopback.
type served struct {
	*rig
	url  string
	addr string
	http *http.Client
	stop context.CancelFunc
	done chan error
}

func serveRig(t *testing.T, limits Limits, change func(*Server)) *served {
	r := newRig(t, limits)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	ctx, stop := context.WithCancel(t.Context())
	transport := &http.Transport{}
	s := &served{rig: r, url: "http://" + l.Addr().String(), addr: l.Addr().String(), http: &http.Client{Transport: transport}, stop: stop, done: make(chan error, 1)}
	srv := &Server{Handler: r.handler, Drain: 5 * time.Second}
	if change != nil {
		change(srv)
	}
	go func() { s.done <- srv.Serve(ctx, l) }()
	t.Cleanup(func() {
		stop()
		transport.CloseIdleConnections()
		if err, ok := <-s.done; ok {
			require.NoError(t, err)
		}
	})
	return s
}

// end stops the server and waits for that.
func (s *served) end() {
	s.stop()
	require.NoError(s.t, <-s.done)
	close(s.done)
}

func (s *served) request(ctx context.Context, method, path string, body io.Reader, header ...string) *http.Response {
	s.t.Helper()
	req, err := http.NewRequestWithContext(ctx, method, s.url+path, body)
	require.NoError(s.t, err)
	req.Header.Set("Authorization", "Bearer "+operateToken)
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := s.http.Do(req)
	require.NoError(s.t, err)
	s.t.Cleanup(func() { _ = resp.Body.Close() })
	return resp
}

// event is one of a stream; a comment has only text.
type event struct {
	id, name string
	op       api.Operation
	comment  string
}

func nextEvent(t *testing.T, r *bufio.Reader) (event, error) {
	t.Helper()
	var e event
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return e, err
		}
		line = strings.TrimSuffix(line, "\n")
		key, value, _ := strings.Cut(line, ": ")
		switch {
		case line == "":
			return e, nil
		case key == "":
			e.comment = value
		case key == "id":
			e.id = value
		case key == "event":
			e.name = value
		case key == "data" && e.name == "operation":
			require.NoError(t, json.Unmarshal([]byte(value), &e.op))
		}
	}
}

func TestEventsFromBeginToEnd(t *testing.T) {
	s := serveRig(t, Limits{}, nil)
	op := s.begin()
	resp := s.request(t.Context(), "GET", "/v1/operations/"+op.ID, nil, "Accept", typeEvents)
	require.Equal(t, typeEvents, resp.Header.Get("Content-Type"))
	r := bufio.NewReader(resp.Body)
	e, err := nextEvent(t, r)
	require.NoError(t, err)
	require.Equal(t, "1", e.id)
	require.Equal(t, "operation", e.name)
	s.fake.update(op.ID, func(op *api.Operation) { op.Phase, op.Done, op.Total = "mount", 3, 9 })
	e, err = nextEvent(t, r)
	require.NoError(t, err)
	require.Equal(t, "mount", e.op.Phase)
	require.Equal(t, "2", e.id)
	s.fake.finish(op.ID)
	e, err = nextEvent(t, r)
	require.NoError(t, err)
	require.Equal(t, api.OperationDone, e.op.State)
	_, err = nextEvent(t, r)
	require.ErrorIs(t, err, io.EOF)

	// Who lost the connection after the second gets the last one only.
	resp = s.request(t.Context(), "GET", "/v1/operations/"+op.ID, nil, "Accept", typeEvents, "Last-Event-ID", "2")
	r = bufio.NewReader(resp.Body)
	e, err = nextEvent(t, r)
	require.NoError(t, err)
	require.Equal(t, "3", e.id)
	_, err = nextEvent(t, r)
	require.ErrorIs(t, err, io.EOF)
}

func TestEventsAreKeptAlive(t *testing.T) {
	s := serveRig(t, Limits{Keep: time.Millisecond}, nil)
	op := s.begin()
	resp := s.request(t.Context(), "GET", "/v1/operations/"+op.ID+"?after=1", nil, "Accept", typeEvents)
	e, err := nextEvent(t, bufio.NewReader(resp.Body))
	require.NoError(t, err)
	require.NotEmpty(t, e.comment)
}

// TestEventsEndWithTheClient: a client that leaves leaves nothing behind.
func TestEventsEndWithTheClient(t *testing.T) {
	s := serveRig(t, Limits{}, nil)
	op := s.begin()
	ctx, cancel := context.WithCancel(t.Context())
	resp := s.request(ctx, "GET", "/v1/operations/"+op.ID, nil, "Accept", typeEvents)
	_, err := nextEvent(t, bufio.NewReader(resp.Body))
	require.NoError(t, err)
	cancel()
	require.Eventually(t, func() bool {
		s.fake.mu.Lock()
		defer s.fake.mu.Unlock()
		return s.fake.watch == 0 && len(s.handler.(*server).slots) == 0
	}, 5*time.Second, time.Millisecond)
}

func TestEventsThatBreak(t *testing.T) {
	s := serveRig(t, Limits{}, nil)
	op := s.begin()
	s.fake.fail["OperationEvents"] = api.Errorf(api.NotFound, "it is gone")
	resp := s.request(t.Context(), "GET", "/v1/operations/"+op.ID, nil, "Accept", typeEvents)
	body := text(t, resp)
	require.Contains(t, body, "event: problem\ndata: {")
	require.Contains(t, body, "it is gone")
}

func TestLongPoll(t *testing.T) {
	s := serveRig(t, Limits{}, nil)
	op := s.begin()
	// A version that is not the newest is answered at once, the newest one with the next.
	require.Equal(t, int64(1), as[api.Operation](t, s.request(t.Context(), "GET", "/v1/operations/"+op.ID+"?wait=60&after=0", nil)).Version)
	answers := make(chan *http.Response, 2)
	for _, query := range []string{"?wait=60&after=1", "?wait=60"} {
		req, err := http.NewRequestWithContext(t.Context(), "GET", s.url+"/v1/operations/"+op.ID+query, nil)
		require.NoError(t, err)
		req.Header.Set("Authorization", "Bearer "+readToken)
		go func() {
			resp, err := s.http.Do(req)
			if err == nil {
				answers <- resp
			} else {
				close(answers)
			}
		}()
		if query == "?wait=60" {
			continue
		}
		require.Eventually(t, func() bool { return len(s.handler.(*server).slots) == 1 }, 5*time.Second, time.Millisecond)
		s.fake.update(op.ID, func(op *api.Operation) { op.Phase = "mount" })
		require.Equal(t, "mount", as[api.Operation](t, closing(t, <-answers)).Phase)
	}
	// Without after only the end is waited for.
	require.Eventually(t, func() bool { return len(s.handler.(*server).slots) == 1 }, 5*time.Second, time.Millisecond)
	s.fake.update(op.ID, func(op *api.Operation) { op.Phase = "resume" })
	s.fake.finish(op.ID)
	require.Equal(t, api.OperationDone, as[api.Operation](t, closing(t, <-answers)).State)
	// The time is bounded.
	other := s.begin()
	require.Equal(t, api.OperationRunning, as[api.Operation](t, s.request(t.Context(), "GET", "/v1/operations/"+other.ID+"?wait=0", nil)).State)
}

func closing(t *testing.T, resp *http.Response) *http.Response {
	require.NotNil(t, resp)
	t.Cleanup(func() { _ = resp.Body.Close() })
	return resp
}

// TestGracefulStop: who waits is told the present state, who works may finish.
func TestGracefulStop(t *testing.T) {
	s := serveRig(t, Limits{}, nil)
	op := s.begin()
	gate := make(chan empty)
	s.fake.gate["Bases"] = gate
	stream := s.request(t.Context(), "GET", "/v1/operations/"+op.ID+"?after=1", nil, "Accept", typeEvents)
	answers := make(chan *http.Response, 2)
	for _, path := range []string{"/v1/operations/" + op.ID + "?wait=60", "/v1/bases"} {
		req, err := http.NewRequestWithContext(t.Context(), "GET", s.url+path, nil)
		require.NoError(t, err)
		req.Header.Set("Authorization", "Bearer "+readToken)
		go func() {
			if resp, err := s.http.Do(req); err == nil {
				answers <- resp
			} else {
				close(answers)
			}
		}()
	}
	require.Eventually(t, func() bool { return len(s.handler.(*server).slots) == 3 }, 5*time.Second, time.Millisecond)
	s.stop()
	e, err := nextEvent(t, bufio.NewReader(stream.Body))
	require.NoError(t, err)
	require.Equal(t, api.OperationRunning, e.op.State)
	require.Equal(t, api.OperationRunning, as[api.Operation](t, closing(t, <-answers)).State)
	require.Eventually(t, func() bool {
		c, err := net.Dial("tcp", s.addr)
		if err == nil {
			_ = c.Close()
		}
		return err != nil
	}, 5*time.Second, time.Millisecond, "it still takes connections")
	close(gate)
	require.Equal(t, 200, closing(t, <-answers).StatusCode)
	s.end()
}

// TestStopIsBounded: a request that does not end is broken off.
func TestStopIsBounded(t *testing.T) {
	s := serveRig(t, Limits{}, func(srv *Server) { srv.Drain = 10 * time.Millisecond })
	s.fake.gate["Bases"] = make(chan empty) // only the end of the request's context ends it
	failed := make(chan error, 1)
	req, err := http.NewRequestWithContext(t.Context(), "GET", s.url+"/v1/bases", nil)
	require.NoError(t, err)
	req.Header.Set("Authorization", "Bearer "+readToken)
	go func() {
		resp, err := s.http.Do(req)
		if err == nil {
			_ = resp.Body.Close()
		}
		failed <- err
	}()
	require.Eventually(t, func() bool { return len(s.handler.(*server).slots) == 1 }, 5*time.Second, time.Millisecond)
	s.end()
	require.Error(t, <-failed)
	require.Eventually(t, func() bool { return len(s.handler.(*server).slots) == 0 }, 5*time.Second, time.Millisecond)
}
