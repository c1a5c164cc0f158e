package source_test

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"cloudlet/overlay/source"
	"cloudlet/overlay/source/sourcetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func tempFile(t *testing.T, data []byte) string {
	path := filepath.Join(t.TempDir(), "overlay.zip")
	require.NoError(t, os.WriteFile(path, data, 0o600))
	return path
}

// contentServer serves data as a right server does.
func contentServer(t *testing.T, data []byte) *httptest.Server {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", `"v1"`)
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
	}))
	t.Cleanup(srv.Close)
	return srv
}

func TestConformance(t *testing.T) {
	t.Run("memory", func(t *testing.T) {
		sourcetest.Run(t, func(_ *testing.T, data []byte) source.Source { return sourcetest.NewMemory(data) })
	})
	t.Run("file", func(t *testing.T) {
		sourcetest.Run(t, func(t *testing.T, data []byte) source.Source {
			s, err := source.Open(t.Context(), tempFile(t, data))
			require.NoError(t, err)
			return s
		})
	})
	t.Run("http", func(t *testing.T) {
		sourcetest.Run(t, func(t *testing.T, data []byte) source.Source {
			s, err := source.Open(t.Context(), contentServer(t, data).URL+"/overlay.zip")
			require.NoError(t, err)
			return s
		})
	})
	t.Run("http by date", func(t *testing.T) {
		sourcetest.Run(t, func(t *testing.T, data []byte) source.Source {
			dir := filepath.Dir(tempFile(t, data))
			srv := httptest.NewServer(http.FileServer(http.Dir(dir)))
			t.Cleanup(srv.Close)
			s, err := source.Open(t.Context(), srv.URL+"/overlay.zip")
			require.NoError(t, err)
			return s
		})
	})
}

func TestOpen(t *testing.T) {
	path := tempFile(t, []byte("hello"))
	fifo := filepath.Join(t.TempDir(), "fifo")
	require.NoError(t, syscall.Mkfifo(fifo, 0o600))
	for _, ref := range []string{path, "file://" + path, "file://localhost" + path} {
		s, err := source.Open(t.Context(), ref)
		require.NoError(t, err)
		require.Equal(t, path, s.String())
		require.NoError(t, s.Close())
	}
	for _, c := range []struct{ name, ref, want string }{
		{"missing", path + ".no", "no such file"},
		{"folder", filepath.Dir(path), "not a regular file"},
		{"fifo", fifo, "not a regular file"},
		{"file on a host", "file://host" + path, "file:///PATH"},
		{"ftp", "ftp://user:pw@host/x", "no such kind of source"},
		{"http without host", "http:///x", "want http://HOST"},
		{"broken url", "http://[::1/secret", "not a valid one"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, err := source.Open(t.Context(), c.ref)
			require.ErrorContains(t, err, c.want)
			require.Nil(t, s)
			require.False(t, source.Temporary(err))
			require.NotContains(t, err.Error(), "pw")
			require.NotContains(t, err.Error(), "secret")
		})
	}
}

func TestFileTruncated(t *testing.T) {
	path := tempFile(t, make([]byte, 10000))
	s, err := source.OpenFile(path)
	require.NoError(t, err)
	defer s.Close()
	require.NoError(t, os.Truncate(path, 5000))
	n, err := s.ReadAt(t.Context(), make([]byte, 2000), 4000)
	require.Equal(t, 1000, n)
	require.ErrorIs(t, err, source.ErrChanged)
	require.ErrorContains(t, err, path)
	require.ErrorContains(t, err, "ends at byte 5000 of 10000")
	_, err = s.ReadAt(t.Context(), make([]byte, 5000), 0)
	require.NoError(t, err)
}
