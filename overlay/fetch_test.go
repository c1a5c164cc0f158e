package overlay

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"cloudlet/overlay/source"
)

// farVM makes a base and an overlay of many small frames that do not compress.
func farVM(t testing.TB, pages int, text string) (*Base, vm, []byte) {
	v := vm{make([]byte, pages*PageSize), make([]byte, PageSize)}
	base := newBase(t, v)
	w := v.clone()
	rand.NewChaCha8([32]byte{5}).Read(w[Memory]) // never fails
	b, _ := create(t, launch(newImage(t, base), w), CreateOptions{Strategy: strategy(t, text)})
	return base, w, b
}

// link is a Source that counts and records its requests, and may be held or broken.
type link struct {
	bytesSource
	mu       sync.Mutex
	err      error
	spoil    int // so many next reads bring wrong bytes
	gate     chan struct{}
	offs     []int64
	lens     []int
	underWay atomic.Int64
}

func (l *link) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	l.underWay.Add(1)
	defer l.underWay.Add(-1)
	l.mu.Lock()
	l.offs, l.lens = append(l.offs, off), append(l.lens, len(p))
	err, gate := l.err, l.gate
	spoil := l.spoil > 0
	if spoil {
		l.spoil--
	}
	l.mu.Unlock()
	if gate != nil {
		if err := waitFor(ctx, gate); err != nil {
			return 0, err
		}
	}
	if err != nil {
		return 0, err
	}
	k, err := l.bytesSource.ReadAt(ctx, p, off)
	if spoil && k > 0 {
		p[k-1] ^= 1
	}
	return k, err
}

func (l *link) set(change func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	change()
}

func (l *link) requests() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.offs)
}

// emptyCache returns an unnamed file of n bytes that holds nothing.
func emptyCache(t testing.TB, n int) *os.File {
	f, err := os.Create(filepath.Join(t.TempDir(), "sparse"))
	require.NoError(t, err)
	t.Cleanup(func() { f.Close() })
	require.NoError(t, f.Truncate(int64(n)))
	return f
}

func openLink(t testing.TB, l *link, cache *os.File) *Reader {
	r, err := OpenWith(t.Context(), l, OpenOptions{Cache: cache})
	require.NoError(t, err)
	l.set(func() { l.offs, l.lens = nil, nil })
	return r
}

// TestFetchAll: everything comes, several at a time and neighbours together, and then the
// source is needed no more, also by the next reader of the same cache.
func TestFetchAll(t *testing.T) {
	base, w, b := farVM(t, 2000, "none,frame=16K")
	l := &link{bytesSource: b}
	cache := emptyCache(t, len(b))
	r := openLink(t, l, cache)
	im := newImage(t, base, r)
	require.False(t, r.Complete())
	require.NoError(t, im.Fetch(t.Context(), nil, FetchOptions{}))
	require.True(t, r.Complete())
	require.EqualValues(t, len(r.index.frames), im.Stats().Cached)
	for _, n := range l.lens {
		require.LessOrEqual(t, n, 256<<10)
	}
	require.Less(t, len(l.lens), len(r.index.frames)/3, "neighbours come together")
	requireImage(t, im, w)
	n := l.requests()
	require.NoError(t, im.Fetch(t.Context(), nil, FetchOptions{}))
	require.Equal(t, n, l.requests())

	l2 := &link{bytesSource: b}
	r = openLink(t, l2, cache)
	l2.err = errors.New("gone")
	im = newImage(t, base, r)
	require.NoError(t, im.Fetch(t.Context(), nil, FetchOptions{}))
	require.True(t, r.Complete())
	requireImage(t, im, w)
	require.Zero(t, l2.requests())
}

// TestFetchOrder: the profile comes first and in its order, the rest in the file's.
func TestFetchOrder(t *testing.T) {
	base, _, b := farVM(t, 400, "none,frame=4K")
	l := &link{bytesSource: b}
	r := openLink(t, l, emptyCache(t, len(b)))
	im := newImage(t, base, r)
	profile := []Addr{300, 7, 200, 201, 100, 1 << 30, MakeAddr(Disk, 1<<20)}
	require.NoError(t, im.Fetch(t.Context(), profile, FetchOptions{Parallel: 1, Most: 16 << 10}))
	first := r.members[memberFrames].data
	var pages []int
	for i, off := range l.offs {
		require.LessOrEqual(t, l.lens[i], 16<<10)
		pages = append(pages, int(off-first)/PageSize)
	}
	require.Equal(t, []int{300, 7, 200, 100}, pages[:4])
	require.Equal(t, 8192, l.lens[2], "two neighbours")
	require.True(t, slices.IsSorted(pages[4:]))
	require.True(t, r.Complete())
}

// TestCacheDamaged: whatever stands in the cache, no wrong byte is believed, and what is
// wrong is fetched again.
func TestCacheDamaged(t *testing.T) {
	base, w, b := farVM(t, 200, "none,frame=16K")
	for name, damage := range map[string]func(t *testing.T, f *os.File){
		"a bit": func(t *testing.T, f *os.File) {
			var p [1]byte
			_, err := f.ReadAt(p[:], int64(len(b)/2))
			require.NoError(t, err)
			p[0] ^= 4
			_, err = f.WriteAt(p[:], int64(len(b)/2))
			require.NoError(t, err)
		},
		"cut":   func(t *testing.T, f *os.File) { require.NoError(t, f.Truncate(int64(len(b)/3))) },
		"empty": func(t *testing.T, f *os.File) { require.NoError(t, f.Truncate(0)) },
		"noise": func(t *testing.T, f *os.File) {
			_, err := f.WriteAt(bytes.Repeat([]byte("noise"), len(b)/5+100), 0)
			require.NoError(t, err)
		},
	} {
		for _, when := range []string{"before opening", "while open"} {
			t.Run(name+" "+when, func(t *testing.T) {
				cache := emptyCache(t, len(b))
				l := &link{bytesSource: b}
				r := openLink(t, l, cache)
				im := newImage(t, base, r)
				require.NoError(t, im.Fetch(t.Context(), nil, FetchOptions{}))
				damage(t, cache)
				if when == "before opening" {
					r = openLink(t, l, cache)
					im = newImage(t, base, r)
				}
				n := l.requests()
				requireImage(t, im, w)
				require.Greater(t, l.requests(), n)
				require.Zero(t, im.Stats().Refused)
				require.NoError(t, im.Fetch(t.Context(), nil, FetchOptions{}))
				require.True(t, r.Complete())
				n = l.requests()
				requireImage(t, newImage(t, base, r), w)
				require.Equal(t, n, l.requests())
			})
		}
	}
}

// TestCacheOff: a cache that takes no writes costs the cache, no read.
func TestCacheOff(t *testing.T) {
	base, w, b := farVM(t, 200, "none,frame=16K")
	path := filepath.Join(t.TempDir(), "cache")
	require.NoError(t, os.WriteFile(path, nil, 0o600))
	readOnly, err := os.Open(path)
	require.NoError(t, err)
	defer readOnly.Close()
	full, err := os.OpenFile("/dev/full", os.O_RDWR, 0)
	require.NoError(t, err)
	defer full.Close()
	for name, f := range map[string]*os.File{"read only": readOnly, "full": full} {
		t.Run(name, func(t *testing.T) {
			r := openLink(t, &link{bytesSource: b}, f)
			im := newImage(t, base, r)
			requireImage(t, im, w)
			require.NoError(t, im.Fetch(t.Context(), nil, FetchOptions{}))
			require.EqualValues(t, 1, im.Stats().CacheOff)
			require.Zero(t, im.Stats().Cached)
			require.False(t, r.Complete())
		})
	}
}

// TestDemandFirst: while a demand is under way nothing else begins; a frame that is on its
// way is not asked for twice; one that waits is taken over.
func TestDemandFirst(t *testing.T) {
	base, w, b := farVM(t, 400, "none,frame=4K")
	synctest.Test(t, func(t *testing.T) {
		gate := make(chan struct{})
		l := &link{bytesSource: b}
		r := openLink(t, l, emptyCache(t, len(b)))
		im := newImage(t, base, r)
		l.gate = gate
		var wg sync.WaitGroup
		defer wg.Wait()
		errs := make([]error, 3)
		wg.Go(func() { errs[0] = im.Fetch(t.Context(), []Addr{0, 50, 100}, FetchOptions{Parallel: 2}) })
		synctest.Wait()
		require.Equal(t, 2, l.requests())
		read := func(page Addr) error {
			p := make([]byte, PageSize)
			err := im.ReadPages(t.Context(), Memory, p, page.Offset())
			if err == nil && !bytes.Equal(p, w.page(page)) {
				err = errors.New("wrong bytes")
			}
			return err
		}
		wg.Go(func() { errs[1] = read(0) }) // on its way
		synctest.Wait()
		require.Equal(t, 2, l.requests())
		demand := make(chan struct{})
		l.set(func() { l.gate = demand })
		wg.Go(func() { errs[2] = read(100) }) // waits
		synctest.Wait()
		require.Equal(t, 3, l.requests())
		close(gate)
		synctest.Wait()
		require.Equal(t, 3, l.requests(), "nothing begins beside a demand")
		require.EqualValues(t, 1, l.underWay.Load())
		l.set(func() { l.gate = nil })
		close(demand)
		wg.Wait()
		for _, err := range errs {
			require.NoError(t, err)
		}
		require.True(t, r.Complete())
		total := 0
		for _, n := range l.lens {
			total += n
		}
		require.EqualValues(t, r.members[memberFrames].size, total, "nothing twice")
	})
}

// TestFetchOutage: an outage ends nothing, a source that is gone for good does.
func TestFetchOutage(t *testing.T) {
	base, w, b := farVM(t, 400, "none,frame=16K")
	synctest.Test(t, func(t *testing.T) {
		l := &link{bytesSource: b}
		r := openLink(t, l, emptyCache(t, len(b)))
		im := newImage(t, base, r)
		l.set(func() { l.err = outage{} })
		done := make(chan error, 1)
		go func() { done <- im.Fetch(t.Context(), []Addr{100, 3}, FetchOptions{}) }()
		time.Sleep(time.Hour)
		n := l.requests()
		time.Sleep(time.Minute)
		require.InDelta(t, 12, l.requests()-n, 2, "one each 5 s")
		l.set(func() { l.err = nil })
		require.NoError(t, <-done)
		require.True(t, r.Complete())
		requireImage(t, im, w)

		r = openLink(t, l, emptyCache(t, len(b)))
		im = newImage(t, base, r)
		l.set(func() { l.err = outage{} })
		ctx, cancel := context.WithCancelCause(t.Context())
		go func() { done <- im.Fetch(ctx, nil, FetchOptions{}) }()
		time.Sleep(time.Second)
		enough := errors.New("enough")
		cancel(enough)
		require.ErrorIs(t, <-done, enough)
		go func() { done <- im.Fetch(t.Context(), nil, FetchOptions{}) }()
		time.Sleep(time.Second)
		require.NoError(t, im.Close())
		require.ErrorIs(t, <-done, ErrClosed)
		require.ErrorIs(t, im.Fetch(t.Context(), nil, FetchOptions{}), ErrClosed)

		im = newImage(t, base, r)
		gone := errors.New("gone")
		l.set(func() { l.err = gone })
		require.ErrorIs(t, im.Fetch(t.Context(), nil, FetchOptions{}), gone)
	})
}

// TestFetchPastOutage: an overlay whose source is away keeps nothing from one of another
// source, and is fetched when that is there again.
func TestFetchPastOutage(t *testing.T) {
	rng := newRand(t)
	v := vm{make([]byte, 400*PageSize), make([]byte, PageSize)}
	base := newBase(t, v)
	w := v.clone()
	noise(rng, w[Memory][:200*PageSize])
	below, _ := create(t, launch(newImage(t, base), w), CreateOptions{Strategy: strategy(t, "none,frame=16K")})
	noise(rng, w[Memory][200*PageSize:])
	above, _ := create(t, launch(newImage(t, base, openBytes(t, below)), w), CreateOptions{Strategy: strategy(t, "none,frame=16K")})
	synctest.Test(t, func(t *testing.T) {
		away, there := &link{bytesSource: below}, &link{bytesSource: above}
		a, b := openLink(t, away, emptyCache(t, len(below))), openLink(t, there, emptyCache(t, len(above)))
		im := newImage(t, base, a, b)
		away.set(func() { away.err = outage{} })
		done := make(chan error, 1)
		go func() { done <- im.Fetch(t.Context(), []Addr{7, 300, 8}, FetchOptions{}) }()
		time.Sleep(time.Minute)
		require.True(t, b.Complete())
		require.False(t, a.Complete())
		away.set(func() { away.err = nil })
		require.NoError(t, <-done)
		require.True(t, a.Complete())
		requireImage(t, im, w)
	})
}

// TestFetchDamaged: what was damaged on the way is fetched once more, what stays damaged is
// left to the demand, which says so.
func TestFetchDamaged(t *testing.T) {
	base, w, b := farVM(t, 100, "none,frame=16K")
	l := &link{bytesSource: b}
	r := openLink(t, l, emptyCache(t, len(b)))
	im := newImage(t, base, r)
	l.set(func() { l.spoil = 3 })
	require.NoError(t, im.Fetch(t.Context(), nil, FetchOptions{Parallel: 4, Most: 16 << 10}))
	require.Positive(t, im.Stats().Refused)

	b = bytes.Clone(b)
	b[r.members[memberFrames].data+5*16<<10] ^= 1
	r = openLink(t, &link{bytesSource: b}, emptyCache(t, len(b)))
	im = newImage(t, base, r)
	require.NoError(t, im.Fetch(t.Context(), []Addr{20}, FetchOptions{}))
	require.False(t, r.Complete())
	require.EqualValues(t, len(r.index.frames)-1, im.Stats().Cached)
	var damaged *CorruptFrameError
	require.ErrorAs(t, im.ReadPages(t.Context(), Memory, make([]byte, PageSize), 20*PageSize), &damaged)
	require.Equal(t, 5, damaged.Frame)
	p := make([]byte, PageSize)
	require.NoError(t, im.ReadPages(t.Context(), Memory, p, 0))
	require.Equal(t, w.page(0), p)
	nothing := func(context.Context, Space, []byte, int64) error { return nil }
	require.ErrorAs(t, im.Prefetch(t.Context(), []Addr{0, 20}, nothing), &damaged)
}

// TestFetchAndPrefetch: Prefetch takes what Fetch brings, with a cache on disk and without,
// and asks the source for nothing itself.
func TestFetchAndPrefetch(t *testing.T) {
	base, w, b := farVM(t, 12000, "none,frame=16K") // more than is held in memory
	var profile []Addr
	for _, n := range rand.New(rand.NewPCG(1, 2)).Perm(12000) {
		profile = append(profile, Addr(n))
	}
	for _, name := range []string{"cache", "memory"} {
		t.Run(name, func(t *testing.T) {
			var cache *os.File
			if name == "cache" {
				cache = emptyCache(t, len(b))
			}
			l := &link{bytesSource: b}
			r := openLink(t, l, cache)
			im, err := NewImage(base, []*Reader{r}, ImageOptions{FrameCache: 96 << 20})
			require.NoError(t, err)
			defer im.Close()
			done, gate := make(chan error, 1), make(chan struct{})
			l.set(func() { l.gate = gate })
			go func() { done <- im.Fetch(t.Context(), profile, FetchOptions{}) }()
			require.Eventually(t, func() bool { return l.underWay.Load() > 1 }, 10*time.Second, time.Millisecond, "one request at a time")
			close(gate)
			pushed := 0
			require.NoError(t, im.Prefetch(t.Context(), profile, func(_ context.Context, s Space, p []byte, off int64) error {
				pushed += len(p)
				if !bytes.Equal(p, w[s][off:off+int64(len(p))]) {
					return errors.New("wrong bytes")
				}
				return nil
			}))
			require.NoError(t, <-done)
			require.Equal(t, len(profile)*PageSize, pushed)
			total := 0
			for _, n := range l.lens {
				total += n
			}
			require.EqualValues(t, r.members[memberFrames].size, total, "nothing twice")
			require.Equal(t, cache != nil, r.Complete())
			r.remote.mu.Lock()
			require.Empty(t, r.remote.held)
			require.Zero(t, r.remote.heldAll)
			r.remote.mu.Unlock()
		})
	}
}

// TestHeldBound: without a cache on disk Fetch waits for room and holds no more than its
// bound, and Prefetch in another order gets its frames nevertheless.
func TestHeldBound(t *testing.T) {
	base, _, b := farVM(t, 12000, "none,frame=16K")
	l := &link{bytesSource: b}
	r := openLink(t, l, nil)
	im := newImage(t, base, r)
	var profile []Addr
	for n := range Addr(12000) {
		profile = append(profile, n)
	}
	done := make(chan error, 1)
	go func() { done <- im.Fetch(t.Context(), profile, FetchOptions{}) }()
	require.Eventually(t, func() bool {
		r.remote.mu.Lock()
		defer r.remote.mu.Unlock()
		return r.remote.stalled
	}, 10*time.Second, time.Millisecond)
	r.remote.mu.Lock()
	require.Less(t, r.remote.heldAll, heldMost+3<<20)
	r.remote.mu.Unlock()
	slices.Reverse(profile)
	nothing := func(context.Context, Space, []byte, int64) error { return nil }
	require.NoError(t, im.Prefetch(t.Context(), profile, nothing))
	require.NoError(t, <-done)
}

// TestFetchConcurrent: demand, Prefetch and Fetch of a chain at the same time, over a link
// that fails now and then.
func TestFetchConcurrent(t *testing.T) {
	rng := newRand(t)
	v := newVM(rng, 600, 200)
	base := newBase(t, v)
	var chain []*Reader
	var bad atomic.Bool
	for n := range 3 {
		v = v.clone()
		v.mutate(rng, 3)
		b, _ := create(t, launch(newImage(t, base, chain...), v), CreateOptions{Strategy: strategy(t, "fast,frame=16K")})
		var cache *os.File
		if n != 1 {
			cache = emptyCache(t, len(b))
		}
		r, err := OpenWith(t.Context(), &lossy{bytesSource: b, bad: &bad}, OpenOptions{Cache: cache})
		require.NoError(t, err)
		chain = append(chain, r)
	}
	im, err := NewImage(base, chain, ImageOptions{FrameCache: 256 << 10, Decoded: emptyCache(t, 0)})
	require.NoError(t, err)
	defer im.Close()
	bad.Store(true)
	var profile []Addr
	for _, n := range rng.Perm(600) {
		profile = append(profile, Addr(n))
	}
	var wg sync.WaitGroup
	errs := make([]error, 6)
	wg.Go(func() { errs[0] = im.Fetch(t.Context(), profile, FetchOptions{}) })
	wg.Go(func() {
		for { // over a lossy link some tries end
			err := im.Prefetch(t.Context(), profile, func(_ context.Context, s Space, p []byte, off int64) error {
				if !bytes.Equal(p, v[s][off:off+int64(len(p))]) {
					return errors.New("wrong bytes")
				}
				return nil
			})
			if !temporary(err) {
				errs[1] = err
				return
			}
		}
	})
	for i := range errs[2:] {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(*seed, uint64(i)))
			var hold Hold
			for range 500 {
				s := Space(rng.IntN(2))
				off := rng.Int64N(im.Size(s)/PageSize) * PageSize
				p := make([]byte, PageSize)
				if _, err := hold.File(im.File(s)).ReadAt(t.Context(), p, off); err != nil {
					errs[2+i] = err
					return
				}
				if !bytes.Equal(p, v[s][off:off+PageSize]) {
					errs[2+i] = errors.New("wrong bytes")
					return
				}
			}
		})
	}
	wg.Wait()
	for _, err := range errs {
		require.NoError(t, err)
	}
	require.True(t, chain[0].Complete())
	require.True(t, chain[2].Complete())
}

// lossy fails every 13th read for the moment, while it is bad.
type lossy struct {
	bytesSource
	bad   *atomic.Bool
	reads atomic.Int64
}

func (l *lossy) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if n := l.reads.Add(1); n%13 == 0 && l.bad.Load() {
		return 0, outage{}
	}
	return l.bytesSource.ReadAt(ctx, p, off)
}

// growing is a Source that becomes local.
type growing struct {
	link
	whole atomic.Bool
}

func (g *growing) Local() bool   { return g.whole.Load() }
func (g *growing) Growing() bool { return true }

// TestFetchGrowing: what comes by itself is waited for and not copied.
func TestFetchGrowing(t *testing.T) {
	base, w, b := farVM(t, 100, "none,frame=16K")
	synctest.Test(t, func(t *testing.T) {
		g := &growing{link: link{bytesSource: b}}
		r, err := OpenWith(t.Context(), g, OpenOptions{})
		require.NoError(t, err)
		im := newImage(t, base, r)
		require.False(t, im.Local())
		g.set(func() { g.offs, g.gate = nil, make(chan struct{}) })
		done := make(chan error, 1)
		go func() { done <- im.Fetch(t.Context(), []Addr{1}, FetchOptions{}) }()
		synctest.Wait()
		require.Equal(t, []int64{int64(len(b)) - 1}, g.offs)
		require.False(t, r.Complete())
		g.whole.Store(true)
		close(g.gate)
		require.NoError(t, <-done)
		require.True(t, r.Complete())
		require.True(t, im.Local())
		requireImage(t, im, w)
	})
}

// delayed serves an overlay over HTTP, each answer late.
func delayed(t testing.TB, b []byte, delay time.Duration) *httptest.Server {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(delay)
		w.Header().Set("ETag", `"v1"`)
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
	}))
	t.Cleanup(s.Close)
	return s
}

// BenchmarkFetch brings the 2,000 frames of a profile over a server that answers after
// 20 ms, and compares with the best that 8 requests of 256 KiB at a time can do.
func BenchmarkFetch(b *testing.B) {
	const frames, size, delay = 2000, 16 << 10, 20 * time.Millisecond
	base, _, data := farVM(b, frames*size/PageSize, "none,frame=16K")
	srv := delayed(b, data, delay)
	for _, order := range []string{"file", "shuffled"} {
		for _, kept := range []string{"cache", "memory"} {
			b.Run(order+"/"+kept, func(b *testing.B) {
				profile := make([]Addr, 0, frames)
				for n := range frames {
					profile = append(profile, Addr(n*size/PageSize))
				}
				if order == "shuffled" {
					rand.New(rand.NewPCG(1, 1)).Shuffle(frames, func(i, k int) { profile[i], profile[k] = profile[k], profile[i] })
				}
				b.SetBytes(frames * size)
				var ideal, took time.Duration
				for b.Loop() {
					src, err := source.OpenHTTP(b.Context(), srv.URL, source.HTTPOptions{})
					require.NoError(b, err)
					var cache *os.File
					if kept == "cache" {
						cache = emptyCache(b, len(data))
					}
					r, err := OpenWith(b.Context(), src, OpenOptions{Cache: cache})
					require.NoError(b, err)
					im, err := NewImage(base, []*Reader{r}, ImageOptions{})
					require.NoError(b, err)
					begin := time.Now()
					require.NoError(b, im.Fetch(b.Context(), profile, FetchOptions{}))
					took += time.Since(begin)
					ideal += frames * size / (8 * fetchMost) * delay
					require.NoError(b, im.Close())
					require.NoError(b, r.Close())
				}
				b.ReportMetric(took.Seconds()/ideal.Seconds(), "of-ideal")
			})
		}
	}
}
