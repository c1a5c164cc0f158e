package overlay

import (
	"context"
	"slices"
)

// heldMost bounds the encoded frames that are held in memory for want of a cache on disk.
const heldMost = 32 << 20

// frameRun is a run of neighbouring frames that one background request brings.
type frameRun struct {
	lo, hi  int // hi 0: none
	bytes   int64
	flights []*flight
}

// beforeRun says what comes before a frame can be claimed.
type beforeRun struct {
	first <-chan struct{} // wait until it is closed
	check bool            // look at what is on disk
	room  bool            // wait until held frames are decoded
}

func (m *remote) beginFetch() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fetches++
}

const (
	// streamMost bounds the encoded bytes that are fetched ahead of a guest that reads one frame
	// after the other, beyond the first frame: a link of 50 Mbit/s has that on its way in 40 ms.
	streamMost = 256 << 10
	// streamFrames bounds the frames, each a request.
	streamFrames = 8
	// streamsMost is the number of readers, each after its own frames, that are told apart.
	streamsMost = 8
)

// streams notices demands of one frame after the other; the one that was last at work first.
type streams []stream

type stream struct {
	next int // frame behind that of the last demand
	end  int // up to here frames are fetched ahead
	size int // how many, the last time
}

// demand notes a demand of frame i, which waits for its source or not, and returns the frames
// to fetch ahead: two at first, then twice as many each time, as a kernel reads files ahead,
// but not more than room.
func (s *streams) demand(i, room int, waits bool) (lo, hi int) {
	k := slices.IndexFunc(*s, func(t stream) bool { return t.next <= i && i <= t.end })
	if k < 0 {
		if waits {
			*s = slices.Insert(*s, 0, stream{next: i + 1, end: i + 1})
			*s = (*s)[:min(len(*s), streamsMost)]
		}
		return 0, 0
	}
	t := (*s)[k]
	t.size = min(max(2*t.size, 2), room)
	lo, hi = max(i+1, t.end), i+1+t.size
	t.next, t.end = i+1, max(t.end, hi)
	*s = slices.Insert(slices.Delete(*s, k, k+1), 0, t)
	return lo, hi
}

// follow notes a demand of frame i and returns the frames to fetch ahead of it. A frame that a
// Fetch is about to bring for a profile has its own order, in which those behind it come.
func (m *remote) follow(i int) (lo, hi int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.frames[i].want == wantHot {
		return 0, 0
	}
	room := 0
	for bytes, n := 0, i+1; n < len(m.frames) && room < streamFrames; n++ {
		bytes += m.size(n)
		if bytes > streamMost && room > 0 || m.off && m.heldAll+bytes > heldMost {
			break
		}
		room++
	}
	return m.streams.demand(i, room, m.frames[i].place == away)
}

// bring fetches frame i unless it is at hand or on its way. If it fails, the demand tries.
func (m *remote) bring(ctx context.Context, i int) {
	if run, _ := m.claimRun(i, 0, nil); run.hi > 0 {
		_ = m.fetchRun(ctx, run)
	}
}

// endFetch ends the wishes of the last Fetch: who waits for it goes on alone.
func (m *remote) endFetch() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fetches--; m.fetches > 0 {
		return
	}
	for i := range m.frames {
		m.frames[i].want = unwanted
	}
	m.stalled = false
	m.changeLocked()
}

// wanted notes that a Fetch will bring frame i, and reports whether it has to.
func (m *remote) wanted(i int, w want) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	fr := &m.frames[i]
	if fr.bad || m.atHandLocked(i) || m.spentLocked(i) {
		return false
	}
	fr.want = max(fr.want, w)
	return true
}

func (m *remote) atHandLocked(i int) bool {
	return m.frames[i].place == onDisk || m.frames[i].place == inMemory
}

// spentLocked reports whether frame i was decoded and there is nowhere to keep it: to bring
// it once more is for the demand.
func (m *remote) spentLocked(i int) bool { return m.off && m.frames[i].used }

// claimRun begins a flight of frame i and of its wanted neighbours, up to most bytes. It
// returns none, and nothing to do before, where frame i is not to be fetched any more. by is
// the Fetch that asks; nil is Prefetch for itself.
func (m *remote) claimRun(i int, most int64, by *fetcher) (run frameRun, before beforeRun) {
	m.mu.Lock()
	defer m.mu.Unlock()
	fr := &m.frames[i]
	switch {
	case fr.flight != nil && by != nil && fr.flight.by == by:
		return run, before // and given back by it if it fails
	case fr.flight != nil:
		return run, beforeRun{first: fr.flight.over}
	case fr.place == unknown:
		return run, beforeRun{check: true}
	case m.atHandLocked(i) || fr.bad || by != nil && (m.spentLocked(i) || m.off && fr.want == wantRest):
		if fr.want != unwanted {
			fr.want = unwanted
			m.changeLocked()
		}
		return run, before
	case by != nil && m.fullLocked():
		return run, beforeRun{room: true}
	}
	free := func(k int) bool {
		n := &m.frames[k]
		return n.want >= fr.want && n.want != unwanted && n.place == away && n.flight == nil && !n.bad && !m.spentLocked(k) &&
			run.bytes+int64(m.size(k)) <= most
	}
	run.lo, run.hi, run.bytes = i, i+1, int64(m.size(i))
	for run.hi < len(m.frames) && free(run.hi) {
		run.bytes += int64(m.size(run.hi))
		run.hi++
	}
	for run.lo > 0 && free(run.lo-1) {
		run.lo--
		run.bytes += int64(m.size(run.lo))
	}
	for k := run.lo; k < run.hi; k++ {
		f := &flight{over: make(chan struct{}), by: by}
		m.frames[k].flight = f
		run.flights = append(run.flights, f)
	}
	return run, before
}

// fetchRun fetches what claimRun claimed. A frame whose hash is wrong is fetched once more.
func (m *remote) fetchRun(ctx context.Context, run frameRun) (err error) {
	next := run.lo
	defer func() { // what has not come, also after a panic
		for ; next < run.hi; next++ {
			m.land(next, run.flights[next-run.lo], away, nil)
		}
	}()
	b := make([]byte, run.bytes)
	if err := m.r.read(ctx, b, m.offset(run.lo)); err != nil {
		return err
	}
	for ; next < run.hi; next++ {
		n := m.size(next)
		frame := b[:n:n]
		b = b[n:]
		if Sum(frame) != m.r.index.frames[next].hash {
			m.r.stats.refused.Add(1)
			if err := m.r.read(ctx, frame, m.offset(next)); err != nil {
				return err
			}
			if Sum(frame) != m.r.index.frames[next].hash {
				m.r.stats.refused.Add(1)
				m.giveUp(next)
				m.land(next, run.flights[next-run.lo], away, nil)
				continue
			}
		}
		p := inMemory
		if m.store(frame, m.offset(next)) {
			p, frame = onDisk, nil
		}
		m.land(next, run.flights[next-run.lo], p, frame)
	}
	return nil
}

func (m *remote) giveUp(i int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.frames[i].bad = true
}

// fullLocked reports whether no more frames are to be held in memory.
func (m *remote) fullLocked() bool { return m.off && m.heldAll >= heldMost }

// awaitRoom waits until another frame may be held in memory.
func (m *remote) awaitRoom(ctx context.Context) error {
	for {
		m.mu.Lock()
		full, changed := m.fullLocked(), m.changedLocked()
		m.mu.Unlock()
		if !full {
			return nil
		}
		if err := waitFor(ctx, changed); err != nil {
			return err
		}
	}
}

// stall notes whether the Fetch waits for room, which may be made by who waits for it.
func (m *remote) stall(yes bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stalled = yes
	m.changeLocked()
}

// check finds out whether what is on disk in the place of frame i is it.
func (m *remote) check(i int) {
	m.mu.Lock()
	p := m.frames[i].place
	m.mu.Unlock()
	if p == unknown {
		m.take(i, nil)
	}
}

// await waits until frame i is at hand, in the background: for a Fetch that will bring it, or
// for a request of its own that gives way to demand. A damaged frame is left to the demand.
func (m *remote) await(ctx context.Context, i int, g *gate) error {
	for {
		m.mu.Lock()
		fr := &m.frames[i]
		done := m.atHandLocked(i) || fr.bad
		var first <-chan struct{}
		if fr.flight == nil && fr.want != unwanted && !m.stalled {
			first = m.changedLocked()
		}
		m.mu.Unlock()
		if done {
			return nil
		}
		if first == nil {
			if err := g.wait(ctx); err != nil {
				return err
			}
			run, before := m.claimRun(i, 0, nil)
			if run.hi > 0 {
				if err := m.fetchRun(ctx, run); err != nil {
					return err
				}
				continue
			}
			if before.check {
				m.check(i)
			}
			first = before.first
		}
		if first != nil {
			if err := waitFor(ctx, first); err != nil {
				return err
			}
		}
	}
}
