package overlay

import (
	"context"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	fetchParallel = 8
	fetchMost     = 256 << 10
)

// FetchOptions are the settings of [Image.Fetch]; the zero value is fit for use.
type FetchOptions struct {
	Parallel int   // requests at the same time, at most; 0: 8
	Most     int64 // bytes of one request, at most, unless one frame is larger; 0: 256 KiB
	// ProfileOnly leaves out what the profile does not list.
	ProfileOnly bool
}

// Fetch brings the encoded frames of all overlays over a network to this host, several at a
// time: those that hold pages of profile first, in its order, then the rest in the order of
// the files; wanted neighbours in one request. It gives way to demand: while a guest waits
// for a frame, Fetch takes no more than half of the link. An outage ends nothing: Fetch tries again, after
// 5 s at most, until ctx ends, and fetches from other sources meanwhile; a source that says
// that it is gone for good ends it. A damaged frame is left to the demand, which reports it.
//
// Without [OpenOptions.Cache] the frames of profile alone are brought, and 32 MiB of them for
// each overlay at most are kept until they are decoded, by [Image.Prefetch] with the same
// profile or by demand: Fetch waits for room. For a source that grows by itself Fetch waits
// until all is there.
func (im *Image) Fetch(ctx context.Context, profile []Addr, o FetchOptions) (err error) {
	if !im.cache.begin() {
		return ErrClosed
	}
	defer im.cache.wg.Done()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(im.life, func() { cancel(ErrClosed) })()
	if o.Parallel <= 0 {
		o.Parallel = fetchParallel
	}
	if o.Most <= 0 {
		o.Most = fetchMost
	}
	if len(im.chain) == 0 {
		return nil
	}
	f := &fetcher{im: im, turn: make(chan struct{}, 1), pace: newPace(int64(o.Parallel)*o.Most, o.Most), levels: make([]trouble, len(im.chain))}
	f.want(profile, !o.ProfileOnly)
	defer f.end()
	g, gctx := errgroup.WithContext(ctx)
	for range o.Parallel {
		g.Go(func() error { return f.work(gctx) })
	}
	for _, r := range im.chain {
		if r.remote == nil && !r.isLocal() && !o.ProfileOnly {
			g.Go(func() error { return r.awaitWhole(gctx) })
		}
	}
	err = g.Wait()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// fetcher is one call of Image.Fetch.
type fetcher struct {
	im   *Image
	turn chan struct{} // held by the worker that chooses what it fetches: order, and one decision at a time
	pace *pace

	mu     sync.Mutex
	keys   []frameKey // what is wanted, the first first
	levels []trouble  // of the chain
}

// trouble is what a fetcher knows of an overlay whose source fails: that of another one is
// fetched on meanwhile.
type trouble struct {
	again []frameKey    // of requests that failed, and what came after them
	pause time.Duration // 0: the last request succeeded
	until time.Time     // before which nothing is asked
	asked bool          // one request tries whether it is there again
}

// want lists what is to be fetched and marks it.
func (f *fetcher) want(profile []Addr, rest bool) {
	chain := f.im.chain
	seen := make([][]bool, len(chain))
	for level, r := range chain {
		if r.remote != nil {
			seen[level] = make([]bool, len(r.index.frames))
			r.remote.beginFetch()
		}
	}
	add := func(key frameKey, w want) {
		if !seen[key.level][key.frame] && chain[key.level].remote.wanted(key.frame, w) {
			f.keys = append(f.keys, key)
		}
		seen[key.level][key.frame] = true
	}
	for _, a := range profile {
		if src := f.im.resolve(a, len(chain)); src.level >= 0 && seen[src.level] != nil {
			add(frameKey{src.level, chain[src.level].index.frameOf(src.entry)}, wantHot)
		}
	}
	for level, r := range chain {
		if !rest || r.remote == nil || r.remote.cache == nil {
			continue
		}
		for n := range r.index.frames {
			add(frameKey{level, n}, wantRest)
		}
	}
}

func (f *fetcher) end() {
	for _, r := range f.im.chain {
		if r.remote != nil {
			r.remote.endFetch()
		}
	}
}

// pop returns the next frame to fetch, or how long to wait for one; none where nothing is left.
func (f *fetcher) pop() (key frameKey, wait time.Duration, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for level := range f.levels {
		t := &f.levels[level]
		if len(t.again) == 0 {
			continue
		}
		if left := t.rests(); left > 0 {
			if wait == 0 || left < wait {
				wait = left
			}
			continue
		}
		key, t.again = t.again[0], t.again[1:]
		return key, 0, true
	}
	for len(f.keys) > 0 {
		key, f.keys = f.keys[0], f.keys[1:]
		t := &f.levels[key.level]
		left := t.rests()
		if left == 0 {
			return key, 0, true
		}
		t.again = append(t.again, key)
		if wait == 0 || left < wait {
			wait = left
		}
	}
	return frameKey{}, wait, wait > 0
}

// rests returns for how long nothing is to be asked.
func (t *trouble) rests() time.Duration {
	if t.asked {
		return t.pause
	}
	if t.pause == 0 {
		return 0
	}
	return max(0, time.Until(t.until))
}

// ask notes that a request of a level begins.
func (f *fetcher) ask(level int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	t := &f.levels[level]
	t.asked = t.pause > 0
}

// done says how a request of a level went; the frames of one that failed are given back.
func (f *fetcher) done(level int, run frameRun, failed bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	t := &f.levels[level]
	if !failed {
		t.pause, t.asked = 0, false
		return
	}
	if t.asked || t.pause == 0 { // else it was begun before the one that failed first
		t.pause = min(max(2*t.pause, holdFirst), holdMost)
		t.until, t.asked = time.Now().Add(t.pause), false
	}
	for n := run.lo; n < run.hi; n++ {
		t.again = append(t.again, frameKey{level, n})
	}
}

// work fetches until nothing is left to begin.
func (f *fetcher) work(ctx context.Context) error {
	for {
		level, run, err := f.choose(ctx)
		if err != nil || run.hi == 0 {
			return err
		}
		begin := f.pace.begin(run.bytes)
		err = f.im.chain[level].remote.fetchRun(ctx, run)
		f.pace.end(begin, err == nil)
		if err != nil && ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil && !temporary(err) {
			return err
		}
		f.done(level, run, err != nil)
	}
}

// choose claims frames to fetch, once the link has room for them; none where nothing is left.
func (f *fetcher) choose(ctx context.Context) (level int, run frameRun, err error) {
	select {
	case f.turn <- struct{}{}:
	case <-ctx.Done():
		return 0, run, context.Cause(ctx)
	}
	defer func() { <-f.turn }()
	key, pause, ok := f.pop()
	for ok {
		if pause > 0 {
			if err := rest(ctx, pause); err != nil {
				return 0, run, err
			}
			key, pause, ok = f.pop()
			continue
		}
		most, err := f.pace.wait(ctx, &f.im.gate)
		if err != nil {
			return 0, run, err
		}
		m := f.im.chain[key.level].remote
		run, next := m.claimRun(key.frame, most, f)
		switch {
		case next.first != nil:
			if err := waitFor(ctx, next.first); err != nil {
				return 0, run, err
			}
		case next.check:
			m.check(key.frame)
		case next.room:
			if err := f.awaitRoom(ctx, m); err != nil {
				return 0, run, err
			}
		case run.hi > 0:
			f.ask(key.level)
			return key.level, run, nil
		default:
			key, pause, ok = f.pop()
		}
	}
	return 0, frameRun{}, nil
}

// awaitRoom waits until m may hold another frame.
func (f *fetcher) awaitRoom(ctx context.Context, m *remote) error {
	for _, stalled := range []bool{true, false} {
		for _, r := range f.im.chain {
			if r.remote != nil {
				r.remote.stall(stalled)
			}
		}
		if stalled {
			if err := m.awaitRoom(ctx); err != nil {
				return err
			}
		}
	}
	return nil
}

// awaitWhole waits until a source that grows by itself has all its bytes.
func (r *Reader) awaitWhole(ctx context.Context) error {
	for pause := holdFirst; ; pause = min(2*pause, holdMost) {
		var last [1]byte
		_, err := r.src.ReadAt(ctx, last[:], r.src.Size()-1)
		if err == nil || ctx.Err() != nil || !temporary(err) {
			return err
		}
		if err := rest(ctx, pause); err != nil {
			return err
		}
	}
}
