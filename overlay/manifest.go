package overlay

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
)

// Limits of an overlay, enforced by writer and reader alike.
const (
	MaxDepth      = 8         // overlays in a chain
	MaxFramePages = 1024      // pages in a frame
	MaxStateSize  = 64 << 20  // bytes of decoded device state
	maxManifest   = 1 << 20   // bytes
	maxMachine    = 64 << 10  // bytes
	maxNesting    = 16        // of the machine configuration: its indent stays within maxManifest
	maxIndex      = 256 << 20 // bytes, decoded
	maxProfile    = 16 << 20  // bytes, decoded

	manifestFormat = "cloudlet-overlay"
	// FormatVersion is the version of the overlay format that is written and read.
	FormatVersion = 1
)

// Errors of opening and using overlays. They arrive wrapped; test with errors.Is.
var (
	// ErrFormat: the bytes are not an overlay of a known version, or are damaged.
	ErrFormat = errors.New("not a valid overlay")
	// ErrParent: an overlay was put on another parent than the one it was made for.
	ErrParent = errors.New("overlay does not fit its parent")
	errShort  = errors.New("too short")
)

// Manifest is the content of manifest.json; doc.go specifies it.
type Manifest struct {
	Format     string          `json:"format"`
	Version    int             `json:"version"`
	ID         Hash            `json:"id"`
	Parent     Hash            `json:"parent"`
	Base       Hash            `json:"base"`
	Depth      int             `json:"depth"`
	MemorySize int64           `json:"memory_size"`
	DiskSize   int64           `json:"disk_size"`
	Machine    json.RawMessage `json:"machine"`
	Strategy   Strategy        `json:"strategy"`
	Members    Members         `json:"members"`
	State      *Hash           `json:"state_sha256,omitempty"`
	Stats      Stats           `json:"stats"`
}

// Members are the sizes and hashes of the members behind the manifest.
type Members struct {
	Index   Member `json:"index"`
	State   Member `json:"state"`
	Profile Member `json:"profile"`
	Frames  struct {
		Size int64 `json:"size"`
	} `json:"frames"`
}

// Member is one stored member: bytes and hash as stored, and the decoded size in bytes.
type Member struct {
	Size    int64 `json:"size"`
	SHA256  Hash  `json:"sha256"`
	Decoded int64 `json:"decoded_size"`
}

// Stats counts what an overlay holds, in pages and bytes.
type Stats struct {
	Memory     PageStats `json:"memory"`
	Disk       PageStats `json:"disk"`
	Frames     int       `json:"frames"`
	FrameBytes int64     `json:"frame_bytes"` // encoded
}

// PageStats counts the pages of one image that differ from the parent's, by class.
type PageStats struct {
	Modified int64 `json:"modified"` // sum of the others
	Zero     int64 `json:"zero"`
	Base     int64 `json:"base"`   // same as a page of the base
	Parent   int64 `json:"parent"` // same as a page of the parent
	Self     int64 `json:"self"`   // same as another page of this overlay
	Stored   int64 `json:"stored"`
}

func (s *Stats) of(sp Space) *PageStats {
	if sp == Disk {
		return &s.Disk
	}
	return &s.Memory
}

// Size returns the size of image s in bytes.
func (m *Manifest) Size(s Space) int64 {
	if s == Disk {
		return m.DiskSize
	}
	return m.MemorySize
}

func (m *Manifest) marshal() ([]byte, error) {
	b, err := json.MarshalIndent(m, "", " ")
	if err != nil {
		return nil, fmt.Errorf("marshal manifest: %w", err)
	}
	return append(b, '\n'), nil
}

// parseManifest accepts exactly what marshal writes, within the limits.
func parseManifest(b []byte) (*Manifest, error) {
	if len(b) > maxManifest {
		return nil, fmt.Errorf("%w: manifest.json has %d bytes, over the limit of %d", ErrFormat, len(b), maxManifest)
	}
	var version struct {
		Format  string `json:"format"`
		Version int    `json:"version"`
	}
	if err := json.Unmarshal(b, &version); err != nil {
		return nil, fmt.Errorf("%w: manifest.json: %w", ErrFormat, err)
	}
	if version.Format != manifestFormat {
		return nil, fmt.Errorf("%w: its format is %.40q, not %q", ErrFormat, version.Format, manifestFormat)
	}
	if version.Version != FormatVersion {
		return nil, fmt.Errorf("%w: it has format version %d, this program reads version %d: use the program that made it, or a newer one",
			ErrFormat, version.Version, FormatVersion)
	}
	m := new(Manifest)
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(m); err != nil {
		return nil, fmt.Errorf("%w: manifest.json: %w", ErrFormat, err)
	}
	if err := m.compactMachine(); err != nil {
		return nil, fmt.Errorf("%w: manifest.json: %w", ErrFormat, err)
	}
	if err := m.validate(); err != nil {
		return nil, fmt.Errorf("%w: manifest.json: %w", ErrFormat, err)
	}
	again, err := m.marshal()
	if err != nil || !bytes.Equal(again, b) {
		return nil, fmt.Errorf("%w: manifest.json is not in its canonical spelling", ErrFormat)
	}
	return m, nil
}

// compactMachine undoes the indent that marshal gives to the machine configuration.
func (m *Manifest) compactMachine() error {
	c, err := compactJSON(m.Machine)
	if err != nil {
		return fmt.Errorf("machine: %w", err)
	}
	m.Machine = c
	return nil
}

// compactJSON returns raw in the one spelling that is hashed and survives a manifest: compact,
// and with the escapes that marshal puts into it.
func compactJSON(raw json.RawMessage) (json.RawMessage, error) {
	var compact, escaped bytes.Buffer
	if err := json.Compact(&compact, raw); err != nil {
		return nil, err
	}
	if n := jsonDepth(compact.Bytes()); n > maxNesting {
		return nil, fmt.Errorf("it nests %d deep, over the limit of %d", n, maxNesting)
	}
	json.HTMLEscape(&escaped, compact.Bytes())
	if escaped.Len() > maxMachine {
		return nil, fmt.Errorf("%d bytes are over the limit of %d", escaped.Len(), maxMachine)
	}
	return escaped.Bytes(), nil
}

// jsonDepth returns how deep arrays and objects nest in valid JSON.
func jsonDepth(b []byte) (deepest int) {
	depth, quoted := 0, false
	for i := 0; i < len(b); i++ {
		switch c := b[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case quoted:
		case c == '[' || c == '{':
			depth++
			deepest = max(deepest, depth)
		case c == ']' || c == '}':
			depth--
		}
	}
	return deepest
}

func checkImageSize(s Space, n int64) error {
	if n <= 0 || n%PageSize != 0 || n > MaxImageSize {
		return fmt.Errorf("%s size %d: want a positive multiple of %d, at most %d", s, n, PageSize, int64(MaxImageSize))
	}
	return nil
}

func (m *Manifest) validate() error {
	for _, s := range Spaces {
		if err := checkImageSize(s, m.Size(s)); err != nil {
			return err
		}
	}
	if m.Depth < 1 || m.Depth > MaxDepth {
		return fmt.Errorf("depth %d is not in 1 to %d", m.Depth, MaxDepth)
	}
	if (m.Depth == 1) != (m.Parent == m.Base) {
		return fmt.Errorf("depth %d does not go with parent %s on base %s", m.Depth, m.Parent, m.Base)
	}
	check := func(name string, d Member, low, high int64) error {
		switch {
		case d.Size == 0 && d.Decoded == 0 && d.SHA256.IsZero() && low == 0:
			return nil
		case d.Decoded < max(low, 1) || d.Decoded > high:
			return fmt.Errorf("member %s: decoded size %d is not in %d to %d", name, d.Decoded, low, high)
		case d.Size < 1 || d.Size > d.Decoded+d.Decoded/128+1024:
			return fmt.Errorf("member %s: size %d does not go with decoded size %d", name, d.Size, d.Decoded)
		}
		return nil
	}
	if m.Members.Frames.Size < 0 || m.Members.Frames.Size > m.MemorySize+m.DiskSize {
		return fmt.Errorf("member frames: size %d is over the size of the images", m.Members.Frames.Size)
	}
	if (m.State == nil) != (m.Members.State.Size == 0) {
		return errors.New("state_sha256 does not go with member state")
	}
	return errors.Join(
		check("index", m.Members.Index, indexHeader, maxIndex),
		check("state", m.Members.State, 0, MaxStateSize),
		check("profile", m.Members.Profile, 0, maxProfile),
	)
}

// newIdentity starts the hash that names an overlay by content; the caller then writes
// every differing page by ascending address with addIdentity.
func (m *Manifest) newIdentity(h hash.Hash) {
	var state Hash
	if m.State != nil {
		state = *m.State
	}
	machine := Sum(m.Machine)
	h.Write([]byte("cloudlet-overlay-1\n"))
	h.Write(m.Parent[:])
	h.Write(machine[:])
	h.Write(state[:])
	b := binary.LittleEndian.AppendUint64(nil, uint64(m.MemorySize))
	h.Write(binary.LittleEndian.AppendUint64(b, uint64(m.DiskSize)))
}

func addIdentity(h hash.Hash, a Addr, page Hash) {
	var b [4 + len(page)]byte
	binary.LittleEndian.PutUint32(b[:], uint32(a))
	copy(b[4:], page[:])
	h.Write(b[:])
}
