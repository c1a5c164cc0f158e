package overlay

import (
	"encoding/binary"
	"fmt"
	"slices"
)

// MarshalProfile returns a touch profile as the format holds it: a little-endian uint32 for
// each page.
func MarshalProfile(p []Addr) []byte {
	b := make([]byte, 0, 4*len(p))
	for _, a := range p {
		b = binary.LittleEndian.AppendUint32(b, uint32(a))
	}
	return b
}

// ParseProfile is the inverse of MarshalProfile for an image of these sizes in bytes. A page
// that is outside of the image or stands twice is an ErrFormat.
func ParseProfile(b []byte, memory, disk int64) ([]Addr, error) {
	if len(b)%4 != 0 || len(b) > maxProfile {
		return nil, fmt.Errorf("%w: profile has %d bytes", ErrFormat, len(b))
	}
	p := make([]Addr, len(b)/4)
	for i := range p {
		p[i] = Addr(binary.LittleEndian.Uint32(b[4*i:]))
	}
	err := checkProfile(p, (&Manifest{MemorySize: memory, DiskSize: disk}).holds)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	return p, nil
}

// MergeProfiles makes one profile of several of the same image: each page at the earliest
// place that it has in any of them.
func MergeProfiles(profiles ...[]Addr) []Addr {
	var out []Addr
	seen := make(map[Addr]struct{})
	for i, more := 0, true; more; i++ {
		more = false
		for _, p := range profiles {
			if i >= len(p) {
				continue
			}
			more = true
			if _, ok := seen[p[i]]; !ok {
				seen[p[i]] = struct{}{}
				out = append(out, p[i])
			}
		}
	}
	return out
}

func checkProfile(p []Addr, holds func(Addr) bool) error {
	if len(p) > maxProfile/4 {
		return fmt.Errorf("profile lists %d pages, over the limit of %d", len(p), maxProfile/4)
	}
	sorted := slices.Clone(p)
	slices.Sort(sorted)
	for i, a := range sorted {
		if !holds(a) {
			return fmt.Errorf("profile: %s is outside of the image", a)
		}
		if i > 0 && a == sorted[i-1] {
			return fmt.Errorf("profile: %s stands twice", a)
		}
	}
	return nil
}
