package overlay

import (
	"context"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"
)

// counting is a Source that counts its reads, and may lie.
type counting struct {
	bytesSource
	size  int64 // 0: the truth
	short bool  // fill half of what was asked for and say nothing
	reads int
	bytes int64
}

func (c *counting) Size() int64 {
	if c.size != 0 {
		return c.size
	}
	return c.bytesSource.Size()
}

func (c *counting) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	c.reads++
	if c.short {
		return c.bytesSource.ReadAt(ctx, p[:len(p)/2], off)
	}
	n, err := c.bytesSource.ReadAt(ctx, p, off)
	c.bytes += int64(n)
	return n, err
}

// TestOpenReads: however large the head of an overlay, Open asks its source a few times only
// and not for its frames.
func TestOpenReads(t *testing.T) {
	rng := rand.New(rand.NewPCG(9, 9))
	v := newVM(rng, 3000, 8)
	base := newBase(t, v)
	w := v.clone()
	w.mutate(rng, 2)
	for name, tt := range map[string]struct{ state, reads int }{
		"small head":   {1000, 1},
		"larger head":  {700 << 10, 2},
		"of 20 MiB":    {20 << 20, 4},
		"of two parts": {200 << 10, 2},
	} {
		t.Run(name, func(t *testing.T) {
			l := launch(newImage(t, base), w)
			l.State = make([]byte, tt.state)
			for i := range l.State {
				l.State[i] = byte(rng.Uint32())
			}
			b, _ := create(t, l, CreateOptions{})
			src := &counting{bytesSource: b}
			r, err := Open(t.Context(), src)
			require.NoError(t, err)
			require.LessOrEqual(t, src.reads, tt.reads)
			require.LessOrEqual(t, src.bytes, int64(len(r.head)+headChunk))
			state, err := r.State()
			require.NoError(t, err)
			require.Equal(t, l.State, state)
		})
	}
}

// TestLyingSource: a source that says it is larger than it is, or brings less than it was
// asked for, costs an error and no memory beyond what came.
func TestLyingSource(t *testing.T) {
	b, _ := sample(t)
	r := openBytes(t, b)
	m := *r.manifest // promises members of the largest sizes, with nothing behind
	m.Members.Index.Size, m.Members.Index.Decoded = 200<<20, maxIndex
	m.Members.State.Size, m.Members.State.Decoded = 60<<20, MaxStateSize
	body, err := m.marshal()
	require.NoError(t, err)
	first, promise := layoutMember(memberNames[memberManifest], crc32.ChecksumIEEE(body), int64(len(body)), 0, false)
	promise = append(promise, body...)
	_, header := layoutMember(memberNames[memberIndex], 0, m.Members.Index.Size, first.data+first.size, false)
	promise = append(promise, header...)
	for name, src := range map[string]*counting{
		"larger":   {bytesSource: b, size: 1 << 40},
		"short":    {bytesSource: b, short: true},
		"cut":      {bytesSource: b[:r.members[memberFrames].data-1], size: int64(len(b))},
		"promises": {bytesSource: promise, size: 1 << 40},
	} {
		t.Run(name, func(t *testing.T) {
			requireAlloc(t, 32<<20, func() {
				_, err := Open(t.Context(), src)
				require.Error(t, err)
				require.NotErrorIs(t, err, io.EOF, "to a reader an end is none")
			})
		})
	}
	t.Run("frames", func(t *testing.T) {
		src := &counting{bytesSource: b}
		r, err := Open(t.Context(), src)
		require.NoError(t, err)
		src.bytesSource = b[:r.members[memberFrames].data+1]
		_, err = r.readFrame(t.Context(), 0, nil, nil)
		require.ErrorIs(t, err, io.ErrUnexpectedEOF)
		src.bytesSource, src.short = b, true
		_, err = r.readFrame(t.Context(), 0, nil, nil)
		require.ErrorIs(t, err, io.ErrUnexpectedEOF)
		require.ErrorIs(t, r.verifyDirectory(t.Context()), io.ErrUnexpectedEOF)
	})
}
