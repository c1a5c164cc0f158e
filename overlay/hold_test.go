package overlay

import (
	"container/list"
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// flaky is a Source that fails on demand.
type flaky struct {
	bytesSource
	mu    sync.Mutex
	err   error
	reads atomic.Int64
	gate  chan struct{} // when set, reads wait for it
}

func (f *flaky) fail(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err = err
}

func (f *flaky) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	f.reads.Add(1)
	f.mu.Lock()
	err, gate := f.err, f.gate
	f.mu.Unlock()
	if err != nil {
		return 0, err
	}
	if gate != nil {
		select {
		case <-gate:
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
	return f.bytesSource.ReadAt(ctx, p, off)
}

type outage struct{}

func (outage) Error() string   { return "network is down" }
func (outage) Temporary() bool { return true }

// storedPage returns an address of image s that the overlay stores.
func storedPage(t *testing.T, r *Reader, s Space) Addr {
	for _, a := range r.index.stored {
		if a.Space() == s {
			return a
		}
	}
	t.Fatal("no stored page")
	return 0
}

func TestHold(t *testing.T) {
	b, l := sample(t)
	synctest.Test(t, func(t *testing.T) {
		src := &flaky{bytesSource: b}
		r, err := Open(t.Context(), src)
		require.NoError(t, err)
		im := newImage(t, l.Parent.base, r)
		var hold Hold
		for _, s := range Spaces {
			src.fail(outage{})
			f := hold.File(im.File(s))
			p := make([]byte, PageSize)
			done := make(chan error, 1)
			go func() {
				_, err := f.ReadAt(t.Context(), p, storedPage(t, r, s).Offset())
				done <- err
			}()
			time.Sleep(time.Minute)
			synctest.Wait()
			stalls := hold.Stalls()
			require.Len(t, stalls, 1)
			require.Equal(t, s.String(), stalls[0].Image)
			require.Contains(t, stalls[0].Error, "network is down")
			require.Greater(t, stalls[0].Tries, 10)
			src.fail(nil)
			require.NoError(t, <-done)
			require.Empty(t, hold.Stalls())

			src.fail(outage{})
			im.cache.mu.Lock() // forget the frame
			im.cache.entries, im.cache.used = map[frameKey]*list.Element{}, 0
			im.cache.order.Init()
			im.cache.mu.Unlock()
			ctx, cancel := context.WithCancelCause(t.Context())
			go func() {
				_, err := f.ReadAt(ctx, p, storedPage(t, r, s).Offset())
				done <- err
			}()
			synctest.Wait()
			aborted := errors.New("aborted")
			cancel(aborted)
			require.ErrorIs(t, <-done, aborted)
			require.Empty(t, hold.Stalls())
		}
	})
}

// TestHoldSilence: a source that does not answer is seen before it gives up.
func TestHoldSilence(t *testing.T) {
	b, l := sample(t)
	synctest.Test(t, func(t *testing.T) {
		src := &flaky{bytesSource: b}
		r, err := Open(t.Context(), src)
		require.NoError(t, err)
		im := newImage(t, l.Parent.base, r)
		src.gate = make(chan struct{})
		var hold Hold
		done := make(chan error, 1)
		go func() {
			_, err := hold.File(im.File(Memory)).ReadAt(t.Context(), make([]byte, PageSize), storedPage(t, r, Memory).Offset())
			done <- err
		}()
		time.Sleep(time.Second)
		require.Empty(t, hold.Stalls())
		time.Sleep(2 * time.Second)
		require.Len(t, hold.Stalls(), 1)
		require.Equal(t, "the source has not answered yet", hold.Stalls()[0].Error)
		require.Zero(t, hold.Stalls()[0].Tries)
		close(src.gate)
		require.NoError(t, <-done)
		require.Empty(t, hold.Stalls())
	})
}

// TestHoldDamage: damage is an error for the disk, which QEMU survives, and is held for
// memory, which it does not.
func TestHoldDamage(t *testing.T) {
	b, l := sample(t)
	synctest.Test(t, func(t *testing.T) {
		src := &flaky{bytesSource: b}
		r, err := Open(t.Context(), src)
		require.NoError(t, err)
		im := newImage(t, l.Parent.base, r)
		src.fail(errors.New("damaged"))
		var hold Hold
		p := make([]byte, PageSize)
		_, err = hold.File(im.File(Disk)).ReadAt(t.Context(), p, storedPage(t, r, Disk).Offset())
		require.ErrorContains(t, err, "damaged")
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		_, err = hold.File(im.File(Memory)).ReadAt(ctx, p, storedPage(t, r, Memory).Offset())
		require.ErrorIs(t, err, context.DeadlineExceeded)
	})
}

// TestOneFetch: many readers of one frame cost one fetch, and one that goes away takes
// nothing from the others.
func TestOneFetch(t *testing.T) {
	b, l := sample(t)
	synctest.Test(t, func(t *testing.T) {
		src := &flaky{bytesSource: b}
		r, err := Open(t.Context(), src)
		require.NoError(t, err)
		im := newImage(t, l.Parent.base, r)
		src.gate = make(chan struct{})
		before := src.reads.Load()
		a := storedPage(t, r, Memory)
		first, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		errs := make([]error, 10)
		for i := range errs {
			ctx := t.Context()
			if i == 0 {
				ctx = first
			}
			wg.Go(func() { errs[i] = im.ReadPages(ctx, a.Space(), make([]byte, PageSize), a.Offset()) })
			synctest.Wait()
		}
		cancel()
		synctest.Wait()
		require.ErrorIs(t, errs[0], context.Canceled)
		close(src.gate)
		wg.Wait()
		for _, err := range errs[1:] {
			require.NoError(t, err)
		}
		require.EqualValues(t, 1, src.reads.Load()-before)
	})
}

// TestCacheBound: the cache keeps to its limit and failed loads are not kept.
func TestCacheBound(t *testing.T) {
	c := newFrameCache(10)
	load := func(n int, err error) func(context.Context) ([]byte, error) {
		return func(context.Context) ([]byte, error) { return make([]byte, n), err }
	}
	for i := range 5 {
		_, err := c.get(t.Context(), t.Context(), frameKey{0, i}, false, load(4, nil))
		require.NoError(t, err)
	}
	c.mu.Lock()
	require.Equal(t, 8, c.used)
	require.Len(t, c.entries, 2)
	c.mu.Unlock()
	_, err := c.get(t.Context(), t.Context(), frameKey{1, 0}, false, load(0, outage{}))
	require.Error(t, err)
	_, err = c.get(t.Context(), t.Context(), frameKey{1, 0}, false, load(1, nil))
	require.NoError(t, err)
	c.close()
	_, err = c.get(t.Context(), t.Context(), frameKey{1, 0}, false, load(1, nil))
	require.ErrorIs(t, err, ErrClosed)
}

// TestLoadHere: where loads run in the caller's goroutine, callers at the same time still
// cost one load.
func TestLoadHere(t *testing.T) {
	c := newFrameCache(1 << 20)
	var loads atomic.Int64
	begin := make(chan struct{})
	var wg sync.WaitGroup
	pages := make([][]byte, 8)
	for i := range pages {
		wg.Go(func() {
			<-begin
			pages[i], _ = c.get(t.Context(), t.Context(), frameKey{}, true, func(context.Context) ([]byte, error) {
				loads.Add(1)
				return []byte{7}, nil
			})
		})
	}
	close(begin)
	wg.Wait()
	require.EqualValues(t, 1, loads.Load())
	for _, p := range pages {
		require.Equal(t, []byte{7}, p)
	}
	c.close()
}
