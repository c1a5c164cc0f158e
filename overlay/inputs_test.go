package overlay

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"cloudlet/integration/need"
)

// TestMachineSpelling: whatever JSON the machine configuration is, the overlay that is made
// of it can be opened and verified.
func TestMachineSpelling(t *testing.T) {
	v := newVM(newRand(t), 8, 8)
	base := newBase(t, v)
	w := v.clone()
	w[Memory][5]++
	for name, machine := range map[string]string{
		"escapes":    `{"append":"a<b> & c \u2028 ` + "\u2028" + `"}`,
		"not utf-8":  "{\"append\":\"\xff\xfe\"}",
		"null":       `null`,
		"spaces":     "{ \"a\" : [ 1,\n 2 ] }",
		"at the cap": `["` + strings.Repeat("x", maxMachine-4) + `"]`,
		"deepest":    strings.Repeat("[", 14) + strings.Repeat(`{"[":[]},`, 7000) + "1" + strings.Repeat("]", 14),
		"many lines": `[` + strings.Repeat("1,", maxMachine/2-2) + `1]`,
	} {
		t.Run(name, func(t *testing.T) {
			l := launch(newImage(t, base), w)
			l.Machine = json.RawMessage(machine)
			b, _ := create(t, l, CreateOptions{})
			require.NoError(t, check(t, b, base))
			var want, have any
			require.NoError(t, json.Unmarshal([]byte(machine), &want))
			require.NoError(t, json.Unmarshal(openBytes(t, b).Manifest().Machine, &have))
			require.Equal(t, want, have)
		})
	}
	t.Run("deep", func(t *testing.T) { // its indent would be large
		l := launch(newImage(t, base), w)
		l.Machine = json.RawMessage(strings.Repeat("[", 9000) + `"\"["` + strings.Repeat("]", 9000))
		_, err := Create(t.Context(), filepath.Join(t.TempDir(), "o"), l, CreateOptions{})
		require.ErrorContains(t, err, "machine configuration: it nests 9000 deep")
		b, _ := create(t, launch(newImage(t, base), w), CreateOptions{})
		m := *openBytes(t, b).manifest
		m.Machine = l.Machine
		body, err := json.Marshal(&m)
		require.NoError(t, err)
		requireAlloc(t, 8<<20, func() {
			_, err := parseManifest(body)
			require.ErrorIs(t, err, ErrFormat)
			require.ErrorContains(t, err, "nests")
		})
	})
}

// TestEmptyState: a device state of no bytes is none.
func TestEmptyState(t *testing.T) {
	v := newVM(newRand(t), 8, 8)
	base := newBase(t, v)
	l := launch(newImage(t, base), v)
	l.State = []byte{}
	b, _ := create(t, l, CreateOptions{})
	state, err := openBytes(t, b).State()
	require.NoError(t, err)
	require.Nil(t, state)
}

// TestFileOfAnotherSize: an image file that is shorter than the parent's image is not the
// whole image that it is taken for.
func TestFileOfAnotherSize(t *testing.T) {
	v := newVM(newRand(t), 16, 8)
	base := newBase(t, v)
	for _, pages := range []int{8, 15, 17} {
		f, err := os.Create(filepath.Join(t.TempDir(), "memory"))
		require.NoError(t, err)
		defer f.Close()
		_, err = f.Write(v[Memory][:min(pages, 16)*PageSize])
		require.NoError(t, err)
		require.NoError(t, f.Truncate(int64(pages)*PageSize))
		l := launch(newImage(t, base), v)
		l.Memory, err = FileChanges(f)
		require.NoError(t, err)
		_, err = Create(t.Context(), filepath.Join(t.TempDir(), "o"), l, CreateOptions{})
		require.ErrorContains(t, err, "memory", "%d pages", pages)
	}
}

// TestCreateCancelled: a context that has ended makes no overlay, not even an empty one.
func TestCreateCancelled(t *testing.T) {
	v := newVM(newRand(t), 16, 8)
	base := newBase(t, v)
	_, err := base.Fingerprints(t.Context(), nil)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	dir := t.TempDir()
	for range 20 {
		_, err = Create(ctx, filepath.Join(dir, "o"), Launch{Parent: newImage(t, base), Machine: testMachine}, CreateOptions{})
		require.ErrorIs(t, err, context.Canceled)
	}
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, entries)
}

// TestUnwritable: a folder that cannot be written to is found before the long work.
func TestUnwritable(t *testing.T) {
	v := newVM(newRand(t), 16, 8)
	base := newBase(t, v)
	l := launch(newImage(t, base), v)
	var reads atomic.Int64
	read := l.Memory.Read
	l.Memory.Read = func(p []byte, off int64) error { reads.Add(1); return read(p, off) }
	path := filepath.Join(t.TempDir(), "missing", "o")
	_, err := Create(t.Context(), path, l, CreateOptions{})
	require.ErrorIs(t, err, os.ErrNotExist)
	require.Zero(t, reads.Load())

	dir := t.TempDir() // the output is a folder
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "o", "p"), 0o755))
	_, err = Create(t.Context(), filepath.Join(dir, "o"), l, CreateOptions{})
	require.Error(t, err)
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, entries, 1)
}

// TestNoSpace: a full disk is named with its remedy, at every size of it, leaves nothing
// behind and does not touch the file that was there before.
func TestNoSpace(t *testing.T) {
	dir := t.TempDir()
	need.No(t, os.NewSyscallError("mount a tmpfs", syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=64k")), syscall.EPERM)
	t.Cleanup(func() { require.NoError(t, syscall.Unmount(dir, 0)) })
	rng := newRand(t)
	v := newVM(rng, 64, 8)
	base := newBase(t, v)
	path := filepath.Join(dir, "o")
	require.NoError(t, os.WriteFile(path, []byte("before"), 0o600))
	for _, pages := range []int{8, 64} { // spool and file together, and the spool alone
		w := v.clone()
		for i := range w[Memory][:pages*PageSize] {
			w[Memory][i] = byte(rng.Uint32())
		}
		_, err := Create(t.Context(), path, launch(newImage(t, base), w), CreateOptions{})
		require.ErrorIs(t, err, syscall.ENOSPC)
		require.ErrorContains(t, err, "free some space")
		entries, err := os.ReadDir(dir)
		require.NoError(t, err)
		require.Len(t, entries, 1)
		b, err := os.ReadFile(path)
		require.NoError(t, err)
		require.Equal(t, "before", string(b))
	}
}
