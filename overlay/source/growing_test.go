package source_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"cloudlet/overlay/source"
	"cloudlet/overlay/source/sourcetest"
)

// upload writes data to a file in steps until it is whole, and returns its path.
func upload(t *testing.T, data []byte, pause time.Duration) string {
	path := filepath.Join(t.TempDir(), "upload")
	f, err := os.Create(path)
	require.NoError(t, err)
	step := max(1, len(data)/8)
	done := make(chan error, 1)
	go func() {
		for len(data) > 0 {
			time.Sleep(pause)
			n := min(step, len(data))
			if _, err := f.Write(data[:n]); err != nil {
				done <- err
				return
			}
			data = data[n:]
		}
		done <- f.Close()
	}()
	t.Cleanup(func() { require.NoError(t, <-done) })
	return path
}

func TestGrowingConformance(t *testing.T) {
	sourcetest.Run(t, func(t *testing.T, data []byte) source.Source {
		g, err := source.OpenGrowing(upload(t, data, 5*time.Millisecond), int64(len(data)))
		require.NoError(t, err)
		require.True(t, g.Growing())
		require.Equal(t, len(data) == 0, g.Local())
		return g
	})
}

// TestGrowing: a read waits for its own bytes only, and becomes local.
func TestGrowing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := tempFile(t, []byte("0123"))
		g, err := source.OpenGrowing(path, 8)
		require.NoError(t, err)
		defer g.Close()
		p := make([]byte, 4)
		_, err = g.ReadAt(t.Context(), p, 0)
		require.NoError(t, err)
		require.Equal(t, "0123", string(p))
		require.False(t, g.Local())
		_, err = g.ReadAt(t.Context(), nil, 8)
		require.NoError(t, err, "nothing is waited for")

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err = g.ReadAt(ctx, p, 3)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.False(t, source.Temporary(err))

		begin := time.Now()
		_, err = g.ReadAt(t.Context(), p, 4)
		require.ErrorContains(t, err, "has had 4 of 8 bytes for 1m0s")
		require.True(t, source.Temporary(err), "somebody may still go on")
		require.InDelta(t, 59, time.Since(begin).Seconds(), 1)
		begin = time.Now()
		_, err = g.ReadAt(t.Context(), p, 4)
		require.True(t, source.Temporary(err))
		require.InDelta(t, 1, time.Since(begin).Seconds(), 0.1, "each read waits for a while")

		done := make(chan error, 1)
		go func() {
			_, err := g.ReadAt(t.Context(), p, 4)
			done <- err
		}()
		synctest.Wait()
		f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
		require.NoError(t, err)
		_, err = f.WriteString("4567")
		require.NoError(t, err)
		require.NoError(t, f.Close())
		require.NoError(t, <-done)
		require.Equal(t, "4567", string(p))
		require.True(t, g.Local())
		require.NoError(t, os.Remove(path))
		_, err = g.ReadAt(t.Context(), p, 4)
		require.NoError(t, err, "it was whole")
	})
}

func TestGrowingFails(t *testing.T) {
	for _, c := range []struct {
		name, want string
		is         error
		change     func(path string) error
	}{
		{"removed", "was removed when it had 4 of 8 bytes", nil, os.Remove},
		{"replaced", "was removed", nil, func(path string) error {
			return errors.Join(os.WriteFile(path+".new", []byte("01234567"), 0o600), os.Rename(path+".new", path))
		}},
		{"too long", "has 9 bytes, and should become 8", source.ErrChanged, func(path string) error { return os.Truncate(path, 9) }},
		{"shorter", "had 4 bytes, and has 2", source.ErrChanged, func(path string) error { return os.Truncate(path, 2) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := tempFile(t, []byte("0123"))
			g, err := source.OpenGrowing(path, 8)
			require.NoError(t, err)
			defer g.Close()
			done := make(chan error, 1)
			go func() {
				_, err := g.ReadAt(t.Context(), make([]byte, 1), 7)
				done <- err
			}()
			require.NoError(t, c.change(path))
			err = <-done
			require.ErrorContains(t, err, c.want)
			require.ErrorContains(t, err, path)
			require.False(t, source.Temporary(err))
			if c.is != nil {
				require.ErrorIs(t, err, c.is)
			}
			_, again := g.ReadAt(t.Context(), make([]byte, 1), 7)
			require.EqualError(t, again, err.Error())
		})
	}
	path := tempFile(t, []byte("0123"))
	_, err := source.OpenGrowing(path, 3)
	require.ErrorIs(t, err, source.ErrChanged)
	_, err = source.OpenGrowing(path, -1)
	require.ErrorContains(t, err, "negative")
	_, err = source.OpenGrowing(path+".no", 3)
	require.ErrorIs(t, err, os.ErrNotExist)

	g, err := source.OpenGrowing(path, 8)
	require.NoError(t, err)
	done := make(chan error, 1)
	go func() {
		_, err := g.ReadAt(t.Context(), make([]byte, 1), 7)
		done <- err
	}()
	require.NoError(t, g.Close())
	require.ErrorIs(t, <-done, source.ErrClosed)
}
