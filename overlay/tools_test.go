package overlay

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// programs are those that encode, and a strategy that needs no other one.
var programs = []struct{ name, version, strategy, remedy string }{
	{"xdelta3", "Xdelta version 9.9, by a test", "none,delta=vcdiff", "install the package xdelta3"},
	{"xz", "xz (XZ Utils) 9.9", "none,codec=xz", "install the package xz-utils"},
	{"zstd", "*** Zstandard CLI (64-bit) v9.9, by a test ***", "none,codec=zstd,level=19", "install the package zstd"},
}

// TestNoProgram: a strategy whose program is missing says so before any work, by name.
func TestNoProgram(t *testing.T) {
	for _, p := range programs {
		t.Run(p.name, func(t *testing.T) {
			v := newVM(newRand(t), 8, 8)
			base := newBase(t, v)
			s := strategy(t, p.strategy)
			t.Setenv("PATH", t.TempDir())
			dir := t.TempDir()
			_, err := Create(t.Context(), filepath.Join(dir, "o"), launch(newImage(t, base), v), CreateOptions{Strategy: s})
			for _, err := range []error{err, s.CheckPrograms(t.Context())} {
				require.ErrorIs(t, err, ErrNoProgram)
				require.ErrorContains(t, err, p.remedy)
			}
			entries, err := os.ReadDir(dir)
			require.NoError(t, err)
			require.Empty(t, entries)
		})
	}
}

// TestProgramFails: what a program says arrives, a context that ends, ends it, and what it
// writes is no overlay because it wrote it.
func TestProgramFails(t *testing.T) {
	for _, p := range programs {
		t.Run(p.name, func(t *testing.T) {
			rng := newRand(t)
			v := newVM(rng, 40, 8)
			base := newBase(t, v)
			w := v.clone()
			w.mutate(rng, 2)
			bin, dir := t.TempDir(), t.TempDir()
			s := strategy(t, p.strategy)
			t.Setenv("PATH", bin)
			script := func(body string) {
				text := "#!/bin/sh\ncase $1 in -V|--version) echo '" + p.version + "' ;; *) " + body + " ;; esac\n"
				require.NoError(t, os.WriteFile(filepath.Join(bin, p.name), []byte(text), 0o755))
			}
			try := func(ctx context.Context) error {
				_, err := Create(ctx, filepath.Join(dir, "o"), launch(newImage(t, base), w), CreateOptions{Strategy: s})
				return err
			}
			script("echo out of luck >&2; exit 3")
			require.ErrorContains(t, try(t.Context()), "exit status 3: out of luck")

			marker := filepath.Join(bin, "started")
			script("echo > " + marker + "; exec /bin/sleep 100")
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error)
			go func() { done <- try(ctx) }()
			require.Eventually(t, func() bool { _, err := os.Stat(marker); return err == nil }, 10e9, 1e6)
			cancel()
			require.ErrorIs(t, <-done, context.Canceled)

			script("printf nonsense")
			data, made := create(t, launch(newImage(t, base), w), CreateOptions{Strategy: s})
			require.Equal(t, p.name+" 9.9", made.Manifest.Strategy.Encoder)
			require.ErrorIs(t, newImage(t, base, openBytes(t, data)).Verify(t.Context(), nil), ErrFormat)
			entries, err := os.ReadDir(dir)
			require.NoError(t, err)
			require.Empty(t, entries)
		})
	}
}
