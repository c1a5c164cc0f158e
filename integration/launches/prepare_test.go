package launches

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"cloudlet/integration/demoguest"
)

var hash = strings.Repeat("0a", 32)

func TestCheck(t *testing.T) {
	p := Prepared{Prepared: demoguest.Prepared{Token: "t"}, Counter: 3, Data: hash}
	good := Verification{Answer{"t", 4}, hash}
	require.NoError(t, p.check(Answer{"t", 4}, good))
	require.ErrorContains(t, p.check(Answer{"u", 4}, good), `want "t"`)
	require.ErrorContains(t, p.check(Answer{"t", 4}, Verification{Answer{"u", 4}, hash}), `want "t"`)
	require.ErrorContains(t, p.check(Answer{"t", 3}, good), "counter 3")
	require.ErrorContains(t, p.check(Answer{"t", 4}, Verification{Answer{"t", 4}, hash[2:] + "00"}), "data have the hash")
}

func TestKeep(t *testing.T) {
	var p Prepared
	require.NoError(t, p.keep(Verification{Answer{"t", 1}, hash}))
	require.Equal(t, Prepared{Prepared: demoguest.Prepared{Token: "t"}, Counter: 1, Data: hash}, p)
	require.Error(t, p.keep(Verification{Answer{"", 1}, hash}))
	require.Error(t, p.keep(Verification{Answer{"t", 1}, ""}))
}

// TestSave: what is saved is found by its key, and as the demo's is.
func TestSave(t *testing.T) {
	root := t.TempDir()
	l := &demoguest.Lab{Options: demoguest.Options{Dir: filepath.Join(root, "demo")}}
	dir := filepath.Join(root, "db")
	require.NoError(t, os.MkdirAll(filepath.Join(l.Path("state"), "bases"), 0o755))
	require.NoError(t, os.Mkdir(dir, 0o755))
	none, err := read(dir)
	require.NoError(t, err)
	require.Equal(t, Prepared{}, none)
	p := Prepared{Prepared: demoguest.Prepared{Launch: "k", Base: "b", Overlay: "o", Token: "t", Size: 5, Profiled: true}, Counter: 1, Data: hash}
	require.NoError(t, save(l, dir, p))
	again, err := read(dir)
	require.NoError(t, err)
	require.Equal(t, p, again)
	text, err := os.ReadFile(filepath.Join(dir, preparedFile))
	require.NoError(t, err)
	require.Contains(t, string(text), `"overlay": "o"`)
	require.DirExists(t, filepath.Join(dir, "state", "bases"))
	require.NoFileExists(t, filepath.Join(dir, preparedFile+".new"))
	require.NoError(t, os.Rename(root, root+"-moved")) // the link is relative
	defer os.RemoveAll(root + "-moved")
	require.DirExists(t, filepath.Join(root+"-moved", "db", "state", "bases"))
	require.NoError(t, os.WriteFile(filepath.Join(root+"-moved", "db", preparedFile), []byte("{"), 0o644))
	torn, err := read(filepath.Join(root+"-moved", "db"))
	require.NoError(t, err)
	require.Equal(t, Prepared{}, torn)
}
