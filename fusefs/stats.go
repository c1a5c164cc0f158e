package fusefs

import (
	"os"
	"slices"
	"time"
)

// Stats is the state of a mount and what it has done so far.
type Stats struct {
	PID        int       `json:"pid"`
	Mountpoint string    `json:"mountpoint"`
	Source     string    `json:"source"`
	Started    time.Time `json:"started"`
	// UptimeSeconds is the age of the mount.
	UptimeSeconds float64 `json:"uptime_seconds"`
	// ReadAheadKiB is the kernel's read-ahead for the mount, 0 where it cannot be read;
	// ReadAheadError is why the wanted one could not be set.
	ReadAheadKiB   int    `json:"read_ahead_kib"`
	ReadAheadError string `json:"read_ahead_error,omitempty"`
	// Aborted says that Abort was called.
	Aborted bool      `json:"aborted"`
	Memory  FileStats `json:"memory"`
	Disk    FileStats `json:"disk"`
	// Held lists the reads that wait, oldest first.
	Held []HeldRead `json:"held"`
}

// FileStats counts what the kernel has asked of one file. What its page cache answers is
// not seen here.
type FileStats struct {
	Size int64 `json:"size"`
	// Reads counts requests, Bytes what was answered, Errors the reads that failed, held
	// ones included and interrupted ones not.
	Reads    int64 `json:"reads"`
	Bytes    int64 `json:"bytes"`
	Errors   int64 `json:"errors"`
	InFlight int   `json:"in_flight"`
	// Pushed is how many bytes the kernel was given unasked.
	Pushed int64 `json:"pushed"`
	// LongestWaitSeconds is the longest time an answer took, counting reads still in flight.
	LongestWaitSeconds float64 `json:"longest_wait_seconds"`
}

// HeldRead is a read that has failed and is not answered (Error says why), or that has had
// no answer for a second. PID is the thread that asked, 0 if unknown; a read ahead stays
// when that thread is gone.
type HeldRead struct {
	File   string    `json:"file"`
	Offset int64     `json:"offset"`
	Length int       `json:"length"`
	PID    int       `json:"pid"`
	Since  time.Time `json:"since"`
	Error  string    `json:"error,omitempty"`
}

// Stats returns the state of the mount now.
func (s *Server) Stats() Stats {
	st := Stats{
		PID: os.Getpid(), Mountpoint: s.point, Source: s.source,
		Started: s.started, UptimeSeconds: time.Since(s.started).Seconds(),
		ReadAheadKiB: readAhead(s.entry), Held: []HeldRead{},
	}
	if s.readAheadErr != nil {
		st.ReadAheadError = s.readAheadErr.Error()
	}
	select {
	case <-s.aborted:
		st.Aborted = true
	default:
	}
	for _, f := range []struct {
		reads *reads
		out   *FileStats
	}{{s.memory, &st.Memory}, {s.disk, &st.Disk}} {
		held, n := f.reads.held()
		longest := time.Duration(f.reads.longest.Load())
		for _, h := range held {
			longest = max(longest, time.Since(h.Since))
		}
		*f.out = FileStats{
			Size: f.reads.file.Size(), Reads: f.reads.requests.Load(), Bytes: f.reads.bytes.Load(),
			Errors: f.reads.failures.Load(), InFlight: n, LongestWaitSeconds: longest.Seconds(),
			Pushed: f.reads.pushed.Load(),
		}
		st.Held = append(st.Held, held...)
	}
	slices.SortFunc(st.Held, func(a, b HeldRead) int { return a.Since.Compare(b.Since) })
	return st
}
