package service

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"

	"cloudlet/api"

	"golang.org/x/sys/unix"
)

// need is what an operation will take of the host.
type need struct {
	Memory    int64 `json:"memory,omitempty"`    // of the guest, bytes
	Instances int   `json:"instances,omitempty"` // 1 for a run
	Disk      int64 `json:"disk,omitempty"`      // bytes in the store; 0: not known, or not much
}

// promised is what is taken already, or will be.
type promised struct {
	need
	untouched int64 // of Memory, what the guests have not used yet
}

// admit refuses what cannot fit, with the numbers. The caller holds the store's lock, so that
// no two are given the same room. resident says by instance how much of its guest's memory
// is in use already; without it none is taken to be.
func (s *Service) admit(n need, resident map[string]int64) error {
	have, err := s.promises(n.Memory > 0 || n.Instances > 0, resident)
	if err != nil {
		return err
	}
	if limit := s.cfg.MaxInstances; limit > 0 && n.Instances > 0 && have.Instances+n.Instances > limit {
		return api.Errorf(api.Unavailable, "%d instances live or start, the limit is %d", have.Instances, limit).Fix("stop one, then ask again")
	}
	if n.Memory > 0 {
		if err := s.admitMemory(n.Memory, have); err != nil {
			return err
		}
	}
	return s.admitDisk(n.Disk, have.Disk)
}

func (s *Service) admitMemory(n int64, have promised) error {
	if limit := s.cfg.MaxMemory; limit > 0 {
		if have.Memory+n > limit {
			return api.Errorf(api.Unavailable, "the guest needs %s of memory; %s of the %s for guests are taken, by %d", bytesText(n), bytesText(have.Memory), bytesText(limit), have.Instances).
				Fix("stop an instance, then ask again")
		}
		return nil
	}
	free, err := s.memAvailable()
	if err != nil {
		return err
	}
	if n+have.untouched > free {
		return api.Errorf(api.Unavailable, "the guest needs %s of memory; the host has %s available, and %s of it are promised to other guests", bytesText(n), bytesText(free), bytesText(have.untouched)).
			Fix("stop an instance, then ask again")
	}
	return nil
}

// admitDisk checks that n more bytes fit beside those that are promised.
func (s *Service) admitDisk(n, promised int64) error {
	if n == 0 && s.cfg.MinFree == 0 {
		return nil
	}
	free, err := s.freeDisk()
	if err != nil {
		return err
	}
	if n > free-promised-s.cfg.MinFree { // n is whatever a caller says: a sum might overflow
		return api.Errorf(api.Unavailable, "%s are needed in %s; %s are free, %s of them promised to other work and %s to stay free",
			bytesText(n), s.cfg.Dir, bytesText(free), bytesText(promised), bytesText(s.cfg.MinFree)).Fix(remedySpace)
	}
	return nil
}

// admitLate admits what an operation has found to need while it works.
func (s *Service) admitLate(ctx context.Context, op *operation, memory int64) error {
	admit := func(resident map[string]int64) error {
		return s.locked(ctx, func() error {
			if err := s.admit(need{Memory: memory}, resident); err != nil {
				return err
			}
			op.change(func(r *operationRecord) { r.Need.Memory = memory })
			return nil
		})
	}
	err := admit(nil)
	if api.CodeOf(err) == api.Unavailable {
		if resident, rerr := s.residents(ctx); rerr == nil {
			err = admit(resident)
		}
	}
	return err
}

// roomFor checks that n bytes fit on the disk, more than which is not known before.
func (s *Service) roomFor(n int64) error { return s.admitDisk(n, 0) }

func (s *Service) freeDisk() (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(s.cfg.Dir, &st); err != nil {
		return 0, fmt.Errorf("free space of %s: %w", s.cfg.Dir, err)
	}
	return int64(st.Bavail) * st.Bsize, nil
}

// promises sums what living instances, active operations and uploads have taken or will take.
func (s *Service) promises(guests bool, resident map[string]int64) (p promised, err error) {
	if guests {
		ids, err := s.list("instances")
		if err != nil {
			return p, err
		}
		for _, id := range ids {
			r, err := s.readRecord(id)
			if err != nil || !r.alive() {
				continue // removed since, or being made
			}
			size := r.memory()
			p.Instances++
			p.Memory += size
			p.untouched += max(0, size-resident[id])
		}
	}
	entries, err := os.ReadDir(s.path("active"))
	if err != nil {
		return p, err
	}
	for _, e := range entries {
		r, ok := s.activeOperation(e.Name())
		if !ok {
			continue
		}
		p.Disk += r.Need.Disk
		if r.Kind != api.KindRun || !s.exists(r.Target) {
			p.Instances += r.Need.Instances
			p.Memory += r.Need.Memory
			p.untouched += r.Need.Memory
		}
	}
	s.mu.Lock()
	for _, d := range s.arrivals {
		n := d.need()
		p.Instances += n.Instances
		p.Memory += n.Memory
		p.untouched += n.Memory
		p.Disk += n.Disk
	}
	s.mu.Unlock()
	uploads, err := s.uploads()
	for _, u := range uploads {
		if u.Operation == "" {
			p.Disk += u.Size - u.Offset
		}
	}
	return p, err
}

// activeOperation returns an operation that has not ended.
func (s *Service) activeOperation(id string) (r operationRecord, ok bool) {
	if op := s.own(id); op != nil {
		op.mu.Lock()
		defer op.mu.Unlock()
		return op.record, !op.record.State.Ended()
	}
	r, err := s.readOperation(id)
	return r, err == nil && !r.State.Ended() // else ended since, or being made
}

// memory returns the size of the guest's memory in bytes.
func (r *record) memory() int64 {
	var m struct {
		Memory int64 `json:"memory"`
	}
	if json.Unmarshal(r.Machine, &m) != nil {
		return 0 // it would not have been resumed
	}
	return m.Memory
}

// residents finds out how much memory of its own the QEMU process of each living instance
// has, in bytes by instance id. On the way those that have ended are recorded as that.
func (s *Service) residents(ctx context.Context) (map[string]int64, error) {
	list, err := s.Instances(ctx, false)
	out := map[string]int64{}
	for _, in := range list {
		if n, err := procNumber(fmt.Sprintf("/proc/%d/status", in.PID), "RssAnon:"); err == nil && in.PID > 0 {
			out[in.ID] = n
		}
	}
	return out, err
}

// memAvailable returns how much memory the host can give without swapping.
func (s *Service) memAvailable() (int64, error) { return procNumber("/proc/meminfo", "MemAvailable:") }

// procNumber returns a field of a file of /proc that is given in kB, in bytes.
func procNumber(path, field string) (int64, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	for line := range bytes.Lines(b) {
		rest, ok := strings.CutPrefix(string(line), field)
		if !ok {
			continue
		}
		n, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
		return n << 10, err
	}
	return 0, fmt.Errorf("read %s: no field %q", path, field)
}

// bytesText writes a size for people.
func bytesText(n int64) string {
	switch {
	case n >= 1<<30:
		return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
	case n >= 1<<20:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	}
	return fmt.Sprintf("%d bytes", n)
}

func trimmed(b []byte) string { return string(bytes.TrimSpace(b)) }
