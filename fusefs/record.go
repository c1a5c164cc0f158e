package fusefs

import (
	"slices"
	"sync"
)

// Touch is a run of pages of 4096 bytes of a file that were first read one after the other.
type Touch struct {
	File  string `json:"file"` // "memory" or "disk"
	Page  int64  `json:"page"`
	Count int64  `json:"count"`
}

// maxTouches bounds the runs that a recorder keeps: what a guest touches later is not what it
// begins with.
const maxTouches = 1 << 18

// recorder keeps the order of first reads.
type recorder struct {
	mu   sync.Mutex
	list []Touch
}

func (r *recorder) add(file string, page int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := len(r.list) - 1; n >= 0 && r.list[n].File == file && r.list[n].Page+r.list[n].Count == page {
		r.list[n].Count++
		return
	}
	if len(r.list) == maxTouches {
		return
	}
	r.list = append(r.list, Touch{file, page, 1})
}

// Touches returns which pages of memory and disk were read so far, in the order of their
// first read; without Options.Record with what the kernel has read around them. What the
// kernel was given by Push is not read. It lists 262144 runs at most, the first ones.
func (s *Server) Touches() []Touch {
	s.recorder.mu.Lock()
	defer s.recorder.mu.Unlock()
	return slices.Clone(s.recorder.list)
}

// know notes that the kernel has asked for n pages from first on.
func (s *reads) know(first, n int64) {
	for end := first + n; first < end; {
		from, to := s.known.gap(first, end)
		s.known.add(from, to-from)
		for page := from; s.record != nil && page < to; page++ {
			s.record.add(s.name, page)
		}
		first = max(to, from+1)
	}
}
