package client

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"

	"cloudlet/api"

	"github.com/stretchr/testify/require"
)

// receiver takes uploads as the service does; each PUT gets through so many bytes, and then
// its connection breaks.
type receiver struct {
	each int64
	lies bool // the answer to a CreateUpload names a wrong offset
	full bool // what has arrived is not taken in
	busy int  // so often it cannot be removed: it is still being written

	mu   sync.Mutex
	up   api.Upload
	got  []byte
	puts int
	gone bool
}

func (s *receiver) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch r.Method {
	case "POST":
		s.up = api.Upload{ID: "upload-1", Size: 10}
		up := s.up
		if s.lies {
			up.Offset = 3
		}
		answer(w, 201, up)
	case "GET":
		answer(w, 200, s.up)
	case "DELETE":
		if s.busy > 0 {
			s.busy--
			refuse(w, 409, api.Error{Code: api.Conflict, Detail: "bytes are arriving"})
			return
		}
		s.gone = true
		w.WriteHeader(204)
	case "PUT":
		s.puts++
		var from, to, size int64
		finish := func() {
			if s.full {
				w.Header().Set("Upload-Offset", fmt.Sprint(s.up.Offset))
				refuse(w, 409, api.Error{Code: api.Conflict, Detail: "the name is taken"})
				return
			}
			answer(w, 202, api.Operation{ID: "op"})
		}
		if s.up.Offset == s.up.Size {
			finish()
			return
		}
		if n, _ := fmt.Sscanf(r.Header.Get("Content-Range"), "bytes %d-%d/%d", &from, &to, &size); n != 3 || size != s.up.Size || to != size-1 || r.ContentLength != size-from {
			refuse(w, 400, api.Error{Code: api.Invalid, Detail: "range " + r.Header.Get("Content-Range")})
			return
		}
		if from != s.up.Offset {
			w.Header().Set("Upload-Offset", fmt.Sprint(s.up.Offset))
			refuse(w, 409, api.Error{Code: api.Conflict, Detail: "wrong offset"})
			return
		}
		b, _ := io.ReadAll(io.LimitReader(r.Body, s.each))
		s.got = append(s.got, b...)
		s.up.Offset += int64(len(b))
		if s.up.Offset < s.up.Size {
			panic(http.ErrAbortHandler)
		}
		finish()
	}
}

func TestSendOverlay(t *testing.T) {
	for name, s := range map[string]*receiver{"whole": {each: 100}, "pieces": {each: 3}, "wrong offset": {each: 100, lies: true}} {
		t.Run(name, func(t *testing.T) {
			l := NewLocal(s)
			defer l.Close()
			c, err := New(Options{Server: "http://here", Transport: l})
			require.NoError(t, err)
			op, err := c.SendOverlay(t.Context(), "", strings.NewReader("0123456789"), 10, nil)
			require.NoError(t, err)
			require.Equal(t, "op", op.ID)
			require.Equal(t, "0123456789", string(s.got))
			require.False(t, s.gone)
		})
	}
}

// TestResumeComplete: all bytes are there, but the answer to the last ones was lost.
func TestResumeComplete(t *testing.T) {
	s := &receiver{up: api.Upload{ID: "upload-1", Size: 10, Offset: 10}}
	l := NewLocal(s)
	defer l.Close()
	c, err := New(Options{Server: "http://here", Transport: l})
	require.NoError(t, err)
	op, err := c.ResumeUpload(t.Context(), s.up, strings.NewReader(""), nil)
	require.NoError(t, err)
	require.Equal(t, "op", op.ID)
}

// TestSendOverlayGivenUp: nothing stays at the service when the caller gives up, or when what
// is sent cannot be right.
func TestSendOverlayGivenUp(t *testing.T) {
	s := &receiver{each: 1}
	l := NewLocal(s)
	defer l.Close()
	c, err := New(Options{Server: "http://here", Transport: l})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	_, err = c.SendOverlay(ctx, "", bytes.NewReader(make([]byte, 10)), 10, func(_ string, done, _ int64) {
		if done > 2 {
			cancel()
		}
	})
	require.ErrorIs(t, err, context.Canceled)
	require.True(t, s.gone)

	*s = receiver{each: 1, busy: 3}
	ctx, cancel = context.WithCancel(t.Context())
	_, err = c.SendOverlay(ctx, "", bytes.NewReader(make([]byte, 10)), 10, func(string, int64, int64) { cancel() })
	require.ErrorIs(t, err, context.Canceled)
	require.True(t, s.gone, "also where it was still being written")

	*s = receiver{each: 100, full: true}
	_, err = c.SendOverlay(t.Context(), "", bytes.NewReader(make([]byte, 10)), 10, nil)
	require.ErrorContains(t, err, "the name is taken")
	require.Less(t, s.puts, 3, "it is not tried again and again")
	require.True(t, s.gone)

	s.gone = false
	_, err = c.SendOverlay(t.Context(), "", bytes.NewReader(make([]byte, 5)), 10, nil)
	require.ErrorIs(t, err, io.ErrUnexpectedEOF)
	require.True(t, s.gone)
}
