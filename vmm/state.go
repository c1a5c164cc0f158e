package vmm

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
)

// The device state is a stream of QEMU's migration format. Numbers are big-endian.
//
//	magic "QEVM", u32 version 3
//	0x07 configuration: u32 n, n bytes machine name, subsections
//	0x01 start of a section: u32 id, u8 n, n bytes name, u32 instance, u32 version, data
//	0x02 part, 0x03 end of a section: u32 id, data
//	0x7e footer after each: u32 id
//	0x04 full section, as 0x01: the first of these begins the devices
//
// The only sections before the devices are those of "ram". Its data are entries
// of u64 address|flags; see ramEntry.
const (
	streamMagic   = "QEVM"
	streamVersion = 3
	streamHeader  = 8

	typeStart         = 0x01
	typePart          = 0x02
	typeEnd           = 0x03
	typeFull          = 0x04
	typeSubsection    = 0x05
	typeConfiguration = 0x07
	typeFooter        = 0x7e

	ramZero     = 0x02
	ramMemSize  = 0x04
	ramPage     = 0x08
	ramEnd      = 0x10
	ramContinue = 0x20
	ramFlags    = 0xfff

	capIgnoreShared = "x-ignore-shared"
	maxBlocks       = 1 << 12
	maxCapabilities = 256
	maxName         = 255
)

// errState means that a device state is damaged or of a kind that is not known.
var errState = errors.New("not a device state this program knows")

// statePrefix returns the length of the part of a device state in a file that comes before
// the devices: configuration and the RAM of the firmware.
func statePrefix(path string) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, fmt.Errorf("open device state: %w", err)
	}
	defer f.Close()
	n, err := parsePrefix(f)
	if err != nil {
		return 0, fmt.Errorf("read device state %s: %w: capture it again", path, err)
	}
	return n, nil
}

// parsePrefix reads a stream up to its first device and returns that one's offset. The
// error wraps errState, or is one of r.
func parsePrefix(r io.Reader) (int64, error) {
	s := newStream(r)
	n := s.prefix()
	return n, s.err
}

func newStream(r io.Reader) *stream { return &stream{in: bufio.NewReaderSize(r, 64<<10)} }

// prefix reads up to the first device and returns its offset, 0 after an error.
func (s *stream) prefix() int64 {
	if magic := s.bytes(4); string(magic) != streamMagic {
		s.fail("magic %q, want %q", magic, streamMagic)
	}
	if v := s.u32(); v != streamVersion {
		s.fail("version %d, want %d", v, streamVersion)
	}
	for s.err == nil {
		switch typ := s.peek(); typ {
		case typeFull:
			return s.off
		case typeConfiguration:
			s.skip(1)
			s.configuration()
		case typeStart, typePart, typeEnd:
			s.skip(1)
			s.section(typ)
		default:
			s.fail("section type %#x", typ)
		}
	}
	return 0
}

// stream reads numbers and keeps the first error.
type stream struct {
	in  *bufio.Reader
	off int64
	err error

	ignoreShared bool
	capable      []string // names of the capabilities the state asks for
	cuts         []cut    // what a state for libvirt lacks
	ram          uint32   // id of the section of RAM
	started      bool
}

func (s *stream) fail(format string, args ...any) {
	if s.err == nil {
		s.err = fmt.Errorf("%w: at byte %d: "+format, append([]any{errState, s.off}, args...)...)
	}
}

func (s *stream) failRead(err error) {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		s.fail("it ends too early")
	} else if s.err == nil {
		s.err = err
	}
}

// bytes reads n <= 255 bytes; after an error, zeros.
func (s *stream) bytes(n int) []byte {
	p := make([]byte, n)
	if s.err != nil {
		return p
	}
	m, err := io.ReadFull(s.in, p)
	s.off += int64(m)
	if err != nil {
		s.failRead(err)
		clear(p)
	}
	return p
}

func (s *stream) skip(n int) {
	if s.err != nil {
		return
	}
	m, err := s.in.Discard(n)
	s.off += int64(m)
	if err != nil {
		s.failRead(err)
	}
}

func (s *stream) peek() byte {
	if s.err != nil {
		return 0
	}
	p, err := s.in.Peek(1)
	if err != nil {
		s.failRead(err)
		return 0
	}
	return p[0]
}

func (s *stream) u8() int      { return int(s.bytes(1)[0]) }
func (s *stream) u32() uint32  { return binary.BigEndian.Uint32(s.bytes(4)) }
func (s *stream) u64() uint64  { return binary.BigEndian.Uint64(s.bytes(8)) }
func (s *stream) name() string { return string(s.bytes(s.u8())) }

// configuration reads the machine's name and the subsections known to exist.
func (s *stream) configuration() {
	n := s.u32()
	if n > maxName {
		s.fail("machine name of %d bytes", n)
		return
	}
	s.skip(int(n))
	for s.err == nil && s.peek() == typeSubsection {
		start := s.off
		s.skip(1)
		name := s.name()
		s.skip(4) // version
		switch name {
		case "configuration/target-page-bits":
			s.skip(4)
		case "configuration/capabilities":
			s.capabilities()
			s.cuts = append(s.cuts, cut{start, s.off})
		default:
			s.fail("configuration subsection %q", name)
		}
	}
}

func (s *stream) capabilities() {
	n := s.u32()
	if n > maxCapabilities {
		s.fail("%d capabilities", n)
		return
	}
	for range n {
		name := s.name()
		s.capable = append(s.capable, name)
		s.ignoreShared = s.ignoreShared || name == capIgnoreShared
	}
}

// section reads one section of RAM, without its type.
func (s *stream) section(typ byte) {
	id := s.u32()
	if typ == typeStart {
		if name := s.name(); s.err == nil && name != "ram" {
			s.fail("section %q before the devices", name)
		}
		s.skip(4 + 4)
		s.ram, s.started = id, true
	}
	if s.err == nil && (!s.started || id != s.ram) {
		s.fail("part of section %d, which was not started", id)
	}
	for s.err == nil && !s.ramEntry() {
	}
	if s.peek() == typeFooter {
		s.skip(1)
		if f := s.u32(); s.err == nil && f != id {
			s.fail("footer of section %d in section %d", f, id)
		}
	}
}

// ramEntry reads one entry of RAM and reports whether it was the last of its section.
func (s *stream) ramEntry() (last bool) {
	v := s.u64()
	if s.err != nil {
		return true
	}
	switch flags := v & ramFlags; flags {
	case ramEnd:
		return true
	case ramMemSize:
		s.blockList(v &^ ramFlags)
	case ramZero, ramZero | ramContinue, ramPage, ramPage | ramContinue:
		if flags&ramContinue == 0 {
			s.skip(s.u8()) // name of the block
		}
		if flags&ramPage != 0 {
			s.skip(pageSize)
		} else {
			s.skip(1)
		}
	default:
		s.fail("RAM entry with flags %#x", flags)
	}
	return false
}

// blockList reads names and sizes of RAM blocks until their sizes sum up to total.
func (s *stream) blockList(total uint64) {
	for n := 0; s.err == nil && total > 0; n++ {
		s.skip(s.u8())
		size := s.u64()
		if s.ignoreShared {
			s.cuts = append(s.cuts, cut{s.off, s.off + 8})
			s.skip(8) // the block's guest address
		}
		if s.err == nil && (size == 0 || size > total || n == maxBlocks) {
			s.fail("RAM block of %d bytes where %d are left", size, total)
		}
		total -= min(size, total)
	}
}

// splice writes an ordinary device state: the beginning of the state that a VM was resumed
// from, then the devices as xen-save-devices-state wrote them.
func splice(w io.Writer, resumed io.Reader, prefix int64, xen io.Reader) error {
	if _, err := io.CopyN(w, resumed, prefix); err != nil {
		return fmt.Errorf("copy firmware state: %w", err)
	}
	var head [streamHeader + 1]byte
	if _, err := io.ReadFull(xen, head[:]); err != nil {
		return fmt.Errorf("read saved devices: %w", err)
	}
	if string(head[:4]) != streamMagic || binary.BigEndian.Uint32(head[4:]) != streamVersion || head[8] != typeFull {
		return fmt.Errorf("read saved devices: %w: it begins with %x", errState, head)
	}
	if _, err := w.Write(head[streamHeader:]); err != nil {
		return err
	}
	n, err := io.Copy(w, io.LimitReader(xen, maxState))
	if err == nil && n == maxState {
		err = fmt.Errorf("read saved devices: %w: more than %d bytes", errState, int64(maxState))
	}
	return err
}

// spliceFiles writes a captured state to a file: see splice.
func spliceFiles(to, resumed, xen string) error {
	prefix, err := statePrefix(resumed)
	if err != nil {
		return err
	}
	head, err := os.Open(resumed)
	if err != nil {
		return fmt.Errorf("open device state: %w", err)
	}
	defer head.Close()
	devices, err := os.Open(xen)
	if err != nil {
		return fmt.Errorf("open saved devices: %w", err)
	}
	defer devices.Close()
	return writeFile(to, func(f *os.File) error { return splice(f, head, prefix, devices) })
}
