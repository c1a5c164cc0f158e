package fusefs

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
)

// mountEntry is a line of /proc/self/mountinfo.
type mountEntry struct {
	major, minor        uint32
	point, kind, source string
}

// bdi is the name of the mount's folder in /sys/class/bdi.
func (m mountEntry) bdi() string { return fmt.Sprintf("%d:%d", m.major, m.minor) }

// connection is the number of a FUSE mount's folder in fusectl: the kernel's own dev_t.
func (m mountEntry) connection() string {
	return strconv.FormatUint(uint64(m.major)<<20|uint64(m.minor), 10)
}

func (m mountEntry) isFUSE() bool {
	return m.kind == "fuse" || m.kind == "fuseblk" || strings.HasPrefix(m.kind, "fuse.")
}

func (m mountEntry) isOurs() bool { return m.kind == "fuse."+fsSubtype }

// findMount returns the topmost mount at the absolute path point without touching it.
func findMount(point string) (m mountEntry, found bool, err error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return m, false, fmt.Errorf("read mount table: %w", err)
	}
	defer f.Close()
	entries, err := parseMountinfo(f)
	if err != nil {
		return m, false, err
	}
	for _, e := range entries {
		if e.point == point {
			m, found = e, true
		}
	}
	return m, found, nil
}

// parseMountinfo reads the format of /proc/PID/mountinfo; see proc(5).
func parseMountinfo(r io.Reader) ([]mountEntry, error) {
	var entries []mountEntry
	s := bufio.NewScanner(r)
	s.Buffer(make([]byte, 0, 64<<10), 1<<20)
	for s.Scan() {
		head, tail, ok := strings.Cut(s.Text(), " - ")
		h, t := strings.Fields(head), strings.Fields(tail)
		if !ok || len(h) < 6 || len(t) < 1 {
			return nil, fmt.Errorf("read mount table: line %.200q is not understood", s.Text())
		}
		var e mountEntry
		if n, err := fmt.Sscanf(h[2], "%d:%d", &e.major, &e.minor); n != 2 {
			return nil, fmt.Errorf("read mount table: device %q: %w", h[2], err)
		}
		e.point, e.kind = unescapeMount(h[4]), t[0]
		if len(t) > 1 {
			e.source = unescapeMount(t[1])
		}
		entries = append(entries, e)
	}
	if err := s.Err(); err != nil {
		return nil, fmt.Errorf("read mount table: %w", err)
	}
	return entries, nil
}

// unescapeMount undoes the kernel's octal escapes of space, tab, newline and backslash.
func unescapeMount(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+4 <= len(s) {
			if v, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(v))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
