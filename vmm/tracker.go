package vmm

import (
	"context"
	"hash/maphash"
	"os"
)

// tracker tells which pages of a process's memory differ from what it has copied before.
// For each round: mark, then copy, then keep once the round is held by someone; without
// keep the next round takes the same pages again.
type tracker interface {
	// stops reports whether the process must be stopped for mark.
	stops() bool
	// mark notes what is to be looked at. After the last round there is no other of which
	// changes would have to be known.
	mark(last bool) error
	// copy copies what was marked and has changed to a file, by so many workers. The process
	// may run.
	copy(ctx context.Context, to *os.File, workers int) (segments, error)
	// keep says that what was copied last will not be lost.
	keep()
}

// hashTracker finds changes by the sums of the bytes that it has copied. A page is compared
// in every round once it was anonymous, also when it is not any more: its changes may have
// been discarded.
type hashTracker struct {
	pid     int
	regions []region
	seen    []span // all pages that were ever anonymous
	sums    sums
	fresh   copied
}

func newHashTracker(pid int, regions []region, size int64) *hashTracker {
	return &hashTracker{pid: pid, regions: regions, sums: newSums(size)}
}

func (t *hashTracker) stops() bool { return false }

func (t *hashTracker) mark(bool) error {
	spans, err := changedSpans(t.pid, t.regions)
	if err != nil {
		return err
	}
	t.seen = union(t.seen, spans)
	return nil
}

func (t *hashTracker) copy(ctx context.Context, to *os.File, workers int) (segments, error) {
	var err error
	t.fresh, err = copier{pid: t.pid, to: to, workers: workers, sums: &t.sums}.copy(ctx, t.seen)
	return t.fresh.segs, err
}

func (t *hashTracker) keep() {
	next := t.fresh.sums
	for _, s := range t.fresh.segs {
		n := copy(t.sums.table[s.Off/pageSize:(s.Off+s.Len)/pageSize], next)
		next = next[n:]
	}
	t.fresh = copied{}
}

// sums holds a sum of each page of an image, 8 bytes a page; memory is used for the pages
// that have one. The sums are seeded, so a guest cannot make two pages with the same.
type sums struct {
	seed  maphash.Seed
	table []uint64 // 0: none
}

func newSums(size int64) sums {
	return sums{seed: maphash.MakeSeed(), table: make([]uint64, size/pageSize)}
}

// of returns the sum of a page, which is not 0.
func (s *sums) of(page []byte) uint64 { return max(1, maphash.Bytes(s.seed, page)) }

// at returns the sum of the page at off.
func (s *sums) at(off int64) uint64 { return s.table[off/pageSize] }
