package client

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func do(t *testing.T, l *Local, ctx context.Context, method string, body io.Reader) (*http.Response, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(ctx, method, "http://here/x?y=z", body)
	require.NoError(t, err)
	return (&http.Client{Transport: l}).Do(req)
}

// TestLocalStreams: request and answer flow at the same time, piece by piece.
func TestLocalStreams(t *testing.T) {
	l := NewLocal(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X", "before")
		w.WriteHeader(http.StatusAccepted)
		w.Header().Set("X", "too late")
		buf := make([]byte, 4)
		for {
			n, err := r.Body.Read(buf)
			if _, werr := w.Write(bytes.ToUpper(buf[:n])); werr != nil || err != nil {
				return
			}
		}
	}))
	defer l.Close()
	pr, pw := io.Pipe()
	resp, err := do(t, l, t.Context(), "PUT", pr)
	require.NoError(t, err)
	require.Equal(t, http.StatusAccepted, resp.StatusCode)
	require.Equal(t, "before", resp.Header.Get("X"))
	got := make([]byte, 2)
	for _, word := range []string{"ab", "cd", "ef"} {
		_, err := io.WriteString(pw, word)
		require.NoError(t, err)
		_, err = io.ReadFull(resp.Body, got)
		require.NoError(t, err)
		require.Equal(t, strings.ToUpper(word), string(got))
	}
	require.NoError(t, pw.Close())
	rest, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.Empty(t, rest)
	require.NoError(t, resp.Body.Close())
}

// TestLocalCancel: a handler that waits, reads or writes ends with the caller's ctx, and when
// the body of the answer is closed.
func TestLocalCancel(t *testing.T) {
	for name, wait := range map[string]func(http.ResponseWriter, *http.Request){
		"waits":  func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
		"reads":  func(_ http.ResponseWriter, r *http.Request) { io.Copy(io.Discard, r.Body) },
		"writes": func(w http.ResponseWriter, _ *http.Request) { io.Copy(w, zeros{}) },
	} {
		for _, sent := range []bool{false, true} {
			if name == "writes" && !sent {
				continue // the first byte sends the header
			}
			t.Run(name, func(t *testing.T) {
				never, w := io.Pipe()
				defer w.Close()
				entered := make(chan struct{})
				l := NewLocal(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if sent {
						require.NoError(t, http.NewResponseController(w).Flush())
					}
					close(entered)
					wait(w, r)
				}))
				ctx, cancel := context.WithCancel(t.Context())
				if !sent {
					go func() { <-entered; cancel() }()
					_, err := do(t, l, ctx, "PUT", never)
					require.ErrorIs(t, err, context.Canceled)
					l.Close() // the handler has returned
					return
				}
				resp, err := do(t, l, ctx, "PUT", never)
				require.NoError(t, err)
				cancel()
				_, err = io.Copy(io.Discard, resp.Body)
				require.ErrorIs(t, err, context.Canceled)
				require.NoError(t, resp.Body.Close())
				l.Close()
			})
		}
	}
	t.Run("closed", func(t *testing.T) {
		l := NewLocal(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}))
		resp, err := do(t, l, t.Context(), "GET", nil)
		require.NoError(t, err)
		require.NoError(t, resp.Body.Close())
		l.Close()
	})
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

func TestLocalPanic(t *testing.T) {
	l := NewLocal(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == "PUT" {
			io.WriteString(w, "half")
			panic(http.ErrAbortHandler)
		}
		panic("broken")
	}))
	defer l.Close()
	_, err := do(t, l, t.Context(), "GET", nil)
	require.ErrorContains(t, err, "broken")
	resp, err := do(t, l, t.Context(), "PUT", nil)
	require.NoError(t, err)
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	require.Equal(t, "half", string(got))
	require.ErrorIs(t, err, io.ErrUnexpectedEOF)
}
