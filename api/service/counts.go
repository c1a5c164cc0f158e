package service

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"time"

	"cloudlet/api"
	"cloudlet/fusefs"

	"golang.org/x/sys/unix"
)

// counts are what metrics need of the past: it is gone from everything else in the store.
type counts struct {
	Since         time.Time        `json:"since"`
	Operations    []OperationCount `json:"operations"`
	FirstResponse Histogram        `json:"first_response"`
	Mounts        MountCount       `json:"mounts"` // that have ended
	DemandWait    Histogram        `json:"demand_wait"`
}

// responseBounds are the upper bounds of FirstResponse in seconds.
func responseBounds() []float64 {
	return []float64{.05, .1, .15, .2, .3, .4, .5, .75, 1, 1.5, 2, 3, 5, 10, 20, 30, 60, 120}
}

func newHistogram(bounds []float64) Histogram {
	h := Histogram{Buckets: make([]Bucket, len(bounds))}
	for i, b := range bounds {
		h.Buckets[i].Upper = b
	}
	return h
}

// observe counts a value.
func (h *Histogram) observe(v float64) {
	h.Count++
	h.Sum += v
	for i := range h.Buckets {
		if v <= h.Buckets[i].Upper {
			h.Buckets[i].Count++
		}
	}
}

// add counts what other has counted. Buckets of other bounds are left out of it.
func (h *Histogram) add(other Histogram) {
	if len(h.Buckets) == 0 {
		h.Buckets = slices.Clone(other.Buckets)
		h.Count, h.Sum = h.Count+other.Count, h.Sum+other.Sum
		return
	}
	h.Count, h.Sum = h.Count+other.Count, h.Sum+other.Sum
	for i := range h.Buckets {
		for _, b := range other.Buckets {
			if b.Upper == h.Buckets[i].Upper {
				h.Buckets[i].Count += b.Count
			}
		}
	}
}

func (m *MountCount) add(o MountCount) {
	m.MemoryReads += o.MemoryReads
	m.MemoryBytes += o.MemoryBytes
	m.DiskReads += o.DiskReads
	m.DiskBytes += o.DiskBytes
	m.Fetched += o.Fetched
	m.Saved += o.Saved
	m.FramesDecoded += o.FramesDecoded
	m.FramesVerified += o.FramesVerified
	m.FramesRefused += o.FramesRefused
	m.CacheHits += o.CacheHits
	m.Held += o.Held
}

func (s *Service) countsPath() string { return s.path("counts", "counts.json") }

// readCounts reads the counts; without any, or with damaged ones, they begin now.
func (s *Service) readCounts() counts {
	var c counts
	if err := readJSON(s.countsPath(), &c); err != nil || c.Since.IsZero() {
		if !os.IsNotExist(err) {
			s.log.Info("counts begin anew", "err", err)
		}
		c = counts{Since: time.Now().UTC(), FirstResponse: newHistogram(responseBounds())}
	}
	return c
}

// count changes the counts. They are no reason for anything else to fail.
func (s *Service) count(ctx context.Context, change func(*counts)) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	lk, err := waitLock(ctx, filepath.Dir(s.countsPath()), unix.LOCK_EX)
	if err == nil {
		defer lk.unlock()
		c := s.readCounts()
		change(&c)
		err = replaceJSON(s.countsPath(), c, false)
	}
	if err != nil {
		s.log.Info("count", "err", err)
	}
}

// note counts an operation that has ended.
func (s *Service) note(ctx context.Context, r operationRecord) {
	first := firstResponse(r)
	s.count(ctx, func(c *counts) {
		i := slices.IndexFunc(c.Operations, func(o OperationCount) bool { return o.Kind == r.Kind && o.State == r.State })
		if i < 0 {
			i = len(c.Operations)
			c.Operations = append(c.Operations, OperationCount{Kind: r.Kind, State: r.State})
		}
		c.Operations[i].Count++
		if first > 0 {
			c.FirstResponse.observe(first)
		}
	})
}

// firstResponse returns the seconds from the request of a run to its first right answer, 0
// where there is none.
func firstResponse(r operationRecord) float64 {
	var in api.Instance
	if r.Kind != api.KindRun || r.State != api.OperationDone || json.Unmarshal(r.Result, &in) != nil {
		return 0
	}
	for _, e := range in.Timeline {
		if e.Name == eventFirstAnswer {
			return e.Seconds
		}
	}
	return 0
}

// noteMount keeps the counts of a mount that is about to end.
func (s *Service) noteMount(ctx context.Context, key string) {
	m, h, err := s.measureMount(ctx, key)
	if err != nil {
		s.log.Info("the counts of a mount are lost", "mount", key, "err", err)
		return
	}
	m.Held = 0
	s.count(ctx, func(c *counts) {
		c.Mounts.add(m)
		c.DemandWait.add(h)
	})
}

// measureMount asks a mount process for its counts.
func (s *Service) measureMount(ctx context.Context, key string) (m MountCount, wait Histogram, err error) {
	bound, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	st, err := fusefs.Dial(s.mountPath(key, "control")).Status(bound)
	if err != nil {
		return m, wait, err
	}
	var image MountStatus
	if err := json.Unmarshal(st.Image, &image); err != nil {
		return m, wait, err
	}
	m = MountCount{
		MemoryReads: st.Memory.Reads, MemoryBytes: st.Memory.Bytes, DiskReads: st.Disk.Reads, DiskBytes: st.Disk.Bytes,
		Fetched: image.Fetched, FramesDecoded: image.FramesDecoded, FramesVerified: image.Verified, FramesRefused: image.Refused,
		CacheHits: image.FrameHits, Held: int64(len(st.Held)),
	}
	var spec MountSpec
	if err := readJSON(s.mountPath(key, "spec.json"), &spec); err != nil {
		return m, wait, err
	}
	for _, l := range spec.Links {
		m.Saved += l.Size
	}
	m.Saved = max(0, m.Saved-m.Fetched)
	return m, image.Waits, nil
}
