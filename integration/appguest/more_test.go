package appguest

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"cloudlet/integration/need"
	"cloudlet/integration/product"
)

func TestMoreKey(t *testing.T) {
	g := Guest{Packages: filepath.Join(t.TempDir(), "packages.txt")}
	require.NoError(t, os.WriteFile(g.Packages, []byte("a 1\n"), 0o644))
	one, err := More{Packages: []string{"x"}}.key(g)
	require.NoError(t, err)
	again, err := More{Packages: []string{"x"}, Title: "other", Dir: "/other"}.key(g)
	require.NoError(t, err)
	require.Equal(t, one, again)
	other, err := More{Packages: []string{"x", "y"}}.key(g)
	require.NoError(t, err)
	require.NotEqual(t, one, other)
	require.NoError(t, os.WriteFile(g.Packages, []byte("a 2\n"), 0o644))
	newer, err := More{Packages: []string{"x"}}.key(g)
	require.NoError(t, err)
	require.NotEqual(t, one, newer)
	_, err = More{}.key(Guest{Packages: "/none"})
	require.ErrorIs(t, err, os.ErrNotExist)
}

func TestDpkgStatus(t *testing.T) {
	need.Program(t, "/usr/sbin/mke2fs")
	need.Program(t, "/usr/sbin/debugfs")
	const status = "Package: a\nStatus: install ok installed\nVersion: 1\n\n"
	for _, test := range []struct{ name, content, want string }{
		{"installed", status, ""},
		{"empty", "", "no package is installed (remedy: build the guest again)"},
	} {
		t.Run(test.name, func(t *testing.T) {
			root, g := t.TempDir(), Guest{Disk: filepath.Join(t.TempDir(), "disk.raw")}
			require.NoError(t, os.MkdirAll(filepath.Join(root, "var/lib/dpkg"), 0o755))
			require.NoError(t, os.WriteFile(filepath.Join(root, "var/lib/dpkg/status"), []byte(test.content), 0o644))
			_, err := product.Run(t.Context(), exec.CommandContext(t.Context(), "mke2fs", "-q", "-t", "ext4", "-d", root, g.Disk, "4M"), "none")
			require.NoError(t, err)
			got, err := dpkgStatus(t.Context(), g)
			if test.want != "" {
				require.ErrorContains(t, err, test.want)
				return
			}
			require.NoError(t, err)
			require.Equal(t, test.content, got)
		})
	}
	_, err := dpkgStatus(t.Context(), Guest{Disk: "/none"})
	require.Error(t, err)
}
