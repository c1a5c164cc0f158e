package fusefs

import (
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestControl(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	memory := newTestFile(1 << 20)
	s, dir := mount(t, Options{
		Memory: memory, Socket: socket, Name: "cloudlet:x",
		Status: func() any { return map[string]int{"frames": 3} },
	})
	info, err := os.Stat(socket)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), info.Mode().Perm())

	c := Dial(socket)
	require.Equal(t, memory.hash(), client(t, "hash", filepath.Join(dir, MemoryName), "read"))
	st, err := c.Status(t.Context())
	require.NoError(t, err)
	require.JSONEq(t, `{"frames":3}`, string(st.Image))
	require.Equal(t, memory.Size(), st.Memory.Bytes)
	require.Equal(t, os.Getpid(), st.PID)
	require.Equal(t, dir, st.Mountpoint)
	require.Equal(t, "cloudlet:x", st.Source)
	require.False(t, st.Aborted)
	require.Positive(t, st.ReadAheadKiB)

	other := filepath.Join(t.TempDir())
	_, err = Mount(other, Options{Memory: memory, Disk: memory, Socket: socket})
	require.ErrorContains(t, err, "another mount listens")

	require.NoError(t, c.Abort(t.Context()))
	require.True(t, s.Stats().Aborted)

	keep := start(t, "keep", filepath.Join(dir, DiskName))
	require.Equal(t, "ready", keep.line(t))
	require.ErrorIs(t, c.Unmount(t.Context(), false), ErrBusy)
	require.NoError(t, c.Unmount(t.Context(), true))
	require.NoError(t, s.Wait())
	require.NoFileExists(t, socket)
	_, err = c.Status(t.Context())
	require.ErrorContains(t, err, socket)
}

func TestControlUnmountsIdle(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	require.NoError(t, err)
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	require.NoError(t, l.Close())
	require.FileExists(t, socket, "left behind, as by a killed process")
	s, _ := mount(t, Options{Socket: socket})
	c := Dial(socket)
	require.ErrorContains(t, c.call(t.Context(), http.MethodPost, "/unmount?force=yes", nil), "want 0 or 1")
	require.Error(t, c.call(t.Context(), http.MethodGet, "/abort", nil))
	require.Error(t, c.call(t.Context(), http.MethodGet, "/nothing", nil))
	require.NoError(t, c.Unmount(t.Context(), false))
	require.NoError(t, s.Wait())
}
