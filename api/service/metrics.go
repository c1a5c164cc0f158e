package service

import (
	"context"
	"time"

	"cloudlet/api"
)

// Metrics are the numbers that an operator watches. Counters grow over the life of the
// store, also over restarts; Since says from when.
type Metrics struct {
	Since time.Time `json:"since"` // counters and histograms count from here

	Instances  map[api.State]int // by state, ended ones included
	Operations []OperationCount  // since Since
	Bases      int
	Overlays   int
	Uploads    int
	StoreBytes int64 // bases and overlays, holes not counted
	FreeBytes  int64 // of the store's file system
	Guests     int64 // bytes of memory that the living guests were promised

	Mounts int        // living
	Mount  MountCount // of all mounts, ended ones included

	FirstResponse Histogram // seconds from the request of a run until its first right answer
	DemandWait    Histogram // seconds that reads of launch images waited; since each mount began
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

// Collect returns the present numbers. A mount that does not answer is left out.
func (s *Service) Collect(ctx context.Context) (Metrics, error) {
	return Metrics{}, api.Errorf(api.Internal, "metrics: not there yet")
}
