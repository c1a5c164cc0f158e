package service

import (
	"context"
	"os"
	"slices"
	"time"

	"cloudlet/api"
)

// Metrics are the numbers that an operator watches. Counters and histograms grow over the
// life of the store, also over restarts; Since says from when. What a mount had counted is
// lost if its process is killed.
type Metrics struct {
	Since time.Time `json:"since"` // counters and histograms count from here

	Instances  map[api.State]int // by state, ended ones included
	Operations []OperationCount  // ended since Since
	Active     []OperationCount  // under way
	Bases      int
	Overlays   int
	Uploads    int
	StoreBytes int64 // bases and overlays, holes not counted
	FreeBytes  int64 // of the store's file system
	Guests     int64 // bytes of memory that the living guests were promised

	Mounts int        // living
	Mount  MountCount // of all mounts, ended ones included

	FirstResponse Histogram // seconds from the request of a run until its first right answer
	DemandWait    Histogram // seconds that reads of launch images waited for their answer
}

// OperationCount counts operations of a kind in a state.
type OperationCount struct {
	Kind  api.Kind           `json:"kind"`
	State api.OperationState `json:"state"`
	Count int64              `json:"count"`
}

// MountCount sums what mount processes have done.
type MountCount struct {
	MemoryReads    int64 `json:"memory_reads"`
	MemoryBytes    int64 `json:"memory_bytes"`
	DiskReads      int64 `json:"disk_reads"`
	DiskBytes      int64 `json:"disk_bytes"`
	Fetched        int64 `json:"fetched"` // bytes read from the overlays' sources
	Saved          int64 `json:"saved"`   // bytes of the mounted overlays that were never read
	FramesDecoded  int64 `json:"frames_decoded"`
	FramesVerified int64 `json:"frames_verified"`
	FramesRefused  int64 `json:"frames_refused"` // their hash was wrong
	CacheHits      int64 `json:"cache_hits"`
	Held           int64 `json:"-"` // reads that wait for their source now
}

// Histogram holds observations in seconds.
type Histogram struct {
	Buckets []Bucket `json:"buckets"`
	Count   uint64   `json:"count"`
	Sum     float64  `json:"sum"`
}

// Bucket counts the observations of at most Upper seconds, those of the buckets below it
// included.
type Bucket struct {
	Upper float64 `json:"upper"`
	Count uint64  `json:"count"`
}

// Collect returns the present numbers. A mount that does not answer is left out. Many who
// ask at the same time share an answer.
func (s *Service) Collect(ctx context.Context) (Metrics, error) {
	m, err := shared(ctx, s, "metrics", s.collectMetrics)
	return m, fail(err)
}

func (s *Service) collectMetrics(ctx context.Context) (m Metrics, err error) {
	past := s.readCounts()
	m = Metrics{
		Since: past.Since, Instances: map[api.State]int{}, Operations: past.Operations, FirstResponse: past.FirstResponse,
		Mount: past.Mounts, DemandWait: past.DemandWait,
	}
	list, err := s.Instances(ctx, true)
	if err != nil {
		return m, err
	}
	for _, in := range list {
		m.Instances[in.State]++
	}
	p, err := s.promises(true, nil)
	if err != nil {
		return m, err
	}
	m.Guests = p.Memory
	if m.FreeBytes, err = s.freeDisk(); err != nil {
		return m, err
	}
	for kind, n := range map[string]*int{"bases": &m.Bases, "overlays": &m.Overlays} {
		ids, err := s.list(kind)
		if err != nil {
			return m, err
		}
		*n = len(ids)
		for _, id := range ids {
			size, err := diskUsage(s.path(kind, id))
			if ignoreMissing(err) != nil {
				return m, err
			}
			m.StoreBytes += size
		}
	}
	if m.Uploads, err = s.collectUploads(); err != nil {
		return m, err
	}
	if m.Active, err = s.collectActive(); err != nil {
		return m, err
	}
	keys, err := s.list("mounts")
	for _, key := range keys {
		if !s.mountLives(key) {
			continue
		}
		m.Mounts++
		if one, wait, err := s.measureMount(ctx, key); err == nil {
			m.Mount.add(one)
			m.DemandWait.add(wait)
		}
	}
	return m, err
}

// collectUploads counts the uploads that are not complete.
func (s *Service) collectUploads() (n int, err error) {
	all, err := s.uploads()
	for _, u := range all {
		if u.Operation == "" {
			n++
		}
	}
	return n, err
}

// collectActive counts the operations under way by kind and state.
func (s *Service) collectActive() (out []OperationCount, err error) {
	entries, err := os.ReadDir(s.path("active"))
	for _, e := range entries {
		r, ok := s.activeOperation(e.Name())
		if !ok {
			continue
		}
		i := slices.IndexFunc(out, func(o OperationCount) bool { return o.Kind == r.Kind && o.State == r.State })
		if i < 0 {
			i = len(out)
			out = append(out, OperationCount{Kind: r.Kind, State: r.State})
		}
		out[i].Count++
	}
	return out, err
}
