package source_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"cloudlet/overlay/source"
)

// patient is quick with retries and slow to give up silence.
var patient = source.HTTPOptions{Backoff: time.Millisecond, MaxBackoff: 2 * time.Millisecond, Timeout: 10 * time.Second}

// badServer serves data well, but lets a test spoil any answer: spoil returns true if it
// has answered itself.
type badServer struct {
	*httptest.Server
	requests atomic.Int64

	mu    sync.Mutex
	etag  string
	spoil func(w http.ResponseWriter, r *http.Request) bool
}

var badData = bytes.Repeat([]byte("0123456789abcdef"), 20000) // 320,000 bytes

func newBadServer(t *testing.T, spoil func(http.ResponseWriter, *http.Request) bool) *badServer {
	s := &badServer{etag: `"v1"`, spoil: spoil}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.requests.Add(1)
		s.mu.Lock()
		etag, spoil := s.etag, s.spoil
		s.mu.Unlock()
		w.Header().Set("ETag", etag)
		if spoil == nil || !spoil(w, r) {
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(badData))
		}
	}))
	t.Cleanup(s.Close)
	return s
}

func (s *badServer) set(etag string, spoil func(http.ResponseWriter, *http.Request) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.etag, s.spoil = etag, spoil
}

func openBad(t *testing.T, s *badServer, o source.HTTPOptions) *source.HTTP {
	h, err := source.OpenHTTP(t.Context(), s.URL+"/o.zip", o)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, h.Close()) })
	return h
}

func status(code int) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(code); return true }
}

// raw answers 206 with given Content-Range and n bytes.
func raw(contentRange string, n int) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Content-Range", contentRange)
		w.WriteHeader(http.StatusPartialContent)
		w.Write(make([]byte, n)) // the client may have gone
		return true
	}
}

func TestOpenHTTPRefuses(t *testing.T) {
	for _, c := range []struct {
		name, want string
		temporary  bool
		spoil      func(http.ResponseWriter, *http.Request) bool
	}{
		{"ignores ranges", "does not support ranges: download the file and use its path", false, func(w http.ResponseWriter, r *http.Request) bool {
			w.Write(badData) // the client may have gone
			return true
		}},
		{"404", "404 Not Found: check the address", false, status(404)},
		{"403", "403 Forbidden: check that you are permitted", false, status(403)},
		{"418", "418 I'm a teapot", false, status(418)},
		{"500", "gave up after 6 attempts: the server answers 500", true, status(500)},
		{"429", "429", true, status(429)},
		{"no content range", "Content-Range", false, raw("", 10)},
		{"other range", "bytes 1-65536 of 320000, not with 0-65535", false, raw("bytes 1-65536/320000", 65536)},
		{"short range", "bytes 0-99 of 320000", false, raw("bytes 0-99/320000", 100)},
		{"size unknown", "Content-Range", false, raw("bytes 0-65535/*", 65536)},
		{"backwards", "Content-Range", false, raw("bytes 9-0/320000", 65536)},
		{"beyond size", "Content-Range", false, raw("bytes 0-65535/100", 65536)},
		{"negative", "Content-Range", false, raw("bytes -1-65535/320000", 65536)},
		{"wrong length", "announces 10 bytes", false, raw("bytes 0-65535/320000", 10)},
		{"no validator", "neither ETag nor Last-Modified", false, func(w http.ResponseWriter, r *http.Request) bool { w.Header().Del("ETag"); return false }},
		{"gzip", "encodes the file (gzip)", false, func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Content-Encoding", "gzip")
			w.Header().Set("Content-Range", "bytes 0-65535/320000")
			w.WriteHeader(http.StatusPartialContent)
			z := gzip.NewWriter(w)
			z.Write(badData) // the client may have gone
			z.Close()
			return true
		}},
		{"redirect loop", "more than 5 redirects", false, func(w http.ResponseWriter, r *http.Request) bool {
			http.Redirect(w, r, "/again", http.StatusFound)
			return true
		}},
		{"redirect to a file", "redirected to neither", false, func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Location", "ftp://host/x")
			w.WriteHeader(http.StatusFound)
			return true
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newBadServer(t, c.spoil)
			ref := strings.Replace(s.URL, "http://", "http://user:hunter2@", 1) + "/o.zip?token=hunter3"
			_, err := source.OpenHTTP(t.Context(), ref, patient)
			require.ErrorContains(t, err, c.want)
			require.ErrorContains(t, err, s.URL+"/o.zip?...")
			require.NotContains(t, err.Error(), "hunter")
			require.Equal(t, c.temporary, source.Temporary(err))
			if !c.temporary {
				require.LessOrEqual(t, s.requests.Load(), int64(6), "what is permanent is not tried again")
			}
		})
	}
}

func TestHTTPSToHTTPIsRefused(t *testing.T) {
	plain := newBadServer(t, nil)
	tls := httptest.NewTLSServer(http.RedirectHandler(plain.URL, http.StatusFound))
	t.Cleanup(tls.Close)
	o := patient
	o.Client = tls.Client()
	_, err := source.OpenHTTP(t.Context(), tls.URL, o)
	require.ErrorContains(t, err, "redirected from https to http")
	require.Zero(t, plain.requests.Load())
	o.Client = nil
	_, err = source.OpenHTTP(t.Context(), tls.URL, o)
	require.ErrorContains(t, err, "certificate")
	require.False(t, source.Temporary(err))
}

func TestHTTPRedirect(t *testing.T) {
	var token atomic.Value
	s := newBadServer(t, func(w http.ResponseWriter, r *http.Request) bool {
		token.Store(r.Header.Get("X-Token"))
		return false
	})
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, s.URL, http.StatusTemporaryRedirect)
	}))
	t.Cleanup(front.Close)
	o := patient
	o.Header = http.Header{"x-token": {"hunter2"}}
	h, err := source.OpenHTTP(t.Context(), front.URL, o)
	require.NoError(t, err)
	defer h.Close()
	requireRead(t, h, 100000, 200000)
	require.Empty(t, token.Load(), "the header is not for the other host")
	direct := openBad(t, s, o)
	require.Equal(t, "hunter2", token.Load())
	require.Equal(t, `"v1"`, direct.ETag())
}

func TestHTTPMaxSize(t *testing.T) {
	o := patient
	o.MaxSize = int64(len(badData)) - 1
	_, err := source.OpenHTTP(t.Context(), newBadServer(t, nil).URL, o)
	require.ErrorContains(t, err, "the limit is 319999")
}

func requireRead(t *testing.T, h *source.HTTP, off, n int) {
	p := make([]byte, n)
	_, err := h.ReadAt(t.Context(), p, int64(off))
	require.NoError(t, err)
	require.True(t, bytes.Equal(badData[off:off+n], p))
}

// TestHTTPRecovers breaks answers in ways that pass.
func TestHTTPRecovers(t *testing.T) {
	hijack := func(n int) func(w http.ResponseWriter, r *http.Request) {
		return func(w http.ResponseWriter, r *http.Request) { // breaks off after n bytes of the body
			var first, last int
			fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &first, &last)
			last = min(last, len(badData)-1)
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", first, last, len(badData)))
			w.Header().Set("Content-Length", fmt.Sprint(last-first+1))
			w.WriteHeader(http.StatusPartialContent)
			w.Write(badData[first:min(first+n, last+1)]) // the client sees what follows
			if first+n <= last {
				panic(http.ErrAbortHandler)
			}
		}
	}
	for _, c := range []struct {
		name  string
		times int64 // how many answers are bad
		bad   func(w http.ResponseWriter, r *http.Request)
	}{
		{"500 then right", 3, func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(500) }},
		{"reset", 3, func(w http.ResponseWriter, r *http.Request) { panic(http.ErrAbortHandler) }},
		{"short body", 2, hijack(1000)},
		{"closes after 64 KiB, always", 1 << 60, hijack(64 << 10)},
		{"closes after 9000 bytes, always", 1 << 60, hijack(9000)},
		{"closes after the header", 4, hijack(0)},
	} {
		t.Run(c.name, func(t *testing.T) {
			var count atomic.Int64
			spoil := func(w http.ResponseWriter, r *http.Request) bool {
				if count.Add(1) > c.times {
					return false
				}
				c.bad(w, r)
				return true
			}
			h := openBad(t, newBadServer(t, spoil), patient)
			require.EqualValues(t, len(badData), h.Size())
			count.Store(0)
			requireRead(t, h, 10, 300000)
			count.Store(0)
			requireRead(t, h, 65536, 1)
		})
	}
}

func TestHTTPOutage(t *testing.T) {
	s := newBadServer(t, nil)
	o := patient
	o.Retries = 2
	h := openBad(t, s, o)
	s.set(`"v1"`, status(503))
	before := s.requests.Load()
	_, err := h.ReadAt(t.Context(), make([]byte, 10), 100000)
	require.ErrorContains(t, err, "gave up after 3 attempts")
	require.True(t, source.Temporary(err))
	require.Equal(t, before+3, s.requests.Load())
	requireRead(t, h, 0, 65536) // is at hand
	s.set(`"v1"`, nil)
	requireRead(t, h, 100000, 10)
	s.Close()
	_, err = h.ReadAt(t.Context(), make([]byte, 10), 100000)
	require.True(t, source.Temporary(err))
	o.Retries = -1
	_, err = source.OpenHTTP(t.Context(), s.URL, o)
	require.ErrorContains(t, err, "refused")
	require.True(t, source.Temporary(err))
}

func TestHTTPChanged(t *testing.T) {
	for _, c := range []struct {
		name  string
		etag  string
		spoil func(http.ResponseWriter, *http.Request) bool
	}{
		{"other etag, whole file", `"v2"`, nil},
		{"other etag, range", `"v2"`, func(w http.ResponseWriter, r *http.Request) bool { r.Header.Del("If-Range"); return false }},
		{"other size", `"v1"`, raw("bytes 100000-100009/320001", 10)},
		{"shorter", `"v1"`, status(http.StatusRequestedRangeNotSatisfiable)},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newBadServer(t, nil)
			h := openBad(t, s, patient)
			requireRead(t, h, 100000, 10)
			s.set(c.etag, c.spoil)
			before := s.requests.Load()
			_, err := h.ReadAt(t.Context(), make([]byte, 10), 100000)
			require.ErrorIs(t, err, source.ErrChanged)
			require.False(t, source.Temporary(err))
			require.Equal(t, before+1, s.requests.Load())
		})
	}
}

func TestHTTPWeakETag(t *testing.T) {
	s := newBadServer(t, func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("If-Range") != "" {
			panic("a weak ETag cannot stand in If-Range")
		}
		return false
	})
	s.etag = `W/"v1"`
	h := openBad(t, s, patient)
	requireRead(t, h, 100000, 10)
}

// TestHTTPSilence meets a server that hangs after the headers, and one that trickles.
func TestHTTPSilence(t *testing.T) {
	release := make(chan struct{})
	s := newBadServer(t, nil)
	o := patient
	o.Timeout, o.Retries = 50*time.Millisecond, 1
	h := openBad(t, s, o)
	s.set(`"v1"`, func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Content-Range", "bytes 100000-100009/320000")
		w.WriteHeader(http.StatusPartialContent)
		w.(http.Flusher).Flush()
		select {
		case <-release:
		case <-r.Context().Done():
		}
		return true
	})
	_, err := h.ReadAt(t.Context(), make([]byte, 10), 100000)
	require.ErrorContains(t, err, "the server sends nothing for 50ms")
	require.True(t, source.Temporary(err))

	ctx, cancel := context.WithCancel(t.Context())
	long := openBadAfter(t, s)
	done := make(chan error)
	go func() {
		_, err := long.ReadAt(ctx, make([]byte, 10), 100000)
		done <- err
	}()
	cancel()
	err = <-done
	require.ErrorIs(t, err, context.Canceled)
	require.False(t, source.Temporary(err))
	close(release)
}

// openBadAfter opens while the server is well, with timeouts that no test waits for.
func openBadAfter(t *testing.T, s *badServer) *source.HTTP {
	s.mu.Lock()
	spoil := s.spoil
	s.mu.Unlock()
	s.set(`"v1"`, nil)
	h := openBad(t, s, patient)
	s.set(`"v1"`, spoil)
	return h
}

func TestHTTPSendsMore(t *testing.T) {
	s := newBadServer(t, nil)
	h := openBad(t, s, patient)
	s.set(`"v1"`, func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Content-Range", "bytes 100000-100009/320000")
		w.WriteHeader(http.StatusPartialContent)
		w.(http.Flusher).Flush() // chunked: no length is announced
		w.Write(make([]byte, 20))
		return true
	})
	_, err := h.ReadAt(t.Context(), make([]byte, 10), 100000)
	require.ErrorContains(t, err, "more bytes than were asked for")
	require.False(t, source.Temporary(err))
}

// TestSparseAnswers: an answer to If-Range may leave out what its ETag says better.
func TestSparseAnswers(t *testing.T) {
	s := newBadServer(t, func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("If-Range") == "" {
			w.Header().Set("Last-Modified", "Sat, 28 Nov 2026 12:00:00 GMT")
		}
		return false
	})
	h := openBad(t, s, patient)
	p := make([]byte, 100)
	_, err := h.ReadAt(t.Context(), p, 70000)
	require.NoError(t, err)
	require.Equal(t, badData[70000:70100], p)
	s.set(`"v2"`, nil)
	_, err = h.ReadAt(t.Context(), p, 70000)
	require.ErrorIs(t, err, source.ErrChanged)
}
