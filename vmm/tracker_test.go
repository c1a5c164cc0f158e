package vmm

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// trackers makes those that can find changes of our own process on this kernel.
func trackers(t *testing.T, info vmInfo) map[string]tracker {
	t.Helper()
	regions, err := memoryRegions(os.Getpid(), info)
	require.NoError(t, err)
	out := map[string]tracker{"hash": newHashTracker(os.Getpid(), regions, info.Machine.Memory)}
	soft, err := hasSoftDirty()
	require.NoError(t, err)
	if soft {
		out["soft-dirty"] = &softTracker{pid: os.Getpid(), regions: regions}
	} else {
		t.Log("this kernel has no soft-dirty bits: their tracker is tested in a guest that has")
	}
	return out
}

// trackRig is a tracker of our own memory and the image that its rounds add up to.
type trackRig struct {
	tracker
	mem   []byte
	image []byte
}

// eachTracker runs a test for each tracker on a mapping of n pages of its own.
func eachTracker(t *testing.T, n int64, test func(t *testing.T, r *trackRig)) {
	t.Helper()
	info, _ := mapPrivately(t, n)
	for name := range trackers(t, info) {
		t.Run(name, func(t *testing.T) {
			info, mem := mapPrivately(t, n)
			image, err := os.ReadFile(info.Memory)
			require.NoError(t, err)
			test(t, &trackRig{tracker: trackers(t, info)[name], mem: mem, image: image})
		})
	}
}

// round takes a round; stopped says around what the writers must rest.
func (r *trackRig) round(t *testing.T, last bool, stopped func(func())) segments {
	t.Helper()
	out, err := os.OpenFile(filepath.Join(t.TempDir(), "out"), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	require.NoError(t, err)
	defer out.Close()
	require.NoError(t, os.Remove(out.Name())) // many rounds of one test would fill a small /tmp
	if !r.stops() {
		stopped = func(f func()) { f() }
	}
	stopped(func() { require.NoError(t, r.mark(last)) })
	segs, err := r.copy(t.Context(), out, runtime.GOMAXPROCS(0))
	require.NoError(t, err)
	r.keep()
	for _, e := range segs.extents() {
		require.NoError(t, segs.read(out, r.image[e.Off:e.Off+e.Len], e.Off))
	}
	return segs
}

// pages lists the pages of a round.
func pages(ss segments) []int64 {
	var out []int64
	for _, s := range ss {
		for off := s.Off; off < s.Off+s.Len; off += pageSize {
			out = append(out, off/pageSize)
		}
	}
	return out
}

func atOnce(f func()) { f() }

// Each round has exactly the pages that were changed since the one before.
func TestTrackerRounds(t *testing.T) {
	eachTracker(t, 300, func(t *testing.T, r *trackRig) {
		var changed []int64
		write := func(page int64, b byte) {
			r.mem[page*pageSize+page] = b
			changed = append(changed, page)
		}
		round := func(last bool, want ...int64) {
			t.Helper()
			require.Equal(t, want, pages(r.round(t, last, atOnce)))
			require.True(t, bytes.Equal(r.mem, r.image))
		}
		for _, p := range []int64{0, 7, 8, 9, 100, 299} {
			write(p, 2)
		}
		round(false, changed...)
		round(false)
		var sum byte
		for i := range 300 { // pages that are read are no changes
			sum += r.mem[i*pageSize+1]
		}
		require.NotZero(t, sum)
		round(false)
		write(8, 3)
		write(50, 3)
		clear(r.mem[9*pageSize : 10*pageSize])
		round(false, 8, 9, 50)

		// Changes that are discarded: the pages are those of the file again.
		require.NoError(t, unix.Madvise(r.mem[7*pageSize:9*pageSize], unix.MADV_DONTNEED))
		round(false, 7, 8)
		write(8, 9)
		segs := r.round(t, false, atOnce)
		require.Contains(t, pages(segs), int64(8))
		require.NotContains(t, pages(segs), int64(50))
		require.True(t, bytes.Equal(r.mem, r.image))

		write(200, 4)
		segs = r.round(t, true, atOnce)
		require.Contains(t, pages(segs), int64(200))
		require.True(t, bytes.Equal(r.mem, r.image))
		// The last round was not the last after all.
		write(201, 4)
		require.Contains(t, pages(r.round(t, false, atOnce)), int64(201))
		require.True(t, bytes.Equal(r.mem, r.image))
	})
}

// A round that was not kept, or whose copy failed, is taken again by the next.
func TestTrackerLosesNothing(t *testing.T) {
	eachTracker(t, 100, func(t *testing.T, r *trackRig) {
		r.mem[5*pageSize] = 7
		require.Equal(t, []int64{5}, pages(r.round(t, false, atOnce)))
		for i, spoil := range []func(){
			func() { // nobody could write it down
				full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
				require.NoError(t, err)
				defer full.Close()
				_, err = r.copy(t.Context(), full, 1)
				require.ErrorIs(t, err, unix.ENOSPC)
			},
			func() { // what was taken was thrown away
				out, err := os.Create(filepath.Join(t.TempDir(), "out"))
				require.NoError(t, err)
				defer out.Close()
				segs, err := r.copy(t.Context(), out, 1)
				require.NoError(t, err)
				require.NotEmpty(t, segs)
			},
			func() {}, // not even begun to copy
		} {
			r.mem[10*pageSize] = byte(i + 2)
			r.mem[(20+i)*pageSize] = byte(i + 2)
			require.NoError(t, r.mark(false))
			spoil()
			r.mem[30*pageSize] = byte(i + 2)
			require.Equal(t, []int64{10, int64(20 + i), 30}, pages(r.round(t, false, atOnce)))
			require.True(t, bytes.Equal(r.mem, r.image))
			require.Empty(t, r.round(t, false, atOnce))
		}
	})
}

// With writers that never rest but where the tracker asks for it, the rounds add up to what
// the memory is whenever they rest.
func TestTrackerWhileWriting(t *testing.T) {
	const n = 5000
	eachTracker(t, n, func(t *testing.T, r *trackRig) {
		seed := uint64(time.Now().UnixNano())
		t.Logf("seed %d", seed)
		const writers = 2
		var rest sync.RWMutex
		var end atomic.Bool
		var writes atomic.Int64
		var wg sync.WaitGroup
		for w := range writers {
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(seed, uint64(w)))
				for !end.Load() {
					rest.RLock()
					// Each writer has its own half of the pages.
					page := (rng.IntN(n/2)*2 + w) * pageSize
					binary.NativeEndian.PutUint64(r.mem[page+8*rng.IntN(pageSize/8):], rng.Uint64())
					if rng.IntN(200) == 0 {
						if err := unix.Madvise(r.mem[page:page+pageSize], unix.MADV_DONTNEED); err != nil {
							panic(err)
						}
					}
					rest.RUnlock()
					writes.Add(1)
				}
			})
		}
		defer wg.Wait()
		defer end.Store(true)
		stopped := func(f func()) {
			rest.Lock()
			defer rest.Unlock()
			f()
		}
		for range 8 {
			before := writes.Load()
			for writes.Load() < before+300 {
				runtime.Gosched()
			}
			r.round(t, false, stopped)
			stopped(func() {
				require.NotEmpty(t, r.round(t, true, atOnce))
				require.True(t, bytes.Equal(r.mem, r.image))
			})
		}
	})
}

func TestSpans(t *testing.T) {
	at := func(pages ...int64) []span { // pairs of first page and number
		var out []span
		for i := 0; i < len(pages); i += 2 {
			out = append(out, span{off: pages[i] * pageSize, n: pages[i+1] * pageSize, addr: 1<<40 + uint64(pages[i]*pageSize)})
		}
		return out
	}
	for name, tt := range map[string]struct{ a, b, union, without []span }{
		"empty":    {nil, nil, []span{}, nil},
		"left":     {at(1, 2), nil, at(1, 2), at(1, 2)},
		"right":    {nil, at(1, 2), at(1, 2), nil},
		"equal":    {at(1, 2, 9, 1), at(1, 2, 9, 1), at(1, 2, 9, 1), nil},
		"apart":    {at(1, 2, 9, 1), at(5, 1), at(1, 2, 5, 1, 9, 1), at(1, 2, 9, 1)},
		"adjacent": {at(1, 2, 6, 1), at(3, 3), at(1, 6), at(1, 2, 6, 1)},
		"inside":   {at(1, 9), at(2, 1, 4, 2), at(1, 9), at(1, 1, 3, 1, 6, 4)},
		"around":   {at(2, 1, 4, 2), at(1, 9), at(1, 9), nil},
		"overlaps": {at(1, 4, 8, 4), at(3, 6), at(1, 11), at(1, 2, 9, 3)},
	} {
		t.Run(name, func(t *testing.T) {
			require.Equal(t, tt.union, union(tt.a, tt.b))
			require.Equal(t, tt.union, union(tt.b, tt.a))
			require.Equal(t, tt.without, without(tt.a, tt.b))
		})
	}
	// Two regions that follow each other in the image only stay apart.
	require.Len(t, union([]span{{0, pageSize, 1 << 40}}, []span{{pageSize, pageSize, 1 << 41}}), 2)
}

// BenchmarkLast measures what a last round costs for memory that was taken before and has
// not changed, by number of workers.
func BenchmarkLast(b *testing.B) {
	const size = 128 << 20
	mem, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	require.NoError(b, err)
	defer func() { require.NoError(b, unix.Munmap(mem)) }()
	rng := rand.New(rand.NewPCG(1, 2))
	for i := 0; i < size; i += 8 {
		binary.NativeEndian.PutUint64(mem[i:], rng.Uint64())
	}
	start := uint64(uintptr(unsafe.Pointer(&mem[0])))
	regions := []region{{start: start, end: start + size}}
	for _, workers := range []int{1, runtime.GOMAXPROCS(0)} {
		b.Run(fmt.Sprint(workers), func(b *testing.B) {
			out, err := os.Create(filepath.Join(b.TempDir(), "out"))
			require.NoError(b, err)
			defer out.Close()
			tr := newHashTracker(os.Getpid(), regions, size)
			round := func() segments {
				require.NoError(b, tr.mark(true))
				segs, err := tr.copy(b.Context(), out, workers)
				require.NoError(b, err)
				tr.keep()
				return segs
			}
			require.NotEmpty(b, round())
			b.SetBytes(size)
			for b.Loop() {
				require.Empty(b, round())
			}
		})
	}
}
