package fusefs

import (
	"path/filepath"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestRecord touches single pages and sees just them, in their order, once each.
func TestRecord(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "control")
	s, dir := mount(t, Options{Record: true, Socket: socket})
	for _, page := range []int{200, 3, 4, 3} {
		client(t, "touch", filepath.Join(dir, MemoryName), strconv.Itoa(page*4096+77), "normal")
	}
	client(t, "pread", filepath.Join(dir, DiskName), "20480", "8192")
	client(t, "pread", filepath.Join(dir, InfoName), "0", "1")
	want := []Touch{{MemoryName, 200, 1}, {MemoryName, 3, 2}, {DiskName, 5, 2}}
	require.Equal(t, want, s.Touches())
	have, err := Dial(socket).Touches(t.Context())
	require.NoError(t, err)
	require.Equal(t, want, have)
}

func TestNoRecord(t *testing.T) {
	s, dir := mount(t, Options{})
	client(t, "touch", filepath.Join(dir, MemoryName), "0", "normal")
	require.Empty(t, s.Touches())
}
