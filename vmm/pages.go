package vmm

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// pageSize is the unit of memory and disk residue in bytes.
const pageSize = 4096

// memoryRegions finds where a process maps the memory file, which must be mapped once and
// wholly, in one or more regions.
func memoryRegions(pid int, info vmInfo) ([]region, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, fmt.Errorf("read memory map of QEMU: %w", err)
	}
	defer f.Close()
	rs, err := parseMaps(f, info)
	if err != nil {
		return nil, fmt.Errorf("read memory map of QEMU: %w", err)
	}
	var next int64
	for _, r := range rs {
		if r.off != next {
			return nil, fmt.Errorf("read memory map of QEMU: %s is not mapped at byte %d", info.Memory, next)
		}
		next += int64(r.end - r.start)
	}
	if next != info.Machine.Memory {
		return nil, fmt.Errorf("read memory map of QEMU: %d bytes of %s are mapped, want %d", next, info.Memory, info.Machine.Memory)
	}
	return rs, nil
}

// mapping returns the fields of a line of /proc/PID/maps if it maps the memory file. Some file
// systems show another device there than stat does; then the path decides.
func mapping(line string, info vmInfo) ([]string, bool) {
	f := strings.SplitN(line, " ", 6)
	if len(f) < 6 {
		return nil, false
	}
	same := f[4] == strconv.FormatUint(info.Inode, 10) &&
		f[3] == fmt.Sprintf("%02x:%02x", unix.Major(info.Dev), unix.Minor(info.Dev))
	return f, same || strings.TrimLeft(f[5], " ") == strings.ReplaceAll(info.Memory, "\n", `\012`)
}

// parseMaps picks the regions of the memory file out of /proc/PID/maps.
func parseMaps(r io.Reader, info vmInfo) ([]region, error) {
	var out []region
	in := bufio.NewScanner(r)
	for in.Scan() {
		f, is := mapping(in.Text(), info)
		if !is {
			continue
		}
		from, to, ok := strings.Cut(f[0], "-")
		start, err1 := strconv.ParseUint(from, 16, 64)
		end, err2 := strconv.ParseUint(to, 16, 64)
		off, err3 := strconv.ParseInt(f[2], 16, 64)
		if err := errors.Join(err1, err2, err3); err != nil || !ok || end < start {
			return nil, fmt.Errorf("parse %.120q: %w", in.Text(), err)
		}
		if !strings.HasSuffix(f[1], "p") {
			return nil, fmt.Errorf("%s is mapped shared: its changes are not private", info.Memory)
		}
		out = append(out, region{start: start, end: end, off: off})
	}
	return out, in.Err()
}

// changedSpans returns the pages that the process has changed, in order. They are anonymous:
// private copies, present or swapped out.
func changedSpans(pid int, rs []region) ([]span, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", pid))
	if err != nil {
		return nil, fmt.Errorf("find changed pages: %w", err)
	}
	defer f.Close()
	var out []span
	for _, r := range rs {
		out, err = scanRegion(f, r, out)
		if errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EINVAL) { // a kernel before 6.7
			out, err = readRegion(f, r, out)
		}
		if err != nil {
			return nil, fmt.Errorf("find changed pages: %w", err)
		}
	}
	return out, nil
}

// The PAGEMAP_SCAN request, from linux/fs.h of kernel 6.7.
const (
	pagemapScan  = 0xc0606610
	pageFile     = 1 << 2
	pagePresent  = 1 << 3
	pageSwapped  = 1 << 4
	scanRegions  = 4096
	pagemapBatch = 64 << 10 // entries of 8 bytes read at once
)

type pmScanArg struct {
	size, flags, start, end, walkEnd, vec, vecLen, maxPages         uint64
	categoryInverted, categoryMask, categoryAnyofMask, returnedMask uint64
}

type pageRegion struct{ start, end, categories uint64 }

// scanRegion appends the changed pages of a region by the PAGEMAP_SCAN request. An error of
// its first call leaves out as it was.
func scanRegion(pagemap *os.File, r region, out []span) ([]span, error) {
	vec := make([]pageRegion, scanRegions)
	for start := r.start; start < r.end; {
		arg := pmScanArg{
			size: uint64(unsafe.Sizeof(pmScanArg{})), start: start, end: r.end,
			vec: uint64(uintptr(unsafe.Pointer(&vec[0]))), vecLen: scanRegions,
			categoryInverted: pageFile, categoryMask: pageFile,
			categoryAnyofMask: pagePresent | pageSwapped, returnedMask: pagePresent | pageSwapped,
		}
		n, _, errno := unix.Syscall(unix.SYS_IOCTL, pagemap.Fd(), pagemapScan, uintptr(unsafe.Pointer(&arg)))
		if errno != 0 {
			return out, fmt.Errorf("scan page map: %w", errno)
		}
		if n > scanRegions || arg.walkEnd <= start || arg.walkEnd > r.end {
			return out, errors.New("scan page map: the kernel's answer is out of range")
		}
		for _, p := range vec[:n] {
			out = join(out, r.span(p.start, p.end))
		}
		// Where the kernel's own buffer of 512 regions was full on the way, walkEnd stays there
		// although the walk went on behind it.
		start = arg.walkEnd
		if n > 0 {
			start = max(start, vec[n-1].end)
		}
	}
	return out, nil
}

// Bits of an entry of the page map.
const (
	entrySoftDirty = 1 << 55
	entryFile      = 1 << 61 // a page of a file, or shared
	entrySwapped   = 1 << 62
	entryPresent   = 1 << 63
)

// readRegion appends the changed pages of a region by reading the page map.
func readRegion(pagemap *os.File, r region, out []span) ([]span, error) {
	return readSpan(pagemap, r.span(r.start, r.end), out, func(e uint64) bool {
		return e&(entryPresent|entrySwapped) != 0 && e&entryFile == 0
	})
}

// readSpan appends the pages of a span whose entries in the page map are wanted.
func readSpan(pagemap *os.File, s span, out []span, want func(entry uint64) bool) ([]span, error) {
	buf := make([]byte, 8*min(s.n/pageSize, pagemapBatch))
	for s.n > 0 {
		part := span{off: s.off, n: min(s.n, pagemapBatch*pageSize), addr: s.addr}
		p := buf[:8*(part.n/pageSize)]
		if _, err := pagemap.ReadAt(p, int64(part.addr/pageSize*8)); err != nil {
			return out, fmt.Errorf("read page map: %w", err)
		}
		for i := int64(0); i < part.n; i += pageSize {
			if want(binary.NativeEndian.Uint64(p[8*(i/pageSize):])) {
				out = join(out, span{off: part.off + i, n: pageSize, addr: part.addr + uint64(i)})
			}
		}
		s = s.from(part.n)
	}
	return out, nil
}
