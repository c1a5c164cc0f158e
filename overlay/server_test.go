package overlay

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"cloudlet/overlay/source"
)

// TestBadServers fetches and reads a whole image from web servers that misbehave once it is
// open: it is right in the end, or the fault is named; no byte is wrong.
func TestBadServers(t *testing.T) {
	base, w, b := farVM(t, 500, "none,frame=16K")
	ok := func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", `"v1"`)
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
	}
	span := func(r *http.Request) (first, last int) {
		fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &first, &last)
		return first, min(last, len(b)-1)
	}
	begin := func(w http.ResponseWriter, first, last int) {
		w.Header().Set("ETag", `"v1"`)
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", first, last, len(b)))
		w.Header().Set("Content-Length", fmt.Sprint(last-first+1))
		w.WriteHeader(http.StatusPartialContent)
	}
	sometimes := func(bad http.HandlerFunc) http.HandlerFunc {
		var n atomic.Int64
		return func(w http.ResponseWriter, r *http.Request) {
			if n.Add(1)%3 == 0 {
				bad(w, r)
				return
			}
			ok(w, r)
		}
	}
	garbage := func(w http.ResponseWriter, r *http.Request) {
		first, last := span(r)
		begin(w, first, last)
		w.Write(make([]byte, last-first+1)) // the client sees what comes
	}
	for _, c := range []struct {
		name, want string // empty: all comes
		bad        http.HandlerFunc
	}{
		{"closes after 64 KiB", "", func(w http.ResponseWriter, r *http.Request) {
			first, last := span(r)
			begin(w, first, last)
			n := min(last+1, first+64<<10)
			w.Write(b[first:n])
			if n <= last {
				panic(http.ErrAbortHandler)
			}
		}},
		{"hangs after the header, sometimes", "", sometimes(func(w http.ResponseWriter, r *http.Request) {
			first, last := span(r)
			begin(w, first, last)
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		})},
		{"garbage, sometimes", "", func() http.HandlerFunc {
			var seen sync.Map // each range is damaged on its way once: more often is damage for good
			return func(w http.ResponseWriter, r *http.Request) {
				first, _ := span(r)
				if _, again := seen.LoadOrStore(first, true); again {
					ok(w, r)
					return
				}
				garbage(w, r)
			}
		}()},
		{"garbage", "is damaged", garbage},
		{"resets, sometimes", "", sometimes(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })},
		{"busy, sometimes", "", sometimes(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) })},
		{"changed", "changed while in use", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("ETag", `"v2"`)
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
		}},
		{"shorter", "changed while in use", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("ETag", `"v1"`)
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b[:len(b)-1]))
		}},
		{"ignores ranges", "does not support ranges", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("ETag", `"v1"`)
			w.Write(b)
		}},
		{"other lengths", "announces", func(w http.ResponseWriter, r *http.Request) {
			first, last := span(r)
			w.Header().Set("ETag", `"v1"`)
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", first, last, len(b)))
			w.Header().Set("Content-Length", "7")
			w.WriteHeader(http.StatusPartialContent)
			w.Write(b[first : first+7])
		}},
		{"redirects to a refused address", "redirected: not there", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://127.0.0.2:1/", http.StatusFound)
		}},
		{"gone", "404", http.NotFound},
	} {
		t.Run(c.name, func(t *testing.T) {
			var bad atomic.Bool
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if bad.Load() {
					c.bad(w, r)
					return
				}
				ok(w, r)
			}))
			t.Cleanup(srv.Close)
			src, err := source.OpenHTTP(t.Context(), srv.URL, source.HTTPOptions{
				Backoff: time.Millisecond, MaxBackoff: 2 * time.Millisecond, Timeout: 100 * time.Millisecond, Retries: 20,
				Check: func(u *url.URL) error {
					if u.Hostname() != "127.0.0.1" {
						return fmt.Errorf("not there")
					}
					return nil
				},
			})
			require.NoError(t, err)
			r, err := OpenWith(t.Context(), src, OpenOptions{Cache: emptyCache(t, len(b))})
			require.NoError(t, err)
			t.Cleanup(func() { require.NoError(t, r.Close()) })
			im := newImage(t, base, r)
			bad.Store(true)
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			err = im.Fetch(ctx, []Addr{400, 30}, FetchOptions{})
			p := make([]byte, PageSize)
			if c.want == "" {
				require.NoError(t, err)
				requireImage(t, im, w)
				return
			}
			if c.name != "garbage" { // which may be of single frames
				require.ErrorContains(t, err, c.want)
			}
			require.ErrorContains(t, im.ReadPages(ctx, Memory, p, 450*PageSize), c.want)
			require.False(t, r.Complete())
		})
	}
}

// TestSpooledImage reads an image from a server that knows no ranges, while it comes.
func TestSpooledImage(t *testing.T) {
	base, w, b := farVM(t, 500, "none,frame=16K")
	release := make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(len(b)))
		w.Write(b[:len(b)/2])
		w.(http.Flusher).Flush()
		if r.Header.Get("Range") == "" {
			<-release
		}
		w.Write(b[len(b)/2:])
	}))
	t.Cleanup(srv.Close)
	src, err := source.OpenHTTP(t.Context(), srv.URL, source.HTTPOptions{Spool: t.TempDir()})
	require.NoError(t, err)
	r, err := OpenWith(t.Context(), src, OpenOptions{Cache: emptyCache(t, len(b))})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, r.Close()) })
	im := newImage(t, base, r)
	p := make([]byte, PageSize)
	require.NoError(t, im.ReadPages(t.Context(), Memory, p, 0))
	require.Equal(t, w.page(0), p)
	require.False(t, r.Complete())
	done := make(chan error, 1)
	go func() { done <- im.Fetch(t.Context(), nil, FetchOptions{}) }()
	close(release)
	require.NoError(t, <-done)
	require.True(t, r.Complete())
	requireImage(t, im, w)
}
