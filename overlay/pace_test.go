package overlay

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// slowLink is a Source over a link: an answer begins a round trip after its request, and the
// link sends one after the other, the worst that can happen to a demand.
type slowLink struct {
	bytesSource
	rate float64 // bytes a second
	trip time.Duration

	mu   sync.Mutex
	free time.Time
}

func (l *slowLink) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	l.mu.Lock()
	begin := time.Now().Add(l.trip)
	if begin.Before(l.free) {
		begin = l.free
	}
	l.free = begin.Add(time.Duration(float64(len(p)) / l.rate * float64(time.Second)))
	end := l.free
	l.mu.Unlock()
	if err := rest(ctx, time.Until(end)); err != nil {
		return 0, err
	}
	return l.bytesSource.ReadAt(ctx, p, off)
}

// TestFetchKeepsLinksFree: on links of all kinds Fetch fills the link, and a demand beside it
// waits about as long as alone.
func TestFetchKeepsLinksFree(t *testing.T) {
	base, _, b := farVM(t, 6000, "none,frame=16K")
	for _, c := range []struct {
		name  string
		mbits float64
		trip  time.Duration
		most  time.Duration // of a demand's wait beyond what it takes alone
		ideal float64
	}{
		{"1 Gbit/s 1 ms", 1000, time.Millisecond, 60 * time.Millisecond, 1.1},
		{"100 Mbit/s 5 ms", 100, 5 * time.Millisecond, 200 * time.Millisecond, 1.1},
		{"38 Mbit/s 20 ms", 38, 20 * time.Millisecond, 250 * time.Millisecond, 1.1},
		{"10 Mbit/s 50 ms", 10, 50 * time.Millisecond, 400 * time.Millisecond, 1.1},
		{"50 Mbit/s 600 ms", 50, 600 * time.Millisecond, 700 * time.Millisecond, 2.2}, // 2 MiB at a time, the link holds 3.6
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := &slowLink{bytesSource: b, rate: c.mbits * 1e6 / 8, trip: c.trip}
				r, err := OpenWith(t.Context(), l, OpenOptions{Cache: emptyCache(t, len(b))})
				require.NoError(t, err)
				im := newImage(t, base, r)
				begin := time.Now()
				require.NoError(t, im.Fetch(t.Context(), nil, FetchOptions{}))
				ideal := float64(r.members[memberFrames].size)/l.rate + c.trip.Seconds()
				alone := time.Since(begin).Seconds() / ideal

				r, err = OpenWith(t.Context(), l, OpenOptions{Cache: emptyCache(t, len(b))})
				require.NoError(t, err)
				im = newImage(t, base, r)
				done := make(chan error, 1)
				begin = time.Now()
				go func() { done <- im.Fetch(t.Context(), nil, FetchOptions{}) }()
				var waits []time.Duration
				for n := int64(5996); ; n -= 40 { // far ahead of the Fetch
					time.Sleep(100 * time.Millisecond)
					if len(done) > 0 || n < 0 {
						break
					}
					asked := time.Now()
					require.NoError(t, im.ReadPages(t.Context(), Memory, make([]byte, PageSize), n*PageSize))
					if wait := time.Since(asked); wait > 0 {
						waits = append(waits, wait)
					}
				}
				require.NoError(t, <-done)
				beside := time.Since(begin).Seconds() / ideal
				slices.Sort(waits)
				single := c.trip + time.Duration(16<<10/l.rate*float64(time.Second))
				last := time.Duration(0)
				text := "none"
				if n := len(waits); n > 0 {
					last = waits[n-1]
					text = fmt.Sprintf("%d, p50 %s, most %s", n, waits[n/2].Round(time.Millisecond), last.Round(time.Millisecond))
				}
				t.Logf("%.2f of the ideal time alone, %.2f beside demands; waits: %s; one alone %s", alone, beside, text, single.Round(time.Millisecond))
				require.Less(t, alone, c.ideal)
				require.Less(t, last, single+c.most)
			})
		})
	}
}

// TestFetchBesideBusyGuest: a guest that waits for one page after the other leaves Fetch a part
// of the link, and does not wait much longer for it.
func TestFetchBesideBusyGuest(t *testing.T) {
	base, _, b := farVM(t, 6000, "none,frame=16K")
	for _, c := range []struct {
		name  string
		mbits float64
		trip  time.Duration
	}{{"100 Mbit/s 10 ms", 100, 10 * time.Millisecond}, {"38 Mbit/s 40 ms", 38, 40 * time.Millisecond}, {"10 Mbit/s 100 ms", 10, 100 * time.Millisecond}} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := &slowLink{bytesSource: b, rate: c.mbits * 1e6 / 8, trip: c.trip}
				r, err := OpenWith(t.Context(), l, OpenOptions{Cache: emptyCache(t, len(b))})
				require.NoError(t, err)
				im := newImage(t, base, r)
				done := make(chan error, 1)
				begin := time.Now()
				go func() { done <- im.Fetch(t.Context(), nil, FetchOptions{}) }()
				time.Sleep(time.Second) // what it takes to start a guest
				var waits []time.Duration
				for n := int64(5996); len(done) == 0 && n > 3000; n -= 4 { // the second half, backwards
					asked := time.Now()
					require.NoError(t, im.ReadPages(t.Context(), Memory, make([]byte, PageSize), n*PageSize))
					waits = append(waits, time.Since(asked))
				}
				fetched := im.Stats().Cached - int64(len(waits))
				took := time.Since(begin).Seconds()
				require.NoError(t, <-done)
				share := float64(fetched) * (16 << 10) / took / l.rate
				slices.Sort(waits)
				single := c.trip + time.Duration(16<<10/l.rate*float64(time.Second))
				t.Logf("Fetch had %.2f of the link; %d waits, p50 %s, p99 %s; one alone %s", share, len(waits), waits[len(waits)/2].Round(time.Millisecond),
					waits[len(waits)*99/100].Round(time.Millisecond), single.Round(time.Millisecond))
				require.Greater(t, share, 0.2)
				require.Less(t, waits[len(waits)/2], 2*single)
			})
		})
	}
}

// TestStreams: demands that follow one another have more and more fetched ahead, those of
// several readers each for itself; others none.
func TestStreams(t *testing.T) {
	var s streams
	const there = 1000 // added to a demand that need not wait
	for _, step := range []struct{ demand, room, lo, hi int }{
		{0, 9, 0, 0}, {7, 9, 0, 0}, {8, 9, 9, 11}, // after two
		{9 + there, 9, 11, 14}, {11 + there, 9, 14, 20}, // came in time, or was the kernel's
		{100, 9, 0, 0}, {50, 9, 0, 0}, {101, 9, 102, 104}, // another reader, and a stray
		{20, 9, 21, 30}, {21 + there, 9, 30, 31}, {102 + there, 9, 104, 107},
		{40 + there, 9, 0, 0}, {41, 9, 0, 0}, // nobody waited for the first
		{42, 1, 43, 44}, {43, 0, 0, 0}, // no room
		{60, 9, 0, 0}, {70, 9, 0, 0}, {80, 9, 0, 0}, {90, 9, 0, 0}, {22, 9, 31, 32}, // five others are remembered as well
		{110, 9, 0, 0}, {120, 9, 0, 0}, {130, 9, 0, 0}, {140, 9, 0, 0}, {150, 9, 0, 0}, {160, 9, 0, 0}, {170, 9, 0, 0},
		{180, 9, 0, 0}, {23, 9, 0, 0}, // but not more
	} {
		lo, hi := s.demand(step.demand%there, step.room, step.demand < there)
		if lo >= hi {
			lo, hi = 0, 0
		}
		require.Equal(t, step, struct{ demand, room, lo, hi int }{step.demand, step.room, lo, hi})
	}
}

// TestFollow: what is fetched ahead is bounded, in frames, bytes and memory, but is one frame at
// least; frames that a Fetch brings for a profile are left to it.
func TestFollow(t *testing.T) {
	for strategy, most := range map[string]int{"none,frame=16K": streamFrames, "none,frame=64K": 4, "none,frame=512K": 1} {
		t.Run(strategy, func(t *testing.T) {
			_, _, b := farVM(t, 6000, strategy)
			r, err := OpenWith(t.Context(), &slowLink{bytesSource: b, rate: 1e12}, OpenOptions{})
			require.NoError(t, err)
			t.Cleanup(func() { require.NoError(t, r.Close()) })
			m := r.remote
			ahead := func(i int) int {
				lo, hi := m.follow(i)
				require.True(t, lo >= hi || lo > i)
				return max(hi-lo, 0)
			}
			require.Zero(t, ahead(0))
			require.Equal(t, min(2, most), ahead(1))
			for i := 2; i < 6; i++ {
				ahead(i)
			}
			_, hi := m.follow(6)
			require.Equal(t, 7+most, hi)
			m.frames[7].want = wantHot
			require.Zero(t, ahead(7))
			m.frames[7].want = unwanted
			require.Equal(t, 1, ahead(7))
			m.heldAll = heldMost
			require.Zero(t, ahead(8))
		})
	}
}

// TestFetchAhead: a guest that reads one frame after the other, of those that Fetch would bring
// last, waits for few of them; also where two of its processes take turns.
func TestFetchAhead(t *testing.T) {
	base, _, b := farVM(t, 6000, "none,frame=16K")
	for readers, first := range map[int][]int64{1: {5000}, 2: {4600, 5200}} {
		t.Run(fmt.Sprintf("%d readers", readers), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := &slowLink{bytesSource: b, rate: 38e6 / 8, trip: 40 * time.Millisecond}
				r, err := OpenWith(t.Context(), l, OpenOptions{Cache: emptyCache(t, len(b))})
				require.NoError(t, err)
				im := newImage(t, base, r)
				done := make(chan error, 1)
				go func() { done <- im.Fetch(t.Context(), nil, FetchOptions{}) }()
				time.Sleep(time.Second)
				begin := time.Now()
				for n := range int64(400) { // 100 frames
					page := first[n%int64(readers)] + n/int64(readers)
					require.NoError(t, im.ReadPages(t.Context(), Memory, make([]byte, PageSize), page*PageSize))
				}
				took := time.Since(begin)
				require.NoError(t, <-done)
				single := l.trip + time.Duration(16<<10/l.rate*float64(time.Second))
				t.Logf("%s, %s if each is waited for", took.Round(time.Millisecond), 100*single)
				require.Less(t, took, 100*single/3)
			})
		})
	}
}
