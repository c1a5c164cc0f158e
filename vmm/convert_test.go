package vmm

import (
	"bytes"
	"context"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"cloudlet/integration/need"
)

func TestConvertDisk(t *testing.T) {
	q := &QEMU{}
	_, err := q.img()
	need.No(t, err, ErrNoQEMU)
	dir := t.TempDir()
	content := make([]byte, 1<<20+512)
	for i := range content[:300<<10] {
		content[i] = byte(rand.Uint32())
	}
	raw, qcow2 := filepath.Join(dir, "a.raw"), filepath.Join(dir, "a.qcow2")
	require.NoError(t, os.WriteFile(raw, content, 0o600))
	out, err := exec.Command("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, qcow2).CombinedOutput()
	require.NoError(t, err, "%s", out)
	want := append(bytes.Clone(content), make([]byte, 4096-512)...)
	for _, tt := range []struct{ path, format string }{{raw, "raw"}, {raw, ""}, {qcow2, "qcow2"}, {qcow2, ""}} {
		to := filepath.Join(t.TempDir(), "out")
		require.NoError(t, q.ConvertDisk(t.Context(), tt.path, tt.format, to))
		have, err := os.ReadFile(to)
		require.NoError(t, err)
		require.True(t, bytes.Equal(want, have), "%v", tt)
		require.ErrorContains(t, q.ConvertDisk(t.Context(), tt.path, tt.format, to), "exists")
	}

	to := filepath.Join(dir, "out")
	require.ErrorContains(t, q.ConvertDisk(t.Context(), filepath.Join(dir, "no"), "", to), "no such file")
	require.ErrorContains(t, q.ConvertDisk(t.Context(), raw, "vmdk", to), "want raw or qcow2")
	require.ErrorContains(t, q.ConvertDisk(t.Context(), raw, "qcow2", to), "a.raw")
	empty := filepath.Join(dir, "empty")
	require.NoError(t, os.WriteFile(empty, nil, 0o600))
	require.ErrorContains(t, q.ConvertDisk(t.Context(), empty, "raw", to), "no bytes")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, q.ConvertDisk(ctx, raw, "raw", to), context.Canceled)
	require.NoFileExists(t, to)
}

// TestProbeCache: another process's answer is used for the same program only.
func TestProbeCache(t *testing.T) {
	bin := filepath.Join(t.TempDir(), "qemu")
	script := "#!/bin/sh\necho asked >> $0.log\ncase $1 in --version) echo QEMU emulator version 7.2.1;; *) echo tcg;; esac\n"
	require.NoError(t, os.WriteFile(bin, []byte(script), 0o755))
	cache := filepath.Join(t.TempDir(), "host.json")
	asked := func() int {
		b, err := os.ReadFile(bin + ".log")
		require.NoError(t, err)
		return bytes.Count(b, []byte("\n"))
	}
	for range 2 {
		h, err := (&QEMU{Binary: bin, ImgBinary: bin, Cache: cache}).Probe(t.Context())
		require.NoError(t, err)
		require.Equal(t, "7.2.1", h.QEMU)
		require.Equal(t, 4, asked())
	}
	require.NoError(t, os.WriteFile(cache, []byte("{"), 0o600))
	_, err := (&QEMU{Binary: bin, ImgBinary: bin, Cache: cache}).Probe(t.Context())
	require.NoError(t, err, "a damaged cache is none")
	require.Equal(t, 8, asked())
	require.NoError(t, os.WriteFile(bin, []byte(script+"# newer\n"), 0o755))
	_, err = (&QEMU{Binary: bin, ImgBinary: bin, Cache: cache}).Probe(t.Context())
	require.NoError(t, err)
	require.Equal(t, 12, asked(), "a changed program is asked again")
}
