package source_test

import (
	"bytes"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"cloudlet/integration/need"
	"cloudlet/overlay/source"
	"cloudlet/overlay/source/sourcetest"
)

// whole answers every request with the whole file, of which n bytes come.
func whole(data []byte, n int) func(w http.ResponseWriter, r *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Content-Length", fmt.Sprint(len(data)))
		w.Write(data[:n]) // the client may have gone
		if n < len(data) {
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}
		return true
	}
}

func spooled(t *testing.T) source.HTTPOptions {
	o := patient
	o.Spool = t.TempDir()
	return o
}

func TestSpoolConformance(t *testing.T) {
	sourcetest.Run(t, func(t *testing.T, data []byte) source.Source {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { whole(data, len(data))(w, r) }))
		t.Cleanup(srv.Close)
		o := spooled(t)
		h, err := source.OpenHTTP(t.Context(), srv.URL, o)
		require.NoError(t, err)
		require.Equal(t, len(data) > 0, h.Growing())
		names, err := os.ReadDir(o.Spool)
		require.NoError(t, err)
		require.Empty(t, names)
		return h
	})
}

// TestSpoolFull: a disk that is full for a while ends no download.
func TestSpoolFull(t *testing.T) {
	need.Root(t, "mount a small file system")
	o := spooled(t)
	need.No(t, os.NewSyscallError("mount a tmpfs", unix.Mount("tmpfs", o.Spool, "tmpfs", 0, "size=1m")), unix.EPERM)
	t.Cleanup(func() { require.NoError(t, unix.Unmount(o.Spool, 0)) })
	data := bytes.Repeat([]byte("0123456789abcdef"), 60000)
	other := filepath.Join(o.Spool, "other")
	require.NoError(t, os.WriteFile(other, make([]byte, 512<<10), 0o600))
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { whole(data, len(data))(w, r) }))
	t.Cleanup(srv.Close)
	h, err := source.OpenHTTP(t.Context(), srv.URL, o)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, h.Close()) })
	p := make([]byte, 10)
	_, err = h.ReadAt(t.Context(), p, int64(len(data)-10))
	require.ErrorIs(t, err, unix.ENOSPC)
	require.True(t, source.Temporary(err))
	require.NoError(t, os.Remove(other))
	require.Eventually(t, func() bool {
		_, err = h.ReadAt(t.Context(), p, int64(len(data)-10))
		return err == nil
	}, 10*time.Second, time.Millisecond)
	require.Equal(t, data[len(data)-10:], p)
}

// TestSpool: what has come is read while the rest is under way, and a broken download goes
// on from the beginning.
func TestSpool(t *testing.T) {
	release := make(chan struct{})
	s := newBadServer(t, func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Range") != "" {
			return whole(badData, len(badData))(w, r)
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(badData)))
		w.Write(badData[:100000])
		w.(http.Flusher).Flush()
		select {
		case <-release:
		case <-r.Context().Done():
		}
		panic(http.ErrAbortHandler)
	})
	h := openBad(t, s, spooled(t))
	requireRead(t, h, 1000, 99000)
	require.False(t, h.Local())
	done := make(chan error, 1)
	p := make([]byte, 100000)
	go func() {
		_, err := h.ReadAt(t.Context(), p, 200000)
		done <- err
	}()
	s.set(`"v1"`, whole(badData, len(badData)))
	close(release)
	require.NoError(t, <-done)
	require.True(t, bytes.Equal(badData[200000:300000], p))
	requireRead(t, h, 0, len(badData))
	require.Eventually(t, h.Local, 10*time.Second, time.Millisecond)
	s.set(`"v1"`, status(404))
	requireRead(t, h, 5, 300000)
}

// TestSpoolFails begins every download with 100,000 right bytes, and goes on badly.
func TestSpoolFails(t *testing.T) {
	other := bytes.Clone(badData)
	other[5000] ^= 1
	for _, c := range []struct {
		name, want string
		temporary  bool
		etag       string
		then       func(w http.ResponseWriter, r *http.Request) bool
	}{
		{"other version", source.ErrChanged.Error(), false, `"v2"`, whole(badData, len(badData))},
		{"other size", source.ErrChanged.Error(), false, `"v1"`, whole(badData[:110000], 110000)},
		{"other bytes", "came otherwise the first time", false, `"v1"`, whole(other, len(other))},
		{"gone", "404 Not Found", false, `"v1"`, status(404)},
		{"away", "503", true, `"v1"`, status(503)},
		{"breaks again", "ends after 100000 of 320000 bytes", true, `"v1"`, whole(badData, 100000)},
		{"no length", "nor says how long", false, `"v1"`, func(w http.ResponseWriter, r *http.Request) bool {
			w.(http.Flusher).Flush()
			return true
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			begin := make(chan struct{})
			s := newBadServer(t, func(w http.ResponseWriter, r *http.Request) bool {
				if r.Header.Get("Range") != "" {
					return whole(badData, len(badData))(w, r)
				}
				w.Header().Set("Content-Length", fmt.Sprint(len(badData)))
				w.Write(badData[:100000])
				w.(http.Flusher).Flush()
				<-begin
				panic(http.ErrAbortHandler)
			})
			h := openBad(t, s, spooled(t))
			requireRead(t, h, 0, 100000)
			s.set(c.etag, c.then)
			close(begin)
			_, err := h.ReadAt(t.Context(), make([]byte, 1), 100000)
			require.ErrorContains(t, err, c.want)
			require.ErrorContains(t, err, s.URL)
			require.Equal(t, c.temporary, source.Temporary(err))
			requireRead(t, h, 0, 100000) // is there
			if !c.temporary {
				return
			}
			s.set(`"v1"`, whole(badData, len(badData)))
			require.Eventually(t, h.Local, 10*time.Second, time.Millisecond, "it goes on")
			requireRead(t, h, 0, len(badData))
		})
	}
}

func TestSpoolRefuses(t *testing.T) {
	s := newBadServer(t, whole(badData, len(badData)))
	o := spooled(t)
	o.MaxSize = 1000
	_, err := source.OpenHTTP(t.Context(), s.URL, o)
	require.ErrorContains(t, err, "the limit is 1000")
	o = patient
	o.Spool = "/nonexistent"
	_, err = source.OpenHTTP(t.Context(), s.URL, o)
	require.ErrorContains(t, err, "make file to download into")
	s.set("", func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Range") == "" {
			return status(500)(w, r)
		}
		return whole(badData, len(badData))(w, r)
	})
	_, err = source.OpenHTTP(t.Context(), strings.Replace(s.URL, "http://", "http://user:pw@", 1), spooled(t))
	require.ErrorContains(t, err, "500")
	require.NotContains(t, err.Error(), "pw")
	require.True(t, source.Temporary(err))
}

// TestSpoolClose: a close ends the download and who waits for it.
func TestSpoolClose(t *testing.T) {
	s := newBadServer(t, func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Content-Length", fmt.Sprint(len(badData)))
		w.Write(badData[:1000])
		w.(http.Flusher).Flush()
		<-r.Context().Done()
		return true
	})
	h, err := source.OpenHTTP(t.Context(), s.URL, spooled(t))
	require.NoError(t, err)
	done := make(chan error, 1)
	go func() {
		_, err := h.ReadAt(t.Context(), make([]byte, 1), 5000)
		done <- err
	}()
	require.NoError(t, h.Close())
	require.ErrorIs(t, <-done, source.ErrClosed)
}
