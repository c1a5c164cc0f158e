package appguest

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestCheckModules(t *testing.T) {
	const dep, builtin = "kernel/drivers/virtio/virtio_pci.ko: kernel/x.ko\nkernel/fs/ext4/ext4.ko.xz:\n", "kernel/drivers/block/virtio_blk.ko\nkernel/drivers/net/virtio-net.ko\n"
	for _, test := range []struct{ name, dep, builtin, want string }{
		{"all", dep, builtin, ""},
		{"no disk", dep, "kernel/drivers/net/virtio_net.ko\n", "find driver virtio_blk: 6.1.0 has none (remedy: "},
		{"no file system", "kernel/drivers/virtio/virtio_pci.ko:\n", builtin, "find driver ext4"},
	} {
		t.Run(test.name, func(t *testing.T) {
			root := t.TempDir()
			dir := filepath.Join(root, "lib", "modules", "6.1.0")
			require.NoError(t, os.MkdirAll(dir, 0o755))
			require.NoError(t, os.WriteFile(filepath.Join(dir, "modules.dep"), []byte(test.dep), 0o644))
			require.NoError(t, os.WriteFile(filepath.Join(dir, "modules.builtin"), []byte(test.builtin), 0o644))
			err := checkModules(root)
			if test.want == "" {
				require.NoError(t, err)
				return
			}
			require.ErrorContains(t, err, test.want)
		})
	}
	require.ErrorContains(t, checkModules(t.TempDir()), "0 kernels, want one")
}

func TestUnpackRecipe(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, unpackRecipe("rootfs/late", dir))
	require.FileExists(t, filepath.Join(dir, "root", ".profile"))
	p, err := os.ReadFile(filepath.Join(dir, "root", ".profile"))
	require.NoError(t, err)
	require.Contains(t, string(p), Ready)
}

// TestBuildWithoutTools: what is missing is said before anything is downloaded.
func TestBuildWithoutTools(t *testing.T) {
	t.Setenv("PATH", "")
	dir := t.TempDir()
	_, err := Build(t.Context(), dir, io.Discard)
	require.ErrorContains(t, err, "remedy: ")
	left, err := filepath.Glob(filepath.Join(dir, "*"))
	require.NoError(t, err)
	require.Equal(t, []string{filepath.Join(dir, ".lock")}, left)
}

func TestLaunchKey(t *testing.T) {
	g := Guest{Packages: filepath.Join(t.TempDir(), "packages.txt")}
	require.NoError(t, os.WriteFile(g.Packages, []byte("a 1\n"), 0o644))
	one, err := LaunchKey(g)
	require.NoError(t, err)
	again, err := LaunchKey(g)
	require.NoError(t, err)
	require.Equal(t, one, again)
	require.NoError(t, os.WriteFile(g.Packages, []byte("a 2\n"), 0o644))
	two, err := LaunchKey(g)
	require.NoError(t, err)
	require.NotEqual(t, one, two)
	_, err = LaunchKey(Guest{Packages: "/none"})
	require.ErrorIs(t, err, os.ErrNotExist)
}

// TestStepsFit: each line can be typed at a terminal.
func TestStepsFit(t *testing.T) {
	for _, s := range steps("10.0.2.2:65535", time.Unix(1, 0)) {
		for _, line := range s.Lines {
			require.Less(t, len(line), 1000, line)
			require.False(t, strings.ContainsAny(line, "\n\r"), line)
		}
	}
}
