package vmm

// region is a range of a process's addresses that maps part of the memory file.
type region struct {
	start, end uint64
	off        int64 // in the file
}

// span is a range of bytes of the memory image and where the process holds it. Lists of
// spans are in order of off and do not overlap.
type span struct {
	off, n int64
	addr   uint64
}

// span returns the part of a region between two addresses.
func (r region) span(start, end uint64) span {
	return span{off: r.off + int64(start-r.start), n: int64(end - start), addr: start}
}

// from returns the span without its first n bytes.
func (s span) from(n int64) span {
	return span{off: s.off + n, n: s.n - n, addr: s.addr + uint64(n)}
}

// join appends a span that does not begin before the last one; it becomes part of that if it
// overlaps or follows it.
func join(out []span, s span) []span {
	if len(out) > 0 {
		last := &out[len(out)-1]
		if s.off <= last.off+last.n && s.addr-last.addr == uint64(s.off-last.off) {
			last.n = max(last.n, s.off+s.n-last.off)
			return out
		}
	}
	return append(out, s)
}

// union returns what is in one of two lists.
func union(a, b []span) []span {
	out := make([]span, 0, max(len(a), len(b)))
	for len(a)+len(b) > 0 {
		if len(a) == 0 || len(b) > 0 && b[0].off < a[0].off {
			a, b = b, a
		}
		out, a = join(out, a[0]), a[1:]
	}
	return out
}

// without returns what is in a and not in b.
func without(a, b []span) []span {
	var out []span
	for _, s := range a {
		for s.n > 0 {
			for len(b) > 0 && b[0].off+b[0].n <= s.off {
				b = b[1:]
			}
			if len(b) == 0 || b[0].off >= s.off+s.n {
				out = append(out, s)
				break
			}
			if n := b[0].off - s.off; n > 0 {
				out = append(out, span{off: s.off, n: n, addr: s.addr})
			}
			s = s.from(min(s.n, b[0].off+b[0].n-s.off))
		}
	}
	return out
}
