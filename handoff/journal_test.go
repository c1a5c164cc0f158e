package handoff

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestFileJournal(t *testing.T) {
	j := FileJournal{Path: filepath.Join(t.TempDir(), "journal")}
	_, err := j.Load(t.Context())
	require.ErrorIs(t, err, fs.ErrNotExist)
	for _, n := range []int{0, 1, 100, MaxRecord, 7} {
		record := bytes.Repeat([]byte{byte(n)}, n)
		require.NoError(t, j.Store(t.Context(), record))
		got, err := j.Load(t.Context())
		require.NoError(t, err)
		require.True(t, bytes.Equal(record, got))
		info, err := os.Stat(j.Path)
		require.NoError(t, err)
		require.Equal(t, int64(2*slotSize), info.Size(), "it never grows")
	}
	require.Error(t, j.Store(t.Context(), make([]byte, MaxRecord+1)))
	entries, err := os.ReadDir(filepath.Dir(j.Path))
	require.NoError(t, err)
	require.Len(t, entries, 1, "no temporary file is left")
}

// TestFileJournalTorn sees that a write cut off at any byte leaves the old record or the new.
func TestFileJournalTorn(t *testing.T) {
	j := FileJournal{Path: filepath.Join(t.TempDir(), "journal")}
	older, old, fresh := []byte("older, and longer than the others"), []byte("old record"), []byte("new record!")
	require.NoError(t, j.Store(t.Context(), older))
	require.NoError(t, j.Store(t.Context(), old))
	before, err := os.ReadFile(j.Path)
	require.NoError(t, err)
	require.NoError(t, j.Store(t.Context(), fresh))
	after, err := os.ReadFile(j.Path)
	require.NoError(t, err)
	start := slotSize // the third record is in the second slot
	require.Equal(t, before[:start], after[:start], "the slot of the old record is not touched")
	for n := range slotHead + len(fresh) + 1 {
		torn := bytes.Clone(before)
		copy(torn[start:], after[start:start+n])
		require.NoError(t, os.WriteFile(j.Path, torn, 0o600))
		got, err := j.Load(t.Context())
		require.NoError(t, err)
		if n == slotHead+len(fresh) {
			require.Equal(t, fresh, got)
		} else {
			require.Equal(t, old, got, "%d bytes", n)
		}
	}
	for bit := range 8 * len(fresh) {
		bad := bytes.Clone(after)
		bad[start+slotHead+bit/8] ^= 1 << (bit % 8)
		require.NoError(t, os.WriteFile(j.Path, bad, 0o600))
		got, err := j.Load(t.Context())
		require.NoError(t, err)
		require.Equal(t, old, got)
	}
	require.NoError(t, os.WriteFile(j.Path, after[:len(after)-1], 0o600))
	_, err = j.Load(t.Context())
	require.ErrorContains(t, err, "cut short")
	require.NoError(t, os.WriteFile(j.Path, make([]byte, 2*slotSize), 0o600))
	_, err = j.Load(t.Context())
	require.ErrorContains(t, err, "no record")
	require.NotErrorIs(t, err, fs.ErrNotExist, "a damaged record is not no record")
}
