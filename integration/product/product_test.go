package product

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"
)

// spec makes a product of the parts a and dir/b.
func spec(t *testing.T, made *atomic.Int32) Spec {
	t.Helper()
	return Spec{
		Title: "thing", Dir: filepath.Join(t.TempDir(), "out"), Key: "k1", Parts: []string{"a", "dir"}, Log: t.Output(),
		Make: func(ctx context.Context, work, product string) error {
			made.Add(1)
			return errors.Join(os.WriteFile(filepath.Join(product, "a"), []byte("x"), 0o644), os.Mkdir(filepath.Join(product, "dir"), 0o755),
				os.WriteFile(filepath.Join(product, "dir", "b"), nil, 0o644), os.WriteFile(filepath.Join(work, "scratch"), nil, 0o644))
		},
	}
}

func names(t *testing.T, dir string) (out []string) {
	t.Helper()
	list, err := os.ReadDir(dir)
	require.NoError(t, err)
	for _, e := range list {
		out = append(out, e.Name())
	}
	return out
}

func TestBuildOnce(t *testing.T) {
	var made atomic.Int32
	s := spec(t, &made)
	g, ctx := errgroup.WithContext(t.Context())
	for range 4 {
		g.Go(func() error {
			_, err := s.Build(ctx)
			return err
		})
	}
	require.NoError(t, g.Wait())
	require.EqualValues(t, 1, made.Load())
	require.Equal(t, []string{".lock", "a", "dir", "k1"}, names(t, s.Dir))
	p, err := os.ReadFile(filepath.Join(s.Dir, "a"))
	require.NoError(t, err)
	require.Equal(t, "x", string(p))

	s.Key = "k2"
	dir, err := s.Build(t.Context())
	require.NoError(t, err)
	require.EqualValues(t, 2, made.Load())
	link, err := os.Readlink(filepath.Join(s.Dir, "a"))
	require.NoError(t, err)
	require.Equal(t, "k2/a", link)

	require.NoError(t, os.Remove(filepath.Join(dir, "a"))) // emptied in part
	_, err = s.Build(t.Context())
	require.NoError(t, err)
	require.EqualValues(t, 3, made.Load())
}

func TestBuildFails(t *testing.T) {
	var made atomic.Int32
	s := spec(t, &made)
	require.NoError(t, os.MkdirAll(filepath.Join(s.Dir, tempPrefix+"killed"), 0o755))
	whole, bad := s.Make, errors.New("no space")
	s.Make = func(ctx context.Context, work, product string) error {
		return errors.Join(whole(ctx, work, product), bad)
	}
	_, err := s.Build(t.Context())
	require.ErrorIs(t, err, bad)
	require.Equal(t, []string{".lock"}, names(t, s.Dir))
}

func TestLockExcludes(t *testing.T) {
	var made atomic.Int32
	s := spec(t, &made)
	require.NoError(t, os.Mkdir(s.Dir, 0o755))
	var log bytes.Buffer
	s.Log = &log
	unlock, err := s.lock(t.Context())
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err = s.Build(ctx)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.Contains(t, log.String(), "waiting for another build")
	require.NoError(t, unlock())
	_, err = s.Build(t.Context())
	require.NoError(t, err)
}

func TestRun(t *testing.T) {
	ctx := t.Context()
	out, err := Run(ctx, exec.CommandContext(ctx, "echo", "a"), "none")
	require.NoError(t, err)
	require.Equal(t, "a\n", out)
	_, err = Run(ctx, exec.CommandContext(ctx, "sh", "-c", "echo why >&2; exit 3"), "try again")
	require.EqualError(t, err, "run sh: exit status 3: why (remedy: try again)")
	_, err = Run(ctx, exec.CommandContext(ctx, "no-such-program"), "install it")
	require.ErrorIs(t, err, exec.ErrNotFound)
	require.ErrorContains(t, err, "remedy: install it")
	gone, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	_, err = Run(gone, exec.CommandContext(gone, "sleep", "5"), "none")
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.NotContains(t, err.Error(), "remedy")
}
