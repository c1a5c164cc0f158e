package service

import (
	"context"
	"sync/atomic"
	"time"

	"cloudlet/fusefs"
)

// waitBounds are the upper bounds of DemandWait in seconds.
func waitBounds() []float64 {
	return []float64{.0001, .0002, .0005, .001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 30, 60}
}

// waits measures how long the reads of files take. Safe for concurrent use.
type waits struct {
	bounds []float64
	counts []atomic.Uint64 // by bound, and one for what is above them
	sum    atomic.Int64    // nanoseconds
}

func newWaits() *waits {
	b := waitBounds()
	return &waits{bounds: b, counts: make([]atomic.Uint64, len(b)+1)}
}

// file returns f with its reads measured.
func (w *waits) file(f fusefs.File) fusefs.File { return &timedFile{f, w} }

func (w *waits) observe(d time.Duration) {
	i := 0
	for v := d.Seconds(); i < len(w.bounds) && v > w.bounds[i]; i++ {
	}
	w.counts[i].Add(1)
	w.sum.Add(int64(d))
}

// histogram returns what has been measured until now.
func (w *waits) histogram() Histogram {
	h := newHistogram(w.bounds)
	for i := range w.counts {
		h.Count += w.counts[i].Load()
		if i < len(h.Buckets) {
			h.Buckets[i].Count = h.Count
		}
	}
	h.Sum = time.Duration(w.sum.Load()).Seconds()
	return h
}

type timedFile struct {
	fusefs.File
	waits *waits
}

// ReadAt implements fusefs.File.
func (f *timedFile) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	start := time.Now()
	n, err := f.File.ReadAt(ctx, p, off)
	f.waits.observe(time.Since(start))
	return n, err
}
