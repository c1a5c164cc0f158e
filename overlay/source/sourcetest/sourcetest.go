// Package sourcetest holds every kind of source to the same contract, and has one in
// memory for tests that need a source at all.
package sourcetest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"cloudlet/overlay/source"
)

// Memory is a source in memory. It is the reference that Run is checked with.
type Memory struct {
	data   []byte
	closed atomic.Bool
}

// NewMemory returns a source of data, which must not change.
func NewMemory(data []byte) *Memory { return &Memory{data: data} }

// Size returns the length of the data.
func (m *Memory) Size() int64 { return int64(len(m.data)) }

// String returns "memory".
func (m *Memory) String() string { return "memory" }

// Close ends the source.
func (m *Memory) Close() error {
	m.closed.Store(true)
	return nil
}

// ReadAt implements source.Source.
func (m *Memory) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	switch {
	case m.closed.Load():
		return 0, source.ErrClosed
	case ctx.Err() != nil:
		return 0, ctx.Err()
	case off < 0:
		return 0, errors.New("negative offset")
	}
	n := 0
	if off < m.Size() {
		n = copy(p, m.data[off:])
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// Run checks the sources that open makes of given bytes.
func Run(t *testing.T, open func(t *testing.T, data []byte) source.Source) {
	for _, size := range []int{0, 1, 4095, 4096, 4097, 65535, 65536, 65537, 1<<20 + 1, 3<<20 + 17} {
		data := make([]byte, size)
		rng := rand.New(rand.NewPCG(uint64(size), 1))
		for i := range data {
			data[i] = byte(rng.Uint32())
		}
		t.Run(fmt.Sprint("size ", size), func(t *testing.T) {
			s := open(t, data)
			require.EqualValues(t, size, s.Size())
			require.NotEmpty(t, s.String())
			checkRanges(t, s, data)
			checkConcurrent(t, s, data)
			checkCancelled(t, s)
			require.NoError(t, s.Close())
			require.NoError(t, s.Close(), "a second close")
			_, err := s.ReadAt(t.Context(), make([]byte, 1), 0)
			require.ErrorIs(t, err, source.ErrClosed)
			require.False(t, source.Temporary(err))
		})
	}
}

func checkRanges(t *testing.T, s source.Source, data []byte) {
	size := int64(len(data))
	for _, c := range []struct{ off, n int64 }{
		{0, 0}, {0, 1}, {0, size}, {size, 0}, {size - 1, 1}, {size / 2, size - size/2}, {size / 3, 1}, {1, size - 2}, {65530, 20}, {65536, 5},
		{0, size + 1}, {size - 1, 2}, {size, 1}, {size + 1, 1}, {size + 1, 0}, {1 << 60, 10},
	} {
		if c.off < 0 || c.n < 0 {
			continue
		}
		p := make([]byte, c.n)
		n, err := s.ReadAt(t.Context(), p, c.off)
		want := max(0, min(c.n, size-c.off))
		require.EqualValues(t, want, n, "off %d n %d", c.off, c.n)
		if want < c.n {
			require.ErrorIs(t, err, io.EOF, "off %d n %d", c.off, c.n)
		} else {
			require.NoError(t, err, "off %d n %d", c.off, c.n)
		}
		if want > 0 {
			require.Equal(t, data[c.off:c.off+want], p[:want])
		}
	}
	_, err := s.ReadAt(t.Context(), make([]byte, 1), -1)
	require.Error(t, err)
	require.NotErrorIs(t, err, io.EOF)
}

func checkConcurrent(t *testing.T, s source.Source, data []byte) {
	if len(data) < 2 {
		return
	}
	g, ctx := errgroup.WithContext(t.Context())
	for i := range 8 {
		g.Go(func() error {
			rng := rand.New(rand.NewPCG(uint64(i), 2))
			for range 20 {
				off := rng.IntN(len(data))
				p := make([]byte, rng.IntN(min(len(data)-off, 100000)+1))
				if _, err := s.ReadAt(ctx, p, int64(off)); err != nil {
					return err
				}
				if string(p) != string(data[off:off+len(p)]) {
					return errors.New("wrong bytes")
				}
			}
			return nil
		})
	}
	require.NoError(t, g.Wait())
}

func checkCancelled(t *testing.T, s source.Source) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := s.ReadAt(ctx, make([]byte, 1), 0)
	require.ErrorIs(t, err, context.Canceled)
	require.False(t, source.Temporary(err))
	_, err = s.ReadAt(t.Context(), nil, 0)
	require.NoError(t, err, "and it works as before")
}
