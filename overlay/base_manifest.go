package overlay

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// Limits of a base: of its manifest, its machine configuration, and each of state, kernel
// and initrd, in bytes.
const (
	MaxBaseManifest = 1 << 20
	MaxBaseMachine  = 64 << 10
	MaxBasePart     = 4 << 30
)

const (
	baseFormat  = "cloudlet-base"
	baseVersion = 1
)

// The members of a base, each a file of its folder and of its zip.
const (
	BaseManifestFile = "manifest.json"
	BaseStateFile    = "state"
	BaseKernelFile   = "kernel"
	BaseInitrdFile   = "initrd"
)

// BaseManifest describes a base VM. Its encoding is canonical, so the base's id, the
// SHA-256 of the encoded bytes, names everything in the base: they hold the hashes of all
// its parts.
type BaseManifest struct {
	Format  string          `json:"format"`
	Version int             `json:"version"`
	Machine json.RawMessage `json:"machine"` // compact JSON object, keys sorted; opaque here
	Memory  BaseImage       `json:"memory"`
	Disk    BaseImage       `json:"disk"`
	State   *BasePart       `json:"state,omitempty"` // nil: the base cannot be resumed
	Kernel  *BasePart       `json:"kernel,omitempty"`
	Initrd  *BasePart       `json:"initrd,omitempty"`
}

// BaseImage describes one image of a base: its size in bytes, the SHA-256 of its hash list
// (32 bytes a page, in order), and the root over that list which lets a part of the list be
// checked alone: the SHA-256 of the SHA-256 hashes of the list's 16 KiB blocks.
type BaseImage struct {
	Size     int64 `json:"size"`
	HashList Hash  `json:"hash_list"`
	HashRoot Hash  `json:"hash_root"`
}

// BasePart describes one plain file of a base: its size in bytes and its SHA-256.
type BasePart struct {
	Size   int64 `json:"size"`
	SHA256 Hash  `json:"sha256"`
}

// Image returns the description of one of the two images.
func (m BaseManifest) Image(s Space) BaseImage {
	if s == Disk {
		return m.Disk
	}
	return m.Memory
}

// part returns the description of the plain member name, nil if the base has none.
func (m BaseManifest) part(name string) *BasePart {
	switch name {
	case BaseStateFile:
		return m.State
	case BaseKernelFile:
		return m.Kernel
	case BaseInitrdFile:
		return m.Initrd
	}
	return nil
}

// baseParts lists the plain members in zip order.
var baseParts = [...]string{BaseStateFile, BaseKernelFile, BaseInitrdFile}

// baseMember is one file of a base and the size its manifest gives it.
type baseMember struct {
	name string
	size int64
}

// members lists what the manifest says the base holds besides the manifest, in zip order.
func (m BaseManifest) members() []baseMember {
	list := []baseMember{
		{Disk.String(), m.Disk.Size},
		{Memory.String(), m.Memory.Size},
		{baseListName(Disk), baseListSize(m.Disk.Size)},
		{baseListName(Memory), baseListSize(m.Memory.Size)},
	}
	for _, name := range baseParts {
		if part := m.part(name); part != nil {
			list = append(list, baseMember{name, part.Size})
		}
	}
	return list
}

func baseListName(s Space) string { return s.String() + ".sha256" }
func baseSumsName(s Space) string { return s.String() + ".sums" }

func baseListSize(image int64) int64 { return image / PageSize * int64(len(Hash{})) }

// encodeBaseManifest returns the canonical bytes of m: one line of compact JSON.
func encodeBaseManifest(m *BaseManifest) ([]byte, error) {
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(m); err != nil {
		return nil, fmt.Errorf("encode base manifest: %w", err)
	}
	if buf.Len() > MaxBaseManifest {
		return nil, fmt.Errorf("encode base manifest: %d bytes, the limit is %d", buf.Len(), MaxBaseManifest)
	}
	return buf.Bytes(), nil
}

// parseBaseManifest accepts exactly the bytes that encodeBaseManifest writes.
func parseBaseManifest(data []byte) (*BaseManifest, error) {
	if len(data) > MaxBaseManifest {
		return nil, fmt.Errorf("parse base manifest: larger than %d bytes", MaxBaseManifest)
	}
	var head struct {
		Format  string `json:"format"`
		Version int    `json:"version"`
	}
	if err := json.Unmarshal(data, &head); err != nil {
		return nil, fmt.Errorf("parse base manifest: %w", err)
	}
	if head.Format != baseFormat {
		return nil, fmt.Errorf("parse base manifest: format is %.40q, want %q: this is not a base VM", head.Format, baseFormat)
	}
	if head.Version != baseVersion {
		return nil, fmt.Errorf("parse base manifest: version is %d, this program reads version %d: use a program that knows it",
			head.Version, baseVersion)
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	var m BaseManifest
	if err := dec.Decode(&m); err != nil {
		return nil, fmt.Errorf("parse base manifest: %w", err)
	}
	if err := m.check(); err != nil {
		return nil, fmt.Errorf("parse base manifest: %w", err)
	}
	want, err := encodeBaseManifest(&m)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(data, want) {
		return nil, errors.New("parse base manifest: not in canonical form (fields in order, compact, one line, nothing after it): export the base again")
	}
	return &m, nil
}

func (m BaseManifest) check() error {
	for _, s := range Spaces {
		if err := checkBaseImageSize(s.String(), m.Image(s).Size); err != nil {
			return err
		}
	}
	for _, name := range baseParts {
		if part := m.part(name); part != nil && (part.Size <= 0 || part.Size > MaxBasePart) {
			return fmt.Errorf("%s: size %d is not between 1 and %d", name, part.Size, int64(MaxBasePart))
		}
	}
	canonical, err := canonicalMachine(m.Machine)
	if err != nil {
		return err
	}
	if !bytes.Equal(canonical, m.Machine) {
		return errors.New("machine: not in canonical form (compact, keys sorted)")
	}
	return nil
}

func checkBaseImageSize(name string, size int64) error {
	if size <= 0 || size > MaxImageSize || size%PageSize != 0 {
		return fmt.Errorf("%s: size %d is not a multiple of %d between %d and %d", name, size, PageSize, PageSize, int64(MaxImageSize))
	}
	return nil
}

// canonicalMachine returns machine, a JSON object, compact and with sorted keys; an empty
// one is {}.
func canonicalMachine(machine json.RawMessage) (json.RawMessage, error) {
	if len(machine) > MaxBaseMachine {
		return nil, fmt.Errorf("machine: %d bytes, the limit is %d", len(machine), MaxBaseMachine)
	}
	fields := map[string]any{}
	if len(machine) > 0 {
		dec := json.NewDecoder(bytes.NewReader(machine))
		dec.UseNumber()
		if err := dec.Decode(&fields); err != nil {
			return nil, fmt.Errorf("machine: not a JSON object: %w", err)
		}
		if _, err := dec.Token(); err != io.EOF {
			return nil, errors.New("machine: bytes after the JSON object")
		}
		if fields == nil {
			return nil, errors.New("machine: null, want a JSON object")
		}
	}
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(fields); err != nil {
		return nil, fmt.Errorf("machine: %w", err)
	}
	out := bytes.TrimSuffix(buf.Bytes(), []byte("\n"))
	if len(out) > MaxBaseMachine {
		return nil, fmt.Errorf("machine: %d bytes, the limit is %d", len(out), MaxBaseMachine)
	}
	return out, nil
}
