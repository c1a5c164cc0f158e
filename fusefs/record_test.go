package fusefs

import (
	"path/filepath"
	"slices"
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

// TestNoRecord: without Record the page that was touched is among those that were read.
func TestNoRecord(t *testing.T) {
	s, dir := mount(t, Options{})
	client(t, "touch", filepath.Join(dir, MemoryName), strconv.Itoa(100*4096), "normal")
	client(t, "touch", filepath.Join(dir, MemoryName), "0", "normal")
	var at []int
	for i, want := range []int64{100, 0} {
		at = append(at, slices.IndexFunc(s.Touches(), func(h Touch) bool { return h.Page <= want && want < h.Page+h.Count }))
		require.GreaterOrEqual(t, at[i], 0, "page %d", want)
	}
	require.Less(t, at[0], at[1])
}
