package service

import (
	"encoding/json"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"cloudlet/fusefs"
	"cloudlet/overlay"

	"github.com/stretchr/testify/require"
)

// TestTouchesAfterAnswer: what the guest touches by itself after its answer stands behind what
// it touched before, and is bounded by it.
func TestTouchesAfterAnswer(t *testing.T) {
	s := newService(t)
	const size = 64 * overlay.PageSize
	st, err := s.newStage(t.Context(), "base")
	require.NoError(t, err)
	dir := filepath.Join(st.dir, "base")
	require.NoError(t, os.Mkdir(dir, 0o700))
	for _, f := range []string{"memory", "disk"} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, f), make([]byte, size), 0o600))
	}
	b, err := overlay.SealBase(t.Context(), dir, json.RawMessage(`{}`), nil)
	require.NoError(t, err)
	base, err := s.keepBase(t.Context(), b, "")
	require.NoError(t, err)
	require.NoError(t, st.drop())

	r := &record{ID: "i", Image: base.ID, Base: base.ID, Mount: recordingKey("i")}
	require.NoError(t, os.MkdirAll(s.mountPath(r.Mount), 0o700))
	l, err := net.Listen("unix", s.mountPath(r.Mount, "control"))
	require.NoError(t, err)
	var calls atomic.Int32
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		touches := []fusefs.Touch{{File: fusefs.MemoryName, Page: 40, Count: 7}, {File: fusefs.DiskName, Page: 5, Count: 1}}
		if calls.Add(1) > 1 {
			touches = append(touches, fusefs.Touch{File: fusefs.MemoryName, Page: 9, Count: 1}, fusefs.Touch{File: fusefs.MemoryName, Page: 20, Count: 20})
		}
		_ = json.NewEncoder(w).Encode(touches)
	})}
	go func() { _ = server.Serve(l) }()
	t.Cleanup(func() { require.NoError(t, server.Close()) })

	require.NoError(t, s.keepTouches(t.Context(), r))
	text, err := os.ReadFile(s.profilePath(r.Image))
	require.NoError(t, err)
	have, err := overlay.ParseProfile(text, size, size)
	require.NoError(t, err)
	disk := overlay.MakeAddr(overlay.Disk, 5)
	require.Equal(t, []overlay.Addr{40, 41, 42, 43, 44, 45, 46, disk, 9, 20}, have)
}
