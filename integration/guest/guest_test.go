package guest

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// fakeProduct puts a complete product of the present sources below outDir.
func fakeProduct(t *testing.T, outDir string) Guest {
	t.Helper()
	key, err := sourceKey()
	require.NoError(t, err)
	dir := filepath.Join(outDir, key)
	require.NoError(t, os.MkdirAll(dir, 0o755))
	g := at(dir)
	for _, name := range g.files() {
		require.NoError(t, os.WriteFile(name, []byte("x"), 0o644))
	}
	return g
}

func TestBuildFindsProduct(t *testing.T) {
	outDir := t.TempDir()
	want := fakeProduct(t, outDir)
	t.Setenv("PATH", "") // nothing can be built
	var log bytes.Buffer
	got, err := Build(t.Context(), outDir, &log)
	require.NoError(t, err)
	require.Equal(t, want, got)
	require.Empty(t, log.String())
}

func TestBuildWithoutTools(t *testing.T) {
	for _, test := range []struct {
		name string
		gone func(Guest) string // a file that is missing from a product
	}{
		{"no product", nil},
		{"no kernel", func(g Guest) string { return g.Kernel }},
		{"no package list", func(g Guest) string { return g.Packages }},
	} {
		t.Run(test.name, func(t *testing.T) {
			outDir := t.TempDir()
			if test.gone != nil {
				require.NoError(t, os.Remove(test.gone(fakeProduct(t, outDir))))
			}
			require.NoError(t, os.Mkdir(filepath.Join(outDir, ".building-old"), 0o755))
			t.Setenv("PATH", "")
			_, err := Build(t.Context(), outDir, nil)
			require.ErrorContains(t, err, "apt-cache")
			require.ErrorContains(t, err, "remedy: ")
			left, err := filepath.Glob(filepath.Join(outDir, ".building-*"))
			require.NoError(t, err)
			require.Empty(t, left)
		})
	}
}

func TestBuildCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	outDir := t.TempDir()
	_, err := Build(ctx, outDir, nil)
	require.ErrorIs(t, err, context.Canceled)
	require.NotContains(t, err.Error(), "remedy")
	left, err := filepath.Glob(filepath.Join(outDir, ".building-*"))
	require.NoError(t, err)
	require.Empty(t, left)
}

func TestParseControl(t *testing.T) {
	fields := parseControl("Package: a\nVersion: 1:2-3\nDescription: b\n more: text\nDepends: c (= 1), d\n\nVersion: 9\n")
	require.Equal(t, map[string]string{"Package": "a", "Version": "1:2-3", "Description": "b", "Depends": "c (= 1), d"}, fields)
}
