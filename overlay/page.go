package overlay

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
)

// PageSize is the unit of identity in bytes: images are compared, deduplicated and
// addressed in pages of this size.
const PageSize = 4096

// MaxImageSize is the largest disk or memory image in bytes (8 TiB): 31 bits of page number.
const MaxImageSize = PageSize << 31

// Space says which of the two images of a VM a page belongs to.
type Space uint8

// The two images of a VM.
const (
	Memory Space = 0
	Disk   Space = 1
)

// String returns "memory" or "disk".
func (s Space) String() string {
	if s == Disk {
		return "disk"
	}
	return "memory"
}

// Spaces lists both images in address order.
var Spaces = [2]Space{Memory, Disk}

// Addr is the address of one page of a VM, memory or disk: bit 31 is the Space, bits 0 to
// 30 the page number. All memory pages sort before all disk pages.
type Addr uint32

// MakeAddr returns the address of page number page of space s.
func MakeAddr(s Space, page int64) Addr { return Addr(uint32(s)<<31 | uint32(page)&(1<<31-1)) }

// Space returns the image the page belongs to.
func (a Addr) Space() Space { return Space(a >> 31) }

// Page returns the page number within the image.
func (a Addr) Page() int64 { return int64(a & (1<<31 - 1)) }

// Offset returns the byte offset within the image.
func (a Addr) Offset() int64 { return a.Page() * PageSize }

// String returns for example "memory page 17".
func (a Addr) String() string { return fmt.Sprintf("%s page %d", a.Space(), a.Page()) }

// Hash is a SHA-256 hash: of a page, of a file, or the id of a base or an overlay.
// Its text form is 64 lower-case hexadecimal digits.
type Hash [sha256.Size]byte

// Sum returns the SHA-256 hash of p.
func Sum(p []byte) Hash { return sha256.Sum256(p) }

// String returns the 64 hexadecimal digits.
func (h Hash) String() string { return hex.EncodeToString(h[:]) }

// IsZero reports whether h is unset.
func (h Hash) IsZero() bool { return h == Hash{} }

// MarshalText implements encoding.TextMarshaler.
func (h Hash) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler; it accepts exactly what MarshalText
// writes.
func (h *Hash) UnmarshalText(text []byte) error {
	v, err := ParseHash(string(text))
	if err == nil {
		*h = v
	}
	return err
}

// ParseHash parses 64 lower-case hexadecimal digits.
func ParseHash(s string) (Hash, error) {
	var h Hash
	if len(s) != 2*len(h) {
		return h, fmt.Errorf("hash %.80q: want %d hexadecimal digits, have %d characters", s, 2*len(h), len(s))
	}
	for _, c := range []byte(s) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return h, fmt.Errorf("hash %q: %q is not a lower-case hexadecimal digit", s, c)
		}
	}
	_, err := hex.Decode(h[:], []byte(s))
	return h, err
}

// Progress is told how far a long step has come: its phase ("hash memory"), and done of
// total bytes (total 0: not known yet). It is called from one goroutine at a time and may
// be nil.
type Progress func(phase string, done, total int64)

// Report calls p unless it is nil.
func (p Progress) Report(phase string, done, total int64) {
	if p != nil {
		p(phase, done, total)
	}
}
